"""The dataflows that exist on a device, and how a table's choice becomes an argument of the convolution."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import torch
from torch import Tensor

from pc3d.ops.backend import on_cpu_kernels, on_triton
from pc3d.ops.conv import Epilogue, Flows, sparse_conv
from pc3d.ops.flows import Window
from pc3d.ops.kernel_map import KernelMap
from pc3d.sparse.dataflow import Pass
from pc3d.sparse.table import Choice, choose

_SORTING: tuple[tuple[Window, int], ...] = (("all", 1), (None, 1), (1024, 1), ("all", 2), ("all", 3))
_TILES = {
    "cpu": tuple(Choice("os", rows) for rows in (512, 128, 2048)),
    "cuda": (
        *(Choice("os", rows, *sorting) for rows, sorting in product((64, 32, 128), _SORTING)),
        Choice("fod"),
    ),
}
_PAIRWISE = Choice("ws")
# For each device the flows of each pass, the usual one first.
REAL_FLOWS: Mapping[str, Mapping[Pass, tuple[Choice, ...]]] = {
    device: {
        Pass.FORWARD: (*tiles, _PAIRWISE),
        Pass.INPUT_GRAD: (*tiles, _PAIRWISE),
        Pass.WEIGHT_GRAD: (Choice("fod"), _PAIRWISE),
    }
    for device, tiles in _TILES.items()
}


def flows_of(choices: Mapping[Pass, Choice]) -> Flows:
    """The flows chosen; a pass without a choice keeps the default of the kernels."""
    names = {Pass.FORWARD: "forward", Pass.INPUT_GRAD: "input_grad", Pass.WEIGHT_GRAD: "weight_grad"}
    return Flows(**{names[op]: choice.name for op, choice in choices.items()})


def planned_conv(
    feat: Tensor, weight: Tensor, kernel_map: KernelMap, bias: Tensor | None, epilogue: Epilogue | None = None
) -> Tensor:
    """:func:`pc3d.ops.conv.sparse_conv` by the flows that the dataflow table, or the user, chose for the layer.

    Only the C++ and the Triton kernels have flows to choose from; under ``torch.compile`` they keep their defaults.
    """
    flows = None
    if not torch.compiler.is_compiling() and (device := _device_of_kernels(feat)):
        flows = flows_of(choose(kernel_map, weight.shape[1], weight.shape[2], feat.dtype, device))
    return sparse_conv(feat, weight, kernel_map, bias, flows, epilogue)


def _device_of_kernels(feat: Tensor) -> str | None:
    if on_triton(feat):
        return "cuda"
    return "cpu" if on_cpu_kernels(feat) else None
