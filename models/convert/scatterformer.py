"""Published ScatterFormer weights for :class:`~pc3d.models.ScatterFormer`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.models.backbones.scatterformer import ScatterFormer
from pc3d.models.convert.kernels import KernelLayout
from pc3d.models.convert.state_dict import convert_state_dict


def import_scatterformer(checkpoint: Mapping[str, Any], network: ScatterFormer, neck: nn.Module | None = None) -> None:
    """Load a published state.

    Args:
        checkpoint: the state, or a mapping with the state under ``"state_dict"`` or ``"model_state"``. A whole detector
            has keys with ``vfe.``, ``backbone_3d.``, ``backbone_2d.`` and ``dense_head.``; keys without these are
            those of ``backbone_3d.`` alone, and the voxel encoder stays as it is.
        network: of the checkpoint's widths, window and grid.
        neck: :class:`~pc3d.models.necks.CascadeDED` for ``backbone_2d.``; None leaves it out.

    Raises:
        InputError: if names are missing or left over, or shapes differ; lists them, and nothing has been loaded then.
    """
    state = checkpoint.get("model_state", checkpoint.get("state_dict", checkpoint))
    state = {name.removeprefix("module."): depthwise_kernel(name, value) for name, value in state.items()}
    parts = {name: module for name, module in network.named_children() if name != "vfe"}
    rename = [(r"^(vfe|backbone_2d|dense_head)\..*|^global_step$", "")]
    if any(name.startswith("backbone_3d.") for name in state):
        parts["vfe"] = network.vfe
        rename = [(r"^backbone_3d\.", ""), (r"^dense_head\..*|^global_step$", ""), (r"^backbone_2d\.", "neck.")]
        if neck is None:
            rename.append((r"^neck\..*", ""))
        else:
            parts["neck"] = neck
    pair = nn.ModuleDict(parts)
    try:
        pair.load_state_dict(convert_state_dict(state, pair, KernelLayout.KRSC, rename, columns="zyx"))
    except InputError as error:
        raise InputError(str(error).replace("ModuleDict", type(network).__name__)) from None


def depthwise_kernel(name: str, value: Tensor) -> Tensor:
    """``(K, C)`` from the stored ``(kz, ky, kx, C)`` if the name is that of a depth-wise kernel, else as it is."""
    if not re.search(r"\.conv_[khw]\.weight$", name):
        return value
    return value.permute(2, 1, 0, 3).flatten(0, 2)
