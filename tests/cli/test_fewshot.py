"""``pc3d fewshot``: all folds run, are summed up, and are not run twice."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import yaml

from pc3d.cli import main

SHAPES = Path(__file__).parents[2] / "configs" / "synthetic_shapes" / "cls-pcm-tiny.yaml"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    content = yaml.safe_load(SHAPES.read_text())
    shapes = {"train": 28, "val": 0, "test": 28, "points": 64}
    content["data"]["dataset"] = {
        "class_path": "pc3d.datasets.FewShot",
        "init_args": {
            "dataset": {"class_path": "pc3d.datasets.SyntheticShapes", "init_args": shapes},
            "queries": 2,
        },
    }
    content["data"]["cache"] = False
    for place in ("crop", "select"):
        content["data"]["pipeline"][place][0]["init_args"]["count"] = 64
    content["trainer"] |= {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False}
    content["trainer"]["callbacks"] = [{"class_path": "pc3d.tasks.callbacks.SavePictures", "init_args": {"clouds": 0}}]
    content["model"]["init_args"].pop("test_augmentations")
    content["model"]["init_args"]["backbone"]["init_args"] |= {"channels": [16, 32, 64], "embed_channels": 16}
    content["model"]["init_args"]["head"]["init_args"] |= {"in_channels": 64, "num_classes": 9}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_folds_are_run_once_and_summed_up(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["fewshot", "--config", str(config), "--way", "3", "--shot", "2", "--run_dir", str(tmp_path / "run")]
    assert main([*command, "--folds", "1"]) == 0
    assert "3-way 2-shot" in capsys.readouterr().out
    base = tmp_path / "run" / "3way-2shot"
    stamp = (base / "fold-00" / "run.json").stat().st_mtime_ns
    (base / "fold-01").mkdir()
    (base / "fold-01" / "summary.json").write_text("{}")  # a fold that was stopped
    content = yaml.safe_load(config.read_text())
    head = content["model"]["init_args"].pop("head")  # given on the command line instead
    config.write_text(yaml.safe_dump(content))
    key = "--model.init_args.head"
    words = [key, head["class_path"], *(f"{key}.init_args.{name}={value}" for name, value in head["init_args"].items())]
    assert main([*command, "--folds", "2", "--", "--seed_everything", "1", *words]) == 0
    assert (base / "fold-00" / "run.json").stat().st_mtime_ns == stamp
    folds = [json.loads((base / name / "summary.json").read_text()) for name in ("fold-00", "fold-01-2")]
    summary = json.loads((base / "summary.json").read_text())
    assert summary["best"] == [fold["test/OA"] for fold in folds]
    assert summary["last"] == [fold["val/OA"] for fold in folds]
    best = summary["best epoch (as published)"]
    assert best["mean"] == pytest.approx(100 * statistics.fmean(summary["best"]))
    assert best["deviation"] == pytest.approx(100 * statistics.pstdev(summary["best"]))
    saved = yaml.safe_load((base / "fold-01-2" / "config.yaml").read_text())
    assert saved["data"]["dataset"]["init_args"]["fold"] == 1
    assert saved["seed_everything"] == 1
    assert saved["model"]["init_args"]["head"]["init_args"]["num_classes"] == 3


def test_what_cannot_be_run(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["fewshot", "--config", str(config), "--run_dir", str(tmp_path / "run")]
    assert main([*command, "--folds", "0"]) == 2
    assert main([*command, "--way", "15"]) == 2
    assert "15-way episodes need 15" in capsys.readouterr().err
