"""Losses of completed clouds: Chamfer and density-aware Chamfer distance."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from pc3d.config import Configurable
from pc3d.ops.point_sets import chamfer_distance, density_aware_chamfer_distance


class CompletionLoss(nn.Module, Configurable, ABC):
    """``loss_weight`` times the mean over clouds of a distance between completed and true points.

    Args:
        loss_weight: factor on the result.
    """

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, made: Tensor, made_offsets: Tensor, wanted: Tensor, wanted_offsets: Tensor) -> Tensor:
        """Scalar loss of packed ``(N, 3)`` and ``(M, 3)`` sets with ``(B + 1,)`` borders."""
        distance = self.distance(made.float(), made_offsets, wanted.float(), wanted_offsets)
        return self.loss_weight * distance.mean()

    @abstractmethod
    def distance(self, made: Tensor, made_offsets: Tensor, wanted: Tensor, wanted_offsets: Tensor) -> Tensor:
        """``(B,)`` distances."""


class Chamfer(CompletionLoss):
    """:func:`chamfer_distance`; ``squared`` as in most training recipes."""

    def __init__(self, loss_weight: float = 1.0, squared: bool = True) -> None:
        super().__init__(loss_weight)
        self.squared = squared

    def distance(self, made: Tensor, made_offsets: Tensor, wanted: Tensor, wanted_offsets: Tensor) -> Tensor:
        return chamfer_distance(made, made_offsets, wanted, wanted_offsets, self.squared)


class DensityAwareChamfer(CompletionLoss):
    """:func:`density_aware_chamfer_distance`."""

    def __init__(self, loss_weight: float = 1.0, alpha: float = 40.0, power: float = 0.5) -> None:
        super().__init__(loss_weight)
        self.alpha, self.power = alpha, power

    def distance(self, made: Tensor, made_offsets: Tensor, wanted: Tensor, wanted_offsets: Tensor) -> Tensor:
        return density_aware_chamfer_distance(made, made_offsets, wanted, wanted_offsets, self.alpha, self.power)
