"""SECOND: sparse convolutions over voxels, their heights stacked to a map, and a two-dimensional neck.

Yan et al., "SECOND: Sparsely Embedded Convolutional Detection", Sensors 2018, as OpenPCDet has it (``MeanVFE``,
``VoxelBackBone8x``, ``HeightCompression``, ``BaseBEVBackbone``). Layers have its names, in ``encoder`` and ``neck``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.nn.bev import BevBackbone, BevGrid, bev_map
from pc3d.nn.bev_neck import MultiScaleNeck
from pc3d.points import Points
from pc3d.sparse import SparseConv3d, SparseConvolution, SparseSequential, SubMConv3d, VoxelBatchNorm
from pc3d.voxels import Voxels

_ENCODER_STRIDE = 8


class SparseEncoder(nn.Module):
    """Four levels of submanifold convolutions with strided ones between, then one more step of height.

    Args:
        in_channels: width of the voxels' features.
        channels: width of the four levels, and of the result.
    """

    def __init__(self, in_channels: int, channels: Sequence[int]) -> None:
        super().__init__()
        one, two, three, four, out = channels
        self.conv_input = _layer(SubMConv3d(in_channels, one, 3, bias=False))
        self.conv1 = SparseSequential(_layer(SubMConv3d(one, one, 3, bias=False)))
        self.conv2 = _level(one, two, padding=(1, 1, 1))
        self.conv3 = _level(two, three, padding=(1, 1, 1))
        self.conv4 = _level(three, four, padding=(1, 1, 0))
        self.conv_out = _layer(SparseConv3d(four, out, (1, 1, 3), stride=(1, 1, 2), bias=False))

    def forward(self, voxels: Voxels) -> Voxels:
        for layer in (self.conv_input, self.conv1, self.conv2, self.conv3, self.conv4, self.conv_out):
            voxels = layer(voxels)
        return voxels


class SECOND(BevBackbone):
    """Voxels with the mean of their points, a sparse encoder of stride 8, and a neck over two scales.

    Args:
        in_channels: width of ``points.attrs["feat"]``.
        grid: range and voxels; heights need 24 voxels at least, maps must be multiples of 16 voxels.
        channels: width of the four levels of the encoder, and of its result.
        max_points: the first so many points of a voxel count.
        max_voxels: of a cloud, in training and otherwise; None sets no limit.
        neck_layers, neck_channels, neck_strides: further layers, widths and strides of the neck's levels.
        up_channels: width of every level in the result; their sum is ``out_channels``.

    With the defaults this is the published network for KITTI, with range ``[0, -40, -3, 70.4, 40, 1]`` and voxels of
    ``[0.05, 0.05, 0.1]``.
    """

    def __init__(
        self,
        in_channels: int,
        grid: BevGrid,
        channels: Sequence[int] = (16, 32, 64, 64, 128),
        max_points: int | None = 5,
        max_voxels: tuple[int, int] | None = (16000, 40000),
        neck_layers: Sequence[int] = (5, 5),
        neck_channels: Sequence[int] = (128, 256),
        neck_strides: Sequence[int] = (1, 2),
        up_channels: Sequence[int] = (256, 256),
    ) -> None:
        super().__init__()
        if len(channels) != 5:
            raise InputError(f"SECOND: channels {tuple(channels)} must be five widths")
        x, y, z = grid.shape
        levels = encoded_height(z + 1)
        if levels < 1:
            raise InputError(f"SECOND: grid has {z} voxels along z, 24 at least are needed: lower voxel_size")
        if x % _ENCODER_STRIDE or y % _ENCODER_STRIDE:
            raise InputError(f"SECOND: grid has {x} x {y} voxels along x and y: both must be multiples of 8")
        self.in_channels, self.grid = in_channels, grid
        self.max_points, self.max_voxels = max_points, max_voxels
        self.encoder = SparseEncoder(in_channels, channels)
        width, up_strides = levels * channels[-1], _products(neck_strides)
        self.neck = MultiScaleNeck(width, neck_layers, neck_strides, neck_channels, up_strides, up_channels)
        self.neck.check_shape(y // _ENCODER_STRIDE, x // _ENCODER_STRIDE)
        self.out_channels, self.stride = self.neck.out_channels, _ENCODER_STRIDE * self.neck.stride

    def forward(self, points: Points) -> Tensor:
        self.check_input(points)
        limit = None if self.max_voxels is None else self.max_voxels[0 if self.training else 1]
        _, voxels = self.grid.voxelize(points, self.max_points, limit)
        x, y, z = self.grid.shape
        # One level of height more than there are voxels, as published: four strides then leave two, not one and a half.
        return self.neck(bev_map(self.encoder(replace(voxels, spatial_shape=(x, y, z + 1)))))


def encoded_height(levels: int) -> int:
    """Levels of height that the encoder leaves of so many; 0 or less: too few."""
    for padding in (1, 1, 0, 0):
        levels = (levels + 2 * padding - 3) // 2 + 1
    return levels


def _products(strides: Sequence[int]) -> list[int]:
    """What brings each level back to the first one's scale."""
    ups, factor = [1], 1
    for stride in strides[1:]:
        factor *= stride
        ups.append(factor)
    return ups


def _layer(conv: SparseConvolution) -> SparseSequential:
    return SparseSequential(conv, VoxelBatchNorm(conv.out_channels), nn.ReLU())


def _level(in_channels: int, channels: int, padding: tuple[int, int, int]) -> SparseSequential:
    return SparseSequential(
        _layer(SparseConv3d(in_channels, channels, 3, stride=2, padding=padding, bias=False)),
        _layer(SubMConv3d(channels, channels, 3, bias=False)),
        _layer(SubMConv3d(channels, channels, 3, bias=False)),
    )
