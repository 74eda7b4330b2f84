"""The tuner: the fastest candidate, remembered; candidates that fail are passed over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pc3d.ops import tune


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PC3D_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tune, "_chosen", {})
    tune._stored.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def test_the_fastest_is_taken_and_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timed = []

    def fake(launch: object, blocks: tuple[int, ...]) -> float:
        timed.append(blocks)
        return {1: 3.0, 2: 1.0, 3: float("inf")}[blocks[0]]

    monkeypatch.setattr(tune, "milliseconds", fake)
    candidates = [(1, 1), (2, 1), (3, 1)]
    device = torch.device("cpu")
    assert tune.fastest(("conv", 8), candidates, lambda blocks: None, device) == (2, 1)
    assert tune.fastest(("conv", 8), candidates, lambda blocks: None, device) == (2, 1)
    assert timed == candidates
    tune._chosen.clear()
    tune._stored.cache_clear()
    assert tune.fastest(("conv", 8), candidates, lambda blocks: None, device) == (2, 1)  # from the file
    assert timed == candidates
    (entry,) = json.loads((tmp_path / "tuning.json").read_text())
    assert "a device" in entry
    monkeypatch.setenv("PC3D_TUNE", "0")
    assert tune.fastest(("other",), candidates, lambda blocks: None, device) == (1, 1)


def test_a_damaged_memory_is_timed_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tuning.json").write_text("{broken")
    monkeypatch.setattr(tune, "milliseconds", lambda launch, blocks: float(blocks[0]))
    assert tune.fastest(("conv",), [(4,), (2,)], lambda blocks: None, torch.device("cpu")) == (2,)


@pytest.mark.gpu
def test_real_launches_are_timed() -> None:
    x = torch.randn(512, 512, device="cuda")
    assert 0 < tune.milliseconds(lambda blocks: x @ x, (1,)) < 100
    assert tune.milliseconds(lambda blocks: 1 / 0, (1,)) == float("inf")
