"""Checkpoints that explain themselves: the card, safe reading, rebuilding a task, weights alone, exports."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import pickletools
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from pc3d.config import instantiate
from pc3d.data.pipeline import Pipeline
from pc3d.data.transforms import AssembleFeatures
from pc3d.errors import InputError
from pc3d.io.atomic import atomic_write
from pc3d.peft import attached, base_state, fingerprint
from pc3d.tasks.record import git_revision, versions, write_json

if TYPE_CHECKING:
    from pc3d.tasks.base import PointTask

CARD = "pc3d_card"
CARD_FORMAT = 1
_REQUIRED = ("task", "pipeline", "class_names", "palette", "label_map", "seed")
_BASE = "peft_base"
_LOSSES = ("criteria.", "feature_criteria.")
Card = dict[str, Any]


class MismatchError(InputError):
    """A checkpoint does not fit the data or the model at hand; ``table`` shows both sides."""

    def __init__(self, message: str, table: str) -> None:
        super().__init__(message)
        self.table = table


# The card ------------------------------------------------------------------------------------------------------------


def make_card(task: PointTask, metrics: Mapping[str, Tensor | float] | None = None) -> Card:
    """All that is needed to use a checkpoint without its training run, in plain types only.

    Keys: ``format``, ``task`` (``class_path``/``init_args`` with backbone, head and criteria), ``training`` (optimizer
    and schedule), ``class_names``, ``palette``, ``label_map``, ``ignore_index``, ``features`` (name and channels of
    each), ``in_channels``, ``grid_size``, ``pipeline``, ``weights`` (``ema`` or ``trained``), ``seed``, ``metrics``,
    ``versions``, ``git_revision``.

    Raises:
        InputError: if the task has no pipeline, or a part of it cannot be written to a config.
    """
    pipeline = task.pipeline
    if pipeline is None:
        raise InputError("a checkpoint needs the data's pipeline: train with a PointDataModule or set task.pipeline")
    try:
        task_config, pipeline_config = task.to_config(), pipeline.to_config()
    except TypeError as error:
        raise InputError(f"the checkpoint's card cannot describe this model or pipeline: {error}") from error
    return {
        "format": CARD_FORMAT,
        "task": task_config,
        "training": {
            "optimizer": _plain_lists(dataclasses.asdict(task.optimizer_config)),
            "schedule": _plain_lists(dataclasses.asdict(task.schedule_config)),
        },
        "class_names": list(task.class_names),
        "palette": None if task.palette is None else [[int(c) for c in color] for color in task.palette],
        "label_map": None if task.label_map is None else {int(k): int(v) for k, v in task.label_map.items()},
        "ignore_index": -1,
        **data_entries(pipeline),
        "pipeline": pipeline_config,
        "weights": "trained" if task.ema_decay is None else "ema",
        "seed": task.seed,
        "metrics": {name: float(value) for name, value in (metrics or {}).items()},
        "versions": versions(),
        "git_revision": git_revision(),
    }


def data_entries(pipeline: Pipeline | None) -> dict[str, Any]:
    """The entries of a card that say what the model's input is: ``features``, ``in_channels`` and ``grid_size``."""
    if pipeline is None:
        return {}
    return {
        "features": [{"name": name, "channels": n} for name, n in feature_channels(pipeline.features).items()],
        "in_channels": int(pipeline.in_channels),
        "grid_size": None if pipeline.grid_size is None else float(pipeline.grid_size),
    }


def feature_channels(features: Sequence[str]) -> dict[str, int]:
    """Channels that each named feature takes in ``feat``."""
    return {name: AssembleFeatures([name]).channels for name in features}


def _plain_lists(value: Any) -> Any:
    """The same nested value with tuples as lists, as JSON would give it back."""
    if isinstance(value, dict):
        return {key: _plain_lists(item) for key, item in value.items()}
    return [_plain_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def card_mismatch_table(card: Card, **here: Any) -> str | None:
    """A table of the card entries that differ from what is at hand, or None if all agree.

    Args:
        card: card of a checkpoint.
        here: card entries to compare, e.g. ``class_names=[...]``, ``in_channels=6``, ``grid_size=0.02``.
    """
    rows = [(name, _brief(card.get(name)), _brief(value)) for name, value in here.items() if card.get(name) != value]
    return text_table("The checkpoint does not fit", ("field", "checkpoint", "here"), rows) if rows else None


def check_card(card: Card, where: str, **here: Any) -> None:
    """Raises MismatchError, naming ``where`` and holding the table, if a card entry differs from what is at hand."""
    table = card_mismatch_table(card, **here)
    if table is not None:
        differ = [f"{n} {_brief(card.get(n))} (here: {_brief(v)})" for n, v in here.items() if card.get(n) != v]
        raise MismatchError(f"{where}: does not fit: {'; '.join(differ)}", table)


def _brief(value: Any) -> str:
    if isinstance(value, list):
        items = [f"{v['name']} ({v['channels']})" if isinstance(v, dict) else str(v) for v in value]
        return f"{len(items)}: {', '.join(items)}"
    return str(value)


def text_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain-text table."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console(file=io.StringIO(), width=120, force_terminal=False)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


# Reading -------------------------------------------------------------------------------------------------------------


def read_checkpoint(path: str | Path, trust: bool = False) -> dict[str, Any]:
    """Read a ``.ckpt``/``.pth`` file, or a ``.safetensors`` export with its ``.json``, on the CPU.

    Args:
        path: the file.
        trust: also run the Python code that a pickle may hold. Only for files you made yourself.

    Returns:
        At least ``state_dict``; ``pc3d_card`` if the file has a card; whatever else the trainer saved.

    Raises:
        InputError: if the file is missing, damaged, holds code (names the global) or no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint file")
    if path.suffix == ".safetensors":
        return _read_export(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what follows is our one clear error
            checkpoint = torch.load(path, map_location="cpu", weights_only=not trust)
    except UnpicklingError as error:
        raise InputError(_unsafe_message(path, str(error))) from error
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError, zipfile errors, ... for damaged files
        raise InputError(f"{path}: not a readable checkpoint ({_first_line(error)}): is the file complete?") from error
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint with a state_dict")
    if "state_dict" not in checkpoint and checkpoint and all(isinstance(v, Tensor) for v in checkpoint.values()):
        checkpoint = {"state_dict": checkpoint}
    for other in ("base_model", "model_state_dict", "model_state", "model"):  # what other code bases call it
        if "state_dict" not in checkpoint and isinstance(checkpoint.get(other), dict):
            checkpoint = {**checkpoint, "state_dict": checkpoint[other]}
    if "state_dict" not in checkpoint:
        raise InputError(f"{path}: has no 'state_dict' (it has: {', '.join(map(str, list(checkpoint)[:8]))})")
    state = checkpoint["state_dict"]
    if not isinstance(state, dict):
        raise InputError(f"{path}: its 'state_dict' is a {type(state).__name__}, not weights by name")
    odd = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise InputError(f"{path}: '{odd}' among its weights is a {type(state[odd]).__name__}, not a tensor")
    return checkpoint


def _unsafe_message(path: Path, error: str) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", error)
    name = found[1] if found else _foreign_global(path.read_bytes())
    if name is None:
        return f"{path}: not a readable checkpoint: a file of another kind, or damaged"
    return f"{path}: holds Python code ({name}) which is not run: pass --trust if you made this file yourself"


def _foreign_global(content: bytes) -> str | None:
    """The first name outside torch which a plain pickle would import; only reads the instructions, runs none."""
    words: list[str] = []
    with contextlib.suppress(ValueError, IndexError):  # the instructions end where the file is not a pickle
        for instruction, argument, _ in pickletools.genops(content):
            if instruction.name == "GLOBAL":
                words = str(argument).split()
            elif instruction.name == "STACK_GLOBAL":
                words = words[-2:]
            else:
                words += [argument] if isinstance(argument, str) else []
                continue
            if not words[0].startswith(("torch", "collections")):
                return ".".join(words)
    return None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def _read_export(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    card_path = path.with_suffix(".json")
    if not card_path.is_file():
        raise InputError(f"{path}: its card {card_path.name} is missing beside it")
    try:
        card = json.loads(card_path.read_text())
        state = load_file(path)
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{path}: not a readable export ({_first_line(error)})") from error
    if card.get("label_map") is not None:
        card["label_map"] = {int(code): index for code, index in card["label_map"].items()}
    return {"state_dict": state, CARD: card}


def load_task(
    path: str | Path, trust: bool = False, allow: tuple[str, ...] = ("pc3d.",)
) -> tuple[PointTask, Pipeline, Card]:
    """Rebuild a trained task from its checkpoint alone, on the CPU in eval mode.

    Args:
        path: ``.ckpt`` or ``.safetensors`` file with a card.
        trust: see :func:`read_checkpoint`.
        allow: prefixes of the class paths that the card may name, see :func:`pc3d.config.instantiate`.

    Raises:
        InputError: if the file cannot be read, has no card, comes from a newer version, or does not fit its own card.
    """
    checkpoint = read_checkpoint(path, trust)
    card = card_of(checkpoint, path)
    if _BASE in card:
        raise InputError(f"{path}: holds an adapter only; join it: pc3d export {path} whole.safetensors --base FILE")
    task, pipeline = instantiate(card["task"], allow), instantiate(card["pipeline"], allow)
    check_weights(checkpoint["state_dict"], task.state_dict(), path)
    task.load_state_dict(checkpoint["state_dict"])
    task.pipeline, task.label_map, task.seed = pipeline, card["label_map"], card["seed"]
    task.palette = None if card["palette"] is None else [tuple(color) for color in card["palette"]]
    return task.eval(), pipeline, card


def adapter_checkpoint(path: str | Path, trust: bool = False) -> dict[str, Any]:
    """A checkpoint of an adapted task without the frozen weights of its backbone, which its card then names.

    Raises:
        InputError: if the checkpoint has no adapter, besides what :func:`load_task` says.
    """
    task, _, card = load_task(path, trust)
    if not attached(task.backbone):
        raise InputError(f"{path}: its backbone has no adapter (model.peft)")
    base = base_state(task.backbone)
    state = {name: v for name, v in task.state_dict().items() if name.removeprefix("backbone.") not in base}
    return {"state_dict": state, CARD: {**card, _BASE: fingerprint(base)}}


def join_base(path: str | Path, base: str | Path, trust: bool = False) -> dict[str, Any]:
    """The whole checkpoint: an adapter's (see :func:`adapter_checkpoint`) with the weights that it started from.

    Raises:
        InputError: if the first has no need of a base, or the second is not the base that the adapter was trained on.
    """
    checkpoint, source = read_checkpoint(path, trust), read_checkpoint(base, trust)["state_dict"]
    card = dict(card_of(checkpoint, path))
    expected = card.pop(_BASE, None)
    if expected is None:
        raise InputError(f"{path}: is whole already, it needs no base")
    task = instantiate(card["task"])
    names = base_state(task.backbone)
    prefix = "" if names.keys() <= source.keys() else "backbone."
    found = {name: source[prefix + name] for name in names if prefix + name in source}
    if len(found) < len(names) or fingerprint(found) != expected:
        raise InputError(f"{base}: does not hold the weights that {path} was trained on (fingerprint {expected[:12]})")
    state = checkpoint["state_dict"] | {f"backbone.{name}": value for name, value in found.items()}
    check_weights(state, task.state_dict(), path)
    return {"state_dict": state, CARD: card}


def check_weights(state: Mapping[str, Tensor], model: Mapping[str, Tensor], path: str | Path) -> None:
    """Raises InputError unless two state dicts have the same names and shapes; says in one line how they differ."""
    shapes, expected = ({name: tuple(v.shape) for name, v in side.items()} for side in (state, model))
    odd = [name for name in {**expected, **shapes} if shapes.get(name) != expected.get(name)]
    if odd:
        first = (
            f"'{odd[0]}' is {shapes.get(odd[0], 'missing')} in the file, {expected.get(odd[0], 'missing')} in the model"
        )
        raise InputError(f"{path}: the weights do not fit the model: {len(odd)} tensors differ, {first}")


def card_of(checkpoint: Mapping[str, Any], path: str | Path) -> Card:
    """The card of a checkpoint.

    Raises:
        InputError: if it has none, or one that this version does not know.
    """
    card = checkpoint.get(CARD)
    if not isinstance(card, dict):
        raise InputError(f"{path}: has no pc3d card, only its weights can be used (--init_from with a config)")
    if card.get("format") != CARD_FORMAT:
        made_by = card.get("versions", {}).get("pc3d", "?")
        raise InputError(
            f"{path}: card format {card.get('format')} of pc3d {made_by}, this version reads {CARD_FORMAT}"
        )
    missing = [name for name in _REQUIRED if name not in card]
    if missing:
        raise InputError(f"{path}: its card has no '{missing[0]}'")
    return card


# Weights without a run -----------------------------------------------------------------------------------------------


@dataclass
class InitReport:
    """What :func:`init_weights` did: names of tensors by fate."""

    path: str
    loaded: list[str]
    missing: list[str]
    unused: list[str]
    reshaped: list[str]
    notes: list[str]

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.missing) + len(self.reshaped)
        lines = [f"{self.path}: {len(self.loaded)} of {total} tensors of the model initialised from it"]
        for title, names in (
            ("other shape, kept as initialised", self.reshaped),
            ("not in the file, kept as initialised", self.missing),
            ("in the file, not used", self.unused),
        ):
            if names:
                more = f" and {len(names) - 6} more" if len(names) > 6 else ""
                lines.append(f"  {title}: {', '.join(names[:6])}{more}")
        return "\n".join(lines + [f"  {note}" for note in self.notes])


def init_weights(task: PointTask, path: str | Path, strict: bool = False, trust: bool = False) -> InitReport:
    """Start a task from the weights of a checkpoint: backbone and heads, no optimizer, step count or loss buffers.

    A ``module.`` prefix is dropped; a file of a bare backbone (no ``backbone.`` prefix) is accepted.

    Args:
        task: receives the weights whose name and shape fit.
        path: any file that :func:`read_checkpoint` reads.
        strict: refuse the file unless every tensor fits.
        trust: see :func:`read_checkpoint`.

    Raises:
        InputError: if nothing fits, or not all with ``strict``.
    """
    checkpoint = read_checkpoint(path, trust)
    own = {name: value for name, value in task.state_dict().items() if not name.startswith(_LOSSES)}
    state = {name.removeprefix("module."): value for name, value in checkpoint["state_dict"].items()}
    if not own.keys() & state.keys():
        state = {f"backbone.{name}": value for name, value in state.items()}
    state = task.initial_state(state)
    fits = {name: state[name] for name in own.keys() & state.keys() if state[name].shape == own[name].shape}
    wrong = [n for n in own if n in state and n not in fits]
    report = InitReport(
        path=str(path),
        loaded=[name for name in own if name in fits],
        missing=[name for name in own if name not in state],
        unused=[name for name in state if name not in own and not name.startswith(_LOSSES)],
        reshaped=[f"{n} {tuple(state[n].shape)} (here {tuple(own[n].shape)})" for n in wrong],
        notes=_init_notes(task, checkpoint.get(CARD)),
    )
    if not fits or (strict and (report.missing or report.unused or report.reshaped)):
        raise InputError(f"{path}: does not fit the model: {' '.join(str(report).split())}")
    task.load_state_dict(fits, strict=False)
    return report


def _init_notes(task: PointTask, card: Card | None) -> list[str]:
    here: dict[str, Any] = {"class_names": task.class_names, **data_entries(task.pipeline)}
    if card is None:
        return []
    return [f"{n} differ: {_brief(card.get(n))} (here {_brief(v)})" for n, v in here.items() if card.get(n) != v]


# Exports -------------------------------------------------------------------------------------------------------------


def save_export(path: str | Path, checkpoint: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write weights and card of a checkpoint as ``.safetensors`` and ``.json``: no pickle, nothing of the training run.

    Losses of features, which only training uses, are left out.

    Args:
        path: the ``.safetensors`` file; the card gets the same name with ``.json``.
        checkpoint: as returned by :func:`read_checkpoint`.

    Returns:
        The two files.

    Raises:
        InputError: if the checkpoint has no card.
    """
    from safetensors.torch import save_file

    weights_path = Path(path).with_suffix(".safetensors")
    card = card_of(checkpoint, path)
    arguments = card["task"]["init_args"]
    if arguments.get("feature_criteria"):
        card = {**card, "task": {**card["task"], "init_args": {**arguments, "feature_criteria": None}}}
    state = {
        name: value.detach().cpu().clone().contiguous()
        for name, value in checkpoint["state_dict"].items()
        if not name.startswith("feature_criteria.")
    }
    with atomic_write(weights_path) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    write_json(weights_path.with_suffix(".json"), card)
    return weights_path, weights_path.with_suffix(".json")
