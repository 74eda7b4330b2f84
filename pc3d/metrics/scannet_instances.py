"""Instance segmentation scores of the ScanNet benchmark: AP, AP50 and AP25."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from pc3d.metrics.instances import Instances, TrueInstances, count_pairs

THRESHOLDS = (*(round(0.5 + 0.05 * i, 2) for i in range(9)), 0.25)
"""Overlaps of the published evaluator: 0.50 .. 0.90 (its half-open range leaves 0.95 out) and 0.25."""


@dataclass
class InstanceScores:
    """Average precisions in 0..1, NaN for a class without true instances; means are over the other classes.

    Attributes:
        ap: mean over the overlaps from 0.50 on; ap50, ap25: at one overlap.
        class_ap, class_ap50, class_ap25: ``(C,)`` float64 per class.
        instances: ``(C,)`` int64 true instances that count.
    """

    ap: float
    ap50: float
    ap25: float
    class_ap: Tensor
    class_ap50: Tensor
    class_ap25: Tensor
    instances: Tensor


class InstanceAveragePrecision(Metric):
    """ScanNet's instance metric, rule by rule.

    Only predictions and true instances of at least ``min_points`` points count. Per class and overlap, each true
    instance takes the first prediction of its class whose IoU is above the overlap; further ones are wrong, with the
    lower confidence of the two. An unmatched prediction is wrong unless more than the overlap's share of its points
    belongs to no instance of a class that counts, or to one of its class that is too small.

    Args:
        things: ``(C,)`` bool, the classes that have instances (ScanNet: all but wall and floor).
        min_points: smallest instance, 100 in the benchmark.
        thresholds: overlaps.
    """

    full_state_update = False
    verdicts: list[Tensor]
    missed: Tensor
    instances: Tensor

    def __init__(
        self, things: list[bool] | Tensor, min_points: int = 100, thresholds: tuple[float, ...] = THRESHOLDS
    ) -> None:
        super().__init__()
        self.things = torch.as_tensor(things, dtype=torch.bool)
        self.min_points = min_points
        self.thresholds = thresholds
        classes = len(self.things)
        # Rows [class, threshold, score, right]: one per prediction that is right or wrong.
        self.add_state("verdicts", default=[], dist_reduce_fx="cat")
        empty = torch.zeros(classes, len(thresholds), dtype=torch.int64)
        self.add_state("missed", default=empty, dist_reduce_fx="sum")
        self.add_state("instances", default=torch.zeros(classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predicted: Instances, segment: Tensor, instance: Tensor) -> None:
        """Count one cloud.

        Args:
            predicted: instances found in it.
            segment, instance: ``(N,)`` int64 true class and instance number of every point, -1 for none.

        Raises:
            ValueError: if shapes differ, or a prediction names a point that is not there.
        """
        if segment.shape != instance.shape or segment.ndim != 1:
            raise ValueError(f"segment {tuple(segment.shape)} and instance {tuple(instance.shape)} must both be (N,)")
        if len(predicted.rows) and int(predicted.rows.max()) >= len(segment):
            raise ValueError(f"a predicted instance names point {int(predicted.rows.max())} of {len(segment)}")
        things = self.things.to(segment.device)
        predicted = predicted.take(predicted.sizes >= self.min_points)
        truth = TrueInstances.of(segment, instance, things)
        shared = truth.overlaps(predicted)
        beside = count_pairs(torch.where(truth.index < 0, 0, -1), predicted, 1)[0]
        for label in things.nonzero()[:, 0].tolist():
            of_class = (truth.classes == label).nonzero()[:, 0]
            found = (predicted.classes == label).nonzero()[:, 0]
            cloud = _ClassOfCloud(
                shared[of_class][:, found],
                truth.sizes[of_class],
                predicted.sizes[found],
                predicted.scores[found].double(),
                beside[found],
                truth.sizes[of_class] >= self.min_points,
            )
            self.instances[label] += int(cloud.counts.sum())
            for t, threshold in enumerate(self.thresholds):
                verdicts, missed = cloud.match(threshold)
                self.missed[label, t] += missed
                if verdicts:
                    rows = torch.tensor(verdicts, dtype=torch.float64, device=segment.device)
                    key = rows.new_tensor([label, t]).expand(len(rows), 2)
                    self.verdicts.append(torch.cat([key, rows], 1))

    def compute(self) -> InstanceScores:
        verdicts = self.verdicts
        rows = torch.cat(verdicts) if isinstance(verdicts, list) and verdicts else verdicts
        rows = rows.cpu() if isinstance(rows, Tensor) else torch.empty(0, 4, dtype=torch.float64)
        table = torch.full((len(self.things), len(self.thresholds)), torch.nan, dtype=torch.float64)
        for label in self.instances.nonzero()[:, 0].tolist():
            for t in range(len(self.thresholds)):
                chosen = rows[(rows[:, 0] == label) & (rows[:, 1] == t)]
                table[label, t] = average_precision(chosen[:, 2], chosen[:, 3] > 0, int(self.missed[label, t]))
        thresholds = torch.tensor(self.thresholds, dtype=torch.float64)
        ap = table[:, thresholds >= 0.5].mean(1)
        ap50, ap25 = (table[:, thresholds == at].mean(1) for at in (0.5, 0.25))
        mean, mean50, mean25 = (part.nanmean().item() for part in (ap, ap50, ap25))
        return InstanceScores(mean, mean50, mean25, ap, ap50, ap25, self.instances.cpu())


@dataclass
class _ClassOfCloud:
    """Predictions and true instances of one class in one cloud."""

    shared: Tensor  # (G, I) points
    true_sizes: Tensor
    sizes: Tensor
    scores: Tensor
    beside: Tensor  # (I,) points in no instance of any class that counts
    counts: Tensor  # (G,) bool, large enough

    def __post_init__(self) -> None:
        union = self.true_sizes[:, None] + self.sizes - self.shared
        self.iou = self.shared.double() / union

    def match(self, threshold: float) -> tuple[list[tuple[float, float]], int]:
        """(score, right) of every prediction that counts, and how many true instances nothing was found for."""
        above = (self.iou > threshold).cpu()
        scores = self.scores.tolist()
        taken = [False] * len(scores)
        verdicts: list[tuple[float, float]] = []
        missed = 0
        for g in self.counts.nonzero()[:, 0].tolist():
            best: float | None = None
            for i in above[g].nonzero()[:, 0].tolist():
                if taken[i]:
                    continue
                if best is None:
                    best, taken[i] = scores[i], True
                else:
                    verdicts.append((min(best, scores[i]), 0.0))
                    best = max(best, scores[i])
            if best is None:
                missed += 1
            else:
                verdicts.append((best, 1.0))
        unclaimed = self.beside + self.shared[~self.counts].sum(0)
        wrong = ~above.any(0) & (unclaimed.double() / self.sizes <= threshold).cpu()
        verdicts += [(scores[i], 0.0) for i in wrong.nonzero()[:, 0].tolist()]
        return verdicts, missed


def average_precision(scores: Tensor, right: Tensor, missed: int) -> float:
    """Area under the precision-recall curve as ScanNet's evaluator takes it.

    One point per distinct score, and one at precision 1 and recall 0; each precision counts for half the distance
    between the recalls beside it.

    Args:
        scores: ``(V,)`` float64 confidences; ``right``: ``(V,)`` bool.
        missed: true instances without any prediction.
    """
    if not len(scores):
        return 0.0
    order = scores.argsort(stable=True)
    scores, right = scores[order], right[order]
    first = torch.cat([torch.ones(1, dtype=torch.bool), scores[1:] != scores[:-1]]).nonzero()[:, 0]
    below = torch.cat([torch.zeros(1, dtype=torch.int64), right.long().cumsum(0)])
    hits = (below[-1] - below[first]).double()
    found = (len(scores) - first).double()
    precision = torch.cat([hits / found, torch.ones(1, dtype=torch.float64)])
    total = hits + missed + below[first]
    recall = torch.cat([torch.where(total > 0, hits / total.clamp(min=1), 0.0), torch.zeros(1, dtype=torch.float64)])
    padded = torch.cat([recall[:1], recall, torch.zeros(1, dtype=torch.float64)])
    return float(precision @ ((padded[:-2] - padded[2:]) / 2))
