"""A model and a data module small enough to train in a unit test."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pc3d import Points
from pc3d.data.dataset import PointDataset
from pc3d.data.module import PointDataModule
from pc3d.data.pipeline import Pipeline
from pc3d.data.transforms import CenterShift, NormalizeColor, RandomJitter, RandomRotate
from pc3d.nn.backbone import Backbone, FeatureInfo
from pc3d.tasks import SemanticSegmentation

CLASSES = ["floor", "wall", "chair"]
ALLOW = ("pc3d.", "tiny.")


class TinyBackbone(Backbone):
    """Point-wise perceptron with batch norm and dropout."""

    def __init__(self, in_channels: int = 6, width: int = 8) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, width
        self.feature_info = [FeatureInfo("stem", width, 1)]
        self.stem = nn.Sequential(nn.Linear(in_channels, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3))
        self.block = nn.Linear(width, width)

    def forward(self, points: Points) -> Tensor:
        self.check_input(points)
        return self.block(self.stem(points.get("feat")))

    def forward_features(self, points: Points) -> dict[str, Points]:
        return {"stem": points.with_attrs(feat=self.forward(points))}


class TinyDataset:
    def __init__(self) -> None:
        self.class_names = CLASSES
        self.label_map = {11: 0, 12: 1, 40: 2, 0: -1}
        self.palette = [(200, 200, 200), (90, 90, 200), (200, 30, 30)]


def cloud(seed: int, count: int = 200) -> Points:
    """Points in a 2 m cube; the class follows from the height, some points have none."""
    generator = torch.Generator().manual_seed(seed)
    coord = torch.rand(count, 3, generator=generator) * 2
    segment = (coord[:, 2] * 1.5).long()
    segment[::17] = -1
    color = (coord * 100).clamp(0, 255)
    return Points(coord, attrs={"color": color, "segment": segment}, meta=[{"name": f"cloud{seed}"}])


def pipeline() -> Pipeline:
    return Pipeline(0.25, ["coord", "color"], prepare=[CenterShift()], finish=[NormalizeColor()])


class TinyData(pl.LightningDataModule):
    """Four training, two validation and two test clouds; the same batches every epoch."""

    def __init__(self, batch_size: int = 2) -> None:
        super().__init__()
        self.dataset, self.pipeline, self.batch_size = TinyDataset(), pipeline(), batch_size
        self.class_names, self.in_channels = CLASSES, 6

    def train_dataloader(self) -> DataLoader:
        samples = [self.pipeline.train(cloud(i), torch.Generator().manual_seed(i)) for i in range(4)]
        return DataLoader(samples, batch_size=self.batch_size, collate_fn=Points.cat)

    def val_dataloader(self) -> DataLoader:
        return DataLoader([self.pipeline.evaluate(cloud(i)) for i in (10, 11)], batch_size=2, collate_fn=Points.cat)

    def test_dataloader(self) -> DataLoader:
        return DataLoader([cloud(i) for i in (20, 21)], batch_size=1, collate_fn=list)


def tiny_task(**options: object) -> SemanticSegmentation:
    pl.seed_everything(7, verbose=False)
    return SemanticSegmentation(TinyBackbone(), CLASSES, **options)


def trainer(folder: object, **options: object) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
    return pl.Trainer(default_root_dir=folder, **{**quiet, "max_epochs": 2, **options})


class TinyClouds(PointDataset):
    """The same clouds as a data set of the house."""

    def __init__(self, train: int = 6) -> None:
        self.train = train
        self.class_names = CLASSES

    def size(self, split: str) -> int:
        return {"train": self.train, "val": 2, "test": 2}[split]

    def name(self, split: str, index: int) -> str:
        return f"{split}{index}"

    def load(self, split: str, index: int) -> Points:
        return cloud({"train": 0, "val": 100, "test": 200}[split] + index)

    def fingerprint(self, split: str, index: int) -> str:
        return f"tiny {split} {index}"


def real_data(**options: object) -> PointDataModule:
    lines = Pipeline(
        0.25,
        ["coord", "color"],
        prepare=[CenterShift()],
        augment=[RandomRotate(axis="z", p=1.0), RandomJitter()],
        finish=[NormalizeColor()],
    )
    return PointDataModule(TinyClouds(), lines, **{"batch_size": 2, "cache": False, **options})
