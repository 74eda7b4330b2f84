"""Focal loss."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from pc3d.losses.base import WeightedLoss
from pc3d.losses.weighting import ClassWeighting


class Focal(WeightedLoss):
    """Softmax focal loss ``-w_y (1 - p_y)^gamma log p_y``, averaged over the points that count.

    ``gamma=0`` without weights is cross-entropy. Lin et al., "Focal loss for dense object detection", ICCV 2017, eq.
    5.

    Args:
        gamma: how much well-classified points are played down, >= 0.
        weight: alpha in the paper; see :class:`~pc3d.losses.base.WeightedLoss`.
    """

    def __init__(
        self,
        loss_weight: float = 1.0,
        ignore_index: int = -1,
        gamma: float = 2.0,
        weight: list[float] | ClassWeighting | None = None,
    ) -> None:
        super().__init__(loss_weight, ignore_index, weight)
        self.gamma = gamma

    def compute(self, logits: Tensor, target: Tensor) -> Tensor:
        weight = self.class_weights(logits.shape[1])
        valid = target != self.ignore_index
        truth = target[valid]
        log_p = F.log_softmax(logits[valid], dim=1).gather(1, truth[:, None])[:, 0]
        miss = -log_p.expm1()  # 1 - p without cancellation
        # A point predicted with certainty has miss 0, where miss ** gamma has no finite slope for gamma < 1.
        loss = -(miss.clamp(min=1e-12) ** self.gamma) * log_p
        if weight is not None:
            loss = loss * weight[truth]
        return loss.sum() / max(1, len(truth))
