"""Published weights of the medical point SSM (flemme) for :class:`~pc3d.models.PointSSM` and its heads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pc3d.models.backbones.point_ssm import PointSSM
from pc3d.models.convert.state_dict import joined, load_fitting, renamed

_NAMES = [
    (r"^encoder\.msg\.(\d+)\.bb\.(\d+)\.building_blocks\.(\d+)\.bb\.", r"network.grouping.\1.scales.\2.\3."),
    (r"^encoder\.lrm\.(\d+)\.building_blocks\.(\d+)\.", r"network.long_scans.\1.\2."),
    (r"^encoder\.ca\.", "network.attention."),
    (r"^encoder\.final_concat\.mlp\.mlp\.", "network.concat."),
    (r"^encoder\.", "network."),
    (r"^decoder\.fp\.(\d+)\.bb\.building_blocks\.", r"network.decoder.steps.\1."),
    (r"^decoder\.final\.mlp\.0\.linear\.", "head.linear."),
    (r"^classifier\.", "head.linear."),
    (r"^decoder\.fold\.(\d+)\.mlp\.(\d+)\.", r"head.layers.\1.\2."),
    (r"^en_cemb\.dense1\.linear\.", "network.condition.0."),
    (r"^en_cemb\.dense2\.linear\.", "network.condition.2."),
]
_IGNORED = r"^(decoder\.ca|de_cemb)\."  # never used; the same module as en_cemb


def rename_block(name: str) -> str:
    """Name of a parameter inside a block, from theirs to ours."""
    name = re.sub(r"\.mamba\.", ".mixer.", name)
    name = re.sub(r"\.cinj\.cond\.hyper_(gate|bias)\.", r".inject.\1.", name)
    name = re.sub(r"\.(norm[12])\.norm\.", r".\1.", name)
    name = re.sub(r"\.mlp\.mlp\.(\d+)\.linear\.", r".mlp.\1.0.", name)
    scan = r"\.(in_proj|conv|out_proj)\.(weight|bias)$|\.(x_proj_weight|dt_projs_\w+|A_logs|Ds|dt_bias|init_states)$"
    if ".mixer." not in name and not re.search(r"\.(attention|ca)\.", name):
        name = re.sub(scan, lambda m: f".mixer{m[0]}", name)
    return name


def import_point_ssm(checkpoint: Mapping[str, Any], network: PointSSM, head: nn.Module | None = None) -> None:
    """Load published weights (commit 86abf06 and later) of a classifier, a segmentation or a completion.

    Args:
        checkpoint: the state, or a mapping with the state under ``"model"`` or ``"state_dict"``.
        network: of the checkpoint's sizes, with ``ignore_origin=True``.
        head: a linear head, or a :class:`~pc3d.models.heads.FoldingDecoder`; None leaves the published one out.

    Raises:
        InputError: if names are missing or left over, or shapes differ; lists them, and nothing has been loaded then.
    """
    state = checkpoint.get("model", checkpoint.get("state_dict", checkpoint))
    folds = len(getattr(head, "last", ()))
    hidden = len(head.layers[0]) if folds else 0  # type: ignore[union-attr, index]
    stored: dict[str, Tensor] = {}
    for name, value in state.items():
        plain = name.removeprefix("module.")
        if re.match(_IGNORED, plain):
            continue
        plain = re.sub(rf"^decoder\.fold\.(\d+)\.mlp\.{hidden}\.linear\.", r"head.last.\1.", plain)
        plain = rename_block(renamed(plain, _NAMES))
        if head is not None or not plain.startswith("head."):
            stored[plain] = value
    load_fitting(joined(network=network, head=head), stored, "PointSSM")
