"""Jointly trained checkpoints of Pointcept (``PPT-v1m1`` and ``PPT-v1m2``) for backbones with norms per dataset.

Wu et al. 2024, "Towards Large-scale 3D Representation Learning with Multi-dataset Point Prompt Training"
(arXiv 2308.09718).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.models.backbones.ptv3 import PTv3
from pc3d.models.backbones.sparse_unet import SparseUNet
from pc3d.models.convert.kernels import KernelLayout
from pc3d.models.convert.pointcept import import_pointcept
from pc3d.models.convert.sparse_unet import import_sparse_unet
from pc3d.models.convert.state_dict import renamed
from pc3d.models.heads import ClassEmbeddingHead

INDOOR = ("Structured3D", "ScanNet", "S3DIS")
"""Datasets of the indoor checkpoints in the order of their context vectors and heads; norms have another order."""

CLASS_ROWS: dict[str, tuple[int, ...]] = {
    "Structured3D": (*range(9), 11, *range(13, 22), 23, 25, 26, 33, 34, 35),
    "ScanNet": (*range(10), 11, 12, 13, 15, 20, 22, 24, 25, 27, 34),
    "S3DIS": (0, 1, 4, 5, 6, 7, 8, 10, 19, 29, 30, 31, 32),
}
"""Rows of the 36 class vectors of the indoor checkpoints that are the classes of a dataset."""

# SpUNet-v1m3 calls otherwise what this package calls as in v1m1.
_RENAME = (
    (r"\.bns\.", ".norm."),
    (r"(conv_input|down\.\d+|up\.\d+)\.conv\.", r"\1.0."),
    (r"(conv_input|down\.\d+|up\.\d+)\.bn\.", r"\1.1."),
    (r"\.proj_conv\.", ".proj.0."),
    (r"\.proj_norm\.", ".proj.1."),
)


def import_ppt(
    checkpoint: Mapping[str, Any],
    backbone: PTv3 | SparseUNet,
    head: nn.Linear | ClassEmbeddingHead | None = None,
    conditions: Sequence[str] = INDOOR,
    layout: KernelLayout | None = None,
) -> KernelLayout:
    """Load a jointly trained state into a backbone and the head of its default dataset.

    Args:
        checkpoint: the state, or a mapping with the state under ``"state_dict"``; keys may begin with ``module.``.
        backbone: PTv3 or SparseUNet whose datasets, in the order of its norms, are those of the checkpoint:
            ``("ScanNet", "S3DIS", "Structured3D")`` indoors.
        head: gets what the file has for the backbone's default dataset: a linear layer its own of ``PPT-v1m2``, a
            :class:`~pc3d.models.heads.ClassEmbeddingHead` the projection and class vectors of ``PPT-v1m1``.
        conditions: datasets in the order of the file's context vectors and heads.
        layout: how the kernels are stored; None detects it from their shapes.

    Returns:
        The layout of the kernels.

    Raises:
        InputError: if names are missing or left over, or shapes differ, or the datasets do not fit.
    """
    stored = {name.removeprefix("module."): v for name, v in checkpoint.get("state_dict", checkpoint).items()}
    if set(conditions) != set(backbone.conditions):
        raise InputError(
            f"checkpoint: trained on {', '.join(conditions)}, the backbone has norms for "
            f"{', '.join(backbone.conditions) or 'no datasets'}; set pdnorm_conditions or norm_conditions"
        )
    parts = {name: value for name, value in stored.items() if name.startswith("backbone.")}
    if backbone.embedding_table is not None and "embedding_table.weight" in stored:
        rows = [list(conditions).index(name) for name in backbone.conditions]
        parts["backbone.embedding_table.weight"] = stored["embedding_table.weight"][rows]
    values = {} if head is None else _head_values(stored, head, backbone.default_condition, conditions)
    if isinstance(backbone, SparseUNet):
        layout = import_sparse_unet({renamed(name, _RENAME): v for name, v in parts.items()}, backbone, layout=layout)
    else:
        layout = import_pointcept(parts, backbone, layout=layout)
    if head is not None:
        head.load_state_dict(values)
    return layout


def _head_values(
    stored: Mapping[str, Tensor],
    head: nn.Linear | ClassEmbeddingHead,
    dataset: str | None,
    conditions: Sequence[str],
) -> dict[str, Tensor]:
    """The state of a head, checked against its shapes."""
    if dataset is None:
        raise InputError("checkpoint: its heads are those of datasets: set pdnorm_default or norm_default to one")
    if isinstance(head, nn.Linear):
        prefix = f"seg_heads.{list(conditions).index(dataset)}."
        names = {name: f"{prefix}{name}" for name in ("weight", "bias")}
    else:
        names = {"proj.weight": "proj_head.weight", "proj.bias": "proj_head.bias"}
        names |= {name: name for name in ("class_embedding", "logit_scale")}
    missing = [name for name in names.values() if name not in stored]
    if missing:
        other = "head: ClassEmbeddingHead" if isinstance(head, nn.Linear) else "a linear head"
        raise InputError(f"checkpoint: has no '{missing[0]}' for this {type(head).__name__}; try {other}")
    values = {own: stored[name].float() for own, name in names.items()}
    if isinstance(head, ClassEmbeddingHead) and len(values["class_embedding"]) != len(head.class_embedding):
        rows = CLASS_ROWS.get(dataset, ())
        if not rows or max(rows) >= len(values["class_embedding"]):
            raise InputError(f"checkpoint: which of its {len(values['class_embedding'])} classes are {dataset}'s?")
        values["class_embedding"] = values["class_embedding"][torch.tensor(rows)]
    for name, target in head.state_dict().items():
        if values[name].shape != target.shape:
            shapes = f"{tuple(values[name].shape)} for {dataset}, the head wants {tuple(target.shape)}"
            raise InputError(f"checkpoint: '{names[name]}' is {shapes}")
    return values
