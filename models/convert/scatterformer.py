"""Published ScatterFormer weights for :class:`~pc3d.models.ScatterFormer`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pc3d.models.backbones.scatterformer import ScatterFormer
from pc3d.models.convert.kernels import KernelLayout
from pc3d.models.convert.openpcdet import import_openpcdet
from pc3d.models.convert.state_dict import convert_state_dict
from pc3d.tasks.heads import DetectionHead

_NAMES = (
    (r"^dense_head\.", "head."),
    (r"^vfe\.", "backbone.vfe."),
    (r"^backbone_3d\.", "backbone.encoder."),
    (r"^backbone_2d\.", "backbone.neck."),
    (r"^global_step$", ""),
)


def import_scatterformer(
    checkpoint: Mapping[str, Any], network: ScatterFormer, head: DetectionHead | None = None
) -> None:
    """Load a published state.

    Args:
        checkpoint: the state, or a mapping with the state under ``"model_state"`` or ``"state_dict"``: of a whole
            detector (keys with ``vfe.``, ``backbone_3d.``, ``backbone_2d.`` and ``dense_head.``), or of its voxel
            backbone alone, with or without ``backbone_3d.``; voxel encoder and neck then stay as they are.
        network: of the checkpoint's widths, window and grid.
        head: gets ``dense_head.`` of a whole detector; None leaves it out.

    Raises:
        InputError: if names are missing or left over, or shapes differ; lists them, and nothing has been loaded then.
    """
    state = checkpoint.get("model_state", checkpoint.get("state_dict", checkpoint))
    state = {name.removeprefix("module."): depthwise_kernel(name, value) for name, value in state.items()}
    if any(name.startswith("vfe.") for name in state):
        import_openpcdet(state, network, head, KernelLayout.KRSC, _NAMES)
        return
    names = [(r"^backbone_3d\.", "")]
    network.encoder.load_state_dict(convert_state_dict(state, network.encoder, KernelLayout.KRSC, names, "zyx"))


def depthwise_kernel(name: str, value: Tensor) -> Tensor:
    """``(K, C)`` from the stored ``(kz, ky, kx, C)`` if the name is that of a depth-wise kernel, else as it is."""
    if not re.search(r"\.conv_[khw]\.weight$", name):
        return value
    return value.permute(2, 1, 0, 3).flatten(0, 2)
