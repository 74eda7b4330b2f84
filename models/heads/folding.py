"""Completion by folding a plane twice (FoldingNet, arXiv 1712.07262)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pc3d.nn.point_ssm import DenseBlock
from pc3d.tasks.heads import CompletionHead


class FoldingDecoder(CompletionHead):
    """Folds a square grid of points by the features of a cloud.

    Args:
        in_channels: width of the features.
        points: about so many points: the grid has ``int(sqrt(points))`` on a side.
        hidden: widths of the layers of a fold.
        folds: times the result is folded again.
        groups: of the group norms.
        condition: width of a condition per cloud.
    """

    plane: Tensor

    def __init__(
        self,
        in_channels: int,
        points: int = 2048,
        hidden: Sequence[int] = (512, 512),
        folds: int = 2,
        groups: int = 8,
        condition: int = 0,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        side = torch.linspace(-0.5, 0.5, math.isqrt(points))
        self.register_buffer("plane", torch.cartesian_prod(side, side).flip(1), persistent=False)
        self.layers, self.last = nn.ModuleList(), nn.ModuleList()
        for i in range(folds):
            widths = [in_channels + (3 if i else 2), *hidden]
            pairs = itertools.pairwise(widths)
            self.layers.append(nn.ModuleList(DenseBlock(a, b, groups, condition) for a, b in pairs))
            self.last.append(nn.Linear(hidden[-1], 3))

    def forward(self, latent: Tensor, condition: Tensor | None = None) -> Tensor:
        """``(B, points, 3)`` from ``(B, in_channels)``."""
        clouds, count = len(latent), len(self.plane)
        offsets = torch.arange(clouds + 1, device=latent.device) * count
        spread, shape = latent.repeat_interleave(count, 0), self.plane.repeat(clouds, 1)
        for layers, last in zip(self.layers, self.last, strict=True):
            x = torch.cat([shape, spread], -1)
            assert isinstance(layers, nn.ModuleList)
            for layer in layers:
                x = layer(x, offsets, condition)
            shape = last(x)
        return shape.view(clouds, count, 3)
