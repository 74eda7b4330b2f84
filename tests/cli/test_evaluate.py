"""``pc3d test --save`` and ``pc3d evaluate``: what is saved scores as the test did, alone and merged over folds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pc3d.cli import main
from pc3d.data.prediction import Prediction
from pc3d.datasets import S3DIS, KITTIObject, ScanNet, SemanticKITTI, ShapeNetPart, SyntheticRooms
from pc3d.datasets.synthetic import objects, scenes
from pc3d.io.kitti_object import write_objects
from pc3d.metrics import Instances, SegmentationMetrics

TINY = Path(__file__).with_name("tiny.yaml")
pytestmark = pytest.mark.filterwarnings("ignore:.*damaged", "ignore:KITTI AP with few")


def config(folder: Path, dataset: dict[str, Any], instances: bool = False, grid: float = 0.3) -> Path:
    """The tiny experiment on another data set, without colours and augmentation."""
    content = yaml.safe_load(TINY.read_text())
    content["data"]["dataset"] = dataset
    content["data"]["pipeline"] = {"grid_size": grid, "features": ["coord"]}
    pictures = {"class_path": "pc3d.tasks.callbacks.SavePictures", "init_args": {"clouds": 0}}
    content["trainer"] |= {"callbacks": [pictures], "max_epochs": 1, "limit_val_batches": 0}
    if instances:
        head = {"class_path": "pc3d.models.heads.OffsetClustering", "init_args": {"radius": 0.4, "min_points": 5}}
        arguments = {**content["model"], "instance_head": head, "min_instance_points": 5}
        content["model"] = {"class_path": "pc3d.tasks.InstanceSegmentation", "init_args": arguments}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def evaluate(path: Path, folder: Path, *options: str) -> dict[str, float]:
    target = folder.parent / "figures.json"
    command = ["evaluate", "--config", str(path), "--predictions", str(folder), "--json", str(target), *options]
    assert main(command) == 0
    return json.loads(target.read_text())


@pytest.fixture(autouse=True)
def _no_confusion_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a second each to draw, and are tested elsewhere."""
    monkeypatch.setattr("pc3d.viz.figures.save_confusion_matrix", lambda path, *_: path)


@pytest.mark.parametrize("instances", [False, True])
def test_saved_predictions_score_as_the_test_did(instances: bool, tmp_path: Path) -> None:
    scenes.s3dis(tmp_path / "s3dis", 0)
    dataset = {"class_path": "pc3d.datasets.S3DIS", "init_args": {"root": str(tmp_path / "s3dis")}}
    path, run = config(tmp_path, dataset, instances), tmp_path / "run"
    assert main(["train", "--config", str(path), "--run_dir", str(run), "--test", "false"]) == 0
    checkpoint = next((run / "checkpoints").glob("*.ckpt"))
    saved = ["--save", str(tmp_path / "saved"), "--run_dir", str(tmp_path / "test")]
    assert main(["test", "--ckpt", str(checkpoint), *saved]) == 0
    tested = json.loads((tmp_path / "test" / "summary.json").read_text())
    figures = evaluate(path, tmp_path / "saved")
    assert figures["clouds"] == 1
    pairs = {"mIoU": "mIoU", "OA": "allAcc", "mAcc": "mAcc"} | (
        {name: name for name in ("AP", "AP50", "AP25", "mPrec", "mRec", "mCov", "mWCov")} if instances else {}
    )
    for ours, theirs in pairs.items():
        assert figures[ours] == pytest.approx(tested[f"test/{theirs}"], abs=1e-6), ours
    assert ("AP" in figures) == instances


def test_six_folds_are_scored_in_one_matrix(tmp_path: Path) -> None:
    scenes.s3dis(tmp_path / "s3dis", 0)
    rng, total = np.random.default_rng(0), SegmentationMetrics(13)
    for area in (1, 2, 5):
        fold = S3DIS(str(tmp_path / "s3dis"), test_area=area)
        for i in range(fold.size("test")):
            cloud = fold.load("test", i)
            wrong = torch.from_numpy(rng.random(cloud.num_points) < 0.3 * area / 5)
            segment = torch.where(wrong, 2, cloud.get("segment"))
            fold.save_prediction(tmp_path / "saved", cloud, Prediction(segment))
            total.update(segment, cloud.get("segment"))
    dataset = {"class_path": "pc3d.datasets.S3DIS", "init_args": {"root": str(tmp_path / "s3dis")}}
    path = config(tmp_path, dataset)
    figures = evaluate(path, tmp_path / "saved", "--split", "all")
    assert figures["clouds"] == 3
    assert figures["mIoU"] == pytest.approx(total.compute().miou)
    assert figures["OA"] == pytest.approx(total.compute().all_acc)
    single = evaluate(path, tmp_path / "saved", "--", "--data.dataset.init_args.test_area", "2")
    assert single["clouds"] == 1
    assert single["OA"] > figures["OA"]
    (tmp_path / "saved" / "Area_2_hallway_1.npz").unlink()
    assert main(["evaluate", "--config", str(path), "--predictions", str(tmp_path / "saved"), "--split", "all"]) == 2


def test_a_submission_needs_no_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenes.scannet(tmp_path / "scannet", 0)
    dataset = {"class_path": "pc3d.datasets.ScanNet", "init_args": {"root": str(tmp_path / "scannet")}}
    path, run = config(tmp_path, dataset), tmp_path / "run"
    assert main(["train", "--config", str(path), "--run_dir", str(run), "--test", "false"]) == 0
    checkpoint = next((run / "checkpoints").glob("*.ckpt"))
    command = ["test", "--ckpt", str(checkpoint), "--save", str(tmp_path / "submission"), "--run_dir"]
    assert main([*command, str(tmp_path / "test")]) == 0
    assert "no test cloud has labels" in capsys.readouterr().out
    data = ScanNet(str(tmp_path / "scannet"))
    written = sorted(p.name for p in (tmp_path / "submission" / "semantic").iterdir())
    assert written == [f"{data.name('test', 0)}.txt"]
    lines = (tmp_path / "submission" / "semantic" / written[0]).read_text().split()
    assert len(lines) == data.load("test", 0).num_points
    assert main([*command, str(tmp_path / "val"), "--data.test_split", "val"]) == 0
    assert "no test cloud has labels" not in capsys.readouterr().out
    assert len(list((tmp_path / "submission" / "semantic").iterdir())) == 2


def test_panoptic(tmp_path: Path) -> None:
    scenes.semantic_kitti(tmp_path / "raw", 0)
    data = SemanticKITTI(str(tmp_path / "raw"))
    for i in range(2):
        cloud = data.load("val", i)
        segment, instance = cloud.get("segment"), cloud.get("instance")
        classes = torch.zeros(int(instance.max()) + 1, dtype=torch.int64)  # cars
        found = Instances.of(instance, classes, torch.ones(len(classes)))
        data.save_prediction(tmp_path / "saved", cloud, Prediction(segment, found))
    dataset = {"class_path": "pc3d.datasets.SemanticKITTI", "init_args": {"root": str(tmp_path / "raw")}}
    path = config(tmp_path, dataset)
    figures = evaluate(path, tmp_path / "saved", "--split", "val")
    assert figures["mIoU_present"] == pytest.approx(1)
    assert figures["PQ_stuff"] == pytest.approx(len(segment[segment > 7].unique()) / 11)
    assert figures["PQ_things"] == pytest.approx(1 / 8)


def test_parts(tmp_path: Path) -> None:
    objects.shapenetpart(tmp_path / "raw", 0)
    data = ShapeNetPart(str(tmp_path / "raw"))
    for i in range(data.size("test")):
        cloud = data.load("test", i)
        own = data.categories[list(data.categories)[int(cloud.get("category")[0])]]
        data.save_prediction(tmp_path / "saved", cloud, Prediction(torch.full((cloud.num_points,), own[0])))
    dataset = {"class_path": "pc3d.datasets.ShapeNetPart", "init_args": {"root": str(tmp_path / "raw")}}
    figures = evaluate(config(tmp_path, dataset), tmp_path / "saved")
    assert 0 < figures["instance_mIoU"] < figures["OA"] < 1


def test_boxes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenes.kitti_object(tmp_path / "raw", 3)
    data = KITTIObject(str(tmp_path / "raw"))
    for i in range(data.size("train")):
        truth = data.objects(data.scenes("train")[i])
        assert truth is not None
        scored = type(truth)(**{**vars(truth), "scores": np.full(len(truth), 0.5)})
        write_objects(tmp_path / "saved" / f"{data.name('train', i)}.txt", scored)
    dataset = {"class_path": "pc3d.datasets.KITTIObject", "init_args": {"root": str(tmp_path / "raw")}}
    path = config(tmp_path, dataset)
    figures = evaluate(path, tmp_path / "saved", "--split", "train")
    assert figures["Car_3d_R11_easy"] == figures["Car_bbox_R11_easy"] > 0
    name = next(scene.name for scene in data.scenes("train") if data.objects(scene))
    label = tmp_path / "raw" / "training" / "label_2" / f"{name}.txt"
    (tmp_path / "saved" / f"{name}.txt").write_text(label.read_text())
    command = ["evaluate", "--config", str(path), "--predictions", str(tmp_path / "saved"), "--split"]
    assert main([*command, "train"]) == 2
    assert "score in a 16th" in capsys.readouterr().err
    assert main([*command, "test"]) == 2
    assert "no public labels" in capsys.readouterr().err


def test_what_cannot_be_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--config", str(TINY), "--predictions", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["evaluate", "--config", str(TINY), "--predictions", str(tmp_path)]) == 2
    assert f"{SyntheticRooms(4, 1, 1, points=2000).name('test', 0)}.npz: is missing" in capsys.readouterr().err
