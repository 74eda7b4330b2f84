"""Names that the published adapters of Point-MAE style networks have in their checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from pc3d.errors import InputError
from pc3d.nn.adaptable import AdapterPart
from pc3d.peft.dapt import DAPTPart
from pc3d.peft.idpt import GraphPrompt, IDPTPart
from pc3d.peft.pointgst import PointGSTPart

_AFFINES = (("", ("norm1", "norm2", "prompt")), (r"attn\.", ("qkv", "proj")), (r"mlp\.", ("fc1", "fc2")))
_BLOCK = r"^blocks\.blocks\.(\d+)\."
_NAMES: dict[type[AdapterPart], list[tuple[str, str]]] = {
    IDPTPart: [
        (r"^blocks\.cls\.conv5\.0\.", "fuse."),
        (r"^blocks\.cls\.conv5\.1\.", "norm."),
        (r"^blocks\.cls\.conv(\d)\.0\.", r"edges.\1.linear."),
        (r"^blocks\.cls\.conv(\d)\.1\.", r"edges.\1.norm."),
        (r"^prompt_pos$", "prompt_pos"),
    ],
    DAPTPart: [
        (rf"{_BLOCK}Adapter_MLP\.adapter_layer_norm_before\.", r"blocks.\1.adapter.norm."),
        (rf"{_BLOCK}Adapter_MLP\.scale\.", r"blocks.\1.adapter.score."),
        (rf"{_BLOCK}Adapter_MLP\.(down|up)_proj\.", r"blocks.\1.adapter.\2."),
        *(
            (rf"{_BLOCK}{owner}tfts_(gamma|beta)_{i}$", rf"blocks.\1.{place}.\2")
            for owner, places in _AFFINES
            for i, place in enumerate(places, 1)
        ),
        (r"^tfts_(gamma|beta)_(\d)$", r"affine\2.\1"),
    ],
    PointGSTPart: [
        (rf"{_BLOCK}gft_adapter\.(down|up)\.", r"blocks.\1.\2."),
        (rf"{_BLOCK}gft_adapter\.adapt1\.", r"blocks.\1.mix."),
        (rf"{_BLOCK}gft_adapter\.norm_ly1\.", r"blocks.\1.norm_whole."),
        (rf"{_BLOCK}gft_adapter\.norm_ly2\.", r"blocks.\1.norm_local."),
    ],
}


def adapter_state(state: Mapping[str, Tensor], name: str, part: AdapterPart) -> dict[str, Tensor]:
    """Published tensors of an adapter by the names of the part, the base's as they are.

    Raises:
        InputError: if a tensor that the published files hold twice has two values, or nothing is known of the part.
    """
    names = next((rules for kind, rules in _NAMES.items() if isinstance(part, kind)), None)
    if names is None:
        raise InputError(f"checkpoint: there is no importer for the adapter {type(part).__name__}")
    found = {}
    for key, value in state.items():
        if isinstance(part, IDPTPart) and (twice := re.match(r"^blocks\.cls\.bn(\d)\.(.+)$", key)):
            other = state.get(f"blocks.cls.conv{twice[1]}.1.{twice[2]}")
            # The two smallest prompt networks have a norm of that name which they do not use.
            shared = isinstance(part.prompt, GraphPrompt) and len(part.prompt.edges) > 1
            if shared and other is not None and not torch.equal(value, other):
                raise InputError(f"checkpoint: '{key}' and its copy in 'blocks.cls.conv{twice[1]}.1' differ")
            continue
        for pattern, replacement in names:
            ours, hits = re.subn(pattern, replacement, key)
            if hits:
                found[f"network.adapters.{name}.{_counted(ours, part)}"] = value
                break
        else:
            found[key] = value
    # The published class token is the sum of the base's and the difference; the base gets it, the difference is zero.
    for difference in ("cls_token", "cls_pos"):
        found[f"network.adapters.{name}.{difference}"] = torch.zeros_like(getattr(part, difference))
    return found


def _counted(name: str, part: AdapterPart) -> str:
    """Edge layers count from 0 here, and belong to the prompt network, as all but the position."""
    if not isinstance(part, IDPTPart) or name == "prompt_pos":
        return name
    return "prompt." + re.sub(r"^edges\.(\d)", lambda m: f"edges.{int(m[1]) - 1}", name)
