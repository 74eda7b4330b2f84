"""Published Point Cloud Mamba weights for :class:`~pc3d.models.PointCloudMamba`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.models.backbones.pcm import PointCloudMamba
from pc3d.models.convert.state_dict import joined, listing, load_fitting, renamed

_NAMES = [
    (r"^encoder\.embedding\.net\.", "network.embedding."),
    (r"^encoder\.order_prompt\.", "network.order_prompt."),
    (r"^encoder\.order_prompt_proj\.(\d+)\.", r"network.stages.\1.prompt_proj."),
    (r"^encoder\.pos_proj\.(\d+)\.", r"network.stages.\1.pos_proj."),
    (r"^encoder\.local_grouper_list\.(\d+)\.affine_", r"network.stages.\1.grouper."),
    (r"^encoder\.pre_blocks_list\.(\d+)\.transfer\.net\.", r"network.stages.\1.transfer."),
    (r"^encoder\.pre_blocks_list\.(\d+)\.operation\.", r"network.stages.\1.pre."),
    (r"^encoder\.mamba_blocks_list\.(\d+)\.(\d+)\.", r"network.stages.\1.blocks.\2."),
    (r"^encoder\.residual_proj_blocks_list\.(\d+)\.", r"network.stages.\1.residual_proj."),
    (r"\.mixer\.(conv1d|x_proj|dt_proj)_b\.", r".mixer.backward_ssm.\1."),
    (r"\.mixer\.A_b_log$", ".mixer.backward_ssm.A_log"),
    (r"\.mixer\.D_b$", ".mixer.backward_ssm.D"),
    (r"^decoder\.decode_list\.(\d+)\.fuse\.net\.", r"network.decoder.fuse.\1."),
    (r"^decoder\.decode_list\.(\d+)\.extraction\.operation\.0\.", r"network.decoder.extract.\1."),
    (r"^decoder\.gmp_map_list\.(\d+)\.net\.", r"network.decoder.context_maps.\1."),
    (r"^decoder\.gmp_map_end\.net\.", "network.decoder.context_end."),
    (r"^decoder\.cls_map\.(\d+)\.net\.", r"network.decoder.category_map.\1."),
    (r"\.net1\.([01])\.", r".inner.\1."),
    (r"\.net2\.0\.", ".outer."),
    (r"\.net2\.1\.", ".norm."),
    (r"^head\.last\.0\.", "head.linear."),
    (r"^head\.head\.0\.", "head.hidden."),
    (r"^head\.head\.2\.0\.", "head.linear."),
]


def import_point_cloud_mamba(
    checkpoint: Mapping[str, Any],
    network: PointCloudMamba,
    head: nn.Module | None,
    prompt_rows: Mapping[str, int],
) -> None:
    """Load published weights.

    Args:
        checkpoint: the state, or a mapping with the state under ``"model"`` or ``"state_dict"``.
        network: of the checkpoint's sizes, with ``released=True``.
        head: :class:`~pc3d.models.heads.GlobalContextHead` of a segmentation or
            :class:`~pc3d.models.heads.MLPHead` of a classification; None leaves the published head out.
        prompt_rows: first row of the prompt table for each order. The released code takes the rows in the order of a
            set of strings, which changes from process to process, so the file does not tell.

    Raises:
        InputError: if names are missing or left over, shapes differ or ``prompt_rows`` lacks an order; lists them, and
            nothing has been loaded then.
    """
    state = checkpoint.get("model", checkpoint.get("state_dict", checkpoint))
    shared = (
        len(network.stages) if any(re.match(r"(module\.)?encoder\.pos_proj\.weight", name) for name in state) else 0
    )
    last = len(getattr(head, "hidden", ()))
    stored: dict[str, Tensor] = {}
    for name, value in state.items():
        plain = name.removeprefix("module.")
        if shared and plain == "encoder.pos_proj.weight":
            stored |= {f"network.stages.{i}.pos_proj.weight": value for i in range(shared)}
            continue
        plain = re.sub(r"^prediction\.head\.(\d+)\.", lambda m: _classifier(int(m[1]), last), plain)
        plain = renamed(plain, _NAMES)
        if head is not None or not plain.startswith(("head.", "prediction.")):
            stored[plain] = value
    if lacking := listing("orders", set(network.prompt_orders) - prompt_rows.keys() if network.prompts else ()):
        raise InputError(f"checkpoint: prompt_rows lacks {lacking[0]} of this PointCloudMamba")
    pair = joined(network=network, head=head)
    own = pair.state_dict()
    for name in stored.keys() & own.keys():
        # 1x1 convolutions keep trailing axes of one; the mixers' depth-wise kernels keep their middle one in both.
        if stored[name].numel() == own[name].numel():
            stored[name] = stored[name].reshape(own[name].shape)
    table = "network.order_prompt.weight"
    if network.prompts and table in stored and stored[table].shape == own[table].shape:
        rows = [prompt_rows[order] + i for order in network.prompt_orders for i in range(network.prompts)]
        stored[table] = stored[table][rows]
    load_fitting(pair, stored, "PointCloudMamba")


def _classifier(index: int, hidden: int) -> str:
    """Layers of the published classifier: a block, dropout, a block, dropout, ..., the last linear layer."""
    return f"head.hidden.{index // 2}." if index < 2 * hidden else "head.last."
