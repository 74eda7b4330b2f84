"""What instance metrics share: predicted and true instances of a cloud, and how much they overlap."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Instances:
    """Instances of one cloud; they may overlap.

    Attributes:
        rows: ``(P,) int64`` points, instance after instance.
        borders: ``(I + 1,)`` int64, instance i has the points ``rows[borders[i]:borders[i + 1]]``.
        classes: ``(I,)`` int64.
        scores: ``(I,)`` float32 confidence.
    """

    rows: Tensor
    borders: Tensor
    classes: Tensor
    scores: Tensor

    def __post_init__(self) -> None:
        count = len(self.borders) - 1
        if len(self.classes) != count or len(self.scores) != count:
            raise ValueError(f"{count} instances with {len(self.classes)} classes and {len(self.scores)} scores")

    @staticmethod
    def of(labels: Tensor, classes: Tensor, scores: Tensor) -> Instances:
        """From the instance number of every point ``(N,)``, -1 for none; instance i has ``classes[i]``."""
        rows = (labels >= 0).nonzero()[:, 0]
        rows = rows[labels[rows].argsort(stable=True)]
        counts = torch.bincount(labels[rows], minlength=len(classes))
        return Instances(rows, torch.cat([counts.new_zeros(1), counts.cumsum(0)]), classes, scores)

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def sizes(self) -> Tensor:
        """``(I,)`` int64 points."""
        return self.borders.diff()

    def labels(self, num_points: int) -> Tensor:
        """``(N,)`` int64 instance of every point, -1 for none; where instances overlap, the one of higher score."""
        out = torch.full((num_points,), -1, dtype=torch.int64, device=self.rows.device)
        number = torch.repeat_interleave(self.sizes)
        for i in self.scores.argsort(stable=True).tolist():
            out[self.rows[number == i]] = i
        return out

    def take(self, kept: Tensor) -> Instances:
        """The instances of a boolean mask ``(I,)``."""
        number = torch.repeat_interleave(self.sizes)
        sizes = self.sizes[kept]
        borders = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        return Instances(self.rows[kept[number]], borders, self.classes[kept], self.scores[kept])


@dataclass(frozen=True)
class TrueInstances:
    """True instances of one cloud: the points that share a class and an instance number.

    Attributes:
        index: ``(N,)`` int64 instance of every point, -1 where there is none.
        classes: ``(G,)`` int64.
        sizes: ``(G,)`` int64 points.
    """

    index: Tensor
    classes: Tensor
    sizes: Tensor

    @staticmethod
    def of(segment: Tensor, instance: Tensor, things: Tensor) -> TrueInstances:
        """From classes and instance numbers ``(N,)`` (-1 none), and which classes ``(C,)`` bool count."""
        counts = (segment >= 0) & (instance >= 0) & things[segment.clamp(min=0)]
        keys = segment[counts] * (int(instance.max()) + 1 if len(instance) else 1) + instance[counts]
        _, inverse, sizes = keys.unique(return_inverse=True, return_counts=True)
        index = torch.full_like(segment, -1)
        index[counts] = inverse
        classes = segment.new_empty(len(sizes))
        classes[inverse] = segment[counts]
        return TrueInstances(index, classes, sizes)

    def overlaps(self, predicted: Instances) -> Tensor:
        """``(G, I)`` int64 points that a true and a predicted instance share."""
        return count_pairs(self.index, predicted, len(self.classes))


def count_pairs(values: Tensor, predicted: Instances, num_values: int) -> Tensor:
    """``(num_values, I)`` int64: how often the points of each predicted instance have each value; negative ones no."""
    number = torch.repeat_interleave(predicted.sizes)
    found = values[predicted.rows]
    keys = (found * len(predicted) + number)[found >= 0]
    return torch.bincount(keys, minlength=num_values * len(predicted)).view(num_values, len(predicted))
