"""Panoptic quality, as SemanticKITTI's evaluator counts it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric


@dataclass
class PanopticScores:
    """Values in 0..1; means are over all classes, as published.

    Attributes:
        pq, sq, rq: panoptic, segmentation and recognition quality.
        pq_dagger: stuff classes count with their IoU (Porzi et al., CVPR 2019).
        pq_things, pq_stuff: means over the things and over the others.
        miou: of the same points.
        table: ``(C, 4)`` float64 PQ, SQ, RQ and IoU per class.
    """

    pq: float
    sq: float
    rq: float
    pq_dagger: float
    pq_things: float
    pq_stuff: float
    miou: float
    table: Tensor


class PanopticQuality(Metric):
    """PQ of Kirillov et al. (CVPR 2019), per scan, with the rules of the SemanticKITTI benchmark.

    Points whose true class is ignored do not count. In every class the segments are the points that share an instance
    number; a predicted and a true one match if their IoU exceeds one half. Unmatched segments of fewer than
    ``min_points`` points are left out.

    Args:
        things: ``(C,)`` bool, the classes with instances; a stuff class is one segment per scan.
        min_points: 50 in the benchmark.
        ignore_index: true class of points that do not count.
    """

    full_state_update = False
    sums: Tensor
    confusion: Tensor

    def __init__(self, things: list[bool] | Tensor, min_points: int = 50, ignore_index: int = -1) -> None:
        super().__init__()
        self.things = torch.as_tensor(things, dtype=torch.bool)
        self.min_points = min_points
        self.ignore_index = ignore_index
        classes = len(self.things)
        # Per class: sum of the IoU of matches, matches, false positives, false negatives.
        self.add_state("sums", default=torch.zeros(classes, 4, dtype=torch.float64), dist_reduce_fx="sum")
        # One column more than classes: points predicted as nothing.
        empty = torch.zeros(classes, classes + 1, dtype=torch.int64)
        self.add_state("confusion", default=empty, dist_reduce_fx="sum")

    def update(self, segment: Tensor, instance: Tensor, true_segment: Tensor, true_instance: Tensor) -> None:
        """Count one scan: predicted and true class and instance number ``(N,)`` int64 of every point.

        Raises:
            ValueError: if shapes differ.
        """
        shapes = {t.shape for t in (segment, instance, true_segment, true_instance)}
        if len(shapes) != 1 or segment.ndim != 1:
            raise ValueError(f"classes and instances must all be (N,), got {sorted(map(tuple, shapes))}")
        counted = true_segment != self.ignore_index
        segment, instance, true_segment, true_instance = (
            t[counted].long() for t in (segment, instance, true_segment, true_instance)
        )
        classes = len(self.things)
        column = torch.where((segment >= 0) & (segment < classes), segment, classes)
        cells = torch.bincount(true_segment * (classes + 1) + column, minlength=classes * (classes + 1))
        self.confusion += cells.view(classes, classes + 1)
        things = self.things.to(segment.device)
        for label in range(classes):
            numbers = (instance, true_instance) if things[label] else (torch.zeros_like(instance),) * 2
            self.sums[label] += self._class(segment == label, true_segment == label, *numbers)

    def _class(self, found: Tensor, true: Tensor, instance: Tensor, true_instance: Tensor) -> Tensor:
        predicted, size = instance[found].unique(return_counts=True)
        real, true_size = true_instance[true].unique(return_counts=True)
        both = found & true
        rows = torch.searchsorted(real, true_instance[both])
        columns = torch.searchsorted(predicted, instance[both])
        shared = torch.bincount(rows * len(predicted) + columns, minlength=len(real) * len(predicted))
        shared = shared.view(len(real), len(predicted))
        iou = shared.double() / (true_size[:, None] + size - shared)
        match = iou > 0.5
        wrong = (~match.any(0) & (size >= self.min_points)).sum() if len(predicted) else 0
        missed = (~match.any(1) & (true_size >= self.min_points)).sum() if len(real) else 0
        counts = [iou[match].sum(), match.sum(), wrong, missed]
        return torch.stack([torch.as_tensor(c, dtype=torch.float64, device=self.sums.device) for c in counts])

    def compute(self) -> PanopticScores:
        overlap, hits, wrong, missed = self.sums.cpu().unbind(1)
        sq = overlap / hits.clamp(min=1)
        rq = hits / (hits + (wrong + missed) / 2).clamp(min=1e-15)
        pq = sq * rq
        counts = self.confusion.cpu().double()
        right = counts[:, :-1].diagonal()
        iou = right / (counts.sum(1) + counts[:, :-1].sum(0) - right).clamp(min=1e-15)
        dagger = torch.where(self.things.cpu(), pq, iou)
        things = self.things.cpu()
        return PanopticScores(
            pq=pq.mean().item(),
            sq=sq.mean().item(),
            rq=rq.mean().item(),
            pq_dagger=dagger.mean().item(),
            pq_things=_mean(pq[things]),
            pq_stuff=_mean(pq[~things]),
            miou=iou.mean().item(),
            table=torch.stack([pq, sq, rq, iou], 1),
        )


def _mean(values: Tensor) -> float:
    return values.mean().item() if len(values) else float("nan")
