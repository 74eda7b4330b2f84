"""Run folders: names, numbering, resuming; nothing of an older run is overwritten."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pc3d.cli.runs import Run, free_folder, plan_run, run_name
from pc3d.errors import InputError


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PC3D_RUN_DIR", "")


def make_checkpoint(folder: str) -> Path:
    path = Path(folder, "checkpoints", "last.ckpt")
    path.parent.mkdir(parents=True)
    path.touch()
    return path


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("configs/lidarhd/semseg-spunet.yaml", "lidarhd-semseg-spunet"),
        ("mine/tiny.yaml", "tiny"),
        ("runs/tiny/config.yaml", "tiny"),
        ("runs/tiny-3/config.yaml", "tiny"),
    ],
)
def test_name_of_a_run_follows_its_config(config: str, name: str) -> None:
    assert run_name(Path(config)) == name


def test_a_new_run_takes_the_next_number() -> None:
    assert plan_run(Path("tiny.yaml"), None, None) == Run(Path("runs/tiny"))
    make_checkpoint("runs/tiny")
    assert plan_run(Path("tiny.yaml"), None, None) == Run(Path("runs/tiny-2"))
    make_checkpoint("runs/tiny-2")
    assert free_folder(Path("runs/tiny")) == Path("runs/tiny-3")


def test_a_named_folder_with_results_is_refused() -> None:
    make_checkpoint("mine")
    with pytest.raises(InputError, match="mine: holds the results of another run"):
        plan_run(Path("tiny.yaml"), "mine", None)


def test_last_is_the_newest_run_of_the_config() -> None:
    make_checkpoint("runs/other")
    make_checkpoint("runs/tiny")
    newest = make_checkpoint("runs/tiny-2")
    os.utime(newest, (4e9, 4e9))
    assert plan_run(Path("tiny.yaml"), None, "last") == Run(Path("runs/tiny-2"), newest, resumed=True)
    assert plan_run(Path("tiny.yaml"), "runs/tiny", "last").folder == Path("runs/tiny")


def test_last_without_a_run_says_where_it_looked() -> None:
    with pytest.raises(InputError, match=r"there is no runs/tiny/checkpoints/last\.ckpt to resume from"):
        plan_run(Path("tiny.yaml"), None, "last")


def test_a_checkpoint_from_elsewhere_starts_a_new_folder() -> None:
    Path("some.ckpt").touch()
    assert plan_run(Path("tiny.yaml"), None, "some.ckpt") == Run(Path("runs/tiny"), Path("some.ckpt"))
    own = make_checkpoint("runs/tiny")
    assert plan_run(Path("tiny.yaml"), "new", str(own)) == Run(Path("new"), own)
