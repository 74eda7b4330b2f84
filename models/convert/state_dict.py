"""State dicts of networks written with spconv, MinkowskiEngine, TorchSparse or fVDB, for networks of this package."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.models.convert.kernels import Columns, KernelLayout, check_semantics, read_kernel, stored_shape
from pc3d.sparse import SparseConvolution

Replacement = str | Callable[[re.Match[str]], str]

# Names an engine gives to what torch calls otherwise: its kernels, and the torch layer inside its norm layers.
_ENGINE_NAMES: dict[KernelLayout, tuple[tuple[str, str], ...]] = {
    KernelLayout.MINKOWSKI: ((r"(^|\.)kernel$", r"\1weight"), (r"(^|\.)(?:bn|linear)\.(?=\w+$)", r"\1")),
    KernelLayout.TORCHSPARSE: ((r"(^|\.)kernel$", r"\1weight"),),
}


def convert_state_dict(
    checkpoint: Mapping[str, Any],
    module: nn.Module,
    layout: KernelLayout,
    rename: Sequence[tuple[str, str]] = (),
    columns: Columns = "xyz",
) -> dict[str, Tensor]:
    """A foreign state dict with the names, kernel layout and shapes of ``module``, ready for ``load_state_dict``.

    Args:
        checkpoint: the state, or a mapping with the state under ``"state_dict"``.
        module: network that computes the same; its own state stays as it is.
        layout: the engine, or the kernel layout of its version.
        rename: regular expressions and replacements for names, applied in turn with :func:`re.sub`, after what the
            engine calls otherwise has been renamed (``kernel`` to ``weight``; for MinkowskiEngine ``bn.weight`` and
            ``linear.weight`` to ``weight``) and a leading ``module.`` was cut. An empty name leaves the entry out.
        columns: ``"zyx"`` if the network was trained on coordinate rows ``[batch, z, y, x]``.

    Returns:
        Tensors on the device and in the dtype of the checkpoint; kernels ``(K, Cin, Cout)``.

    Raises:
        InputError: if names are missing, left over or given twice, or shapes differ; or if a layer visits other voxels
            in that engine than here (MinkowskiEngine or TorchSparse with a strided 3x3x3 kernel, for instance).
    """
    stored = _renamed(checkpoint.get("state_dict", checkpoint), layout, rename)
    own = module.state_dict()
    convs = {
        f"{name}.weight" if name else "weight": conv
        for name, conv in module.named_modules()
        if isinstance(conv, SparseConvolution)
    }
    for name, conv in convs.items():
        check_semantics(name.removesuffix(".weight"), conv, layout)
    shapes: dict[str, tuple[int, ...]] = {name: tuple(value.shape) for name, value in own.items()}
    shapes |= {name: stored_shape(conv, layout, columns) for name, conv in convs.items()}
    for name, value in stored.items():  # MinkowskiEngine and TorchSparse before 2.0 store a bias as (1, C)
        if name in shapes and len(shapes[name]) == 1 and tuple(value.shape) == (1, *shapes[name]):
            stored[name] = value[0]
    if problems := misfits(shapes, stored):
        raise InputError(
            f"checkpoint: does not fit this {_kind(module)}: {'; '.join(problems)}; "
            "set rename, or build the network with the settings of the checkpoint"
        )
    return {
        name: read_kernel(stored[name], convs[name], layout, columns).contiguous() if name in convs else stored[name]
        for name in own
    }


def load_with_head(
    checkpoint: Mapping[str, Any],
    network: nn.Module,
    head: nn.Module | None,
    layout: KernelLayout,
    rename: Sequence[tuple[str, str]],
    rename_head: Sequence[tuple[str, str]],
) -> None:
    """Load a state into a network and its head.

    Args:
        checkpoint, layout: as for :func:`convert_state_dict`; a leading ``backbone.`` is cut too.
        rename: to names of the network.
        rename_head: from published names to names of the head behind ``head.``; without a head these are left out.

    Raises:
        InputError: as :func:`convert_state_dict`; nothing has been loaded then.
    """
    heads = [(pattern, name) if head is not None else (f"{pattern}.*", "") for pattern, name in rename_head]
    names = [(r"^backbone\.", ""), *rename, *heads, (r"^(?=.)(?!head\.)", "network.")]
    pair = joined(network=network, head=head)
    pair.load_state_dict(convert_state_dict(checkpoint, pair, layout, names))


def _kind(module: nn.Module) -> str:
    """Class of a network; of joined ones, the first."""
    return type(next(module.children()) if isinstance(module, nn.ModuleDict) else module).__name__


def joined(**parts: nn.Module | None) -> nn.ModuleDict:
    """Modules under names, as one that shares their memory; None for what is not there."""
    return nn.ModuleDict({name: part for name, part in parts.items() if part is not None})


def load_fitting(module: nn.Module, stored: Mapping[str, Tensor], what: str, new: str | None = None) -> list[str]:
    """Load a state which has the names of ``module`` by now.

    Args:
        what: the state is for, in errors.
        new: pattern of names that may be missing and then keep their values.

    Returns:
        The names that keep their values, sorted.

    Raises:
        InputError: if other names are missing or left over, or shapes differ; lists them, and nothing has been loaded.
    """
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    kept = sorted(name for name in shapes.keys() - stored.keys() if new is not None and re.search(new, name))
    if problems := misfits({name: shape for name, shape in shapes.items() if name not in kept}, stored):
        raise InputError(f"checkpoint: does not fit this {what}: {'; '.join(problems)}")
    module.load_state_dict(stored, strict=False)
    return kept


def renamed(name: str, rules: Iterable[tuple[str, Replacement]]) -> str:
    """A name after every rule in turn, see :func:`re.sub`."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def published_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights in a published file of an object network, without the prefixes that training put before names."""
    wrapped = (checkpoint[key] for key in ("base_model", "model_state_dict", "state_dict") if key in checkpoint)
    state = next(wrapped, checkpoint)
    return {name.removeprefix("module.").removeprefix("base_model."): value for name, value in state.items()}


def without_kernel(value: Tensor) -> Tensor:
    """1x1 convolutions are linear layers here; tokens keep their axes."""
    if value.ndim == 4 and value.shape[2:] == (1, 1):
        return value[..., 0, 0]
    return value[..., 0] if value.ndim == 3 and value.shape[0] > 1 and value.shape[2] == 1 else value


def misfits(shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, Tensor]) -> list[str]:
    """In what a state differs from the names and shapes that are wanted, in words; nothing if it fits."""
    missing, unexpected = shapes.keys() - stored.keys(), stored.keys() - shapes.keys()
    other = [
        f"{name} {tuple(stored[name].shape)} instead of {shapes[name]}"
        for name in shapes.keys() & stored.keys()
        if tuple(stored[name].shape) != shapes[name]
    ]
    problems = listing("missing", missing) + listing("unexpected", unexpected) + _nearest(missing, unexpected)
    return problems + listing("of another shape", other)


def listing(what: str, items: Iterable[str], shown: int = 4) -> list[str]:
    """``["<count> <what> (<first names>)"]``, or nothing without items."""
    names = sorted(items)
    if not names:
        return []
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return [f"{len(names)} {what} ({', '.join(names[:shown])}{more})"]


def _nearest(missing: Iterable[str], unexpected: Iterable[str], shown: int = 2) -> list[str]:
    """What some missing names may be called in the file: the closest of its unexpected names."""
    there = sorted(unexpected)
    pairs = ((name, difflib.get_close_matches(name, there, n=1, cutoff=0.75)) for name in sorted(missing)[:50])
    hints = [f"'{name}' may be '{close[0]}' in the file" for name, close in pairs if close]
    return hints[:shown]


def _renamed(state: Mapping[str, Tensor], layout: KernelLayout, rename: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    new: dict[str, Tensor] = {}
    for old, value in state.items():
        name = renamed(old.removeprefix("module."), (*_ENGINE_NAMES.get(layout, ()), *rename))
        if name in new:
            raise InputError(f"checkpoint: '{old}' and another entry are both renamed to '{name}'; change rename")
        if name:
            new[name] = value
    return new
