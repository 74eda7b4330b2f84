"""Published SparseUNet weights (Pointcept ``SpUNet-v1m1``, spconv) to and from :class:`~pc3d.models.SparseUNet`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.models.backbones.sparse_unet import SparseUNet
from pc3d.models.convert.kernels import KernelLayout, detect_layout, read_kernel, stored_shape, write_kernel
from pc3d.models.convert.state_dict import misfits
from pc3d.sparse import SparseConvolution, SubMConv3d


def import_sparse_unet(
    checkpoint: Mapping[str, Any],
    backbone: SparseUNet,
    head: nn.Linear | None = None,
    layout: KernelLayout | None = None,
) -> KernelLayout:
    """Load a published state into a backbone and its linear head.

    Args:
        checkpoint: the state, or a mapping with the state under ``"state_dict"``; keys may begin with ``module.`` and
            ``backbone.``.
        backbone: network of the checkpoint's widths and depths.
        head: gets the published last layer ``final``; without a head that layer is left out.
        layout: how the kernels are stored; None detects it from their shapes.

    Returns:
        The layout of the kernels.

    Raises:
        InputError: if keys are missing or left over, or shapes differ; lists them, and nothing has been loaded then.
            Also if the shapes fit several layouts.
    """
    stored = _plain_names(checkpoint)
    if head is None:
        stored = {name: value for name, value in stored.items() if not name.startswith("final.")}
    own, convs = _own_state(backbone, head)
    convs = {name: conv for name, conv in convs.items() if name in stored}
    layout = layout or detect_layout(stored, convs)
    shapes: dict[str, tuple[int, ...]] = {name: tuple(value.shape) for name, value in own.items()}
    shapes |= {name: stored_shape(conv, layout) for name, conv in convs.items()}
    if problems := misfits(shapes, stored):
        raise InputError(
            f"checkpoint: does not fit this SparseUNet: {'; '.join(problems)}; "
            "in_channels, channels, layers and the number of classes must be those of the checkpoint"
        )
    with torch.no_grad():
        for name, target in own.items():
            value = stored[name]
            target.copy_(read_kernel(value, convs[name], layout).reshape(target.shape) if name in convs else value)
    return layout


def export_sparse_unet(
    backbone: SparseUNet,
    head: nn.Linear | None = None,
    layout: KernelLayout = KernelLayout.KRSC,
    prefix: str = "backbone.",
) -> dict[str, Tensor]:
    """The published state of a backbone and its linear head: the exact inverse of :func:`import_sparse_unet`."""
    own, convs = _own_state(backbone, head)
    return {
        prefix + name: (write_kernel(value, convs[name], layout) if name in convs else value).contiguous().clone()
        for name, value in own.items()
    }


def _plain_names(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    state = checkpoint.get("state_dict", checkpoint)
    return {name.removeprefix("module.").removeprefix("backbone."): value for name, value in state.items()}


def _own_state(backbone: SparseUNet, head: nn.Linear | None) -> tuple[dict[str, Tensor], dict[str, SparseConvolution]]:
    """Parameters and buffers by published name, sharing the module's memory; layers whose kernel has a layout."""
    own = dict(backbone.state_dict())
    convs = {f"{name}.weight": m for name, m in backbone.named_modules() if isinstance(m, SparseConvolution)}
    if head is not None:
        # The published last layer is a 1^3 convolution: M (Cin, Cout) is the transposed weight of a linear layer.
        own["final.weight"] = head.weight.detach().T
        with torch.device("meta"):
            convs["final.weight"] = SubMConv3d(head.in_features, head.out_features, 1)
        if head.bias is not None:
            own["final.bias"] = head.bias.detach()
    return own, convs
