"""From features to class logits."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from pc3d.config import Configurable
from pc3d.points import Points


class SegmentationHead(nn.Module, Configurable, ABC):
    """``head(features, points)``: ``(N, C)`` features of ``points`` to ``(N, K)`` logits."""

    @abstractmethod
    def forward(self, features: Tensor, points: Points) -> Tensor: ...


class LinearHead(SegmentationHead):
    """One linear layer."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, features: Tensor, points: Points) -> Tensor:
        return self.linear(features)
