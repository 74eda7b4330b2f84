"""Lovász-softmax: a convex surrogate of the Jaccard index."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pc3d.losses.base import Loss

_SORTED_AT_ONCE = 1 << 25
"""Entries of the (classes, points) error matrix sorted at once: bounds the scratch memory to a few hundred MB."""


class Lovasz(Loss):
    """Multi-class Lovász-softmax, averaged over the classes present in the labels of the whole batch.

    For a class ``c``, the errors ``|1[y = c] - p_c|`` in descending order are weighted by the growth of the Jaccard
    loss as one more point is wrong. Berman et al., "The Lovász-Softmax loss", CVPR 2018, eq. 8-12.
    """

    def compute(self, logits: Tensor, target: Tensor) -> Tensor:
        valid = target != self.ignore_index
        probabilities = logits[valid].softmax(1)
        truth = F.one_hot(target[valid], logits.shape[1]).bool()
        present = truth.any(0)
        errors = (truth.to(probabilities.dtype) - probabilities).abs().T[present]
        weights = jaccard_growth(errors.detach(), truth.T[present])
        return (errors * weights).sum() / max(1, len(errors))


def jaccard_growth(errors: Tensor, truth: Tensor) -> Tensor:
    """Weight of every error in the Lovász extension of the Jaccard loss, class by class.

    Args:
        errors: ``(C, N)`` errors in 0..1.
        truth: ``(C, N)`` bool, which points have the class; at least one of each.

    Returns:
        ``(C, N)``, of the dtype of ``errors``.
    """
    weights = torch.empty_like(errors)
    step = max(1, _SORTED_AT_ONCE // max(1, errors.shape[1]))
    for rows in (slice(start, start + step) for start in range(0, len(errors), step)):
        order = errors[rows].argsort(dim=1, descending=True)
        weights[rows] = torch.empty_like(errors[rows]).scatter(1, order, _growth(truth[rows].gather(1, order)))
    return weights


def _growth(truth: Tensor) -> Tensor:
    """Jaccard loss after point i minus before it, of points sorted by error.

    Written as a product, not as a difference of two almost equal losses, which float32 cannot resolve for a million
    points.
    """
    positives = truth.sum(1, keepdim=True)
    found = truth.cumsum(1, dtype=torch.int32)
    rank = torch.arange(1, truth.shape[1] + 1, device=truth.device)
    intersection = (positives - found).float()
    union = (positives + rank - found).float()
    return torch.where(truth, 1 / union, intersection / (union * (union - 1).clamp(min=1)))
