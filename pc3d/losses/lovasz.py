"""Lovász-softmax: a convex surrogate of the Jaccard index."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pc3d.losses.base import Loss

_SORTED_AT_ONCE = 1 << 25
"""Entries of the (points, classes) error matrix sorted at once: bounds the scratch memory to a few hundred MB."""


class Lovasz(Loss):
    """Multi-class Lovász-softmax, averaged over the classes present in the labels of the whole batch.

    For a class ``c``, the errors ``|1[y = c] - p_c|`` in descending order are weighted by the growth of the Jaccard
    loss as one more point is wrong. Berman et al., "The Lovász-Softmax loss", CVPR 2018, eq. 8-12.
    """

    def compute(self, logits: Tensor, target: Tensor) -> Tensor:
        valid = target != self.ignore_index
        probabilities = logits[valid].softmax(1)
        truth = F.one_hot(target[valid], logits.shape[1]).bool()
        errors = (truth.to(probabilities.dtype) - probabilities).abs()
        present = truth.any(0)
        per_class = (errors * jaccard_growth(errors.detach(), truth)).sum(0)
        return per_class[present].sum() / present.sum().clamp(min=1)


def jaccard_growth(errors: Tensor, truth: Tensor) -> Tensor:
    """Weight of every error in the Lovász extension of the Jaccard loss, class by class.

    Args:
        errors: ``(N, K)`` errors in 0..1.
        truth: ``(N, K)`` bool, the true class of each point.

    Returns:
        ``(N, K)``, of the dtype of ``errors``; the columns of classes without points mean nothing.
    """
    weights = torch.empty_like(errors)
    step = max(1, _SORTED_AT_ONCE // max(1, len(errors)))
    for start in range(0, errors.shape[1], step):
        columns = slice(start, start + step)
        order = errors[:, columns].argsort(dim=0, descending=True)
        weights[:, columns] = torch.empty_like(weights[:, columns]).scatter_(
            0, order, _growth(truth[:, columns].gather(0, order))
        )
    return weights


def _growth(truth: Tensor) -> Tensor:
    """Jaccard loss after row i minus before it, of rows sorted by error.

    Written as a product, not as a difference of two almost equal losses, which float32 cannot resolve for a million
    points.
    """
    positives = truth.sum(0)
    missed = truth.cumsum(0, dtype=torch.int32)
    intersection = (positives - missed).float()
    union = (positives + torch.arange(1, len(truth) + 1, device=truth.device)[:, None] - missed).float()
    return torch.where(truth, 1 / union, intersection / (union * (union - 1).clamp(min=1)))
