"""A tiny run, trained once for all command-line tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pc3d.cli import main
from pc3d.io import write
from pc3d.points import Points

TINY = Path(__file__).with_name("tiny.yaml")


@dataclass
class Outcome:
    """What a command left: its exit status and what it printed."""

    status: int
    out: str
    err: str


Pc3d = Callable[..., Outcome]


@pytest.fixture
def pc3d(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pc3d:
    """Run a command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PC3D_DEBUG", raising=False)
    monkeypatch.delenv("PC3D_RUN_DIR", raising=False)

    def run(*words: object) -> Outcome:
        capfd.readouterr()
        status = main([str(word) for word in words])
        return Outcome(status, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of :data:`TINY`, trained and tested."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", "--config", str(TINY), "--run_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def checkpoint(trained: Path) -> Path:
    return trained / "checkpoints" / "best.ckpt"


@pytest.fixture
def cloud(tmp_path: Path) -> Path:
    """A PLY file with colours and a field of its own, far from the origin."""
    generator = torch.Generator().manual_seed(0)
    coord = torch.rand(500, 3, generator=generator) * 3
    color = torch.randint(0, 256, (500, 3), generator=generator).float()
    points = Points(
        coord,
        attrs={"color": color, "quality": torch.arange(500, dtype=torch.int32)},
        meta=[{"name": "cloud", "origin": (650_000.0, 6_200_000.0, 0.0)}],
    )
    return write(tmp_path / "cloud.ply", points)
