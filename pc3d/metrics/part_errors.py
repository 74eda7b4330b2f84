"""Part misclassification: how far the points of one object disagree about its class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from pc3d.metrics.instances import TrueInstances


@dataclass
class PartErrors:
    """Shares in 0..1, and the number of true instances they are over.

    Attributes:
        points: mean over instances of the share of points that do not carry the instance's most common prediction.
        instances: share of instances with more than a tenth of such points.
        count: instances.
    """

    points: float
    instances: float
    count: int


class PartMisclassification(Metric):
    """The error that Segment-Fusion is about: parts of one object with different labels, right or wrong.

    Args:
        num_classes: C.
        tolerance: share of dissenting points from which an instance counts as broken.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, num_classes: int, tolerance: float = 0.1) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.tolerance = tolerance
        self.add_state("sums", default=torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, segment: Tensor, instance: Tensor) -> None:
        """Count one cloud: predicted class, true class and instance number ``(N,)`` of every point (-1 none)."""
        truth = TrueInstances.of(
            segment, instance, torch.ones(self.num_classes, dtype=torch.bool, device=segment.device)
        )
        inside = (truth.index >= 0) & (prediction >= 0)
        keys = truth.index[inside] * self.num_classes + prediction[inside]
        votes = torch.bincount(keys, minlength=len(truth.classes) * self.num_classes).view(-1, self.num_classes)
        votes = votes[votes.sum(1) > 0].double()
        dissent = 1 - votes.amax(1) / votes.sum(1)
        counts = [dissent.sum(), (dissent > self.tolerance).sum(), torch.tensor(len(dissent))]
        self.sums += torch.stack([c.to(self.sums) for c in counts])

    def compute(self) -> PartErrors:
        points, broken, count = self.sums.tolist()
        return PartErrors(points / max(count, 1), broken / max(count, 1), int(count))
