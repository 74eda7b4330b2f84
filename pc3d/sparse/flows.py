"""The dataflows that exist on a device, and how a table's choice becomes an argument of the convolution."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pc3d.ops.backend import on_cpu_kernels
from pc3d.ops.conv import Epilogue, Flows, sparse_conv
from pc3d.ops.kernel_map import KernelMap
from pc3d.sparse.dataflow import Pass
from pc3d.sparse.table import Choice, choose

_TILES = tuple(Choice("os", rows) for rows in (128, 512, 2048))
_PAIRWISE = Choice("ws")
REAL_FLOWS: Mapping[Pass, tuple[Choice, ...]] = {
    Pass.FORWARD: (*_TILES, _PAIRWISE),
    Pass.INPUT_GRAD: (*_TILES, _PAIRWISE),
    Pass.WEIGHT_GRAD: (Choice("fod"), _PAIRWISE),
}


def flows_of(choices: Mapping[Pass, Choice]) -> Flows:
    """The flows chosen; a pass without a choice keeps the default of the kernels."""
    names = {Pass.FORWARD: "forward", Pass.INPUT_GRAD: "input_grad", Pass.WEIGHT_GRAD: "weight_grad"}
    return Flows(**{names[op]: choice.name for op, choice in choices.items()})


def planned_conv(
    feat: Tensor, weight: Tensor, kernel_map: KernelMap, bias: Tensor | None, epilogue: Epilogue | None = None
) -> Tensor:
    """:func:`pc3d.ops.conv.sparse_conv` by the flows that the dataflow table, or the user, chose for the layer.

    Only the CPU kernels have flows to choose from; under ``torch.compile`` they keep their defaults.
    """
    flows = None
    if not torch.compiler.is_compiling() and on_cpu_kernels(feat):
        flows = flows_of(choose(kernel_map, weight.shape[1], weight.shape[2], feat.dtype, "cpu"))
    return sparse_conv(feat, weight, kernel_map, bias, flows, epilogue)
