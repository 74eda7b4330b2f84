"""Scores of whole clouds: overall and mean class accuracy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pc3d.metrics.segmentation import SegmentationMetrics


@dataclass
class ClassificationScores:
    """Scores of one evaluation, 0..1, float64 on the CPU.

    Attributes:
        oa: share of clouds with the right class.
        macc: mean accuracy of the classes that the truth contains.
        acc: ``(K,)`` accuracy (recall) per class, 0 for absent ones.
        confusion: ``(K, K)`` int64, rows are true classes, columns predictions.
    """

    oa: float
    macc: float
    acc: Tensor
    confusion: Tensor


class ClassificationMetrics(SegmentationMetrics):
    """Overall accuracy and mean class accuracy, from a confusion matrix summed over batches and processes."""

    def compute(self) -> ClassificationScores:  # type: ignore[override]
        confusion = self.confusion.detach().cpu()
        counts = confusion.double()
        truth = counts.sum(1)
        acc = counts.diag() / truth.clamp(min=1)
        present = truth > 0
        mean = acc[present].mean().item() if bool(present.any()) else 0.0
        return ClassificationScores((counts.diag().sum() / truth.sum().clamp(min=1)).item(), mean, acc, confusion)


def overall_accuracy(confusion: Tensor) -> float:
    """Share of the diagonal of a ``(K, K)`` confusion matrix; 0 of an empty one."""
    return (confusion.diag().sum() / torch.clamp(confusion.sum(), min=1)).item()
