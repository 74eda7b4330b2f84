"""The one dispatch setting: what a choice switches on, and what a wrong one says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from pc3d.errors import InputError
from pc3d.ops import backend
from pc3d.ops.backend import cpu_kernels, on_cpu_kernels, on_spconv, on_triton, use_backend

CLOUD = torch.zeros(4, 3)


@pytest.fixture
def everything_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backend, "_is_installed", lambda name: True)
    backend._checked.cache_clear()
    yield
    backend._checked.cache_clear()


@pytest.mark.usefixtures("everything_installed")
@pytest.mark.parametrize(
    ("choice", "kernels", "triton", "spconv"),
    [
        ("auto", True, False, False),
        ("reference", False, False, False),
        ("triton", False, True, False),
        ("spconv", True, False, True),
    ],
)
def test_what_serves_a_cpu_tensor(choice: backend.Backend, kernels: bool, triton: bool, spconv: bool) -> None:
    with use_backend(choice):
        assert on_cpu_kernels(CLOUD) == kernels
        assert (cpu_kernels(CLOUD) is None) == (choice == "reference")
        assert on_triton(CLOUD) == triton
        assert on_spconv(CLOUD) == spconv
    assert on_cpu_kernels(CLOUD)


@pytest.mark.parametrize("package", ["triton", "spconv"])
def test_missing_package_is_one_error(monkeypatch: pytest.MonkeyPatch, package: backend.Backend) -> None:
    monkeypatch.setattr(backend, "_is_installed", lambda name: False)
    backend._checked.cache_clear()
    with pytest.raises(InputError, match=f"needs the package {package}, which is not"), use_backend(package):
        pass
    assert on_cpu_kernels(CLOUD)
    backend._checked.cache_clear()


def test_wrong_name_in_the_environment() -> None:
    """``import pc3d`` works; the first op that asks says what is wrong."""
    lines = (
        "import torch, pc3d",
        "from pc3d.ops.segment import segment_sum",
        "segment_sum(torch.ones(2, 1), torch.tensor([0, 2]))",
    )
    environment = {**os.environ, "PC3D_BACKEND": "bogus"}
    run = subprocess.run([sys.executable, "-c", "\n".join(lines)], env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("pc3d.errors.InputError: backend 'bogus'")
    assert last.endswith("choose from auto, reference, triton, spconv")
