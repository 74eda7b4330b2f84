"""Published weights of GridFormer for :class:`~pc3d.models.GridFormer` and its decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pc3d.models.backbones.gridformer import GridFormer, GridFormerDecoder
from pc3d.models.convert.state_dict import Replacement, joined, load_fitting, renamed

_LAYER = {("0", "0"): 0, ("0", "1"): 1, ("2", "0"): 3, ("2", "1"): 4}  # of the planes' double convolutions
_NAMES: list[tuple[str, Replacement]] = [
    (r"^encoder\.fc_pos\.", "backbone.embed."),
    (r"^encoder\.(unet3d\.encoders|unet\.down_convs)\.", "backbone.encoder."),
    (r"^encoder\.(unet3d\.decoders|unet\.up_convs)\.", "backbone.decoder."),
    (r"\.basic_module\.SingleConv([12])\.groupnorm\.", lambda m: f".convs.{3 * int(m[1]) - 3}."),
    (r"\.basic_module\.SingleConv([12])\.conv\.", lambda m: f".convs.{3 * int(m[1]) - 2}."),
    (r"\.conv1\.([02])\.([01])\.", lambda m: f".convs.{_LAYER[m[1], m[2]]}."),
    (r"\.conv1\.([01])\.", r".convs.\1."),
    (r"\.(upconv|upconv_noup)\.([01])\.", r".up.\2."),
    (r"\.fc_k\.0\.", ".mixing.key."),
    (r"\.fc_v\.", ".mixing.value."),
    (r"\.conv_q\.(0\.)?", ".mixing.attention.query."),
    (r"\.(\d)\.fc_pos\.", r".\1.mixing.attention.position."),
    (r"\.fc_w\.", ".mixing.attention.weight."),
    (r"\.weight_conv\.", ".mixing.merge."),
    (r"\.conv1x1\.", ".mixing.skip."),
    (r"\.conv_final\.", ".mixing.final."),
    (r"^decoder\.fc_c\.", "decoder.condition."),
    (r"^decoder\.fc_multi\.", "decoder.levels."),
    (r"^decoder\.fc_p\.", "decoder.point."),
    (r"^decoder\.blocks\.(\d)\.fc_([01])\.", lambda m: f"decoder.blocks.{m[1]}.{2 * int(m[2]) + 1}."),
    (r"^decoder\.fc_out\.", "decoder.out.1."),
]


def import_gridformer(
    checkpoint: Mapping[str, Any], backbone: GridFormer, decoder: GridFormerDecoder | None = None
) -> None:
    """Load published weights, those of the last level's attention too, which nothing uses.

    Args:
        checkpoint: the state, or a mapping with it under ``"model"`` or ``"state_dict"``.
        backbone: of the checkpoint's sizes and kind; ``decoder``, None to leave the published one out.

    Raises:
        InputError: if names are missing or left over, or shapes differ; lists them, and nothing has been loaded then.
    """
    state = checkpoint.get("model", checkpoint.get("state_dict", checkpoint))
    stored: dict[str, Tensor] = {}
    for name, value in state.items():
        plain = renamed(name.removeprefix("module."), _NAMES)
        if plain.endswith("attention.query.weight"):  # a convolution of 1 cell
            value = value.flatten(1)
        if decoder is not None or not plain.startswith("decoder."):
            stored[plain] = value
    load_fitting(joined(backbone=backbone, decoder=decoder), stored, "GridFormer")
