"""State dicts of networks written with spconv, MinkowskiEngine, TorchSparse or fVDB, for networks of this package."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.models.convert.kernels import Columns, KernelLayout, check_semantics, read_kernel, stored_shape
from pc3d.sparse import SparseConvolution

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
    missing, unexpected = own.keys() - stored.keys(), stored.keys() - own.keys()
    problems = listing("missing", missing) + listing("unexpected", unexpected) + _nearest(missing, unexpected)
    wrong = []
    for name in own.keys() & stored.keys():
        shape = tuple(own[name].shape)
        expected = stored_shape(convs[name], layout, columns) if name in convs else shape
        # MinkowskiEngine and TorchSparse before 2.0 store a bias as (1, C).
        if tuple(stored[name].shape) not in (expected, (1, *expected) if len(expected) == 1 else expected):
            wrong.append(f"{name} {tuple(stored[name].shape)} instead of {expected}")
    problems += listing("of another shape", wrong)
    if problems:
        raise InputError(
            f"checkpoint: does not fit this {type(module).__name__}: {'; '.join(problems)}; "
            "set rename, or build the network with the settings of the checkpoint"
        )
    return {
        name: read_kernel(stored[name], convs[name], layout, columns).contiguous()
        if name in convs
        else stored[name].reshape(target.shape)
        for name, target in own.items()
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
    pair = nn.ModuleDict({"network": network} if head is None else {"network": network, "head": head})
    try:
        pair.load_state_dict(convert_state_dict(checkpoint, pair, layout, names))
    except InputError as error:
        raise InputError(str(error).replace("ModuleDict", type(network).__name__)) from None


def published_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights in a published file of an object network, without the prefix of data-parallel training."""
    wrapped = (checkpoint[key] for key in ("base_model", "model_state_dict", "state_dict") if key in checkpoint)
    return {name.removeprefix("module."): value for name, value in next(wrapped, checkpoint).items()}


def without_kernel(value: Tensor) -> Tensor:
    """1x1 convolutions are linear layers here; tokens keep their axes."""
    if value.ndim == 4 and value.shape[2:] == (1, 1):
        return value[..., 0, 0]
    return value[..., 0] if value.ndim == 3 and value.shape[0] > 1 and value.shape[2] == 1 else value


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
        name = old.removeprefix("module.")
        for pattern, replacement in (*_ENGINE_NAMES.get(layout, ()), *rename):
            name = re.sub(pattern, replacement, name)
        if name in new:
            raise InputError(f"checkpoint: '{old}' and another entry are both renamed to '{name}'; change rename")
        if name:
            new[name] = value
    return new
