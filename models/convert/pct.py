"""Published weights of the Point Cloud Transformer for :class:`~pc3d.models.PCT`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pc3d.errors import InputError
from pc3d.models.backbones.pct import PCT
from pc3d.models.convert.state_dict import joined, load_fitting, published_state, renamed, without_kernel


def _mlp(published: str, ours: str) -> list[tuple[str, str]]:
    """Two convolutions with batch norm."""
    return [
        (rf"^{published}{kind}{layer}\.", f"{ours}.{3 * (layer - 1) + place}.")
        for layer in (1, 2)
        for place, kind in enumerate(("conv", "bn"))
    ]


_NAMES = [
    (r"^model\.", ""),
    *_mlp("", "network.embed"),
    *(pair for i in (0, 1) for pair in _mlp(rf"gather_local_{i}\.", f"network.abstractions.{i}.local")),
    *_mlp(r"pt_last\.", "network.enter"),
    *((rf"^pt_last\.sa{i + 1}\.", f"network.attentions.{i}.") for i in range(4)),
    (r"\.q_conv\.", ".query."),
    (r"\.v_conv\.", ".value."),
    (r"\.trans_conv\.", ".project."),
    (r"\.after_norm\.", ".norm."),
    (r"^conv_fuse\.", "network.fuse."),
    (r"^linear1\.", "head.hidden.0.0."),
    (r"^bn6\.", "head.hidden.0.1."),
    (r"^linear2\.", "head.hidden.1.0."),
    (r"^bn7\.", "head.hidden.1.1."),
    (r"^linear3\.", "head.linear."),
]


def import_pct(checkpoint: Mapping[str, Any], network: PCT, head: nn.Module | None = None) -> None:
    """Load published weights.

    Args:
        checkpoint: the state, or a mapping with it under ``"model_state"``, ``"model_state_dict"`` or ``"state_dict"``.
        network: of the checkpoint's sizes.
        head: :class:`~pc3d.models.heads.MLPHead` with ``bias=True`` (the first layer has none, which becomes zeros) and
            ``leak=0.2``; None leaves the published head out.

    Raises:
        InputError: if names are missing or left over, shapes differ, or queries and keys are not the same; nothing has
            been loaded then.
    """
    stored = {}
    state = published_state(checkpoint.get("model_state", checkpoint))
    for name, value in state.items():
        ours = renamed(name, _NAMES)
        if ".k_conv." in name:
            if not torch.equal(value, state.get(name.replace("k_conv", "q_conv"), value[:0])):
                raise InputError(f"checkpoint: {name} differs from the queries, with which a PCT shares it")
        elif head is not None or not ours.startswith("head."):
            stored[ours] = without_kernel(value)
    bias = None if head is None else head.state_dict().get("hidden.0.0.bias")
    if bias is not None:
        stored.setdefault("head.hidden.0.0.bias", torch.zeros_like(bias))
    load_fitting(joined(network=network, head=head), stored, "PCT")
