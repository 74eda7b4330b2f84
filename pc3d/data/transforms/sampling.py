"""Which points stay: grid sampling, crops, dropout, clipping and order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from pc3d.data.boxes import box_tensor, take_boxes
from pc3d.data.transforms.base import CloudTransform, Transform, chance, check_range
from pc3d.data.transforms.geometric import lowered
from pc3d.errors import InputError
from pc3d.ops.neighbours import farthest_points, knn
from pc3d.ops.voxelize import UniqueVoxels, grid_coords, unique_voxels
from pc3d.points import Points

Pick = Literal["random", "first", "center"]
KeyOrder = Literal["raster", "fnv"]

_FNV_BASIS = 14695981039346656037 - 2**64  # as a signed 64-bit integer
_FNV_PRIME = 1099511628211
_LARGEST_STRIDE = 128


class GridSample(Transform):
    """Keep one point per cell of a cubic grid, ``floor(coord / size)``.

    Sets ``grid_coord`` (N, 3) int32, counted from each cloud's lowest cell. The points come out in the order of their
    cells. A cloud that is a part of another one (``meta["grid_low"]``: lowest coordinate of the whole) is counted from
    up to 127 cells further down, so that cells of strides up to 128 are those that the whole cloud would have.

    Args:
        size: edge of a cell in metres.
        pick: which point stands for a cell: a ``random`` one, the ``first`` row, or the one nearest to the cell's
            ``center``.
        inverse: keep the clouds before sampling as ``source``, with ``attrs["inverse"]`` (point -> row of the sampled
            cloud).
        key_order: ``"raster"`` orders the cells by (x, y, z) and draws members evenly. ``"fnv"`` is the published
            protocol of Pointcept: cells by their 64-bit FNV-1 hash, member ``U{0, ..., max count - 1} mod count``
            (slightly uneven).
    """

    def __init__(
        self, size: float, pick: Pick = "random", inverse: bool = False, key_order: KeyOrder = "raster"
    ) -> None:
        self.size = size
        self.pick = pick
        self.inverse = inverse
        self.key_order = key_order

    def __call__(self, points: Points, generator: torch.Generator | None = None) -> Points:
        grid, voxels = self._cells(points)
        rows = self._picked_rows(points, voxels, generator)
        sampled = points.with_attrs(grid_coord=grid).select(rows)
        if not self.inverse:
            return sampled
        local = voxels.inverse - voxels.voxel_offsets[points.batch]
        return sampled.replace(source=points.with_attrs(inverse=local))

    def fragments(self, points: Points) -> Iterator[Points]:
        """Every point of one cloud, in as few one-point-per-cell samples as possible, made one at a time.

        Fragment ``f`` holds member ``f mod count`` of each cell, so a point of a sparse cell comes back in several
        fragments. All fragments have the same ``grid_coord``. ``attrs["index"]`` is the row of each point in
        ``points`` (an ``index`` that ``points`` already carries is kept).

        Raises:
            ValueError: for a batch of several clouds.
        """
        if len(points) != 1:
            raise ValueError(f"fragments are made of one cloud at a time, got {len(points)}")
        grid, voxels = self._cells(points)
        index = points.attrs.get("index", torch.arange(points.num_points, device=points.device))
        points = points.with_attrs(grid_coord=grid, index=index)
        starts = voxels.row_offsets[:-1]
        for fragment in range(int(voxels.counts.max()) if len(voxels) else 0):
            yield points.select(voxels.order_rows[starts + fragment % voxels.counts])

    def _cells(self, points: Points) -> tuple[Tensor, UniqueVoxels]:
        grid = grid_coords(points.coord, points.offsets, self.size)
        if any("grid_low" in entry for entry in points.meta):
            grid = grid + _phases(points, self.size)[points.batch]
        voxels = unique_voxels(grid, points.offsets, "raster")
        if self.key_order == "fnv":
            voxels = _reorder(voxels, _fnv_order(grid[voxels.first], points.batch[voxels.first]))
        return grid, voxels

    def _picked_rows(self, points: Points, voxels: UniqueVoxels, generator: torch.Generator | None) -> Tensor:
        if self.pick == "first":
            return voxels.first
        if self.pick == "center":
            return _nearest_to_center(points.coord, voxels, self.size)
        high = voxels.counts
        if self.key_order == "fnv" and len(voxels):
            cloud_max = torch.segment_reduce(high.double(), "max", offsets=voxels.voxel_offsets, initial=0).long()
            high = cloud_max[points.batch[voxels.first]]
        member = self._draw(high, generator) % voxels.counts
        return voxels.order_rows[voxels.row_offsets[:-1] + member]

    def _draw(self, high: Tensor, generator: torch.Generator | None) -> Tensor:
        """One integer from U{0, ..., high - 1} for every entry of ``high``."""
        return (torch.rand(len(high), dtype=torch.float64, generator=generator).to(high.device) * high).long()


def _phases(points: Points, size: float) -> Tensor:
    """``(B, 3)`` int32 cells between the lowest cell of each cloud and that of its whole, up to the largest stride."""
    phases = torch.zeros(len(points), 3, dtype=torch.int32)
    for i, (entry, cloud) in enumerate(zip(points.meta, points, strict=True)):
        if "grid_low" in entry and cloud.num_points:
            whole = torch.tensor(entry["grid_low"], dtype=torch.float32).double()
            lowest = cloud.coord.amin(0).cpu().double()
            phases[i] = ((lowest / size).floor() - (whole / size).floor()).long() % _LARGEST_STRIDE
    return phases.to(points.device)


def fnv_keys(grid: Tensor) -> Tensor:
    """``(N,)`` int64: FNV-1 64-bit hash over x, y, z of ``(N, 3)`` cells; the bits of the unsigned hash."""
    keys = torch.full((len(grid),), _FNV_BASIS, dtype=torch.int64, device=grid.device)
    for axis in range(3):
        keys = (keys * _FNV_PRIME) ^ grid[:, axis].long()
    return keys


def _fnv_order(grid: Tensor, batch: Tensor) -> Tensor:
    unsigned_order = fnv_keys(grid) ^ torch.iinfo(torch.int64).min
    order = torch.argsort(unsigned_order)
    return order[torch.argsort(batch[order], stable=True)]


def _reorder(voxels: UniqueVoxels, order: Tensor) -> UniqueVoxels:
    """The same voxels, the one at ``order[i]`` becoming number ``i``; ``order`` keeps the clouds in place."""
    new_number = torch.empty_like(order)
    new_number[order] = torch.arange(len(order), device=order.device)
    inverse = new_number[voxels.inverse]
    return replace(
        voxels,
        first=voxels.first[order],
        counts=voxels.counts[order],
        inverse=inverse,
        order_rows=torch.argsort(inverse, stable=True),
    )


def _nearest_to_center(coord: Tensor, voxels: UniqueVoxels, size: float) -> Tensor:
    cells = coord.double() / size
    distance = (cells - cells.floor() - 0.5).square().sum(1)
    near_first = torch.argsort(distance, stable=True)
    by_voxel = near_first[torch.argsort(voxels.inverse[near_first], stable=True)]
    return by_voxel[voxels.row_offsets[:-1]]


class SphereCrop(CloudTransform):
    """Keep the points nearest to a random point of the cloud, ordered by distance; a smaller cloud stays as it is.

    Args:
        max_points: points to keep; or
        rate: share of the cloud's points to keep. Give one of the two.
    """

    def __init__(self, max_points: int | None = None, rate: float | None = None) -> None:
        if (max_points is None) == (rate is None):
            raise InputError(
                f"SphereCrop takes max_points or rate, one of them, got max_points={max_points}, rate={rate}"
            )
        self.max_points = max_points
        self.rate = rate

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        keep = self.max_points if self.max_points is not None else int(cloud.num_points * (self.rate or 0))
        if cloud.num_points <= keep:
            return cloud
        center = cloud.coord[int(torch.randint(cloud.num_points, (1,), generator=generator))]
        distance = (cloud.coord - center).square().sum(1)
        return cloud.select(torch.argsort(distance, stable=True)[:keep])


class ColumnCrop(CloudTransform):
    """Keep a square column around a random point, which moves to x = y = 0; z stays as it is.

    Args:
        size: edge of the square in metres.
        more_than: a column with no more points is drawn again.
        tries: columns drawn at most; if all have too few points the fullest of them is kept.
    """

    def __init__(self, size: float = 1.0, more_than: int = 1024, tries: int = 100) -> None:
        if size <= 0 or tries < 1:
            raise InputError(f"ColumnCrop: size {size} must be above 0 and tries {tries} at least 1")
        self.size, self.more_than, self.tries = size, more_than, tries

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        if cloud.num_points == 0:
            return cloud
        best, middle, most = cloud.coord.new_zeros(0, dtype=torch.bool), cloud.coord[0], -1
        for _ in range(self.tries):
            center = cloud.coord[int(torch.randint(cloud.num_points, (1,), generator=generator))]
            inside = ((cloud.coord - center)[:, :2].abs() <= self.size / 2).all(1)
            if (count := int(inside.sum())) > most:
                best, middle, most = inside, center, count
            if most > self.more_than:
                break
        return lowered(cloud.select(best.nonzero()[:, 0]), middle * middle.new_tensor([1.0, 1.0, 0.0]))


class FixedPoints(CloudTransform):
    """Keep exactly ``count`` points of a cloud; a smaller one repeats some. An empty cloud stays empty.

    The two sides of a cloud to complete (``target`` 0 and 1) get ``count`` points each.

    Args:
        count: points to keep.
        pick: ``random`` ones, the ``first`` rows, or the ``farthest`` from each other (farthest point sampling from the
            first row, in the order they are taken).
        replace: draw random points with repeats, as some published protocols do.
        inverse: keep the cloud before sampling as ``source``, with ``attrs["inverse"]`` (point -> nearest kept point).
    """

    def __init__(
        self,
        count: int,
        pick: Literal["random", "first", "farthest"] = "random",
        replace: bool = False,
        inverse: bool = False,
    ) -> None:
        if count < 1 or pick not in ("random", "first", "farthest") or (replace and pick != "random"):
            raise InputError(
                f"FixedPoints: count {count} must be at least 1, pick '{pick}' random, first or farthest, and replace "
                "is for random"
            )
        self.count = count
        self.pick = pick
        self.replace = replace
        self.inverse = inverse

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        if cloud.num_points == 0:
            return cloud
        sides = [torch.arange(cloud.num_points, device=cloud.device)]
        if "target" in cloud:
            sides = [(cloud.get("target") == side).nonzero()[:, 0] for side in (0, 1)]
        rows = torch.cat([own[self._choose(cloud.coord[own], generator)] for own in sides if len(own)])
        sampled = cloud.select(rows)
        if not self.inverse:
            return sampled
        nearest, _ = knn(cloud.coord, cloud.offsets, sampled.coord, sampled.offsets, 1)
        return sampled.replace(source=cloud.with_attrs(inverse=nearest[:, 0]))

    def _choose(self, coord: Tensor, generator: torch.Generator | None) -> Tensor:
        """``(count,)`` rows."""
        size = len(coord)
        if self.replace:
            return torch.randint(size, (self.count,), generator=generator).to(coord.device)
        if size < self.count:
            more = torch.arange(self.count - size) % size
            if self.pick != "first":
                more = torch.randint(size, (self.count - size,), generator=generator)
            return torch.cat([torch.arange(size), more]).to(coord.device)
        if self.pick == "first":
            return torch.arange(self.count, device=coord.device)
        if self.pick == "random":
            return torch.randperm(size, generator=generator)[: self.count].to(coord.device)
        borders = torch.tensor([[0, size], [0, self.count]], device=coord.device)
        return farthest_points(coord, borders[0], borders[1])


class RandomDropout(CloudTransform):
    """With probability ``p`` keep only ``int(n * (1 - ratio))`` random points of a cloud, in their order."""

    def __init__(self, ratio: float = 0.2, p: float = 0.2) -> None:
        self.ratio = ratio
        self.p = p

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        if not chance(self.p, generator):
            return cloud
        keep = torch.zeros(cloud.num_points, dtype=torch.bool)
        keep[torch.randperm(cloud.num_points, generator=generator)[: int(cloud.num_points * (1 - self.ratio))]] = True
        return cloud.select(keep.to(cloud.device))


class ShufflePoints(CloudTransform):
    """Put the points of a cloud in random order."""

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        return cloud.select(torch.randperm(cloud.num_points, generator=generator).to(cloud.device))


class CropBox(Transform):
    """Remove the points outside a box (``PointClip`` moves them to its faces instead), and boxes with their centre.

    Args:
        point_range: ``(xmin, ymin, zmin, xmax, ymax, zmax)`` in metres; faces belong to the box.
    """

    def __init__(self, point_range: Sequence[float]) -> None:
        self.point_range = check_range(point_range)

    def __call__(self, points: Points, generator: torch.Generator | None = None) -> Points:
        low, high = (points.coord.new_tensor(corner) for corner in (self.point_range[:3], self.point_range[3:]))
        inside = points.select(((points.coord >= low) & (points.coord <= high)).all(1))
        return inside.replace(meta=[self._with_boxes(meta) for meta in points.meta])

    def _with_boxes(self, meta: dict[str, Any]) -> dict[str, Any]:
        center = box_tensor(meta)[:, :3]
        low, high = center.new_tensor(self.point_range).view(2, 3)
        return take_boxes(meta, ((center >= low) & (center <= high)).all(1).nonzero()[:, 0].tolist())
