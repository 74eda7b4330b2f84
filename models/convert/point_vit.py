"""Published weights of Point-MAE and Point-BERT for :class:`~pc3d.models.PointViT`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.models.backbones.point_vit import PointViT
from pc3d.models.convert.peft import adapter_state
from pc3d.models.convert.state_dict import listing
from pc3d.nn.adaptable import AdapterPart

_NAMES = [
    (r"^(encoder|reduce_dim|pos_embed|norm|cls_token|cls_pos)(?=\.|$)", r"network.\1"),
    (r"^blocks\.blocks\.", "network.blocks."),
    (r"^label_conv\.", "network.decoder.category."),
    (r"^propagation_0\.mlp_convs\.(\d+)\.", r"network.decoder.spread.\1.0."),
    (r"^propagation_0\.mlp_bns\.(\d+)\.", r"network.decoder.spread.\1.1."),
    (r"^convs1\.", "network.decoder.join.0."),
    (r"^bns1\.", "network.decoder.join.1."),
    (r"^convs2\.", "network.decoder.last.1.0."),
    (r"^bns2\.", "network.decoder.last.1.1."),
    (r"^convs3\.", "head.linear."),
]
_OF_PRETRAINING = r"^(mask_token|decoder_pos_embed\.|MAE_decoder\.|increase_dim\.|lm_head\.|cls_head\.)"
_NOT_PRETRAINED = r"^(network\.(cls_token|cls_pos)$|network\.decoder\.|network\.(.+\.)?adapt(ers|ed)\.|head\.)"


def import_point_vit(checkpoint: Mapping[str, Any], network: PointViT, head: nn.Module | None = None) -> list[str]:
    """Load published weights: a classifier, a part segmentation, or the encoder of a pre-training.

    Args:
        checkpoint: the state, or a mapping with it under ``"base_model"``, ``"model_state_dict"`` or ``"state_dict"``.
        network: of the checkpoint's sizes; ``ignore_origin=True`` samples patches as it was trained with.
        head: :class:`~pc3d.models.heads.MLPHead` with ``bias=True`` of a classification, a linear head of a part
            segmentation; None leaves the published head out.

    Returns:
        Names that keep their values: what a pre-training does not have (class token of Point-MAE, decoder, head, an
        adapter of the network). A fine-tuned file has the adapter that is attached, or none if none is.

    Raises:
        InputError: if other names are missing or left over, or shapes differ; lists them, and nothing has been loaded
            then.
    """
    wrapped = (checkpoint[key] for key in ("base_model", "model_state_dict", "state_dict") if key in checkpoint)
    state: Mapping[str, Tensor] = next(wrapped, checkpoint)
    plain = {name.removeprefix("module."): value for name, value in state.items()}
    pretrained = any(name.startswith(("MAE_encoder.", "transformer_q.")) for name in plain)
    if any(name.startswith("transformer_q.") for name in plain):
        plain = {name: value for name, value in plain.items() if name.startswith("transformer_q.")}
    stored = {}
    adapters = {} if pretrained else dict(network.adapters.items())
    for name, part in adapters.items():
        assert isinstance(part, AdapterPart)
        plain = adapter_state(plain, name, part)
    for name, value in plain.items():
        ours = re.sub(r"^(MAE_encoder|transformer_q)\.", "", name)
        if pretrained and re.match(_OF_PRETRAINING, ours):
            continue
        ours = re.sub(r"^cls_head_finetune\.(\d+)\.", lambda m: _classifier(int(m[1]), head), ours)
        for pattern, replacement in _NAMES:
            ours = re.sub(pattern, replacement, ours)
        if head is not None or not ours.startswith("head."):
            stored[ours] = value
    pair = nn.ModuleDict({"network": network} | ({} if head is None else {"head": head}))
    own = pair.state_dict()
    missing = own.keys() - stored.keys()
    new = {name for name in missing if pretrained and re.match(_NOT_PRETRAINED, name)}
    if pretrained and network.cls_token is None:
        stored = {name: value for name, value in stored.items() if name not in ("network.cls_token", "network.cls_pos")}
    problems = listing("missing", missing - new) + listing("unexpected", stored.keys() - own.keys())
    shapes = [
        f"{name} {tuple(stored[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & stored.keys()
        if _without_kernel(stored[name]).shape != own[name].shape
    ]
    problems += listing("of another shape", shapes)
    if problems:
        raise InputError(f"checkpoint: does not fit this PointViT: {'; '.join(problems)}")
    pair.load_state_dict({name: _without_kernel(value) for name, value in stored.items()}, strict=False)
    return sorted(new)


def _classifier(index: int, head: nn.Module | None) -> str:
    """Published layers: linear, batch norm, ReLU and dropout of each hidden layer, then the last linear one."""
    hidden = len(getattr(head, "hidden", ()))
    return f"head.hidden.{index // 4}.{index % 4}." if index < 4 * hidden else "head.linear."


def _without_kernel(value: Tensor) -> Tensor:
    """1x1 convolutions are linear layers here; tokens keep their axes."""
    if value.ndim == 4 and value.shape[2:] == (1, 1):
        return value[..., 0, 0]
    return value[..., 0] if value.ndim == 3 and value.shape[0] > 1 and value.shape[2] == 1 else value
