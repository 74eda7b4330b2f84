"""Objects through the command line: each task is trained, tested and used on files."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pc3d.cli import main
from pc3d.datasets import ShapeNetPart, SyntheticShapes
from pc3d.datasets.synthetic import objects
from pc3d.io import read, write
from pc3d.points import Points

pytest.importorskip("h5py")
SSM = {
    "channels": [8, 8],
    "points": [24, 8],
    "radius": [0.4, 0.8],
    "project_channels": 8,
    "neighbours": 4,
    "state": 2,
    "groups": 4,
    "dense": [16],
}
TASKS: dict[str, dict[str, Any]] = {
    "Classification": {
        "dataset": {
            "class_path": "pc3d.datasets.SyntheticShapes",
            "init_args": {"train": 6, "val": 3, "test": 3, "points": 150, "classes": ["carton", "lamp", "pillow"]},
        },
        "model": {"test_augmentations": "scaling"},
    },
    "PartSegmentation": {
        "dataset": {"class_path": "pc3d.datasets.ShapeNetPart"},
        "model": {},
        "backbone": {"decoder": [8, 8], "categories": 16, "condition_hidden": 4, "condition_channels": 8},
        "inverse": True,
    },
    "Completion": {
        "dataset": {"class_path": "pc3d.datasets.MedPointS", "init_args": {"task": "completion"}},
        "model": {
            "decoder": {
                "class_path": "pc3d.models.heads.FoldingDecoder",
                "init_args": {"in_channels": 16, "points": 64, "hidden": [16, 16], "groups": 4},
            },
            "emd_points": 16,
        },
    },
}


@dataclass
class Trained:
    """A run of a task on its miniature."""

    folder: Path
    data: Path
    checkpoint: Path


def config(kind: str, root: Path | None) -> dict[str, Any]:
    entry = TASKS[kind]
    backbone = {"class_path": "pc3d.models.PointSSM", "init_args": {**SSM, **entry.get("backbone", {})}}
    count = {"class_path": "pc3d.data.transforms.FixedPoints", "init_args": {"count": 64}}
    select = {**count, "init_args": {"count": 64, "pick": "first", "inverse": entry.get("inverse", False)}}
    pipeline = {
        "grid_size": None,
        "features": ["coord"],
        "prepare": [{"class_path": "pc3d.data.transforms.UnitShape"}],
        "crop": [count],
        "select": [select],
    }
    pictures = {"class_path": "pc3d.tasks.callbacks.SavePictures", "init_args": {"clouds": 1}}
    data = {"dataset": entry["dataset"], "pipeline": pipeline, "batch_size": 3, "cache": False}
    trainer = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "callbacks": [pictures]}
    trainer |= {"limit_train_batches": 2, "limit_val_batches": 2, "limit_test_batches": 2}
    model = {"class_path": f"pc3d.tasks.{kind}", "init_args": {"backbone": backbone, **entry["model"]}}
    return {"trainer": trainer, "model": model, "data": data | ({"root": str(root)} if root else {})}


@pytest.fixture(scope="module", autouse=True)
def _no_confusion_matrices() -> Iterator[None]:
    """That of 50 parts takes seconds to draw, and is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pc3d.viz.figures.save_confusion_matrix", lambda path, *_: path)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    base = tmp_path_factory.mktemp("objects")
    objects.shapenetpart(base / "PartSegmentation", 0)
    objects.medpoints(base / "Completion", 0)
    runs = {}
    for kind in TASKS:
        root, path = base / kind, base / f"{kind}.yaml"
        path.write_text(yaml.safe_dump(config(kind, root if root.exists() else None)))
        folder = base / f"run-{kind}"
        assert main(["train", "--config", str(path), "--run_dir", str(folder)]) == 0
        runs[kind] = Trained(folder, root, folder / "checkpoints" / "best.ckpt")
    return runs


FIGURES = {
    "Classification": {"test/OA", "test/mAcc", "test/OA_vote", "val/OA"},
    "PartSegmentation": {"test/instance_mIoU", "test/class_mIoU", "val/instance_mIoU"},
    "Completion": {"test/CD", "test/EMD", "val/CD"},
}


@pytest.mark.parametrize("kind", TASKS)
def test_a_run_reports_its_scores(kind: str, trained: dict[str, Trained]) -> None:
    run = trained[kind]
    summary = json.loads((run.folder / "summary.json").read_text())
    assert FIGURES[kind] <= set(summary)
    assert any((run.folder / "pictures").glob("test-*.png"))
    assert run.checkpoint.is_file()


@pytest.mark.parametrize("kind", TASKS)
def test_the_test_command_repeats_the_figures(
    kind: str, trained: dict[str, Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained[kind]
    assert main(["test", "--ckpt", str(run.checkpoint), "--run_dir", str(tmp_path)]) == 0
    again, first = (json.loads((p / "summary.json").read_text()) for p in (tmp_path, run.folder))
    for name in (name for name in FIGURES[kind] if name.startswith("test/")):
        assert again[name] == pytest.approx(first[name], abs=1e-6), name
    assert "test" in capsys.readouterr().out


def cloud_file(folder: Path, seed: int = 0) -> Path:
    """A chair, somewhere in UTM coordinates."""
    points = SyntheticShapes(1, 0, 0, points=200, seed=seed, classes=["chair"]).load("train", 0)
    meta = [{"name": "chair", "origin": (500_000.0, 4_000_000.0, 100.0)}]
    return write(folder / f"chair{seed}.ply", Points(points.coord, meta=meta))


def test_classes_of_files_go_into_a_table(
    trained: dict[str, Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [cloud_file(tmp_path / "in", seed) for seed in (0, 1)]
    command = ["predict", str(tmp_path / "in"), "--ckpt", str(trained["Classification"].checkpoint)]
    assert main([*command, "-o", str(tmp_path / "classes.csv"), "--probabilities", "--tta", "scaling"]) == 0
    with (tmp_path / "classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [str(path) for path in files]
    for row in rows:
        shares = {name: float(row[f"prob_{name}"]) for name in ("carton", "lamp", "pillow")}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
        assert row["class"] == max(shares, key=lambda name: shares[name])
        assert float(row["confidence"]) == pytest.approx(max(shares.values()), abs=1e-6)
    assert main([*command, "-o", str(tmp_path / "classes.ply")]) == 2
    assert "name it .csv" in capsys.readouterr().err
    assert main([*command, "-o", str(tmp_path / "x.csv"), "--tile", "5"]) == 2
    assert "--tile: of no use, the checkpoint is a Classification" in capsys.readouterr().err


def test_parts_are_those_of_the_category_named(
    trained: dict[str, Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = cloud_file(tmp_path / "in"), tmp_path / "out.ply"
    command = ["predict", str(source), "--ckpt", str(trained["PartSegmentation"].checkpoint), "-o", str(target)]
    assert main([*command, "--category", "Chair"]) == 0
    labels = read(target).get("label")
    own = ShapeNetPart().categories
    assert own is not None
    assert set(labels.reshape(-1).tolist()) <= set(own["Chair"])
    assert len(labels) == 200
    target.unlink()
    assert main(command) == 2
    assert "--category is missing; the model knows Airplane" in capsys.readouterr().err
    assert main([*command, "--category", "Chiar"]) == 2
    assert "did you mean 'Chair'" in capsys.readouterr().err
    assert not target.exists()


def test_completed_shapes_lie_where_the_file_does(
    trained: dict[str, Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = cloud_file(tmp_path / "in"), tmp_path / "whole.ply"
    command = ["predict", str(source), "--ckpt", str(trained["Completion"].checkpoint), "-o", str(target)]
    assert main(command) == 0
    made, given = read(target), read(source)
    assert made.num_points == 64
    assert torch.tensor(made.meta[0]["origin"]).tolist() == pytest.approx(given.meta[0]["origin"], abs=10)
    place = made.coord.mean(0) + torch.tensor(made.meta[0]["origin"]) - torch.tensor(given.meta[0]["origin"])
    assert (place - given.coord.mean(0)).abs().max() < 2  # metres: in the file's frame, not in a unit sphere at 0
    assert main([*command[:-1], str(tmp_path / "b.ply"), "--probabilities"]) == 2
    assert "of no use, the checkpoint is a Completion" in capsys.readouterr().err


@pytest.mark.parametrize("kind", TASKS)
def test_an_export_predicts_like_its_checkpoint(kind: str, trained: dict[str, Trained], tmp_path: Path) -> None:
    source = cloud_file(tmp_path / "in")
    weights = tmp_path / "weights.safetensors"
    assert main(["export", str(trained[kind].checkpoint), str(weights)]) == 0
    suffix = ".csv" if kind == "Classification" else ".ply"
    more = ["--category", "Chair"] if kind == "PartSegmentation" else []
    results = []
    for number, model in enumerate((trained[kind].checkpoint, weights)):
        target = tmp_path / f"result{number}{suffix}"
        assert main(["predict", str(source), "--ckpt", str(model), "-o", str(target), *more]) == 0
        results.append(target.read_bytes())
    assert results[0] == results[1]


def test_a_broken_cloud_is_named(
    trained: dict[str, Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = cloud_file(tmp_path / "in")
    source.write_bytes(source.read_bytes()[:-40])
    shutil.copy(source, tmp_path / "in" / "other.ply")
    for kind, suffix in (("Classification", ".csv"), ("PartSegmentation", ""), ("Completion", "")):
        target = tmp_path / f"{kind}{suffix}"
        command = ["predict", str(tmp_path / "in"), "--ckpt", str(trained[kind].checkpoint), "-o", str(target)]
        assert main([*command, *(["--category", "Chair"] if kind == "PartSegmentation" else [])]) == 2
        assert "2 of 2 clouds could not be labelled" in capsys.readouterr().err
        assert not target.is_file()
