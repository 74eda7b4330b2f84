"""Run folders: ``runs/<name>/`` with ``checkpoints/``, ``logs/``, ``pictures/``, ``config.yaml``, ``summary.json``."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pytorch_lightning.utilities import rank_zero_only

from pc3d.errors import InputError

CHECKPOINTS = "checkpoints"


@dataclass
class Run:
    """A run's folder, and the checkpoint it starts from (``resumed``: one of its own)."""

    folder: Path
    checkpoint: Path | None = None
    resumed: bool = False

    @cached_property
    def logs(self) -> Path:
        """Folder of the logs, a new one where a run is resumed."""
        return free_folder(self.folder / "logs") if self.resumed else self.folder / "logs"

    def discard(self) -> None:
        """After a failure: remove what the call has begun, unless it has written figures or checkpoints."""
        if (self.logs / "metrics.csv").is_file():
            return
        if self.resumed:
            shutil.rmtree(self.logs, ignore_errors=True)
        elif not any((self.folder / CHECKPOINTS).glob("*.ckpt")):
            shutil.rmtree(self.folder, ignore_errors=True)


def run_name(config: Path) -> str:
    """Name of a run: folder and name of the config, e.g. ``lidarhd-semseg-spunet``; of a saved one that of its run."""
    if config.stem == "config":
        return re.sub(r"-\d+$", "", config.resolve().parent.name)
    parent = config.resolve().parent.name
    return f"{parent}-{config.stem}" if config.resolve().parent.parent.name == "configs" else config.stem


def free_folder(folder: Path) -> Path:
    """``folder``, or the first of ``folder-2``, ``folder-3``, ... that is not there yet or empty."""
    candidate, number = folder, 1
    while candidate.exists() and (not candidate.is_dir() or any(candidate.iterdir())):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def plan_run(config: Path, run_dir: str | None, ckpt_path: str | None) -> Run:
    """Where a training run writes, and what it goes on from.

    A checkpoint that lies in a run folder continues that run, unless ``run_dir`` names another folder.

    Raises:
        InputError: if there is no checkpoint to resume from, or ``run_dir`` holds another run's results.
    """
    started = os.environ.get("PC3D_RUN_DIR")
    checkpoint = None
    if ckpt_path is not None:
        checkpoint = _last_checkpoint(config, run_dir) if ckpt_path == "last" else Path(ckpt_path)
    own = None if checkpoint is None else run_of(checkpoint)
    if own is not None and (run_dir is None or own.resolve() == Path(run_dir).resolve()):
        return Run(own, checkpoint, resumed=True)
    if started and (
        getattr(rank_zero_only, "rank", None) or 0
    ):  # a process of a multi-device run: the first one has chosen
        return Run(Path(started), checkpoint)
    folder = free_folder(Path("runs") / run_name(config)) if run_dir is None else Path(run_dir)
    if folder.is_file():
        raise InputError(f"--run_dir {folder}: is a file; name a folder")
    if free_folder(folder) != folder:
        raise InputError(
            f"{folder}: holds the results of another run: resume it with --ckpt_path last, or choose another --run_dir"
        )
    os.environ["PC3D_RUN_DIR"] = str(folder)
    return Run(folder, checkpoint)


def _last_checkpoint(config: Path, run_dir: str | None) -> Path:
    """The newest ``last.ckpt`` of the runs of a config (of ``run_dir`` only, if given)."""
    base = Path("runs") / run_name(config)
    folders = [Path(run_dir)] if run_dir else [base, *base.parent.glob(f"{base.name}-[0-9]*")]
    found = [path for folder in folders if (path := folder / CHECKPOINTS / "last.ckpt").is_file()]
    if not found:
        raise InputError(f"--ckpt_path last: there is no {folders[0] / CHECKPOINTS / 'last.ckpt'} to resume from")
    return max(found, key=lambda path: path.stat().st_mtime)


def run_of(checkpoint: Path) -> Path | None:
    """The run folder a checkpoint lies in, None if it lies elsewhere."""
    folder = checkpoint.resolve().parent
    if folder.name != CHECKPOINTS:
        return None
    here = Path.cwd()
    return folder.parent.relative_to(here) if folder.parent.is_relative_to(here) else folder.parent
