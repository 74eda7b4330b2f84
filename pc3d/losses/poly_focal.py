"""Focal loss of sigmoids with a polynomial term."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from pc3d.losses.base import Loss


class PolyFocal(Loss):
    """Poly-1 focal loss of every class as a yes or no: ``a_t (1 - p_t)^gamma BCE + epsilon (1 - p_t)^(gamma + 1)``.

    ``p_t`` is the sigmoid of the true answer, ``a_t`` is alpha for yes and 1 - alpha for no; mean over points and
    classes. Leng et al., "PolyLoss", ICLR 2022; as Point Cloud Mamba uses it for part segmentation.

    Args:
        gamma: how much well-classified answers are played down.
        alpha: weight of the true class; None weighs all alike.
        epsilon: weight of the polynomial term.
    """

    def __init__(
        self,
        loss_weight: float = 1.0,
        ignore_index: int = -1,
        gamma: float = 2.0,
        alpha: float | None = 0.25,
        epsilon: float = 1.0,
    ) -> None:
        super().__init__(loss_weight, ignore_index)
        self.gamma, self.alpha, self.epsilon = gamma, alpha, epsilon

    def compute(self, logits: Tensor, target: Tensor) -> Tensor:
        valid = target != self.ignore_index
        logits = logits[valid]
        truth = F.one_hot(target[valid], logits.shape[1]).to(logits.dtype)
        entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        miss = (1 - truth) * logits.sigmoid() + truth * (-logits).sigmoid()  # 1 - p_t
        weight = 1.0 if self.alpha is None else self.alpha * truth + (1 - self.alpha) * (1 - truth)
        loss = weight * miss**self.gamma * entropy + self.epsilon * miss ** (self.gamma + 1)
        return loss.sum() / max(1, loss.numel())
