"""What a run was: code revision, environment and figures, written beside its checkpoints."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

import pc3d
from pc3d.io.atomic import atomic_write


@cache
def git_revision() -> str | None:
    """Commit of the source tree this package runs from, with ``+`` for local changes; None outside a git checkout."""
    here = Path(pc3d.__file__).parent
    try:
        revision = _git("rev-parse", "HEAD", folder=here)
        return revision + ("+" if _git("status", "--porcelain", "--untracked-files=no", folder=here) else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str, folder: Path) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def versions() -> dict[str, str]:
    """Versions of the packages which decide what a checkpoint means."""
    return {
        "pc3d": pc3d.__version__,
        "torch": str(torch.__version__),
        "pytorch_lightning": pl.__version__,
        "python": platform.python_version(),
    }


def environment() -> dict[str, Any]:
    """Versions, machine and command line of this process, as plain values."""
    return {
        **versions(),
        "git_revision": git_revision(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "command": list(sys.argv),
    }


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file; an older one is replaced only when the new one is complete."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")
