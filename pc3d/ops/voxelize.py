"""From coordinates to grid cells, and from cells to the distinct voxels: the first step of every voxel model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pc3d.errors import InputError
from pc3d.ops.backend import cpu_kernels

VoxelOrder = Literal["raster", "input"]

MAX_CELLS_PER_AXIS = 1 << 20
"""Widest cloud, in cells along one axis, that :func:`grid_coords` accepts (1 km at 1 mm)."""

_KEY_BITS = 63


@dataclass(frozen=True)
class UniqueVoxels:
    """The distinct cells of N points: M voxels, each cloud's after the previous one's.

    Attributes:
        first: ``(M,)`` int64, the lowest row among the points of a voxel.
        inverse: ``(N,)`` int64, the voxel of each point.
        counts: ``(M,)`` int64, points per voxel (at least 1).
        order_rows: ``(N,)`` int64, the points voxel after voxel, ascending inside a voxel.
        voxel_offsets: ``(B + 1,)`` int64, voxels ``voxel_offsets[i]:voxel_offsets[i + 1]`` belong to cloud ``i``.
    """

    first: Tensor
    inverse: Tensor
    counts: Tensor
    order_rows: Tensor
    voxel_offsets: Tensor

    def __len__(self) -> int:
        """Number of voxels M."""
        return len(self.first)

    @property
    def row_offsets(self) -> Tensor:
        """``(M + 1,)`` int64: ``order_rows[row_offsets[v]:row_offsets[v + 1]]`` are the points of voxel ``v``."""
        return _offsets_of(self.counts)


def grid_coords(coord: Tensor, offsets: Tensor, size: float) -> Tensor:
    """Cell of each point on a cubic grid: ``floor(coord / size)`` in float64, counted from the cloud's lowest cell.

    Args:
        coord: ``(N, 3)`` floating point, metres.
        offsets: ``(B + 1,)`` int64 cloud borders.
        size: edge of a cell in metres.

    Returns:
        ``(N, 3)`` int32; the minimum over each cloud is 0 on every axis.

    Raises:
        InputError: if ``size`` is not positive, a coordinate is not finite, or a cloud is wider than
            ``MAX_CELLS_PER_AXIS`` cells.
    """
    if not (math.isfinite(size) and size > 0):
        raise InputError(f"grid size must be a positive number of metres, got {size}")
    kernels = cpu_kernels(coord, offsets)
    if kernels is not None:
        exact = coord if coord.dtype == torch.float64 else coord.float()
        grid = kernels.grid_coords(exact.detach().contiguous(), offsets.contiguous(), size, MAX_CELLS_PER_AXIS)
        if grid is not None:
            return grid
    return _grid_coords_reference(coord, offsets, size)


def unique_voxels(grid: Tensor, offsets: Tensor, order: VoxelOrder = "raster") -> UniqueVoxels:
    """The distinct cells of a batch of clouds.

    Args:
        grid: ``(N, 3)`` int32 cells, negative ones allowed.
        offsets: ``(B + 1,)`` int64 cloud borders; a cell shared by two clouds is two voxels.
        order: ``"raster"`` sorts the voxels by (cloud, x, y, z); ``"input"`` keeps the order in which they first occur.

    Raises:
        InputError: if clouds and cells together need more than 63 bits (spans of more than 2^20 cells in big batches).
    """
    if grid.ndim != 2 or grid.shape[1] != 3 or grid.dtype != torch.int32:
        raise ValueError(f"grid must be (N, 3) int32, got {tuple(grid.shape)} {grid.dtype}")
    kernels = cpu_kernels(grid, offsets)
    found = None if kernels is None else kernels.unique_voxels(grid.contiguous(), offsets.contiguous())
    voxels = _unique_reference(grid, offsets) if found is None else UniqueVoxels(*found)
    return voxels if order == "raster" else _in_input_order(voxels)


def random_rows(cells: UniqueVoxels, generator: torch.Generator | None = None) -> Tensor:
    """``(M,)`` int64: one point of each voxel, all equally likely, drawn from a CPU generator (None: the default)."""
    draw = torch.rand(len(cells), generator=generator, dtype=torch.float64).to(cells.counts.device)
    return cells.order_rows[cells.row_offsets[:-1] + (draw * cells.counts).long()]


def _grid_coords_reference(coord: Tensor, offsets: Tensor, size: float) -> Tensor:
    if len(coord) == 0:
        return torch.zeros_like(coord, dtype=torch.int32)
    _check_finite(coord)
    cells = torch.floor(coord.double() / size)
    low = torch.segment_reduce(cells, "min", offsets=offsets, axis=0, unsafe=True)
    high = torch.segment_reduce(cells, "max", offsets=offsets, axis=0, unsafe=True)
    widest = (high - low).amax(0)  # an empty cloud has -inf - inf
    if not bool((widest < MAX_CELLS_PER_AXIS).all()):  # NaN where coord / size overflows
        axis = int(widest.argmax())
        raise InputError(
            f"grid size {size} m cuts axis {'xyz'[axis]} into {widest[axis].item() + 1:.0f} cells, the limit is "
            f"{MAX_CELLS_PER_AXIS}; remove stray points or take a larger grid size"
        )
    return (cells - torch.repeat_interleave(low, offsets.diff(), dim=0, output_size=len(coord))).to(torch.int32)


def _check_finite(coord: Tensor) -> None:
    bad = ~torch.isfinite(coord).all(1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        values = ", ".join(f"{v:g}" for v in coord[row].tolist())
        raise InputError(
            f"{int(bad.sum())} points have non-finite coordinates (first: point {row} at {values}); remove them"
        )


def _unique_reference(grid: Tensor, offsets: Tensor) -> UniqueVoxels:
    counts_per_cloud = offsets.diff()
    clouds = torch.arange(len(counts_per_cloud), device=grid.device)
    batch = torch.repeat_interleave(clouds, counts_per_cloud, output_size=len(grid))
    keys, order_rows = torch.sort(_pack(grid, batch, len(counts_per_cloud)), stable=True)
    is_start = torch.ones_like(keys, dtype=torch.bool)
    is_start[1:] = keys[1:] != keys[:-1]
    starts = is_start.nonzero()[:, 0]
    inverse = torch.empty_like(order_rows)
    inverse[order_rows] = is_start.cumsum(0) - 1
    first = order_rows[starts]
    counts = torch.cat([starts, starts.new_tensor([len(grid)])]).diff()
    return UniqueVoxels(
        first, inverse, counts, order_rows, _offsets_of(torch.bincount(batch[first], minlength=len(counts_per_cloud)))
    )


def _pack(grid: Tensor, batch: Tensor, batch_size: int) -> Tensor:
    """``(N,)`` int64 keys in raster order, each axis in as many bits as the batch needs."""
    if len(grid) == 0:
        return torch.zeros_like(batch)
    low, high = (t.tolist() for t in (grid.amin(0), grid.amax(0)))
    bits = [(b - a).bit_length() for a, b in zip(low, high, strict=True)]
    if sum(bits) + (batch_size - 1).bit_length() > _KEY_BITS:
        spans = " x ".join(str(b - a + 1) for a, b in zip(low, high, strict=True))
        raise InputError(
            f"a batch of {batch_size} clouds over {spans} cells does not fit 63-bit keys; use a larger grid size"
        )
    keys = batch
    for axis in range(3):
        keys = (keys << bits[axis]) | (grid[:, axis].long() - low[axis])
    return keys


def _in_input_order(voxels: UniqueVoxels) -> UniqueVoxels:
    old_of_new = torch.argsort(voxels.first)  # clouds are packed one after the other, so they stay in place
    new_of_old = torch.empty_like(old_of_new)
    new_of_old[old_of_new] = torch.arange(len(voxels), device=old_of_new.device)
    inverse = new_of_old[voxels.inverse]
    return UniqueVoxels(
        voxels.first[old_of_new],
        inverse,
        voxels.counts[old_of_new],
        torch.argsort(inverse, stable=True),
        voxels.voxel_offsets,
    )


def _offsets_of(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
