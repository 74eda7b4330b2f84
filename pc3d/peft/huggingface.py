"""LoRA adapters as the Hugging Face ``peft`` library keeps them; the library itself is not needed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.io.atomic import atomic_write
from pc3d.nn.backbone import Backbone
from pc3d.peft.adaptation import attach, attached, detach
from pc3d.peft.lora import LoRA
from pc3d.peft.weights import LowRank

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_KEY = re.compile(r"base_model\.model\.(?:backbone\.)?(.+)\.lora_([AB])\.weight")
# What changes the meaning of the matrices, and the values that :class:`LoRA` stands for.
_PLAIN = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "lora_bias": False, "use_dora": False,
          "use_qalora": False, "modules_to_save": None, "target_parameters": None}  # fmt: skip


def export_lora(folder: str | Path, backbone: Backbone, name: str = "default") -> tuple[Path, Path]:
    """Write a :class:`LoRA` adapter for ``peft.PeftModel.from_pretrained(backbone, folder)``.

    Returns:
        ``adapter_model.safetensors`` and ``adapter_config.json``.

    Raises:
        InputError: if there is no such adapter, it is no LoRA, or it is on layers that the library does not have.
    """
    from safetensors.torch import save_file

    method = attached(backbone)[name].method if name in attached(backbone) else None
    if not isinstance(method, LoRA):
        there = ", ".join(f"{n} ({type(a.method).__name__})" for n, a in attached(backbone).items()) or "none"
        raise InputError(f"peft: '{name}' is no LoRA adapter of this {type(backbone).__name__} (it has: {there})")
    parts = _parts(backbone, name)
    tensors = {
        f"base_model.model.{place}.lora_{which}.weight": value.detach().cpu().reshape(shape).contiguous()
        for place, part in parts.items()
        for which, value, shape in _matrices(backbone, place, part)
    }
    others = {re.escape(place): len(part.down) for place, part in parts.items() if len(part.down) != method.rank}
    config = {
        **_PLAIN,
        "r": method.rank,
        "rank_pattern": others,
        "lora_alpha": method.rank if method.alpha is None else method.alpha,
        "alpha_pattern": others if method.alpha is None else {},
        "use_rslora": method.rank_stabilized,
        "target_modules": "|".join(map(re.escape, parts)),
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    weights, about = Path(folder) / _WEIGHTS, Path(folder) / _CONFIG
    with atomic_write(weights) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    with atomic_write(about) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")
    return weights, about


def import_lora(folder: str | Path, backbone: Backbone, name: str = "default") -> None:
    """Attach a LoRA adapter that the library saved for this backbone, or for a model that holds it as ``backbone``.

    Raises:
        InputError: if the files are missing or damaged, hold something else than plain LoRA, or do not fit; nothing is
            attached then.
    """
    where = Path(folder) / _WEIGHTS
    config, stored = _read(Path(folder))
    ranks = {place: len(value) for (place, which), value in stored.items() if which == "A"}
    attach(backbone, _method(Path(folder) / _CONFIG, config, ranks), name)
    try:
        for place, part in _parts(backbone, name).items():
            for which, own, shape in _matrices(backbone, place, part):
                value = stored.get((place, which), torch.empty(0))
                if value.shape != shape:
                    raise InputError(f"{where}: lora_{which} of '{place}' is {tuple(value.shape)}, {shape} fits")
                with torch.no_grad():
                    own.copy_(value.reshape(own.shape))
    except InputError:
        detach(backbone, name)
        raise


def _parts(backbone: Backbone, name: str) -> dict[str, LowRank]:
    """The adapter's pair of matrices for each layer, by the layer's name."""
    return {
        path.partition(".adapted.")[0]: part
        for path, part in backbone.named_modules()
        if isinstance(part, LowRank) and part.adapter == name
    }


def _matrices(backbone: Backbone, place: str, part: LowRank) -> list[tuple[str, Tensor, tuple[int, ...]]]:
    """Name, value and shape in the library of a layer's two matrices."""
    layer = backbone.get_submodule(place)
    if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)) or getattr(layer, "groups", 1) > 1:
        raise InputError(f"peft: the library's LoRA cannot be on '{place}', a {type(layer).__name__}")
    _, *kernel = layer.weight.shape
    ones = [1] * (len(kernel) - 1)
    return [("A", part.down, (len(part.down), *kernel)), ("B", part.up, (*part.up.shape, *ones))]


def _method(path: Path, config: Mapping[str, Any], ranks: Mapping[str, int]) -> LoRA:
    """The adaptation of layers with these ranks that a config describes."""
    odd = [key for key, plain in _PLAIN.items() if (config.get(key) or plain) != plain]
    if odd:
        raise InputError(f"{path}: '{odd[0]}' is {config[odd[0]]!r}: pc3d.peft.LoRA is {_PLAIN[odd[0]]!r}")
    alphas = {place: _of_pattern(config.get("alpha_pattern") or {}, place, config["lora_alpha"]) for place in ranks}
    alpha = None if alphas == ranks else alphas[next(iter(ranks))]
    if alpha is not None and set(alphas.values()) != {alpha}:
        raise InputError(f"{path}: 'alpha_pattern' gives layers factors of their own, which LoRA here does not have")
    exact = {f"^{re.escape(place)}$": rank for place, rank in ranks.items()}
    return LoRA(int(config["r"]), alpha, list(exact), exact, bool(config.get("use_rslora")))


def _of_pattern(patterns: Mapping[str, float], place: str, default: float) -> float:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", place)), default)


def _read(folder: Path) -> tuple[dict[str, Any], dict[tuple[str, str], Tensor]]:
    """The config, and the matrices by layer and ``A`` or ``B``."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config, tensors = json.loads((folder / _CONFIG).read_text()), load_file(folder / _WEIGHTS)
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(f"{folder}: not a readable LoRA adapter ({error}): it needs {_WEIGHTS}, {_CONFIG}") from error
    missing = [key for key in ("r", "lora_alpha") if not isinstance(config, dict) or key not in config]
    if missing:
        raise InputError(f"{folder / _CONFIG}: has no '{missing[0]}'")
    found = {key: _KEY.fullmatch(key) for key in tensors}
    foreign = [key for key, match in found.items() if match is None]
    if foreign or not tensors:
        raise InputError(f"{folder / _WEIGHTS}: '{(foreign or ['nothing'])[0]}' is no matrix of a LoRA adapter")
    return config, {(match[1], match[2]): tensors[key] for key, match in found.items() if match is not None}
