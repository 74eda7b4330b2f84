"""Published weights of whole pre-trainings: backbone and method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pc3d.errors import InputError
from pc3d.models.convert.state_dict import Replacement, joined, load_fitting, published_state, renamed, without_kernel
from pc3d.models.pretrain import DiscreteVAETraining, PointBERT, PointMAE, PointPQAE
from pc3d.nn import Backbone
from pc3d.tasks.pretraining import PretrainingMethod

_POINT_MAE: list[tuple[str, Replacement]] = [
    (r"^MAE_encoder\.blocks\.", "backbone."),
    (r"^MAE_encoder\.", "backbone."),
    (r"^mask_token$", "method.mask_token"),
    (r"^decoder_pos_embed\.", "method.pos_embed."),
    (r"^MAE_decoder\.", "method."),
    (r"^increase_dim\.0\.", "method.to_points."),
]
_POINT_PQAE: list[tuple[str, Replacement]] = [
    (r"^PQAE_encoder\.blocks\.", "backbone."),
    (r"^PQAE_encoder\.", "backbone."),
    (r"^PQattn_contrast\.", "method.attention."),
    (r"^PQ_decoder\.", "method."),
    (r"^PQ_linear\.", "method.to_points."),
    (r"^decoder_pos_embed\..*", ""),  # published, and never used
]
_POINT_BERT: list[tuple[str, Replacement]] = [
    (r"^transformer_q\.(mask_token|lm_head|cls_head)(?=\.|$)", r"method.heads.\1"),
    (r"^transformer_k\.(mask_token|lm_head|cls_head)(?=\.|$)", r"method.key_heads.\1"),
    (r"^transformer_q\.(blocks\.)?", "backbone."),
    (r"^transformer_k\.(blocks\.)?", "method.key_backbone."),
    (r"^dvae\.", "method.tokenizer."),
    (r"^(queue|queue_ptr)$", r"method.\1"),
]
_GRAPH_NETS: list[tuple[str, Replacement]] = [
    (r"(dgcnn_[12])\.layer5\.0\.", r"\1.last."),
    (r"(dgcnn_[12])\.layer5\.1\.", r"\1.norm."),
    (r"(dgcnn_[12])\.layer(\d)\.0\.", lambda m: f"{m[1]}.layers.{int(m[2]) - 1}.linear."),
    (r"(dgcnn_[12])\.layer(\d)\.1\.", lambda m: f"{m[1]}.layers.{int(m[2]) - 1}.norm."),
]
_NAMES: dict[type[PretrainingMethod], Sequence[tuple[str, Replacement]]] = {
    PointMAE: _POINT_MAE,
    PointPQAE: _POINT_PQAE,
    PointBERT: [*_POINT_BERT, *_GRAPH_NETS],
    DiscreteVAETraining: [(r"^(?=.)", "backbone."), *_GRAPH_NETS],
}
_NEW: dict[type[PretrainingMethod], str] = {PointMAE: r"^backbone\.(cls_token|cls_pos)$"}


def import_pretraining(checkpoint: Mapping[str, Any], backbone: Backbone, method: PretrainingMethod) -> list[str]:
    """Load a published pre-training, so that it can go on or be looked at.

    Args:
        checkpoint: the state, or a mapping with it under ``"base_model"``, ``"model_state_dict"`` or ``"state_dict"``.
        backbone: of the checkpoint's sizes; ``method``, built for it.

    Returns:
        Names that keep their values: the class token, where the method has none.

    Raises:
        InputError: if there is no importer for the method, other names are missing or left over, or shapes differ;
            lists them, and nothing has been loaded then.
    """
    if type(method) not in _NAMES:
        raise InputError(f"checkpoint: there is no importer for {type(method).__name__}")
    stored = {}
    for name, value in published_state(checkpoint).items():
        if ours := renamed(name, _NAMES[type(method)]):
            stored[ours] = without_kernel(value)
    return load_fitting(joined(backbone=backbone, method=method), stored, type(method).__name__, _NEW.get(type(method)))
