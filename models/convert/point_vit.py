"""Published weights of Point-MAE, Point-BERT and Point-PQAE for :class:`~pc3d.models.PointViT`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pc3d.models.backbones.point_vit import PointViT
from pc3d.models.convert.peft import adapter_state, differences
from pc3d.models.convert.state_dict import joined, load_fitting, published_state, renamed, without_kernel
from pc3d.nn.adaptable import AdapterPart
from pc3d.nn.patch_decoders import LevelDecoder

_NAMES = [
    (r"^(encoder|reduce_dim|pos_embed|norm|cls_token|cls_pos)(?=\.|$)", r"network.\1"),
    (r"^blocks\.blocks\.", "network.blocks."),
    (r"^(label_conv|propagation_0|convs[123]|bns[12])_cls\.", r"\1."),  # of scenes
    (r"^label_conv\.", "network.decoder.category."),
    (r"^propagation_0\.mlp_convs\.(\d+)\.", r"network.decoder.spread.\1.0."),
    (r"^propagation_0\.mlp_bns\.(\d+)\.", r"network.decoder.spread.\1.1."),
    (r"^convs1\.", "network.decoder.join.0."),
    (r"^bns1\.", "network.decoder.join.1."),
    (r"^convs2\.", "network.decoder.last.1.0."),
    (r"^bns2\.", "network.decoder.last.1.1."),
    (r"^convs3\.", "head.linear."),
]
_LEVELS = [
    (r"^propagation_(\d)\.mlp_convs\.(\d)\.", r"network.decoder.propagation.\1.\2.0."),
    (r"^propagation_(\d)\.mlp_bns\.(\d)\.", r"network.decoder.propagation.\1.\2.1."),
    *(
        (rf"^dgcnn_pro_{level + 1}\.layer{layer}\.{i}\.", f"network.decoder.edges.{level}.{edges}.{name}.")
        for level in (0, 1)
        for layer, edges in ((1, "across"), (2, "within"))
        for i, name in enumerate(("linear", "norm"))
    ),
    (r"^conv1\.", "network.decoder.last.0."),
    (r"^bn1\.", "network.decoder.last.1."),
    (r"^conv2\.", "head.linear."),
]
_OF_PRETRAINING = (
    r"^(mask_token$|"
    r"(decoder_pos_embed|MAE_decoder|increase_dim|lm_head|cls_head|PQ_decoder|PQ_linear|PQattn_contrast)\.)"
)
_PREFIX = ("MAE_encoder.", "transformer_q.", "PQAE_encoder.", "ACT_encoder.")
_NEVER_PUBLISHED = r"^network\.adapters\.\w+\.bank\."
_NOT_PRETRAINED = r"^(network\.(cls_token|cls_pos)$|network\.decoder\.|network\.(.+\.)?adapt(ers|ed)\.|head\.)"


def import_point_vit(
    checkpoint: Mapping[str, Any], network: PointViT, head: nn.Module | None = None, onto_base: bool = False
) -> list[str]:
    """Load published weights: a classifier, a part segmentation, or the encoder of a pre-training.

    Args:
        checkpoint: the state, or a mapping with it under ``"base_model"``, ``"model_state_dict"`` or ``"state_dict"``.
        network: of the checkpoint's sizes; ``ignore_origin=True`` samples patches as it was trained with.
        head: :class:`~pc3d.models.heads.MLPHead` with ``bias=True`` of a classification, a linear head of a part
            segmentation; None leaves the published head out.
        onto_base: the network holds the pre-trained weights that the file was tuned from: what trained in place of one
            of them becomes a difference from it. :class:`~pc3d.peft.PointPEFT` asks the pre-trained network for its
            prompts; for other adapters it changes nothing. False: the tuned values become the base.

    Returns:
        Names that keep their values: what a pre-training does not have (class token of Point-MAE, decoder, head, an
        adapter of the network), and the bank of an adapter. A fine-tuned file has the adapter that is attached, or
        none if none is.

    Raises:
        InputError: if other names are missing or left over, or shapes differ; lists them, and nothing has been loaded
            then.
    """
    plain = published_state(checkpoint)
    pretrained = any(name.startswith(_PREFIX) for name in plain)
    if any(name.startswith("transformer_q.") for name in plain):
        plain = {name: value for name, value in plain.items() if name.startswith("transformer_q.")}
    stored, names = {}, [*(_LEVELS if isinstance(network.decoder, LevelDecoder) else []), *_NAMES]
    adapters = {} if pretrained else dict(network.adapters.items())
    for name, part in adapters.items():
        assert isinstance(part, AdapterPart)
        plain = adapter_state(plain, name, part)
    for name, value in plain.items():
        ours = next((name.removeprefix(prefix) for prefix in _PREFIX if name.startswith(prefix)), name)
        if pretrained and re.match(_OF_PRETRAINING, ours):
            continue
        ours = re.sub(r"^cls_head_finetune\.(\d+)\.", lambda m: _classifier(int(m[1]), head), ours)
        ours = renamed(ours, names)
        if head is not None or not ours.startswith("head."):
            stored[ours] = value
    pair = joined(network=network, head=head)
    if adapters:
        _split_differences(stored, pair.state_dict(), onto_base)
    if pretrained and network.cls_token is None:
        stored = {name: value for name, value in stored.items() if name not in ("network.cls_token", "network.cls_pos")}
    stored = {name: without_kernel(value) for name, value in stored.items()}
    return load_fitting(pair, stored, "PointViT", _NOT_PRETRAINED if pretrained else _NEVER_PUBLISHED)


def _split_differences(stored: dict[str, Tensor], own: Mapping[str, Tensor], onto_base: bool) -> None:
    """Give the differences that ``own`` has their values, and their bases what is left."""
    for difference, base in differences(own).items():
        stored[difference] = torch.zeros_like(own[difference])
        if onto_base and base in stored and stored[base].shape == own[base].shape:
            stored[difference] = stored[base] - own[base]
            stored[base] = own[base]


def _classifier(index: int, head: nn.Module | None) -> str:
    """Published layers: linear, batch norm (if any), ReLU and dropout of each hidden one, then the last linear one."""
    hidden = getattr(head, "hidden", nn.Sequential())
    for i, layer in enumerate(hidden):
        if index < len(layer):
            return f"head.hidden.{i}.{index}."
        index -= len(layer)
    return "head.linear."
