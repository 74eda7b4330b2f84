"""The package as a whole: imports stay light, point one way, and the configs stay readable."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = (
    "open3d",
    "spconv",
    "mamba_ssm",
    "torch_scatter",
    "triton",
    "laspy",
    "matplotlib",
    "sklearn",
    "h5py",
    "pytorch_lightning",
)


def test_import_needs_only_torch_and_numpy() -> None:
    code = f"import sys, pc3d; print([name for name in {OPTIONAL!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded_by_torch = subprocess.run(
        [sys.executable, "-c", code.replace(", pc3d", ", torch")], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout == loaded_by_torch.stdout


def test_imports_point_one_way() -> None:
    linter = Path(sys.executable).parent / "lint-imports"
    if not linter.exists() and shutil.which("lint-imports") is None:
        pytest.skip("import-linter is not installed")
    command = str(linter) if linter.exists() else "lint-imports"
    result = subprocess.run([command], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout
