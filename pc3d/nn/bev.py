"""Maps seen from above (bird's eye view, BEV): the contract between backbones and heads that detect objects.

A map is ``(B, C, H, W)``: rows along y, columns along x, both rising. A cell covers ``stride`` voxels on either axis.
"""

# No postponed annotations here: jsonargparse takes the types of a dataclass's __init__ as they stand, and would check
# nothing.
import abc
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pc3d.config import Configurable
from pc3d.errors import InputError
from pc3d.nn.backbone import FeatureInfo, PointNetwork
from pc3d.nn.bev_neck import MultiScaleNeck
from pc3d.ops.segment import segment_mean
from pc3d.ops.voxelize import UniqueVoxels, unique_voxels
from pc3d.points import Points
from pc3d.sparse.dense import to_dense
from pc3d.sparse.sequence import SparseModule
from pc3d.voxels import Voxels

_WHOLE = 1e-3  # how far a range may be from a whole number of voxels, in voxels


@dataclass(frozen=True)
class BevGrid(Configurable):
    """The box that a detector looks at, cut into voxels.

    Attributes:
        point_range: ``x_min y_min z_min x_max y_max z_max`` in metres.
        voxel_size: edges of a voxel along x, y, z in metres.

    Raises:
        InputError: if the range is empty, or no whole number of voxels along an axis.
    """

    point_range: Sequence[float]
    voxel_size: Sequence[float]

    def __post_init__(self) -> None:
        for name, value, length in (("point_range", self.point_range, 6), ("voxel_size", self.voxel_size, 3)):
            if len(value) != length or not all(math.isfinite(v) for v in value):
                raise InputError(f"grid.{name} is {list(value)}: it needs {length} finite numbers")
        if not all(edge > 0 for edge in self.voxel_size):
            raise InputError(f"grid.voxel_size is {list(self.voxel_size)}: edges must be positive")
        for axis in range(3):
            low, high, edge = self.point_range[axis], self.point_range[axis + 3], self.voxel_size[axis]
            cells = (high - low) / edge
            if not high > low or abs(cells - round(cells)) > _WHOLE:
                raise InputError(
                    f"grid.point_range goes from {low} to {high} along {'xyz'[axis]}: that must be a whole number "
                    f"of voxels of {edge} m, not {cells:g}"
                )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along x, y, z."""
        x, y, z = (
            round((self.point_range[axis + 3] - self.point_range[axis]) / self.voxel_size[axis]) for axis in range(3)
        )
        return x, y, z

    def bev_shape(self, stride: int) -> tuple[int, int]:
        """``(H, W)`` cells of a map; the last row or column may reach beyond the range."""
        x, y, _ = self.shape
        return -(-y // stride), -(-x // stride)

    def cell_size(self, stride: int) -> tuple[float, float]:
        """Edges of a cell of a map along x and y in metres."""
        return self.voxel_size[0] * stride, self.voxel_size[1] * stride

    def cell_centers(self, stride: int, device: torch.device | str = "cpu") -> Tensor:
        """``(H, W, 2)`` float32 x and y of the middle of every cell of a map, in metres."""
        height, width = self.bev_shape(stride)
        axes = [
            self.point_range[axis] + (torch.arange(count, device=device) + 0.5) * self.cell_size(stride)[axis]
            for axis, count in ((0, width), (1, height))
        ]
        x, y = torch.meshgrid(*axes, indexing="xy")
        return torch.stack([x, y], -1)

    def centers(self, coord: Tensor, stride: int = 1) -> Tensor:
        """``(M, 3)`` float32 middles of voxels ``(M, 3)`` that are ``stride`` voxels of the grid wide, in metres."""
        low, edge = (torch.tensor(list(v), device=coord.device) for v in (self.point_range[:3], self.voxel_size))
        return (coord + 0.5) * (edge * stride) + low

    def cells(self, coord: Tensor) -> Tensor:
        """``(N, 3)`` int32 voxel along x, y, z of each point, ``floor((p - low) / edge)`` in the dtype of ``coord``.

        Points outside the range get voxels outside ``shape``.
        """
        low, edge = coord.new_tensor(list(self.point_range[:3])), coord.new_tensor(list(self.voxel_size))
        limit = max(self.shape) + 1
        return ((coord - low) / edge).floor().nan_to_num(-1.0).clamp(-1, limit).to(torch.int32)

    def voxelize(
        self, points: Points, max_points: int | None = None, max_voxels: int | None = None
    ) -> tuple[Points, Voxels]:
        """The points inside the range, and their voxels with the mean of ``feat``.

        Args:
            points: B clouds with ``feat`` ``(N, C)``.
            max_points: keep the first so many points of a voxel.
            max_voxels: keep the first so many voxels of a cloud, in the order in which points reach them.

        Returns:
            The points kept, voxel after voxel, and M voxels sorted by (batch, x, y, z) whose ``spatial_shape`` and
            (rising) ``point_to_voxel`` are set; a cloud without points inside has none.

        Raises:
            InputError: for a limit below 1.
        """
        for name, limit in (("max_points", max_points), ("max_voxels", max_voxels)):
            if limit is not None and limit < 1:
                raise InputError(f"{name} is {limit}: voxels need at least 1 (null sets no limit)")
        cells = self.cells(points.coord)
        inside = ((cells >= 0) & (cells < cells.new_tensor(self.shape))).all(1)
        points = points.replace(source=None).select(inside)
        cells = cells[inside]
        found = unique_voxels(cells, points.offsets)
        rows = found.order_rows[_within_limits(found, max_points, max_voxels)]
        kept, cells = points.select(rows), cells[rows]
        voxel, counts = found.inverse[rows].unique_consecutive(return_inverse=True, return_counts=True)[1:]
        borders = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        first = borders[:-1]
        batch = kept.batch[first].to(torch.int32)
        voxels = Voxels(
            coord=torch.cat([batch[:, None], cells[first]], 1),
            feat=segment_mean(kept.get("feat"), borders),
            batch_size=len(points),
            point_to_voxel=voxel,
            spatial_shape=self.shape,
        )
        return kept, voxels

    def point_features(self, points: Points, voxels: Voxels) -> tuple[Tensor, Tensor]:
        """What points and voxels of :meth:`voxelize` hand to a network that encodes voxels from their points.

        Returns:
            ``(N, C + 6)``: a point's features, its offset from the mean of its voxel's points and that from the voxel's
            centre, in metres; and ``(M + 1,)`` int64 borders of the voxels' runs of points.
        """
        assert voxels.point_to_voxel is not None
        voxel = voxels.point_to_voxel
        counts = torch.bincount(voxel, minlength=len(voxels))
        borders = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        mean, center = segment_mean(points.coord, borders), self.centers(voxels.coord[:, 1:])
        return torch.cat([points.get("feat"), points.coord - mean[voxel], points.coord - center[voxel]], 1), borders


def _within_limits(found: UniqueVoxels, max_points: int | None, max_voxels: int | None) -> Tensor:
    """Which of ``order_rows`` fit into their voxels, of the voxels that fit into their clouds."""
    keep = torch.ones_like(found.order_rows, dtype=torch.bool)
    if max_points is not None:
        place = torch.arange(len(keep), device=keep.device)
        start = torch.repeat_interleave(found.row_offsets[:-1], found.counts, output_size=len(keep))
        keep &= place - start < max_points
    if max_voxels is not None:
        arrival = torch.empty_like(found.first)
        arrival[found.first.argsort()] = torch.arange(len(arrival), device=arrival.device)
        clouds = found.voxel_offsets  # they lie one after the other, so the voxels of a cloud arrive together
        before = torch.repeat_interleave(clouds[:-1], clouds.diff(), output_size=len(arrival))
        keep &= torch.repeat_interleave(arrival - before < max_voxels, found.counts, output_size=len(keep))
    return keep


class BevBackbone(PointNetwork):
    """A network from points to a map seen from above.

    Attributes:
        grid: the box and its voxels.
        stride: voxels per cell of the map, along x and along y.
        out_channels: width C of the map.
        feature_info: the levels of voxels below the map, for what looks at them once more; none by default.
    """

    grid: BevGrid
    stride: int
    feature_info: Sequence[FeatureInfo] = ()

    @abc.abstractmethod
    def forward(self, points: Points) -> Tensor:
        """``(B, out_channels, H, W)`` with ``(H, W) = grid.bev_shape(stride)``; a cloud without points counts too.

        Raises:
            InputError: if ``points.attrs["feat"]`` is missing or not ``(N, in_channels)``.
        """

    def forward_levels(self, points: Points) -> tuple[Tensor, dict[str, Voxels]]:
        """The map of :meth:`forward`, and the voxels of every level by the names of ``feature_info``."""
        return self(points), {}


class SparseEncoder(nn.Module, abc.ABC):
    """Sparse convolutions over voxels of a :class:`BevGrid`, each level half as fine as the one before.

    A subclass has ``conv_input``, a module for every level by its name, ``conv1`` the finest, and ``conv_out``, which
    changes heights only.

    Args:
        channels: width of every level, and of the result.

    Attributes:
        stride: of the result along x and y.
        out_channels: width of the result.
        feature_info: the levels, the result left out.
    """

    conv_input: SparseModule
    conv_out: SparseModule

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.feature_info = [FeatureInfo(f"conv{i + 1}", width, 2**i) for i, width in enumerate(channels[:-1])]
        self.stride, self.out_channels = self.feature_info[-1].stride, channels[-1]

    @abc.abstractmethod
    def height(self, cells: int) -> int:
        """Cells along z that the encoder leaves of so many; 0 or less: too few."""

    def forward(self, voxels: Voxels) -> tuple[Voxels, dict[str, Voxels]]:
        """The result, and the voxels of every level by the names of ``feature_info``."""
        voxels, levels = self.conv_input(voxels), {}
        for info in self.feature_info:
            voxels = levels[info.name] = self.get_submodule(info.name)(voxels)
        return self.conv_out(voxels), levels


class VoxelBevBackbone(BevBackbone):
    """Voxels with the mean of their points, a sparse encoder, its heights as channels of a map, and a neck.

    Args:
        in_channels: width of ``points.attrs["feat"]``.
        grid: range and voxels; maps must be multiples of the encoder's stride times the neck's coarsest.
        encoder: for ``in_channels``.
        neck: makes the neck for maps of a width.
        max_points: the first so many points of a voxel count.
        max_voxels: of a cloud, in training and otherwise; None sets no limit.

    Raises:
        InputError: if the grid does not fit the strides.
    """

    def __init__(
        self,
        in_channels: int,
        grid: BevGrid,
        encoder: SparseEncoder,
        neck: Callable[[int], MultiScaleNeck],
        max_points: int | None,
        max_voxels: tuple[int, int] | None,
    ) -> None:
        super().__init__()
        name, (x, y, z), stride = type(self).__name__, grid.shape, encoder.stride
        height = encoder.height(z + 1)
        if height < 1:
            least = next(cells for cells in itertools.count(1) if encoder.height(cells + 1) > 0)
            raise InputError(f"{name}: grid has {z} voxels along z, {least} at least are needed: lower voxel_size")
        if x % stride or y % stride:
            raise InputError(f"{name}: grid has {x} x {y} voxels along x and y: both must be multiples of {stride}")
        self.in_channels, self.grid = in_channels, grid
        self.max_points, self.max_voxels = max_points, max_voxels
        self.encoder, self.neck = encoder, neck(height * encoder.out_channels)
        self.neck.check_shape(y // stride, x // stride)
        self.out_channels, self.stride = self.neck.out_channels, stride * self.neck.stride
        self.feature_info = encoder.feature_info

    def forward(self, points: Points) -> Tensor:
        return self.forward_levels(points)[0]

    def forward_levels(self, points: Points) -> tuple[Tensor, dict[str, Voxels]]:
        self.check_input(points)
        limit = None if self.max_voxels is None else self.max_voxels[0 if self.training else 1]
        _, voxels = self.grid.voxelize(points, self.max_points, limit)
        x, y, z = self.grid.shape
        # One cell of height more than there are voxels, as published: four strides then leave two, not one and a half.
        encoded, levels = self.encoder(replace(voxels, spatial_shape=(x, y, z + 1)))
        return self.neck(bev_map(encoded)), levels


def bev_map(voxels: Voxels) -> Tensor:
    """``(B, C * Z, Y, X)``: the levels of a bounded grid ``(M, C)`` of X, Y, Z cells become channels, height fastest.

    Raises:
        ValueError: if the grid has no ``spatial_shape``.
    """
    if voxels.spatial_shape is None:
        raise ValueError("a map needs a bounded grid: set spatial_shape")
    return to_dense(voxels).permute(0, 1, 4, 3, 2).flatten(1, 2).contiguous()
