"""A small SECOND and clouds in its range, for the tests of detectors."""

from __future__ import annotations

import torch

from pc3d.models import SECOND
from pc3d.nn.bev import BevGrid
from pc3d.points import Points

GRID = BevGrid([0, -3.2, -3, 6.4, 3.2, 1], [0.1, 0.1, 0.16])


def small_second() -> SECOND:
    return SECOND(4, GRID, (4, 4, 8, 8, 8), neck_layers=(1, 1), neck_channels=(8, 8), up_channels=(8, 8))


def clouds(*counts: int) -> Points:
    """A batch of clouds of so many random points, with ``feat`` of width 4."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for count in counts:
        coord = torch.rand(count, 3, generator=generator) * torch.tensor([6.4, 6.4, 4]) - torch.tensor([0, 3.2, 3])
        made.append(Points(coord, attrs={"feat": torch.cat([coord, coord[:, :1]], 1)}))
    return Points.cat(made)
