"""PointPillars: columns of points become the pixels of a map.

Lang et al., "PointPillars: Fast Encoders for Object Detection from Point Clouds", CVPR 2019 (arXiv 1812.05784), as
OpenPCDet has it (``PillarVFE``, ``PointPillarScatter``, ``BaseBEVBackbone``). Layers have its names, in ``vfe`` and
``neck``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.nn.bev import BevBackbone, BevGrid, bev_map
from pc3d.nn.bev_neck import MultiScaleNeck
from pc3d.ops.segment import segment_max
from pc3d.points import Points
from pc3d.sparse import VoxelBatchNorm


class PaddedBatchNorm(VoxelBatchNorm):
    """Batch normalisation of rows among which there are more rows of zeros, which nobody stores."""

    def forward(self, feat: Tensor, zeros: int = 0) -> Tensor:
        if not self.training or not zeros:
            return super().forward(feat)
        feat = feat.to(self.weight.dtype)
        total = len(feat) + zeros
        mean = feat.sum(0) / total
        variance = ((feat - mean).square().sum(0) + zeros * mean.square()) / total
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)  # type: ignore[union-attr, arg-type]
            self.running_var.lerp_(variance * total / (total - 1), self.momentum)  # type: ignore[union-attr, arg-type]
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        return (feat - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias


class PillarEncoder(nn.Module):
    """Largest of a linear layer, batch norm and ReLU over the points of every pillar.

    The published layer fills pillars up with zeros: these count in the norm's statistics, and where a pillar is not
    full what the norm makes of zero is one of the values. So it is here, without storing them.

    Args:
        in_channels: width of the points' features.
        channels: width of the result.
        max_points: of a full pillar.
    """

    def __init__(self, in_channels: int, channels: int, max_points: int) -> None:
        super().__init__()
        self.max_points = max_points
        self.linear = nn.Linear(in_channels, channels, bias=False)
        self.norm = PaddedBatchNorm(channels)

    def forward(self, feat: Tensor, borders: Tensor) -> Tensor:
        """``(M, channels)`` from ``(N, in_channels)`` points, pillar after pillar, with ``(M + 1,)`` borders."""
        counts = borders.diff()
        zeros = len(counts) * self.max_points - len(feat)
        rows = self.linear(feat)
        if zeros:  # one of them, to see what becomes of it
            rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        values = self.norm(rows, max(zeros - 1, 0)).relu()
        largest = segment_max(values[: len(feat)], borders)
        if not zeros:
            return largest
        return torch.where((counts < self.max_points)[:, None], torch.maximum(largest, values[-1]), largest)


class PointPillars(BevBackbone):
    """A map of pillars, and a neck over three scales.

    A point's features are its own, and its offsets from the mean of its pillar's points and from the pillar's centre.

    Args:
        in_channels: width of ``points.attrs["feat"]``.
        grid: range and pillars, one voxel high; along x and y multiples of 8 pillars.
        channels: width of a pillar.
        max_points: the first so many points of a pillar count.
        max_pillars: of a cloud, in training and otherwise; None sets no limit.
        neck_layers, neck_strides, neck_channels: further layers, strides and widths of the neck's levels.
        up_strides, up_channels: how every level comes to the scale of the result, and its width there.

    With the defaults this is the published network for KITTI, with range ``[0, -39.68, -3, 69.12, 39.68, 1]`` and
    pillars of ``[0.16, 0.16, 4]``.
    """

    def __init__(
        self,
        in_channels: int,
        grid: BevGrid,
        channels: int = 64,
        max_points: int = 32,
        max_pillars: tuple[int, int] | None = (16000, 40000),
        neck_layers: Sequence[int] = (3, 5, 5),
        neck_strides: Sequence[int] = (2, 2, 2),
        neck_channels: Sequence[int] = (64, 128, 256),
        up_strides: Sequence[int] = (1, 2, 4),
        up_channels: Sequence[int] = (128, 128, 128),
    ) -> None:
        super().__init__()
        x, y, z = grid.shape
        if z != 1:
            raise InputError(f"PointPillars: grid has {z} voxels along z: voxel_size must be as high as point_range")
        self.in_channels, self.grid = in_channels, grid
        self.max_points, self.max_pillars = max_points, max_pillars
        self.vfe = PillarEncoder(in_channels + 6, channels, max_points)
        self.neck = MultiScaleNeck(channels, neck_layers, neck_strides, neck_channels, up_strides, up_channels)
        self.neck.check_shape(y, x)
        self.out_channels, self.stride = self.neck.out_channels, self.neck.stride

    def forward(self, points: Points) -> Tensor:
        self.check_input(points)
        limit = None if self.max_pillars is None else self.max_pillars[0 if self.training else 1]
        kept, pillars = self.grid.voxelize(points, self.max_points, limit)
        feat, borders = self.grid.point_features(kept, pillars)
        return self.neck(bev_map(pillars.with_feat(self.vfe(feat, borders))))
