"""``Voxels``: a packed batch of sparse voxel grids, and how points become voxels."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pc3d.points import Points

Reduce = Literal["mean", "first", "random"]
VoxelOrder = Literal["raster", "input"]


@dataclass
class Voxels:
    """A batch of sparse voxel grids.

    Attributes:
        coord: ``(M, 4)`` int32 rows ``[batch, x, y, z]``, unique. Coordinates may be negative. At stride ``s`` they count cells
            of ``s * voxel_size`` metres.
        feat: ``(M, C)`` features.
        batch_size: number of clouds B (empty clouds included).
        stride: cells of the input grid per cell of this one, along an axis.
        voxel_size: edge of an input-grid cell in metres.
        point_to_voxel: ``(N,)`` int64, the voxel of each point of the batch the grid was made from; None below the input stride.
        context: shared by all grids derived from one input: orders, kernel maps and coordinates per stride, each built once.
    """

    coord: Tensor
    feat: Tensor
    batch_size: int
    stride: int = 1
    voxel_size: float = 1.0
    point_to_voxel: Tensor | None = None
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
            raise ValueError(f"voxels at stride {self.stride} have no points of their own; go back to the input stride first")
        return (self.feat if feat is None else feat)[self.point_to_voxel]
