"""Losses of detectors: what is learned about boxes and where they are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def sigmoid_focal(logits: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss of every entry: ``-alpha_t (1 - p_t)^gamma log p_t`` with one sigmoid per class.

    Lin et al., "Focal loss for dense object detection", ICCV 2017, eq. 5.

    Args:
        logits: any shape.
        target: 0 or 1, same shape.
    """
    p = logits.sigmoid()
    miss = target * (1 - p) + (1 - target) * p
    weight = target * alpha + (1 - target) * (1 - alpha)
    return weight * miss**gamma * F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def center_focal(logits: Tensor, target: Tensor) -> Tensor:
    """Scalar focal loss of heat maps.

    ``-log(p) (1 - p)^2`` where the target is exactly 1, ``-log(1 - p) p^2 (1 - target)^4`` elsewhere, summed over all
    cells and divided by the number of ones (1 if there are none); p is kept 1e-4 away from 0 and 1. Zhou et al.,
    "Objects as points" (arXiv 1904.07850), eq. 1.

    Args:
        logits: any shape.
        target: 0..1, same shape.
    """
    p = logits.sigmoid().clamp(1e-4, 1 - 1e-4)
    peak = target == 1
    positive = (torch.log(p) * (1 - p) ** 2)[peak].sum()
    negative = (torch.log(1 - p) * p**2 * (1 - target) ** 4)[~peak].sum()
    return -(positive + negative) / peak.sum().clamp(min=1)


def upright_diou(a: Tensor, b: Tensor) -> Tensor:
    """``(N,)`` distance-IoU of boxes ``(N, 7)``, pair by pair, as if their headings were 0; differentiable.

    Overlap of the volumes over their union, less the squared distance of the centres over the squared diagonal of the
    box around both; limited to -1..1. Zheng et al., "Distance-IoU Loss", AAAI 2020, in three dimensions.
    """
    (low_a, high_a), (low_b, high_b) = ((box[:, :3] - box[:, 3:6] / 2, box[:, :3] + box[:, 3:6] / 2) for box in (a, b))
    shared = (torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp(min=0).prod(1)
    union = a[:, 3:6].prod(1) + b[:, 3:6].prod(1) - shared
    apart = (b[:, :3] - a[:, :3]).square().sum(1)
    diagonal = (torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b)).square().sum(1)
    return (shared / union - apart / diagonal).clamp(-1, 1)
