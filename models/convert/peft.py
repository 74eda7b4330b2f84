"""Names that the published adapters of Point-MAE style networks have in their checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pc3d.errors import InputError
from pc3d.nn.adaptable import AdapterPart
from pc3d.peft.dapt import DAPTPart
from pc3d.peft.idpt import GraphPrompt, IDPTPart, IDPTSegmentationPart
from pc3d.peft.point_peft import PointPEFTPart
from pc3d.peft.pointgst import PointGSTPart

_AFFINES = (("", ("norm1", "norm2", "prompt")), (r"attn\.", ("qkv", "proj")), (r"mlp\.", ("fc1", "fc2")))
_BLOCK = r"^blocks\.blocks\.(\d+)\."
_NAMES: dict[type[AdapterPart], list[tuple[str, str]]] = {
    IDPTPart: [
        (r"^blocks\.cls\.conv5\.0\.", "fuse."),
        (r"^blocks\.cls\.conv5\.1\.", "norm."),
        (r"^blocks\.cls\.conv(\d)\.0\.", r"edges.\1.linear."),
        (r"^blocks\.cls\.conv(\d)\.1\.", r"edges.\1.norm."),
        (r"^blocks\.cls\.(?:.+\.)?(?=(norm[12]|attn|mlp)\.)", "block."),  # of the prompt network ``transformer``
        (r"^prompt_pos$", "prompt_pos"),
    ],
    IDPTSegmentationPart: [
        (r"^dgcnn_cls(\d+)\.conv5\.0\.", r"prompts.\1.fuse."),
        (r"^dgcnn_cls(\d+)\.conv5\.1\.", r"prompts.\1.norm."),
        (r"^dgcnn_cls(\d+)\.conv(\d)\.0\.", r"prompts.\1.edges.\2.linear."),
        (r"^dgcnn_cls(\d+)\.conv(\d)\.1\.", r"prompts.\1.edges.\2.norm."),
        (r"^prompt_cls_pos$", "prompt_pos"),
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
    PointPEFTPart: [
        (r"^prompt_cor$", "prompt_coord"),
        (r"^blocks\.norm3\.", "attention.norm."),
        (r"^blocks\.attn1\.", "attention."),
        (rf"{_BLOCK}prompt_embeddings$", r"prompts.\1.prompt"),
        (rf"{_BLOCK}cp_adapter\.", r"prompts.\1.refine."),
        (rf"{_BLOCK}adapter\.", r"blocks.\1.mlp."),
        (rf"{_BLOCK}adapter1\.", r"blocks.\1.last."),
        (rf"{_BLOCK}out_transform\.0\.", r"blocks.\1.norm."),
        (rf"{_BLOCK}ad_gate$", ""),  # published, and never used
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
    found, of_idpt = {}, isinstance(part, (IDPTPart, IDPTSegmentationPart))
    for key, value in state.items():
        if of_idpt and (twice := re.match(r"^(blocks\.cls|dgcnn_cls\d+)\.bn(\d)\.(.+)$", key)):
            copy = f"{twice[1]}.conv{twice[2]}.1.{twice[3]}"
            if _holds_norms_twice(part) and not torch.equal(value, state.get(copy, value)):
                raise InputError(f"checkpoint: '{key}' and its copy in '{copy}' differ")
            continue
        for pattern, replacement in names:
            ours, hits = re.subn(pattern, replacement, key)
            if hits:
                if ours := _own_name(ours, part):
                    found[f"network.adapters.{name}.{ours}"] = value
                break
        else:
            found[key] = value
    return found


def _holds_norms_twice(part: AdapterPart) -> bool:
    """The two smallest prompt networks have a norm under the second name which they do not use."""
    return any(isinstance(module, GraphPrompt) and len(module.edges) > 1 for module in part.modules())


def _own_name(name: str, part: AdapterPart) -> str:
    """The name with what differs from part to part; none for tensors that never had an influence."""
    if isinstance(part, PointPEFTPart):
        prompt = re.match(r"prompts\.(\d+)\.", name)
        if prompt and int(prompt[1]) >= len(part.prompts):
            return ""  # later blocks have no prompts
        return re.sub(r"\.ln([12])\.", lambda m: f".{('down', 'up')[int(m[1]) - 1]}.", name)
    name = re.sub(r"\bedges\.(\d)", lambda m: f"edges.{int(m[1]) - 1}", name)  # they count from 0 here
    if isinstance(part, IDPTSegmentationPart):  # prompts are named by their block there
        return re.sub(r"^prompts\.(\d+)", lambda m: f"prompts.{part.stages.index(int(m[1]))}", name)
    return f"prompt.{name}" if isinstance(part, IDPTPart) and name != "prompt_pos" else name


def differences(names: Iterable[str]) -> dict[str, str]:
    """Tensors that train as a difference from one of the base, and that one."""
    found = {}
    for name in names:
        if token := re.match(r"(network\.)adapters\.\w+\.(cls_token|cls_pos)$", name):
            found[name] = token[1] + token[2]
        elif weight := re.match(r"(.+\.)adapted\.(\w+)\.[\w-]+\.delta$", name):
            found[name] = weight[1] + weight[2]
    return found
