"""Instance segmentation scores usual on S3DIS: mean precision, recall, coverage and weighted coverage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from pc3d.metrics.instances import Instances, TrueInstances


@dataclass
class CoverageScores:
    """Values in 0..1, means over the classes that have true instances.

    Attributes:
        precision, recall: mPrec and mRec at the overlap asked for.
        coverage, weighted_coverage: mCov and mWCov.
        table: ``(C, 4)`` float64 the same per class, NaN without true instances.
    """

    precision: float
    recall: float
    coverage: float
    weighted_coverage: float
    table: Tensor


class InstanceCoverage(Metric):
    """mPrec, mRec, mCov and mWCov (Wang et al., "Associatively segmenting instances and semantics", CVPR 2019, 5.1).

    A predicted instance is right if its best IoU with a true instance of its class reaches ``overlap``. Recall is the
    number of right predictions over that of true instances. Coverage is the best IoU of every true instance with a
    prediction of its class, plain and weighted by size in its cloud, averaged over clouds.

    Args:
        things: ``(C,)`` bool, the classes that have instances.
        overlap: IoU that counts as found.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, things: list[bool] | Tensor, overlap: float = 0.5) -> None:
        super().__init__()
        self.things = torch.as_tensor(things, dtype=torch.bool)
        self.overlap = overlap
        # Per class: right, predicted, true instances, sum of coverages, of weighted coverages, clouds with the class.
        empty = torch.zeros(len(self.things), 6, dtype=torch.float64)
        self.add_state("sums", default=empty, dist_reduce_fx="sum")

    def update(self, predicted: Instances, segment: Tensor, instance: Tensor) -> None:
        """Count one cloud; arguments as :meth:`InstanceAveragePrecision.update`."""
        truth = TrueInstances.of(segment, instance, self.things.to(segment.device))
        shared = truth.overlaps(predicted)
        iou = shared.double() / (truth.sizes[:, None] + predicted.sizes - shared)
        iou = torch.where(truth.classes[:, None] == predicted.classes, iou, 0.0)
        for label in self.things.nonzero()[:, 0].tolist():
            true, found = truth.classes == label, predicted.classes == label
            right = int((iou[:, found].amax(0) >= self.overlap).sum()) if len(iou) else 0
            self.sums[label, :3] += torch.tensor([right, int(found.sum()), int(true.sum())]).to(self.sums)
            if bool(true.any()):
                best = iou[true].amax(1) if iou.shape[1] else iou.new_zeros(int(true.sum()))
                share = truth.sizes[true].double() / truth.sizes[true].sum()
                self.sums[label, 3:] += torch.stack([best.mean(), (best * share).sum(), best.new_ones(())]).to(
                    self.sums
                )

    def compute(self) -> CoverageScores:
        right, predicted, true, coverage, weighted, clouds = self.sums.cpu().unbind(1)
        table = torch.stack([right / predicted.clamp(min=1), right / true, coverage / clouds, weighted / clouds], 1)
        table[true == 0] = torch.nan
        precision, recall, cover, weighted_cover = table.nanmean(0).tolist()
        return CoverageScores(precision, recall, cover, weighted_cover, table)
