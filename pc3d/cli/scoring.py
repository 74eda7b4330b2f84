"""What ``pc3d evaluate`` counts: saved predictions against the labels of a data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pc3d.data.dataset import PointDataset, Split
from pc3d.datasets import SemanticKITTI
from pc3d.datasets.kitti_frames import CLASSES, KittiFrames
from pc3d.errors import InputError
from pc3d.io.kitti_object import read_objects
from pc3d.metrics import (
    InstanceAveragePrecision,
    InstanceCoverage,
    PanopticQuality,
    SegmentationMetrics,
    ShapePartIoU,
)
from pc3d.metrics.kitti import DIFFICULTIES, kitti_ap
from pc3d.tasks import InstanceSegmentation
from pc3d.tasks.base import PointTask
from pc3d.tasks.tables import score_table, value_table

Figures = dict[str, float]


def clouds_of(dataset: PointDataset, splits: Sequence[Split]) -> Iterator[tuple[Split, int]]:
    """Every cloud of the splits once, though two splits may share some."""
    seen = set()
    for split in splits:
        for index in range(dataset.size(split)):
            name = dataset.name(split, index)
            if name not in seen:
                seen.add(name)
                yield split, index


def evaluate_points(
    dataset: PointDataset, task: PointTask, clouds: list[tuple[Split, int]], folder: Path
) -> tuple[Figures, list[Table]]:
    """Figures and tables of classes, and of instances, panoptic segments and parts where the data set has them."""
    semantic = SegmentationMetrics(dataset.num_classes)
    categories = dataset.categories or {}
    parts = ShapePartIoU(list(categories.values()))
    things = task.precision.things if isinstance(task, InstanceSegmentation) else torch.tensor(dataset.things or [])
    least = task.precision.min_points if isinstance(task, InstanceSegmentation) else 100
    precision, coverage = InstanceAveragePrecision(things, least), InstanceCoverage(things)
    panoptic = PanopticQuality(things)
    bar = Console(stderr=True)
    for split, index in track(clouds, "Scoring", console=bar, transient=True, disable=not bar.is_terminal):
        cloud = dataset.load(split, index)
        found, segment = dataset.load_prediction(folder, cloud), cloud.get("segment")
        semantic.update(found.segment, segment)
        if categories:
            parts.update(found.segment, segment, int(cloud.get("category")[0]))
        if found.instances is None or len(things) == 0 or "instance" not in cloud:
            continue
        instance = cloud.get("instance")
        if isinstance(dataset, SemanticKITTI):
            panoptic.update(found.segment, found.instances.labels(cloud.num_points), segment, instance)
        else:
            precision.update(found.instances, segment, instance)
            coverage.update(found.instances, segment, instance)
    figures: Figures = {}
    tables = [_semantic(semantic, dataset.class_names, figures)]
    if categories:
        tables.append(_parts(parts, list(categories), figures))
    if precision.update_called:
        tables.append(_instances(precision, coverage, dataset.class_names, figures))
    if panoptic.update_called:
        tables.append(_panoptic(panoptic, dataset.class_names, figures))
    return figures, tables


def _semantic(metric: SegmentationMetrics, names: list[str], figures: Figures) -> Table:
    scores = metric.compute()
    figures |= {"mIoU": scores.miou, "mIoU_present": scores.miou_present, "mAcc": scores.macc, "OA": scores.all_acc}
    return score_table(scores, names, "classes")


def _parts(metric: ShapePartIoU, names: list[str], figures: Figures) -> Table:
    scores = metric.compute()
    figures |= {"instance_mIoU": scores.instance_miou, "class_mIoU": scores.class_miou}
    title = f"parts: instance mIoU {scores.instance_miou:.3f}"
    return value_table(title, names, scores.shapes, {"mIoU": scores.category_iou}, {"mIoU": scores.class_miou})


def _instances(
    precision: InstanceAveragePrecision, coverage: InstanceCoverage, names: list[str], figures: Figures
) -> Table:
    ap, cover = precision.compute(), coverage.compute()
    means = {"AP": ap.ap, "AP50": ap.ap50, "AP25": ap.ap25, "mPrec": cover.precision, "mRec": cover.recall}
    means |= {"mCov": cover.coverage, "mWCov": cover.weighted_coverage}
    figures |= means
    columns = dict(zip(means, (ap.class_ap, ap.class_ap50, ap.class_ap25, *cover.table.unbind(1)), strict=True))
    return value_table("instances", names, ap.instances, columns, means)


def _panoptic(metric: PanopticQuality, names: list[str], figures: Figures) -> Table:
    scores = metric.compute()
    figures |= {"PQ": scores.pq, "PQ_dagger": scores.pq_dagger, "PQ_things": scores.pq_things}
    figures |= {"PQ_stuff": scores.pq_stuff, "SQ": scores.sq, "RQ": scores.rq}
    means = dict(zip(("PQ", "SQ", "RQ", "IoU"), (scores.pq, scores.sq, scores.rq, scores.miou), strict=True))
    columns = dict(zip(means, scores.table.unbind(1), strict=True))
    title = f"panoptic: PQ {scores.pq:.3f}, PQ-dagger {scores.pq_dagger:.3f}"
    return value_table(title, names, torch.ones(len(names), dtype=torch.int64), columns, means)


def evaluate_boxes(dataset: KittiFrames, clouds: list[tuple[Split, int]], folder: Path) -> tuple[Figures, list[Table]]:
    """KITTI AP, 40 and 11 recall positions, of label files with scores."""
    truth, found = [], []
    for split, index in clouds:
        objects, name = dataset.labels(split, index), dataset.name(split, index)
        if objects is None:
            raise InputError(f"{dataset.root}: frame {name} of {split} has no public labels")
        boxes = read_objects(path := folder / f"{name}.txt")
        if len(boxes) and boxes.scores is None:
            raise InputError(f"{path}: has 15 columns; a result has a score in a 16th")
        truth.append(objects)
        found.append(boxes if len(boxes) else dataclasses.replace(boxes, scores=np.zeros(0)))
    scores = kitti_ap(truth, found, CLASSES)
    figures: Figures = {}
    table = Table("class", "metric", "positions", *DIFFICULTIES, title="AP in %, overlap 0.7 (cars) and 0.5")
    for positions, values in (("R40", scores.r40), ("R11", scores.r11)):
        for metric, value in values.items():
            for name, row in zip(CLASSES, value[..., 0].tolist(), strict=True):
                table.add_row(name, metric, positions, *(f"{ap:.2f}" for ap in row))
                pairs = zip(DIFFICULTIES, row, strict=True)
                figures |= {f"{name}_{metric}_{positions}_{level}": ap for level, ap in pairs}
    return figures, [table]
