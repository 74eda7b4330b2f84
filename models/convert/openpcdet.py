"""Published weights of OpenPCDet and its forks for detectors of this package."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pc3d.models.convert.kernels import KernelLayout, detect_layout
from pc3d.models.convert.state_dict import convert_state_dict, joined, renamed
from pc3d.nn.bev import BevBackbone
from pc3d.sparse import SparseConvolution
from pc3d.tasks.heads import DetectionHead, RefinementHead

_NAMES = (
    (r"^dense_head\.", "head."),
    (r"^vfe\.pfn_layers\.0\.", "backbone.vfe."),
    (r"^backbone_3d\.", "backbone.encoder."),
    (r"^backbone_2d\.", "backbone.neck."),
    (r"^global_step$", ""),
    (r"^roi_head\.", "refine."),
    (r"^refine\.roi_grid_pool_layers\.(\d+)\.mlps_in\.0\.", r"refine.pools.\1.enter."),
    (r"^refine\.roi_grid_pool_layers\.(\d+)\.mlps_pos\.0\.", r"refine.pools.\1.way."),
    (r"^refine\.roi_grid_pool_layers\.(\d+)\.mlps_out\.0\.", r"refine.pools.\1.leave."),
    (r"^refine\.shared_fc_layer\.", "refine.shared."),
    (r"^refine\.cls_fc_layers\.", "refine.class_layers."),
    (r"^refine\.reg_fc_layers\.", "refine.box_layers."),
    (r"^refine\.cls_pred_layer\.", "refine.class_out."),
    (r"^refine\.reg_pred_layer\.", "refine.box_out."),
)
_POINTWISE = re.compile(r"^(?:module\.)?roi_head\..+\.mlps_(in|pos|out)\.0\.\d\.weight$")


def import_openpcdet(
    checkpoint: Mapping[str, Any],
    backbone: BevBackbone,
    head: DetectionHead | None = None,
    layout: KernelLayout | None = None,
    rename: Sequence[tuple[str, str]] = _NAMES,
    refine: RefinementHead | None = None,
) -> KernelLayout | None:
    """Load a published state into a backbone and its head.

    Args:
        checkpoint: the state, or a mapping with the state under ``"model_state"`` or ``"state_dict"``.
        backbone: :class:`~pc3d.models.SECOND`, :class:`~pc3d.models.PointPillars` or
            :class:`~pc3d.models.E3DSNNDetector` of the checkpoint's settings.
        head: has been built, with the checkpoint's classes in their order; None leaves the published head out.
        layout: how sparse kernels are stored; None detects it (spconv 1 or 2).
        rename: from published names to names behind ``backbone.``, ``head.`` and ``refine.``, see
            :func:`convert_state_dict`.
        refine: second stage of the task, built; None leaves the published one out.

    Returns:
        The layout of sparse kernels; None if there are none.

    Raises:
        InputError: if names are missing or left over, or shapes differ; lists them, and nothing has been loaded then.
    """
    state = checkpoint.get("model_state", checkpoint.get("state_dict", checkpoint))
    state = {
        name: value.flatten(1) if value.ndim > 2 and _POINTWISE.match(name) else value for name, value in state.items()
    }
    absent = [name for name, part in (("dense_head", head), ("roi_head", refine)) if part is None]
    names = [*((rf"^{name}\..*", "") for name in absent), *rename]
    network = joined(backbone=backbone, head=head, refine=refine)
    convs = {f"{n}.weight": m for n, m in network.named_modules() if isinstance(m, SparseConvolution)}
    if convs and layout is None:
        stored = {renamed(name, names): value for name, value in state.items()}
        layout = detect_layout(stored, {n: conv for n, conv in convs.items() if n in stored}, "zyx")
    found = convert_state_dict(state, network, layout or KernelLayout.KRSC, names, "zyx")
    network.load_state_dict(found)
    return layout if convs else None
