"""Golden files: recorded inputs, states and outputs of published implementations, one ``.npz`` per case."""

from __future__ import annotations

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Golden:
    """One golden file, read when a test asks for it.

    Arrays are named ``in/...`` (inputs), ``state/...`` (weights under their published names) and ``out/...`` (results);
    ``meta`` holds the configuration to build the module from.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name != "meta"}

    @cached_property
    def meta(self) -> dict[str, Any]:
        with np.load(self.path, allow_pickle=False) as file:
            return json.loads(str(file["meta"]))

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name].copy())

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Arrays whose name begins with ``prefix/``, by the rest of their name."""
        start = f"{prefix}/"
        return {name.removeprefix(start): self.tensor(name) for name in self.arrays if name.startswith(start)}

    def __repr__(self) -> str:
        return self.path.stem


def golden_files(family: str) -> list[Any]:
    """One test parameter per file ``<family>.npz`` or ``<family>-*.npz`` in ``$PC3D_GOLDEN_DIR``, named by its stem."""
    folder = ROOT / os.environ.get("PC3D_GOLDEN_DIR", "../shared/reference/golden")
    return [
        pytest.param(Golden(path), id=path.stem)
        for path in sorted({*folder.glob(f"{family}.npz"), *folder.glob(f"{family}-*.npz")})
    ]


def sorted_rows(coord: Tensor) -> Tensor:
    """Order that sorts ``[batch, x, y, z]`` rows lexicographically."""
    return torch.from_numpy(np.lexsort(coord.cpu().numpy().T[::-1]))
