"""Shared fixtures: where the real sample scans and the golden files are (tests that need them skip without them)."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton: its kernels then run, slowly, on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples on every machine; HYPOTHESIS_PROFILE=explore looks for new ones.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU, kernels that are interpreted elsewhere run on it, and belong to ``-m gpu``."""
    if torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu_kernel"):
                item.add_marker(pytest.mark.gpu)


ROOT = Path(__file__).resolve().parent.parent


def _folder(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable, ROOT / default)).resolve()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of small real scans: ``$PC3D_DATA_DIR``, default ``../shared/data``."""
    folder = _folder("PC3D_DATA_DIR", "../shared/data")
    if not folder.is_dir():
        pytest.skip(f"no sample scans at {folder} (set PC3D_DATA_DIR)")
    return folder


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Outputs recorded from published implementations: ``$PC3D_GOLDEN_DIR``, default ``../shared/reference/golden``."""
    folder = _folder("PC3D_GOLDEN_DIR", "../shared/reference/golden")
    if not folder.is_dir():
        pytest.skip(f"no golden files at {folder} (set PC3D_GOLDEN_DIR)")
    return folder
