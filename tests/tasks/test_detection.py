"""The detection task and its score in several processes."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from pc3d.data.boxes import Boxes, box_tensor
from pc3d.data.module import PointDataModule
from pc3d.data.pipeline import Pipeline
from pc3d.data.transforms import CropBox
from pc3d.datasets import SyntheticStreets
from pc3d.metrics.kitti import KittiScores
from pc3d.models import PointPillars
from pc3d.models.heads import AnchorHead
from pc3d.nn.bev import BevGrid
from pc3d.points import Points
from pc3d.tasks import Detection

RANGE = [0, -12, -3, 44, 12, 1]


class Perfect(Detection):
    """Finds what is labelled."""

    def forward(self, points: Points) -> list[Boxes]:
        found = []
        for meta in points.meta:
            rows = [i for i, name in enumerate(meta["box_names"]) if name in self.class_names]
            labels = torch.tensor([self.class_names.index(meta["box_names"][i]) for i in rows])
            found.append(Boxes(box_tensor(meta)[rows].float(), labels, torch.linspace(1, 0.5, len(rows))))
        return found


def perfect() -> Perfect:
    pl.seed_everything(0, verbose=False)
    width = {"channels": 8, "neck_layers": (1, 1, 1), "neck_channels": (8, 8, 8), "up_channels": (8, 8, 8)}
    backbone = PointPillars(4, BevGrid(RANGE, [0.5, 0.5, 4]), **width)
    return Perfect(backbone, ["Car", "Pedestrian", "Cyclist"], AnchorHead())


def data(frames: int) -> PointDataModule:
    pipeline = Pipeline(None, ["coord", "strength"], crop=[CropBox(RANGE)])
    return PointDataModule(SyntheticStreets(1, frames, 0), pipeline, batch_size=1, cache=False, seed=0)


def test_boxes_beyond_the_range_are_not_looked_for() -> None:
    middle = [[20.0, 12, 1], [20, 0, -3.01], [44.01, 0, 0], [-0.01, 0, 0], [20, -12.01, 0], [0, -12, -3]]
    boxes = [[*place, 4.0, 2.0, 1.5, 0.0] for place in middle]
    cloud = Points(torch.zeros(1, 3), meta=[{"boxes": boxes, "box_names": ["Car"] * 6}])
    (found,) = perfect().truth(cloud)
    assert found.boxes[:, :3].tolist() == [middle[0], middle[5]]


@pytest.mark.filterwarnings("ignore:KITTI AP with few objects")
def test_a_frame_that_fills_up_a_batch_counts_for_nothing() -> None:
    task, (cloud,) = perfect(), iter(data(1).val_dataloader())
    padding = cloud.replace(meta=[{**cloud.meta[0], "padding": True}])
    found = task(cloud)
    task._score(Points.cat([cloud, padding]), [*found, *found], task.val_metrics)
    counted = task.val_metrics.compute().counted
    assert counted.sum() > 0
    task._score(padding, found, task.test_metrics)
    assert task.test_metrics.update_called
    assert task.test_metrics.compute().counted.sum() == 0
    task.val_metrics.reset()
    task._score(cloud, found, task.val_metrics)
    assert np.array_equal(task.val_metrics.compute().counted, counted)


def _validate(rank: int, folder: str, frames: int, processes: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if processes > 1:
        meeting = f"file://{folder}/meeting{frames}"
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    task, module = perfect(), data(frames)
    draws = list(range(rank, frames, processes)) or [0]
    for number in draws:
        cloud = module.samples("val")[number][1]
        if rank >= frames:
            cloud = cloud.replace(meta=[{**cloud.meta[0], "padding": True}])
        task._score(cloud, task(cloud), task.val_metrics)
    scores: KittiScores = task.val_metrics.compute()
    np.savez(f"{folder}/{frames}-{processes}-{rank}.npz", counted=scores.counted, **scores.r40)
    if processes > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("frames", [1, 5])
def test_processes_share_the_score(frames: int, tmp_path: Path) -> None:
    """Ten seconds; with one frame the second process has nothing but padding."""
    torch.multiprocessing.spawn(_validate, (str(tmp_path), frames, 2), nprocs=2)
    _validate(0, str(tmp_path), frames, 1)
    alone, *together = (np.load(tmp_path / f"{frames}-{name}.npz") for name in ("1-0", "2-0", "2-1"))
    assert alone["3d"].max() > 0
    for scores in together:
        for name in alone:
            np.testing.assert_array_equal(scores[name], alone[name])
