"""``Voxels``: a packed batch of sparse voxel grids, and how points become voxels."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from pc3d.errors import InputError
from pc3d.ops.segment import segment_mean
from pc3d.ops.voxelize import UniqueVoxels, VoxelOrder, grid_coords, random_rows, unique_voxels

if TYPE_CHECKING:
    from pc3d.points import Points

Reduce = Literal["mean", "first", "random"]


@dataclass
class Voxels:
    """A batch of sparse voxel grids.

    Attributes:
        coord: ``(M, 4)`` int32 rows ``[batch, x, y, z]``, unique. Coordinates may be negative. At stride ``s`` they
            count cells of ``s * voxel_size`` metres.
        feat: ``(M, C)`` features.
        batch_size: number of clouds B (empty clouds included).
        stride: cells of the input grid per cell of this one; one number, or three where the axes differ.
        voxel_size: edge of an input-grid cell in metres.
        point_to_voxel: ``(N,)`` int64, the voxel of each point of the batch the grid was made from; None below the
            input stride.
        spatial_shape: extent of a bounded grid along x, y, z: strided convolutions drop what lies beyond their last
            full window, as spconv does. None (the default): nothing is ever dropped.
        context: shared by all grids derived from one input: orders, kernel maps and coordinates per stride, each built
            once.
    """

    coord: Tensor
    feat: Tensor
    batch_size: int
    stride: int | tuple[int, int, int] = 1
    voxel_size: float = 1.0
    point_to_voxel: Tensor | None = None
    spatial_shape: tuple[int, int, int] | None = None
    context: dict[Any, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.coord)

    def with_feat(self, feat: Tensor) -> Voxels:
        """The same grid with other features ``(M, C')``; geometry and context are shared."""
        if len(feat) != len(self.coord):
            raise ValueError(f"feat has {len(feat)} rows for {len(self.coord)} voxels")
        return replace(self, feat=feat)

    def to_points(self, feat: Tensor | None = None) -> Tensor:
        """``(N, C)``: the features (own ones by default) of each point's voxel.

        Raises:
            ValueError: if the grid is not the input grid of a batch of points.
        """
        if self.point_to_voxel is None:
            raise ValueError(
                f"voxels at stride {self.stride} have no points of their own; go back to the input stride first"
            )
        return (self.feat if feat is None else feat)[self.point_to_voxel]


def voxelize(
    points: Points,
    size: float,
    reduce: Reduce = "mean",
    order: VoxelOrder = "raster",
    generator: torch.Generator | None = None,
) -> Voxels:
    """Group points into cubic cells.

    Args:
        points: B clouds with ``attrs["feat"]`` ``(N, C)``.
        size: edge of a cell in metres. Cells count from each cloud's lowest one (see ``ops.voxelize.grid_coords``).
        reduce: a voxel's features: the ``"mean"`` over its points, or those of its ``"first"`` or a ``"random"`` one.
        order: ``"raster"`` sorts voxels by (batch, x, y, z), ``"input"`` by the first point that hits them.
        generator: CPU generator for ``reduce="random"``; None is torch's default one.

    Returns:
        M voxels with ``point_to_voxel`` ``(N,)``.

    Raises:
        InputError: without ``feat``, or when the coordinates do not fit a grid of this size.
    """
    feat = points.get("feat")
    try:
        grid = grid_coords(points.coord, points.offsets, size)
        cells = unique_voxels(grid, points.offsets, order)
    except InputError as error:
        raise InputError(f"{points.describe()}: {error}") from None
    return Voxels(
        coord=_with_batch(grid[cells.first], cells.voxel_offsets),
        feat=_reduce(feat, cells, reduce, generator),
        batch_size=len(points),
        voxel_size=size,
        point_to_voxel=cells.inverse,
    )


def from_grid(points: Points) -> Voxels:
    """The voxels that grid sampling has named already, in ``attrs["grid_coord"]`` ``(N, 3)`` int32.

    Where every point has a cell of its own, rows stay as they are and ``feat`` is shared, not copied; otherwise (after
    mixing clouds, for instance) the points of a cell are merged to their mean, in raster order.

    Raises:
        InputError: without ``grid_coord`` or ``feat``, or when the cells span too wide a range.
    """
    feat = points.get("feat")
    grid = points.get("grid_coord").to(torch.int32)
    try:
        cells = unique_voxels(grid, points.offsets)
    except InputError as error:
        raise InputError(f"{points.describe()}: field 'grid_coord': {error}") from None
    if len(cells) == len(grid):
        rows = torch.arange(len(grid), device=grid.device)
        return Voxels(_with_batch(grid, points.offsets), feat, len(points), point_to_voxel=rows)
    coord = _with_batch(grid[cells.first], cells.voxel_offsets)
    return Voxels(coord, _reduce(feat, cells, "mean"), len(points), point_to_voxel=cells.inverse)


def _reduce(feat: Tensor, cells: UniqueVoxels, reduce: Reduce, generator: torch.Generator | None = None) -> Tensor:
    if reduce == "mean":
        return segment_mean(feat[cells.order_rows], cells.row_offsets)
    if reduce == "first":
        return feat[cells.first]
    return feat[random_rows(cells, generator)]


def _with_batch(grid: Tensor, offsets: Tensor) -> Tensor:
    """``(M, 4)`` int32 rows ``[batch, x, y, z]``."""
    clouds = torch.arange(len(offsets) - 1, dtype=torch.int32, device=grid.device)
    batch = torch.repeat_interleave(clouds, offsets.diff(), output_size=len(grid))
    return torch.cat([batch[:, None], grid], dim=1)
