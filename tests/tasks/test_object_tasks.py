"""Tasks on whole objects under the real trainer: classification, part segmentation, completion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from tiny import TinyBackbone, trainer
from torch import Tensor

from pc3d import InputError, Points
from pc3d.data.dataset import PointDataset
from pc3d.data.module import PointDataModule
from pc3d.data.pipeline import Pipeline
from pc3d.data.transforms import FixedPoints, RandomScale, UnitShape
from pc3d.datasets import SyntheticShapes
from pc3d.models import PointSSM
from pc3d.models.heads import FoldingDecoder, MLPHead
from pc3d.tasks import (
    Classification,
    Completion,
    OptimizerConfig,
    PartSegmentation,
    PointTask,
    classify,
    complete,
    load_task,
    predict_cloud,
)
from pc3d.tasks.callbacks import RunRecord, SavePictures, ScoreProgressBar, ScoreTable
from pc3d.tasks.classification import cloud_labels

CATEGORIES = {"ball": [0, 1], "stick": [2], "cross": [3, 4, 5]}
FAST = OptimizerConfig(lr=0.02)


class Shapes(PointDataset):
    """Shapes of three categories with parts by height, or pairs to complete."""

    def __init__(self, labels: str = "parts", clouds: int = 9) -> None:
        self.labels, self.clouds = labels, clouds
        self.class_names = [f"part {i}" for i in range(6)] if labels == "parts" else list(CATEGORIES)
        self.categories = CATEGORIES if labels == "parts" else None

    def size(self, split: str) -> int:
        return self.clouds if split == "train" else 3

    def name(self, split: str, index: int) -> str:
        return f"{split}{index}"

    def fingerprint(self, split: str, index: int) -> str:
        return f"{self.labels} {split} {index}"

    def load(self, split: str, index: int) -> Points:
        generator = torch.Generator().manual_seed(1000 * len(split) + index)
        category = index % 3
        shape = torch.tensor([[1.0, 1, 1], [0.1, 0.1, 2], [2, 2, 0.2]])[category]
        coord = (torch.rand(80 + index, 3, generator=generator) - 0.5) * shape * 10 + 3
        kind = torch.full((len(coord),), category)
        meta = [{"name": self.name(split, index)}]
        if self.labels == "parts":
            own = list(CATEGORIES.values())[category]
            rank = coord[:, 2].argsort().argsort() * len(own) // len(coord)
            return Points(coord, attrs={"segment": torch.tensor(own)[rank], "category": kind}, meta=meta)
        there = coord[coord[:, 0] < coord[:, 0].quantile(0.8)]
        both = torch.cat([there, coord])
        kind = torch.full((len(both),), category)
        target = (torch.arange(len(both)) >= len(there)).long()
        return Points(both, attrs={"segment": kind, "category": kind, "target": target}, meta=meta)


def classification_data(**options: Any) -> PointDataModule:
    clouds = SyntheticShapes(24, 6, 6, points=150, classes=["carton", "lamp", "pillow"], occlusion=0.0)
    lines = Pipeline(
        None,
        ["coord"],
        prepare=[UnitShape()],
        augment=[RandomScale((0.8, 1.2), anisotropic=True)],
        crop=[FixedPoints(64)],
        select=[FixedPoints(64, "farthest")],
    )
    return PointDataModule(clouds, lines, **{"batch_size": 6, "val_batch_size": 3, "cache": False, **options})


def shape_data(labels: str = "parts", **options: Any) -> PointDataModule:
    lines = Pipeline(
        None,
        ["coord"],
        prepare=[UnitShape()],
        crop=[FixedPoints(60)],
        select=[FixedPoints(60, "farthest", inverse=labels == "parts")],
    )
    return PointDataModule(Shapes(labels), lines, **{"batch_size": 3, "cache": False, **options})


def classifier(**options: Any) -> Classification:
    pl.seed_everything(3, verbose=False)
    return Classification(TinyBackbone(3, 16), ["carton", "lamp", "pillow"], **{"optimizer": FAST, **options})


def parts_task(**options: Any) -> PartSegmentation:
    pl.seed_everything(3, verbose=False)
    names = [f"part {i}" for i in range(6)]
    return PartSegmentation(TinyBackbone(3, 16), names, CATEGORIES, **{"optimizer": FAST, **options})


SSM = {"channels": (8, 8), "points": (24, 8), "project_channels": 8, "neighbours": 4, "radius": (0.4, 0.8), "state": 2,
       "groups": 4, "dense": (16,)}  # fmt: skip


def completion_task(**options: Any) -> Completion:
    pl.seed_everything(3, verbose=False)
    backbone = PointSSM(**SSM, categories=3, condition_hidden=4, condition_channels=8)
    decoder = FoldingDecoder(16, points=64, hidden=(16, 16), groups=4, condition=8)
    return Completion(backbone, list(CATEGORIES), decoder, **{"optimizer": FAST, "emd_points": 32, **options})


def test_classification_learns_and_votes(tmp_path: Path) -> None:
    task, data = classifier(test_augmentations="scaling"), classification_data()
    run = trainer(tmp_path, max_epochs=12)
    run.fit(task, datamodule=data)
    assert run.callback_metrics["val/OA"] >= 0.8
    run.test(task, datamodule=data, verbose=False)
    figures = {name: float(value) for name, value in run.callback_metrics.items()}
    assert figures["test/OA"] >= 0.8
    assert {"test/mAcc", "test/OA_vote", "test/mAcc_vote", *(f"test/acc/{n}" for n in task.class_names)} <= set(figures)
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded, lines, card = load_task(tmp_path / "a.ckpt", allow=("pc3d.", "tiny."))
    assert isinstance(loaded, Classification)
    assert (card["grid_size"], card["class_names"]) == (None, task.class_names)
    clouds = [data.dataset.load("test", i) for i in range(6)]
    right = 0
    for cloud in clouds:
        values = classify(loaded, lines, cloud)
        assert float(values.sum()) == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(values, classify(task, lines, cloud))
        right += int(values.argmax()) == int(cloud.get("segment")[0])
    assert figures["test/OA"] == pytest.approx(right / 6)
    assert not task.training or loaded.training is False


def test_validation_and_test_agree_on_the_same_clouds(tmp_path: Path) -> None:
    task, data = classifier(), classification_data()
    data.dataset.load = lambda split, i, load=data.dataset.load: load("val", i)
    run = trainer(tmp_path, max_epochs=2)
    run.fit(task, datamodule=data)
    seen = task.scores["val"]
    run.test(task, datamodule=data, verbose=False)
    assert torch.equal(task.scores["test"].confusion, seen.confusion)
    assert "test/OA_vote" not in run.callback_metrics


def test_a_cloud_has_one_class() -> None:
    points = Points(torch.rand(4, 3), torch.tensor([0, 2, 4]), {"segment": torch.tensor([1, 1, 0, 0])})
    assert cloud_labels(points).tolist() == [1, 0]
    with pytest.raises(InputError, match="several classes"):
        cloud_labels(points.with_attrs(segment=torch.tensor([1, 0, 0, 0])))
    with pytest.raises(InputError, match="without points"):
        cloud_labels(points.replace(offsets=torch.tensor([0, 4, 4])))


def test_parts_are_those_of_the_category(tmp_path: Path) -> None:
    task, data = parts_task(test_augmentations="scaling"), shape_data()
    run = trainer(tmp_path, max_epochs=20)
    run.fit(task, datamodule=data)
    assert run.callback_metrics["val/instance_mIoU"] > 0.6
    run.test(task, datamodule=data, verbose=False)
    assert run.callback_metrics["test/class_mIoU"] > 0.6
    assert {"test/category_mIoU/ball", "test/mIoU", "test/instance_mIoU"} <= set(run.callback_metrics)
    cloud = data.dataset.load("test", 1)
    for category, own in enumerate(CATEGORIES.values()):
        asked = cloud.with_attrs(category=torch.full((cloud.num_points,), category))
        values = predict_cloud(task, data.pipeline, asked)
        assert set(values.argmax(1).tolist()) <= set(own)
        others = [part for part in range(6) if part not in own]
        assert float(values[:, others].abs().max()) == 0
        torch.testing.assert_close(values.sum(1), torch.ones(len(values)))
    fast = predict_cloud(task, data.pipeline, cloud, mode="fast")
    torch.testing.assert_close(fast, predict_cloud(task, data.pipeline, cloud))
    with pytest.raises(InputError, match="3 categories"):
        predict_cloud(task, data.pipeline, cloud.with_attrs(category=torch.full((cloud.num_points,), 7)))
    with pytest.raises(InputError, match="'category' is missing"):
        predict_cloud(task, data.pipeline, cloud.without_attrs("category"))
    for wrong in ({"a": [0, 9]}, {"a": []}, {}):
        with pytest.raises(InputError, match=r"model\.categories"):
            PartSegmentation(TinyBackbone(3), ["x", "y"], wrong)


def test_a_head_that_does_not_fit_is_refused() -> None:
    backbone = TinyBackbone(3)
    for channels, classes, message in (
        (backbone.out_channels + 1, 2, r"model\.head\.in_channels: \d+, but TinyBackbone gives \d+"),
        (backbone.out_channels, 3, r"model\.head\.num_classes: 3, but there are 2 classes"),
    ):
        with pytest.raises(InputError, match=message):
            Classification(backbone, ["x", "y"], MLPHead(channels, classes))


def test_completion_learns_in_the_frame_of_its_input(tmp_path: Path) -> None:
    task, data = completion_task(), shape_data("pairs")
    run = trainer(tmp_path, max_epochs=1)
    run.fit(task, datamodule=data)
    before = float(run.callback_metrics["val/CD"])
    task = completion_task()
    run = trainer(tmp_path, max_epochs=12)
    run.fit(task, datamodule=data)
    assert float(run.callback_metrics["val/CD"]) < 0.85 * before
    run.test(task, datamodule=data, verbose=False)
    figures = run.callback_metrics
    assert {"test/CD", "test/CD_squared", "test/EMD", "test/CD/ball"} <= set(figures)
    assert float(figures["test/EMD"]) > 0
    cloud = data.dataset.load("test", 1)
    made = complete(task, data.pipeline, cloud.select(cloud.get("target") == 0))
    assert made.shape == (64, 3)
    torch.testing.assert_close(made.mean(0), cloud.coord.mean(0), atol=3.0, rtol=0)  # not around the origin
    with pytest.raises(InputError, match=r"decoder\.in_channels is 12"):
        Completion(TinyBackbone(3), ["a"], FoldingDecoder(12, points=16, hidden=(4,), groups=1))
    with pytest.raises(InputError, match="no points that are wanted"):
        task.training_step(data.pipeline.train(cloud.with_attrs(target=torch.zeros(cloud.num_points).long())), 0)


KINDS: dict[str, tuple[Callable[..., PointTask], Callable[..., PointDataModule]]] = {
    "classification": (classifier, classification_data),
    "parts": (parts_task, shape_data),
    "completion": (completion_task, lambda **options: shape_data("pairs", **options)),
}


def weights(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_ends_bit_for_bit_as_an_unbroken_one(kind: str, tmp_path: Path) -> None:
    make, data = KINDS[kind]
    ends = []
    for name in ("whole", "broken"):
        saver = ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=1, save_top_k=-1)
        run = trainer(tmp_path, max_epochs=2, callbacks=[saver])
        resume = tmp_path / "whole" / "step=2.ckpt" if name == "broken" else None
        run.fit(make(ema_decay=0.9), datamodule=data(), ckpt_path=resume)
        ends.append(weights(max((tmp_path / name).iterdir(), key=lambda path: path.stat().st_mtime_ns)))
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("kind", KINDS)
def test_reports_of_every_task(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, data = KINDS[kind]
    callbacks = [ScoreTable(), SavePictures(clouds=2), RunRecord(), ScoreProgressBar()]
    run = trainer(tmp_path, max_epochs=1, callbacks=callbacks, enable_progress_bar=True)
    task, module = make(), data()
    run.fit(task, datamodule=module)
    run.test(task, datamodule=module, verbose=False)
    pictures = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert len([name for name in pictures if name.startswith("test-") and name != "test-confusion.png"]) == 2
    assert ("val-confusion.png" in pictures) == (kind != "completion")
    assert {"classification": "OA", "parts": "instance mIoU", "completion": "CD"}[kind] in capsys.readouterr().out
    assert task.monitor[0].replace("val", "test") in run.callback_metrics
    run.save_checkpoint(tmp_path / "end.ckpt")
    loaded, _, card = load_task(tmp_path / "end.ckpt", allow=("pc3d.", "tiny."))
    assert type(loaded) is type(task)
    assert "optimizer" not in card["task"]["init_args"]
