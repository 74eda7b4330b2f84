"""Softmax cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pc3d.losses.base import WeightedLoss
from pc3d.losses.weighting import ClassWeighting


class CrossEntropy(WeightedLoss):
    """Cross-entropy, averaged over the points that count (with class weights: by the sum of their weights).

    Args:
        weight: see :class:`~pc3d.losses.base.WeightedLoss`.
        label_smoothing: share of the target spread evenly over all classes, 0..1.
    """

    def __init__(
        self,
        loss_weight: float = 1.0,
        ignore_index: int = -1,
        weight: list[float] | ClassWeighting | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(loss_weight, ignore_index, weight)
        self.label_smoothing = label_smoothing

    def compute(self, logits: Tensor, target: Tensor) -> Tensor:
        weight = self.class_weights(logits.shape[1])
        total = F.cross_entropy(
            logits,
            target,
            weight,
            ignore_index=self.ignore_index,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        counts = target != self.ignore_index
        norm = counts.sum() if weight is None else weight[torch.where(counts, target, 0)][counts].sum()
        return total / norm.clamp(min=torch.finfo(total.dtype).tiny)
