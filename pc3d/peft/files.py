"""Adapters in files of their own: ``.safetensors`` with their tensors, ``.json`` with what they are."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pc3d.config import instantiate
from pc3d.errors import InputError
from pc3d.io.atomic import atomic_write
from pc3d.nn.backbone import Backbone, PointNetwork
from pc3d.peft.adaptation import attach, attached, detach, parts_of

_FORMAT = 1


def base_state(backbone: PointNetwork) -> dict[str, Tensor]:
    """State of the backbone without its adapters and task layers: what a pre-training brings."""
    added = set().union(*(entry.added for entry in attached(backbone).values()))
    task = tuple(f"{layer}." for layer in backbone.task_layers)
    return {name: v for name, v in backbone.state_dict().items() if name not in added and not name.startswith(task)}


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values of tensors."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_adapter(
    path: str | Path, backbone: Backbone, name: str = "default", head: nn.Module | None = None
) -> tuple[Path, Path]:
    """Write one adapter and, if given, a head; nothing of the backbone.

    Returns:
        The ``.safetensors`` file and the ``.json`` beside it: method, head and the fingerprint of the backbone.

    Raises:
        InputError: if there is no such adapter, or others act beside it, which would not be in the file.
    """
    from safetensors.torch import save_file

    if name not in attached(backbone):
        raise InputError(f"peft: no adapter '{name}' to save (attached: {', '.join(attached(backbone)) or 'none'})")
    others = sorted({part.adapter for part in parts_of(backbone) if part.active} - {name})
    if others:
        raise InputError(
            f"peft: adapter '{name}' acts together with '{others[0]}', which its file does not hold; save what it does "
            f"alone: pc3d.peft.use(backbone, '{name}')"
        )
    entry, state = attached(backbone)[name], backbone.state_dict()
    tensors = {f"adapter.{key}": state[key] for key in sorted(entry.added)}
    tensors |= {f"head.{key}": value for key, value in (head.state_dict() if head is not None else {}).items()}
    about = {
        "format": _FORMAT,
        "name": name,
        "method": entry.method.to_config(),
        "backbone": type(backbone).__name__,
        "base": fingerprint(base_state(backbone)),
    }
    path = Path(path).with_suffix(".safetensors")
    with atomic_write(path) as temporary:
        save_file({key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}, temporary)
    with atomic_write(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(about, indent=2) + "\n")
    return path, path.with_suffix(".json")


def load_adapter(
    path: str | Path,
    backbone: Backbone,
    name: str | None = None,
    head: nn.Module | None = None,
    allow: tuple[str, ...] = ("pc3d.",),
) -> str:
    """Attach the adapter of a file to the backbone it was trained on.

    Args:
        path: as written by :func:`save_adapter`.
        backbone: its base; adapters that it has already do not matter.
        name: another name than in the file; returned.
        head: takes the head of the file.
        allow: see :func:`pc3d.config.instantiate`.

    Raises:
        InputError: if the file is no adapter, belongs to other weights, or does not fit; nothing is attached then.
    """
    path = Path(path).with_suffix(".safetensors")
    about, tensors = _read(path)
    own = fingerprint(base_state(backbone))
    if about["base"] != own:
        raise InputError(
            f"{path}: was trained on another {about['backbone']} (weights {about['base'][:12]}, here {own[:12]}): "
            "load the pre-trained weights it started from"
        )
    name = name or str(about["name"])
    stored = {key.removeprefix("adapter."): v for key, v in tensors.items() if key.startswith("adapter.")}
    stored = {_renamed(key, str(about["name"]), name): value for key, value in stored.items()}
    heads = {key.removeprefix("head."): v for key, v in tensors.items() if key.startswith("head.")}
    expected = {} if head is None else head.state_dict()
    if head is not None:
        _check(path, heads, expected, "head")
    entry = attach(backbone, instantiate(about["method"], allow), name)
    try:
        _check(path, stored, {key: v for key, v in backbone.state_dict().items() if key in entry.added}, "adapter")
    except InputError:
        detach(backbone, name)
        raise
    backbone.load_state_dict(stored, strict=False)
    if head is not None:
        head.load_state_dict(heads)
    return name


def _renamed(key: str, old: str, new: str) -> str:
    """A key of the file under another name of the adapter; modules are ``adapters.<name>`` and ``adapted.*.<name>``."""
    return re.sub(rf"\b(adapters|adapted\.\w+)\.{old}(?=[.-])", rf"\1.{new}", key)


def _check(path: Path, stored: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    here, there = ({key: tuple(v.shape) for key, v in side.items()} for side in (expected, stored))
    odd = [key for key in {**here, **there} if here.get(key) != there.get(key)]
    if odd:
        raise InputError(
            f"{path}: its {what} does not fit: '{odd[0]}' is {there.get(odd[0], 'missing')} in the file, "
            f"{here.get(odd[0], 'missing')} in the model ({len(odd)} tensors differ)"
        )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        about, tensors = json.loads(path.with_suffix(".json").read_text()), load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{error.filename or path}: no such file; an adapter is a .safetensors and a .json") from error
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(f"{path}: not a readable adapter ({error})") from error
    if about.get("format") != _FORMAT or "method" not in about or "base" not in about:
        raise InputError(f"{path.with_suffix('.json')}: does not describe an adapter of format {_FORMAT}")
    return about, tensors
