"""SECOND: sparse convolutions over voxels, their heights stacked to a map, and a two-dimensional neck.

Yan et al., "SECOND: Sparsely Embedded Convolutional Detection", Sensors 2018, as OpenPCDet has it (``MeanVFE``,
``VoxelBackBone8x``, ``HeightCompression``, ``BaseBEVBackbone``). Layers have its names, in ``encoder`` and ``neck``.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

from torch import nn

from pc3d.errors import InputError
from pc3d.nn.bev import BevGrid, SparseEncoder, VoxelBevBackbone
from pc3d.nn.bev_neck import MultiScaleNeck
from pc3d.sparse import SparseConv3d, SparseConvolution, SparseSequential, SubMConv3d, VoxelBatchNorm


class SECONDEncoder(SparseEncoder):
    """Four levels of submanifold convolutions with strided ones between, then one more step of height.

    Args:
        in_channels: width of the voxels' features.
        channels: width of the four levels, and of the result.
    """

    def __init__(self, in_channels: int, channels: Sequence[int]) -> None:
        super().__init__(channels)
        one, two, three, four, out = channels
        self.conv_input = _layer(SubMConv3d(in_channels, one, 3, bias=False))
        self.conv1 = SparseSequential(_layer(SubMConv3d(one, one, 3, bias=False)))
        self.conv2 = _level(one, two, padding=(1, 1, 1))
        self.conv3 = _level(two, three, padding=(1, 1, 1))
        self.conv4 = _level(three, four, padding=(1, 1, 0))
        self.conv_out = _layer(SparseConv3d(four, out, (1, 1, 3), stride=(1, 1, 2), bias=False))

    def height(self, cells: int) -> int:
        for padding in (1, 1, 0, 0):
            cells = (cells + 2 * padding - 3) // 2 + 1
        return cells


class SECOND(VoxelBevBackbone):
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
        if len(channels) != 5:
            raise InputError(f"SECOND: channels {tuple(channels)} must be five widths")
        up_strides = list(itertools.accumulate(neck_strides[1:], operator.mul, initial=1))

        def neck(width: int) -> MultiScaleNeck:
            return MultiScaleNeck(width, neck_layers, neck_strides, neck_channels, up_strides, up_channels)

        super().__init__(in_channels, grid, SECONDEncoder(in_channels, channels), neck, max_points, max_voxels)


def _layer(conv: SparseConvolution) -> SparseSequential:
    return SparseSequential(conv, VoxelBatchNorm(conv.out_channels), nn.ReLU())


def _level(in_channels: int, channels: int, padding: tuple[int, int, int]) -> SparseSequential:
    return SparseSequential(
        _layer(SparseConv3d(in_channels, channels, 3, stride=2, padding=padding, bias=False)),
        _layer(SubMConv3d(channels, channels, 3, bias=False)),
        _layer(SubMConv3d(channels, channels, 3, bias=False)),
    )
