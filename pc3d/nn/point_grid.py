"""Points and dense grids: points attend into the cells they lie in, grids are read back at points.

Grids are planes or a volume over the unit square or cube, as in Convolutional Occupancy Networks (Peng et al. 2020,
arXiv 2003.04618); the attention is that of GridFormer (arXiv 2401.02292). A batch is packed, its clouds may differ in
size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pc3d.errors import InputError
from pc3d.nn.backbone import Backbone
from pc3d.nn.norm import PointBatchNorm
from pc3d.ops.segment import segment_expand, segment_mean, segment_softmax, segment_sum
from pc3d.points import Points

GridKind = Literal["volume", "planes"]

# Coordinates that a grid spans, the first of them along its last axis; and how far from 1 the largest place is.
_AXES: dict[GridKind, list[list[int]]] = {"volume": [[0, 1, 2]], "planes": [[0, 2], [0, 1], [1, 2]]}
_MARGIN: dict[GridKind, float] = {"volume": 1e-3, "planes": 1e-5}


@dataclass(frozen=True)
class GridFrame:
    """Where grids lie: one volume, or the planes xz, xy and yz, over the cube ``[-0.5, 0.5]^3`` and some padding.

    Attributes:
        kind: ``volume`` or ``planes``.
        padding: a grid covers ``1 + padding``; points outside count to its outermost cells.

    Raises:
        InputError: for another kind, or a negative padding.
    """

    kind: GridKind = "volume"
    padding: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in get_args(GridKind) or self.padding < 0:
            raise InputError(f"kind '{self.kind}' is none of {', '.join(_AXES)}, or padding {self.padding} is negative")

    @property
    def dimensions(self) -> int:
        """Axes of a grid."""
        return len(_AXES[self.kind][0])

    def places(self, coord: Tensor, offsets: Tensor) -> list[Places]:
        """Where ``(N, 3)`` packed points lie in each grid of the frame."""
        margin = _MARGIN[self.kind]
        unit = coord / (1 + self.padding + margin) + 0.5
        unit = torch.where(unit >= 1, 1 - margin, torch.where(unit < 0, 0, unit))
        return [Places(unit[:, axes], offsets) for axes in _AXES[self.kind]]


@dataclass(frozen=True, eq=False)
class Cells:
    """The cells of a grid that hold points, and the points in the order of their cells.

    Attributes:
        shape: ``(B, R, ..., R)`` clouds and cells of the whole grid.
        cloud, cell: ``(M,)`` int64, of each occupied cell its cloud and its number there.
        order: ``(N,)`` int64, rows of the points, cell after cell; within a cell in their own order.
        offsets: ``(M + 1,)`` int64, borders of the cells in ``order``.
        local: ``(N, D)`` places of the points ``order`` from the lowest corner of their cell, in units of the grid.
    """

    shape: tuple[int, ...]
    cloud: Tensor
    cell: Tensor
    order: Tensor
    offsets: Tensor
    local: Tensor

    def read(self, grid: Tensor) -> Tensor:
        """``(M, C)`` values of the occupied cells of a ``(B, C, R, ..., R)`` grid."""
        return grid.flatten(2)[self.cloud, :, self.cell]

    def dense(self, rows: Tensor) -> Tensor:
        """``(B, C, R, ..., R)`` grid with ``(M, C)`` rows in the occupied cells, zeros elsewhere."""
        per_cloud = self.shape[1] ** (len(self.shape) - 1)
        grid = rows.new_zeros(self.shape[0] * per_cloud, rows.shape[1])
        grid = grid.index_copy(0, self.cloud * per_cloud + self.cell, rows)
        return grid.view(*self.shape, rows.shape[1]).movedim(-1, 1).contiguous()

    def mean(self, feat: Tensor) -> Tensor:
        """``(B, C, R, ..., R)`` mean of ``(N, C)`` features in each cell, zeros in empty ones."""
        return self.dense(segment_mean(feat.index_select(0, self.order), self.offsets))


class Places:
    """Points in the unit square or cube of a grid.

    Args:
        unit: ``(N, D)`` floating point in ``[0, 1)``, packed; the first column runs along the last axis of a grid.
        offsets: ``(B + 1,)`` int64 borders of the clouds; empty clouds are allowed.
    """

    def __init__(self, unit: Tensor, offsets: Tensor) -> None:
        self.unit = unit
        self.clouds = len(offsets) - 1
        counts = offsets.diff()
        self._cloud = torch.repeat_interleave(counts, output_size=len(unit))
        width = int(counts.max()) if self.clouds else 0
        self._row = torch.arange(len(unit), device=unit.device) + (self._cloud * width - offsets[self._cloud])
        padded = unit.new_zeros(self.clouds * width, unit.shape[1]).index_copy(0, self._row, 2 * unit - 1)
        self._padded = padded.view(self.clouds, width, unit.shape[1])
        self._cells: dict[int, Cells] = {}

    def cells(self, resolution: int) -> Cells:
        """The cells of a grid of ``resolution`` per axis; found once."""
        if resolution not in self._cells:
            self._cells[resolution] = self._find_cells(resolution)
        return self._cells[resolution]

    def _find_cells(self, resolution: int) -> Cells:
        dimensions = self.unit.shape[1]
        corner = (self.unit * resolution).long()
        strides = resolution ** torch.arange(dimensions, device=corner.device)
        number = (corner * strides).sum(1) + self._cloud * resolution**dimensions
        number, order = number.sort(stable=True)
        number, counts = number.unique_consecutive(return_counts=True)
        local = (self.unit - corner.to(self.unit.dtype) / resolution)[order]
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        cloud = number.div(resolution**dimensions, rounding_mode="floor")
        shape = (self.clouds, *[resolution] * dimensions)
        return Cells(shape, cloud, number - cloud * resolution**dimensions, order, offsets, local)

    def sample(self, grid: Tensor) -> Tensor:
        """``(N, C)`` values of a ``(B, C, R, ..., R)`` grid at the points, linear between the centres of cells.

        The centres of the outermost cells are on the border of the unit square (``align_corners``): half a cell away
        from where :meth:`cells` has them, which published weights depend on.
        """
        if not len(self.unit):
            return grid.new_zeros(0, grid.shape[1])
        shape = (self.clouds, *[1] * (self.unit.shape[1] - 1), *self._padded.shape[1:])
        values = F.grid_sample(
            grid.to(self._padded.dtype), self._padded.view(shape), padding_mode="border", align_corners=True
        )
        rows = values.flatten(2).transpose(1, 2).flatten(0, 1)
        return rows if len(rows) == len(self.unit) else rows.index_select(0, self._row)


class CellAttention(nn.Module):
    """Points attend into the cell they lie in; the query is the cell's.

    ``w = softmax(relu(norm(W (k - q + e))))`` over the points of a cell, by channel, and ``sum w (v + e)``; ``e``
    encodes the place in the cell. Each of the ``channels / groups`` weights serves ``groups`` channels.

    Args:
        channels: width of keys, values and the grid.
        dimensions: axes of the grid.
        groups: channels that share a weight.

    Raises:
        InputError: if ``groups`` does not divide ``channels``.
    """

    def __init__(self, channels: int, dimensions: int, groups: int = 8) -> None:
        super().__init__()
        if channels % groups:
            raise InputError(f"attention of {channels} channels cannot share its weights by {groups}")
        self.groups = groups
        self.query = nn.Linear(channels, channels)
        self.position = nn.Sequential(
            nn.Linear(dimensions, dimensions), _norm(dimensions), nn.ReLU(), nn.Linear(dimensions, channels)
        )
        self.weight = nn.Sequential(nn.Linear(channels, channels // groups), _norm(channels // groups), nn.ReLU())

    def forward(self, key: Tensor, value: Tensor, grid: Tensor, cells: Cells) -> Tensor:
        """``(B, channels, R, ..., R)``, zeros in empty cells.

        Args:
            key, value: ``(N, channels)`` of the points.
            grid: ``(B, channels, R, ..., R)``, of which the occupied cells ask.
            cells: where the points are.
        """
        place = self.position(cells.local)
        query = segment_expand(self.query(cells.read(grid)), cells.offsets, len(key))
        share = segment_softmax(self.weight(key.index_select(0, cells.order) - query + place), cells.offsets)
        value = (value.index_select(0, cells.order) + place).unflatten(1, (self.groups, -1)) * share[:, None]
        return cells.dense(segment_sum(value.flatten(1), cells.offsets))


def _norm(channels: int) -> PointBatchNorm:
    return PointBatchNorm(channels, eps=1e-5, momentum=0.1)


@dataclass(frozen=True, eq=False)
class GridPyramid:
    """What is known of a batch of shapes: levels of grids, to be read anywhere.

    Attributes:
        frame: where the grids lie.
        levels: grids ``(B, C, R, ..., R)`` of each level, one for each of the frame.
    """

    frame: GridFrame
    levels: Sequence[Sequence[Tensor]]

    def read(self, query: Tensor, offsets: Tensor) -> list[Tensor]:
        """``(Q, C)`` features of each level at packed points ``(Q, 3)``, the sum over its grids."""
        places = self.frame.places(query, offsets)
        return [sample_sum(grids, places) for grids in self.levels]


def sample_sum(grids: Sequence[Tensor], places: Sequence[Places]) -> Tensor:
    """``(N, C)`` sum of the grids' values at points."""
    return torch.stack([place.sample(grid) for grid, place in zip(grids, places, strict=True)]).sum(0)


class GridBackbone(Backbone):
    """A backbone that turns clouds into grids, which are read at any point of space.

    Attributes:
        frame: where the grids lie.
        grid_channels: widths of their levels.
    """

    frame: GridFrame
    grid_channels: list[int]

    @abstractmethod
    def encode(self, points: Points) -> GridPyramid:
        """The grids of a batch; errors as :meth:`forward`."""
