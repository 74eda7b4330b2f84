"""Soft Dice loss."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from pc3d.losses.base import Loss


class Dice(Loss):
    """``1 - 2 sum(p y) / (sum p^2 + sum y^2)`` of each class over the points of a cloud, mean over classes and clouds.

    p are softmax probabilities, y the one-hot truth; ignored points count in neither. Milletari et al., "V-Net", 3DV
    2016, with squares in the denominator; as the medical point SSM uses it.
    """

    per_cloud = True

    def compute(self, logits: Tensor, target: Tensor) -> Tensor:
        valid = target != self.ignore_index
        if not bool(valid.any()):
            return 0 * logits.sum()
        probability = logits[valid].softmax(1)
        truth = F.one_hot(target[valid], logits.shape[1]).to(probability.dtype)
        shared = (probability * truth).sum(0)
        total = probability.square().sum(0) + truth.sum(0)
        return (1 - 2 * shared.clamp(min=_LEAST) / total.clamp(min=_LEAST)).mean()


_LEAST = 1e-8  # as published, in numerator and denominator
