"""Softmax cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pc3d.losses.base import Loss, check_class_weights, class_weights


class CrossEntropy(Loss):
    """Cross-entropy, averaged over the points that count (with class weights: by the sum of their weights).

    Args:
        weight: one factor per class.
        label_smoothing: share of the target spread evenly over all classes, 0..1.
    """

    weight: Tensor | None

    def __init__(
        self,
        loss_weight: float = 1.0,
        ignore_index: int = -1,
        weight: list[float] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(loss_weight, ignore_index)
        self.register_buffer("weight", class_weights(weight), persistent=False)
        self.label_smoothing = label_smoothing

    def compute(self, logits: Tensor, target: Tensor) -> Tensor:
        check_class_weights(self.weight, logits.shape[1])
        total = F.cross_entropy(
            logits,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        counts = target != self.ignore_index
        norm = counts.sum() if self.weight is None else self.weight[torch.where(counts, target, 0)][counts].sum()
        return total / norm.clamp(min=torch.finfo(total.dtype).tiny)
