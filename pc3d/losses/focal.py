"""Focal loss."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from pc3d.losses.base import Loss, check_class_weights, class_weights


class Focal(Loss):
    """Softmax focal loss ``-w_y (1 - p_y)^gamma log p_y``, averaged over the points that count.

    ``gamma=0`` without weights is cross-entropy. Lin et al., "Focal loss for dense object detection", ICCV 2017, eq.
    5.

    Args:
        gamma: how much well-classified points are played down, >= 0.
        weight: one factor per class (alpha in the paper).
    """

    weight: Tensor | None

    def __init__(
        self,
        loss_weight: float = 1.0,
        ignore_index: int = -1,
        gamma: float = 2.0,
        weight: list[float] | None = None,
    ) -> None:
        super().__init__(loss_weight, ignore_index)
        self.gamma = gamma
        self.register_buffer("weight", class_weights(weight), persistent=False)

    def compute(self, logits: Tensor, target: Tensor) -> Tensor:
        check_class_weights(self.weight, logits.shape[1])
        valid = target != self.ignore_index
        truth = target[valid]
        log_p = F.log_softmax(logits[valid], dim=1).gather(1, truth[:, None])[:, 0]
        miss = -log_p.expm1()  # 1 - p without cancellation
        # A point predicted with certainty has miss 0, where miss ** gamma has no finite slope for gamma < 1.
        loss = -(miss.clamp(min=1e-12) ** self.gamma) * log_p
        if self.weight is not None:
            loss = loss * self.weight[truth]
        return loss.sum() / max(1, len(truth))
