"""Semantic segmentation scores over a whole data set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from pc3d.errors import InputError

_EPS = 1e-10  # as published: a class without points scores 0


@dataclass
class SegmentationScores:
    """Scores of one evaluation; all values in 0..1, float64 on the CPU.

    Attributes:
        miou: mean IoU over all classes; a class absent from truth and prediction counts 0 (the Pointcept definition).
        miou_present: mean IoU over the classes that the ground truth contains.
        macc: mean per-class accuracy (recall) over all classes, absent ones 0.
        all_acc: share of points with the right class.
        iou: ``(K,)`` IoU per class.
        acc: ``(K,)`` accuracy per class.
        confusion: ``(K, K)`` int64, rows are true classes, columns predictions.
    """

    miou: float
    miou_present: float
    macc: float
    all_acc: float
    iou: Tensor
    acc: Tensor
    confusion: Tensor


def scores_from_confusion(confusion: Tensor, missed: Tensor | None = None) -> SegmentationScores:
    """Scores of a ``(K, K)`` confusion matrix of counts (rows truth, columns prediction).

    Args:
        confusion: counts.
        missed: ``(K,)`` points of each true class for which nothing was predicted.
    """
    confusion = confusion.detach().cpu()
    counts = confusion.double()
    hits, truth = counts.diag(), counts.sum(1)
    if missed is not None:
        truth = truth + missed.detach().cpu()
    iou = hits / (truth + counts.sum(0) - hits + _EPS)
    acc = hits / (truth + _EPS)
    present = truth > 0
    return SegmentationScores(
        miou=iou.mean().item(),
        miou_present=iou[present].mean().item() if bool(present.any()) else 0.0,
        macc=acc.mean().item(),
        all_acc=(hits.sum() / (truth.sum() + _EPS)).item(),
        iou=iou,
        acc=acc,
        confusion=confusion,
    )


class SegmentationMetrics(Metric):
    """Confusion matrix of a data set, summed over batches and processes, and the scores made from it.

    A prediction of ``ignore_index`` for a point that counts is a miss of its true class, as in the evaluators of
    ScanNet and SemanticKITTI.

    Args:
        num_classes: K.
        ignore_index: true class of the points that do not count.
    """

    full_state_update = False
    confusion: Tensor
    missed: Tensor

    def __init__(self, num_classes: int, ignore_index: int = -1) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        empty = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.add_state("confusion", default=empty, dist_reduce_fx="sum")
        self.add_state("missed", default=torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Count ``(N,)`` predicted classes against ``(N,)`` true ones (integers).

        Raises:
            ValueError: if the shapes differ.
            InputError: if a class that counts is outside ``0 .. num_classes - 1``.
        """
        if pred.ndim != 1 or pred.shape != target.shape:
            raise ValueError(f"pred and target must both be (N,), got {tuple(pred.shape)} and {tuple(target.shape)}")
        counts = target != self.ignore_index
        pred, target = pred[counts].long(), target[counts].long()
        self._check(target, "true")
        nothing = pred == self.ignore_index
        self.missed += torch.bincount(target[nothing], minlength=self.num_classes)
        pred, target = pred[~nothing], target[~nothing]
        self._check(pred, "predicted")
        cells = torch.bincount(target * self.num_classes + pred, minlength=self.num_classes**2)
        self.confusion += cells.view(self.num_classes, self.num_classes)

    def compute(self) -> SegmentationScores:
        return scores_from_confusion(self.confusion, self.missed)

    def _check(self, classes: Tensor, kind: str) -> None:
        wrong = classes[(classes < 0) | (classes >= self.num_classes)]
        if len(wrong):
            raise InputError(
                f"{kind} class {wrong[0].item()} is outside 0..{self.num_classes - 1} ({len(wrong)} points)"
            )
