"""The clouds that are timed: files named on the command line, or a generated sweep of a spinning lidar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from pc3d.io import read
from pc3d.points import Points

RINGS = 64
SENSOR_HEIGHT = 1.8  # metres
FARTHEST = 80.0  # metres


def lidar_sweep(num_points: int, seed: int = 0) -> Points:
    """A street as a 64-ring lidar on a car sees it: ground, house fronts on both sides, and boxes the size of cars.

    Points come in the order of the sweep (azimuth after azimuth, ring after ring), with 2 cm of range noise; several
    sweeps are stacked, as in an accumulated map, when one turn of ``RINGS x 2048`` rays does not give enough points.
    """
    generator = torch.Generator().manual_seed(seed)
    sweeps: list[torch.Tensor] = []
    while sum(map(len, sweeps)) < num_points:
        sweeps.append(_one_turn(generator) + torch.tensor([1.0 * len(sweeps), 0.0, 0.0]))
    return Points(torch.cat(sweeps)[:num_points].contiguous(), meta=[{"name": f"lidar-{num_points}"}])


def _one_turn(generator: torch.Generator) -> torch.Tensor:
    azimuth = torch.arange(2048) * (2 * math.pi / 2048)
    elevation = torch.deg2rad(torch.linspace(-24.8, 2.0, RINGS))
    a, e = (t.reshape(-1) for t in torch.meshgrid(azimuth, elevation, indexing="ij"))
    rays = torch.stack([e.cos() * a.cos(), e.cos() * a.sin(), e.sin()], 1)
    fronts = 9.0 + 3.0 * torch.rand(64, generator=generator)[(a * (63 / (2 * math.pi))).long()]
    cars = torch.where(torch.rand(256, generator=generator) < 0.2, 6.0, 1e9)[(a * (255 / (2 * math.pi))).long()]
    cars = torch.where(e < -0.05, cars, 1e9)
    distance = torch.stack(
        [SENSOR_HEIGHT / (-rays[:, 2]).clamp(min=1e-3), fronts / rays[:, 1].abs().clamp(min=1e-3), cars]
    )
    distance = distance.amin(0)
    hit = distance < FARTHEST
    noise = 0.02 * torch.randn(len(distance), generator=generator)
    return ((distance + noise)[:, None] * rays)[hit]


def load(paths: Sequence[Path], num_points: int) -> list[Points]:
    """The clouds of ``paths``, or one generated sweep of ``num_points``."""
    return [read(path) for path in paths] or [lidar_sweep(num_points)]
