"""The loss of occupancy networks, with the margin of GridFormer's second stage."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from pc3d.config import Configurable
from pc3d.errors import InputError
from pc3d.ops.segment import segment_sum


class MarginOccupancy(nn.Module, Configurable):
    """Binary cross-entropy of ``logit - margin * (2 occupancy - 1)``, summed over a cloud's queries, mean over clouds.

    With a margin a query counts as decided only when its logit is beyond it (arXiv 2401.02292: 0 in the first stage, 2
    in the second).

    Args:
        margin: in logits.
        loss_weight: factor on the result.

    Raises:
        InputError: for a negative margin.
    """

    def __init__(self, margin: float = 0.0, loss_weight: float = 1.0) -> None:
        super().__init__()
        if margin < 0:
            raise InputError(f"MarginOccupancy.margin: {margin} must not be negative")
        self.margin = margin
        self.loss_weight = loss_weight

    def forward(self, logits: Tensor, occupancy: Tensor, offsets: Tensor) -> Tensor:
        """Scalar loss.

        Args:
            logits: ``(Q,)`` floating point, packed.
            occupancy: ``(Q,)`` 1 inside, 0 outside.
            offsets: ``(B + 1,)`` int64 borders of the clouds.
        """
        target = occupancy.float()
        shifted = logits.float() - self.margin * (2 * target - 1)
        losses = F.binary_cross_entropy_with_logits(shifted, target, reduction="none")
        return self.loss_weight * segment_sum(losses, offsets).mean()
