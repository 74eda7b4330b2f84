"""Surfaces and points in space, to learn occupancy from.

Such a cloud holds both, told apart by ``occupancy`` (N,) int64: -1 on the surface, 1 inside, 0 outside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pc3d.data.transforms.base import CloudTransform, normal_like
from pc3d.errors import InputError
from pc3d.ops.neighbours import knn
from pc3d.points import Points

SURFACE = -1
_QUERIES = 20_000  # points whose neighbours are held at a time


class ScanAndQueries(CloudTransform):
    """A noisy scan drawn from the surface, then queries drawn from the points in space, both with repeats.

    A cloud without ``occupancy`` is a scan already: it gets no noise, and only loses points where it has too many.

    Args:
        points: of the scan.
        queries: drawn from space; None keeps all points in space, once.
        noise: standard deviation of every coordinate of the scan.
        boundary: draw queries near the surface only, see :class:`MarkBoundary`.

    Raises:
        InputError: when called, if there is no surface, or no point in space to draw from.
    """

    def __init__(
        self, points: int = 3000, queries: int | None = 2048, noise: float = 0.005, boundary: bool = False
    ) -> None:
        if points < 1 or noise < 0 or (queries is not None and queries < 1):
            raise InputError(f"ScanAndQueries: points {points}, queries {queries} or noise {noise} is too small")
        self.points, self.queries, self.noise, self.boundary = points, queries, noise, boundary

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        if "occupancy" not in cloud:
            if cloud.num_points <= self.points:
                return cloud
            rows = torch.randperm(cloud.num_points, generator=generator)[: self.points]
            return cloud.select(rows.sort().values.to(cloud.device))
        occupancy = cloud.get("occupancy")
        surface = (occupancy == SURFACE).nonzero()[:, 0]
        wanted = cloud.get("boundary") if self.boundary else occupancy != SURFACE
        space = wanted.nonzero()[:, 0]
        for rows, what in ((surface, "on the surface"), (space, "to ask for")):
            if not len(rows):
                raise InputError(f"{cloud.describe()}: field 'occupancy' has no points {what}")
        scan = _drawn(surface, self.points, generator)
        space = space if self.queries is None else _drawn(space, self.queries, generator)
        chosen = cloud.select(torch.cat([scan, space]))
        noise = normal_like(chosen.coord[: len(scan)], generator) * self.noise
        return chosen.with_attrs(coord=torch.cat([chosen.coord[: len(scan)] + noise, chosen.coord[len(scan) :]]))


def _drawn(rows: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    return rows[torch.randint(len(rows), (count,), generator=generator).to(rows.device)]


class MarkBoundary(CloudTransform):
    """``boundary`` (N,) bool: points in space with a near neighbour on the other side of the surface.

    As published with GridFormer (arXiv 2401.02292): one of the nearest ``neighbours`` points in space within
    ``radius``, itself among them, has the other occupancy. Done once per cloud where it is part of ``prepare``.
    """

    def __init__(self, neighbours: int = 100, radius: float = 0.08) -> None:
        if neighbours < 2 or radius <= 0:
            raise InputError(f"MarkBoundary: neighbours {neighbours} or radius {radius} is too small")
        self.neighbours, self.radius = neighbours, radius

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        if "occupancy" not in cloud:
            return cloud
        occupancy = cloud.get("occupancy")
        space = (occupancy != SURFACE).nonzero()[:, 0]
        coord, inside = cloud.coord[space], occupancy[space]
        borders = torch.tensor([0, len(space)], device=cloud.device)
        mixed = []
        for query, own in zip(coord.split(_QUERIES), inside.split(_QUERIES), strict=True):
            asked = torch.tensor([0, len(query)], device=cloud.device)
            rows, _ = knn(query, asked, coord, borders, self.neighbours, self.radius)
            mixed.append(((inside[rows.clamp(min=0)] != own[:, None]) & (rows >= 0)).any(1))
        boundary = torch.zeros_like(occupancy, dtype=torch.bool)
        boundary[space] = torch.cat(mixed) if mixed else boundary[space]
        return cloud.with_attrs(boundary=boundary)
