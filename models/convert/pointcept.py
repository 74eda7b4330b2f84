"""Published weights of Pointcept's serialized transformers to and from the backbones of this package.

PTv3, Sonata and Utonia, and every other backbone whose modules carry the published names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pc3d.models.convert.kernels import KernelLayout, detect_layout, write_kernel
from pc3d.models.convert.state_dict import convert_state_dict
from pc3d.nn import Backbone
from pc3d.sparse import SparseConvolution

_HEAD = "seg_head."
_MASK_TOKEN = "backbone.embedding.mask_token"


def import_pointcept(
    checkpoint: Mapping[str, Any],
    backbone: Backbone,
    head: nn.Linear | None = None,
    layout: KernelLayout | None = None,
) -> KernelLayout:
    """Load a published state into a backbone and its linear head.

    Args:
        checkpoint: the state, or a mapping with the state under ``"state_dict"``. Of a segmentation file (keys with
            ``backbone.`` and ``seg_head.``) all is used, of a pre-training file the student. Keys may begin with
            ``module.``; release files have no prefix at all. The token of masked points is left out if the backbone
            has none.
        backbone: network of the checkpoint's settings.
        head: gets the published ``seg_head``; without a head only the backbone is read.
        layout: how the kernels are stored; None detects it from their shapes.

    Returns:
        The layout of the kernels.

    Raises:
        InputError: if names are missing or left over, or shapes differ; lists them, and nothing has been loaded then.
            Also if the shapes fit several layouts.
    """
    stored = _select(checkpoint, with_head=head is not None)
    network = _network(backbone, head)
    if _MASK_TOKEN not in network.state_dict():
        stored.pop(_MASK_TOKEN, None)  # pre-training alone has masks
    if layout is None:
        convs = {name: conv for name, conv in _convs(network).items() if name in stored}
        layout = detect_layout(stored, convs)
    network.load_state_dict(convert_state_dict(stored, network, layout))
    return layout


def export_pointcept(
    backbone: Backbone, head: nn.Linear | None = None, layout: KernelLayout = KernelLayout.KRSC
) -> dict[str, Tensor]:
    """The published state of a backbone and its linear head: the exact inverse of :func:`import_pointcept`."""
    network = _network(backbone, head)
    convs = _convs(network)
    return {
        name: (write_kernel(value, convs[name], layout) if name in convs else value).contiguous().clone()
        for name, value in network.state_dict().items()
    }


def _network(backbone: Backbone, head: nn.Linear | None) -> nn.ModuleDict:
    """Backbone and head under their published names; shares their memory."""
    parts: dict[str, nn.Module] = {"backbone": backbone}
    return nn.ModuleDict(parts if head is None else {**parts, "seg_head": head})


def _convs(network: nn.Module) -> dict[str, SparseConvolution]:
    return {f"{name}.weight": conv for name, conv in network.named_modules() if isinstance(conv, SparseConvolution)}


def _select(checkpoint: Mapping[str, Any], with_head: bool) -> dict[str, Tensor]:
    """The entries of the backbone, and of the head if wanted, under the names of a segmentation file."""
    state = checkpoint.get("state_dict", checkpoint)
    stored = {name.removeprefix("module."): value for name, value in state.items()}
    student = "student.backbone."
    if any(name.startswith(student) for name in stored):
        stored = {name.removeprefix("student."): v for name, v in stored.items() if name.startswith(student)}
    if not any(name.startswith("backbone.") for name in stored):
        stored = {name if name.startswith(_HEAD) else f"backbone.{name}": value for name, value in stored.items()}
    if not with_head:
        stored = {name: value for name, value in stored.items() if name.startswith("backbone.")}
    return stored
