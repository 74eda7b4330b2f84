"""ScatterFormer: linear attention inside windows of voxels, and one-dimensional convolutions between the windows.

He et al., "ScatterFormer: Efficient Voxel Transformer with Scattered Linear Attention", ECCV 2024 (arXiv 2401.00912).
Modules carry the names of the published checkpoints; :func:`pc3d.models.convert.import_scatterformer` reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.nn.bev import BevBackbone, BevGrid, bev_map
from pc3d.nn.cascade_ded import CascadeDED
from pc3d.nn.norm import PointBatchNorm
from pc3d.ops.kernel_map import triple
from pc3d.ops.linear_attention import linear_attention
from pc3d.ops.segment import segment_max
from pc3d.ops.voxelize import unique_voxels
from pc3d.points import Points
from pc3d.sparse import (
    DepthwiseSubMConv3d,
    SparseConv3d,
    SparseModule,
    SparseSequential,
    SubMConv3d,
    VoxelBatchNorm,
    WindowOrder,
    conv_norm_act,
    reorder,
)
from pc3d.voxels import Voxels

_POOLING_HEADS = 8


class PointLayer(nn.Module):
    """Linear layer, batch norm and ReLU on points, and the largest value of each voxel."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels, bias=False)
        self.norm = PointBatchNorm(out_channels)

    def forward(self, feat: Tensor, borders: Tensor) -> tuple[Tensor, Tensor]:
        """``(N, C')`` of the points, voxel after voxel, and ``(M, C')`` of the voxels."""
        feat = self.norm(self.linear(feat)).relu()
        return feat, segment_max(feat, borders)


class VoxelEncoder(nn.Module):
    """Features of voxels from any number of points in each ("dynamic" voxel feature encoding).

    Points come with their features, their offset from the mean of their voxel's points and that from its centre. Half
    of the channels that a layer hands to the next one are the largest values of the voxel.

    Args:
        in_channels: width of ``feat``; published networks take coordinates and reflectivity there.
        grid: the range and its voxels.
        channels: width after each layer.
    """

    def __init__(self, in_channels: int, grid: BevGrid, channels: Sequence[int] = (64, 64)) -> None:
        super().__init__()
        self.grid = grid
        widths = [*(width // 2 for width in channels[:-1]), channels[-1]]
        inputs = [in_channels + 6, *channels[:-1]]
        self.pfn_layers = nn.ModuleList(PointLayer(i, o) for i, o in zip(inputs, widths, strict=True))

    def forward(self, points: Points) -> Voxels:
        """M voxels with features ``(M, C)``, sorted by (batch, x, y, z); points outside the range are left out."""
        points, voxels = self.grid.voxelize(points)
        assert voxels.point_to_voxel is not None
        feat, borders = self.grid.point_features(points, voxels)
        first, *others = self.pfn_layers
        feat, largest = first(feat, borders)
        for layer in others:
            feat, largest = layer(torch.cat([feat, largest[voxels.point_to_voxel]], 1), borders)
        return voxels.with_feat(largest)


class ResidualBlock(SparseModule):
    """Two submanifold convolutions with norms, and the input added before the last ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = SubMConv3d(channels, channels, 3), VoxelBatchNorm(channels)
        self.conv2, self.bn2 = SubMConv3d(channels, channels, 3), VoxelBatchNorm(channels)
        self.relu = nn.ReLU()

    def forward(self, voxels: Voxels) -> Voxels:
        inner = conv_norm_act(self.conv1, voxels, self.bn1, self.relu)
        return conv_norm_act(self.conv2, inner, self.bn2, self.relu, residual=voxels.feat)


class ScatteredLinearAttention(nn.Module):
    """Linear attention among the voxels of each window, see :func:`pc3d.ops.linear_attention.linear_attention`."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)

    def forward(self, feat: Tensor, offsets: Tensor) -> Tensor:
        """``(M, C)`` of rows window after window; ``offsets`` ``(W + 1,)`` int64."""
        qkv = self.qkv(feat).unflatten(1, (3, self.num_heads, -1))
        return self.proj(linear_attention(qkv, offsets).flatten(1))


class CrossWindowFFN(SparseModule):
    """Depth-wise convolutions that reach into the next windows, and a feed-forward network.

    A quarter of the channels each goes through a kernel of 3x3x3, one along x, one along y, and none. As published, the
    residual starts from the normalised features, so the last quarter is doubled.

    Args:
        channels: width.
        reach: length of the kernels along x and y, more than a window's side.
    """

    def __init__(self, channels: int, reach: int) -> None:
        super().__init__()
        self.bn = VoxelBatchNorm(channels)
        quarter = channels // 4
        self.conv_k = _depthwise(quarter, (3, 3, 3))
        self.conv_h = _depthwise(quarter, (reach, 1, 1))
        self.conv_w = _depthwise(quarter, (1, reach, 1))
        self.bn2 = VoxelBatchNorm(channels)
        self.fc1 = nn.Linear(channels, 2 * channels)
        self.fc2 = nn.Linear(2 * channels, channels)

    def forward(self, voxels: Voxels) -> Voxels:
        feat = self.bn(voxels.feat)
        around, along_x, along_y, own = feat.chunk(4, 1)
        convs = ((self.conv_k, around), (self.conv_h, along_x), (self.conv_w, along_y))
        feat = feat + torch.cat([*(conv(voxels.with_feat(part)).feat for conv, part in convs), own], 1)
        return voxels.with_feat(feat + self.fc2(self.fc1(self.bn2(feat)).relu()))


class WindowLayers(SparseModule):
    """Layers of scattered linear attention and cross-window interaction on one resolution.

    Args:
        channels: width.
        num_heads: of the attention.
        num_layers: layers.
        window: side of a window in voxels of this resolution; windows have the full height.
    """

    def __init__(self, channels: int, num_heads: int, num_layers: int, window: int) -> None:
        super().__init__()
        self.order = WindowOrder(window)
        self.norm_layers = nn.ModuleList(VoxelBatchNorm(channels) for _ in range(num_layers))
        self.attn_layers = nn.ModuleList(ScatteredLinearAttention(channels, num_heads) for _ in range(num_layers))
        self.cffn_layers = nn.ModuleList(CrossWindowFFN(channels, window + 1) for _ in range(num_layers))

    def forward(self, voxels: Voxels) -> Voxels:
        """The voxels in the order of windows, in which the grids derived from them come too."""
        if voxels.context.get("order") != self.order:
            voxels, _ = reorder(voxels, self.order)
        offsets = self.order.offsets(voxels.coord)
        for norm, attend, interact in zip(self.norm_layers, self.attn_layers, self.cffn_layers, strict=True):
            voxels = interact(voxels.with_feat(voxels.feat + attend(norm(voxels.feat), offsets)))
        return voxels


class PillarPooling(SparseModule):
    """The voxels of each column, pooled by attention from their maximum.

    As recorded of the published network, the maximum is over all heights of a column, of which empty ones count as 0;
    the learned embedding of heights is added to keys but not to values.

    Args:
        channels: width.
        height: voxels of a column.
        from_zero: the maximum is 0 or more in columns with a voxel at every height too, as with spconv's pooling.
    """

    def __init__(self, channels: int, height: int, from_zero: bool = False) -> None:
        super().__init__()
        self.height, self.from_zero = height, from_zero
        self.norm = nn.LayerNorm(channels)
        self.self_attn = nn.MultiheadAttention(channels, _POOLING_HEADS, batch_first=True)
        self.pos_embedding = nn.Embedding(height, channels)
        nn.init.normal_(self.pos_embedding.weight, std=0.01)

    def forward(self, voxels: Voxels) -> Voxels:
        """One voxel per column, sorted by (batch, y, x)."""
        batch, x, y, z = voxels.coord.unbind(1)
        clouds = torch.bincount(batch, minlength=voxels.batch_size)
        offsets = torch.cat([clouds.new_zeros(1), clouds.cumsum(0)])
        columns = unique_voxels(torch.stack([y, x, torch.zeros_like(z)], 1), offsets)
        pooled = self.pool(voxels.feat, columns.inverse, z.long(), len(columns.first))
        coord = voxels.coord[columns.first] * voxels.coord.new_tensor([1, 1, 1, 0])
        shape = None if voxels.spatial_shape is None else (*voxels.spatial_shape[:2], 1)
        sx, sy, sz = triple("stride", voxels.stride)
        return replace(voxels, coord=coord, feat=pooled, stride=(sx, sy, sz * self.height), spatial_shape=shape)

    def pool(self, feat: Tensor, column: Tensor, height: Tensor, columns: int) -> Tensor:
        """``(columns, C)`` from features, column and height of all voxels."""
        if columns == 0:  # which MultiheadAttention cannot
            return feat[:0]
        place = column, height
        values = feat.new_zeros(columns, self.height, feat.shape[1]).index_put(place, feat)
        empty = torch.ones_like(values[..., 0], dtype=torch.bool).index_put(place, torch.zeros_like(column).bool())
        largest = values.amax(1)
        query = largest.relu() if self.from_zero else largest
        keys = values + self.pos_embedding.weight.to(values.dtype)
        pooled, _ = self.self_attn(query[:, None], keys, values, key_padding_mask=empty, need_weights=False)
        return self.norm(pooled[:, 0] + query)


class VoxelTransformer(SparseModule):
    """Stem, two stages of windows with a strided convolution between, and one voxel per column in the end.

    Args:
        in_channels: width of the voxels' features.
        channels: width of the network.
        num_heads: of the attention in windows.
        layers: layers of each stage.
        window: side of a window in voxels of a stage.
        height: voxels along z, one more than there can be.
        pool_from_zero: see :class:`PillarPooling`.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_heads: int,
        layers: Sequence[int],
        window: int,
        height: int,
        pool_from_zero: bool = False,
    ) -> None:
        super().__init__()
        self.cpe = SparseSequential(
            _post_act(SubMConv3d(in_channels, channels, 3, bias=False)),
            *(ResidualBlock(channels) for _ in range(3)),
            _post_act(SparseConv3d(channels, channels, (1, 1, 3), (1, 1, 2), bias=False)),
        )
        first, second = layers
        self.stage1 = SparseSequential(
            WindowLayers(channels, num_heads, first, window),
            VoxelBatchNorm(channels),
            SparseConv3d(channels, channels, 3, 2, padding=1, bias=False),
        )
        self.stage2 = SparseSequential(WindowLayers(channels, num_heads, second, window), VoxelBatchNorm(channels))
        halved = (height - 3) // 2 + 1
        self.app = PillarPooling(channels, (halved + 1) // 2, pool_from_zero)

    def forward(self, voxels: Voxels) -> Voxels:
        *_, (_, last) = self.stages(voxels)
        return last

    def stages(self, voxels: Voxels) -> Iterator[tuple[str, Voxels]]:
        """The voxels after the stem, each stage and the pooling; rows may come in any order."""
        for name, stage in self.named_children():
            voxels = stage(voxels)
            yield name, voxels


class ScatterFormer(BevBackbone):
    """ScatterFormer: a map of half the voxels' resolution, and a neck on it.

    Args:
        in_channels: width of ``points.attrs["feat"]``: coordinates and reflectivity (and elongation for Waymo, time for
            nuScenes).
        grid: range and voxels; published: 480 x 480 x 32 voxels of 0.32 x 0.32 x 0.1875 m for Waymo, 360 x 360 x 40 of
            0.3 x 0.3 x 0.2 m for nuScenes.
        channels: width of the network, a multiple of 8 and of ``num_heads``.
        num_heads: of the attention in windows.
        layers: layers of each of the two stages.
        window: side of a window in voxels of a stage: 12 for Waymo, 20 for nuScenes. Kernels between windows are one
            voxel longer.
        encoder_channels: width after each layer of the voxel encoder.
        neck_units, neck_blocks: of :class:`~pc3d.nn.cascade_ded.CascadeDED`.
        pool_from_zero: let no column's maximum be negative, as spconv's pooling has it, with which published weights
            were trained. False reproduces the recorded outputs; only columns with a voxel at every height differ.

    The defaults are the published network for Waymo, 4.2 M parameters between voxel encoder and neck.
    """

    stride = 2

    def __init__(
        self,
        in_channels: int,
        grid: BevGrid,
        channels: int = 128,
        num_heads: int = 4,
        layers: Sequence[int] = (3, 3),
        window: int = 12,
        encoder_channels: Sequence[int] = (64, 64),
        neck_units: int = 4,
        neck_blocks: Sequence[int] = (2, 1, 1),
        pool_from_zero: bool = False,
    ) -> None:
        super().__init__()
        _check_settings(grid, channels, num_heads, layers, window, encoder_channels)
        self.in_channels, self.grid, self.out_channels = in_channels, grid, channels
        self.vfe = VoxelEncoder(in_channels, grid, encoder_channels)
        height = grid.shape[2] + 1  # published: one more than there are voxels
        self.encoder = VoxelTransformer(
            encoder_channels[-1], channels, num_heads, layers, window, height, pool_from_zero
        )
        self.neck = CascadeDED(channels, neck_units, neck_blocks)

    def forward(self, points: Points) -> Tensor:
        """``(B, channels, H, W)`` with ``(H, W) = grid.bev_shape(2)``; before the neck zeros where there are no points.

        Raises:
            InputError: if ``points.attrs["feat"]`` is missing or not ``(N, in_channels)``, or there are too few voxels
                to train on.
        """
        self.check_input(points)
        x, y, z = self.grid.shape
        voxels = replace(self.vfe(points), spatial_shape=(x, y, z + 1))
        return self.neck(bev_map(self.encoder(voxels)))


def _depthwise(channels: int, kernel_size: tuple[int, int, int]) -> DepthwiseSubMConv3d:
    conv = DepthwiseSubMConv3d(channels, kernel_size, bias=False)
    nn.init.normal_(conv.weight)  # published; the norm before each block takes the gain back
    return conv


def _post_act(conv: SubMConv3d | SparseConv3d) -> SparseSequential:
    return SparseSequential(conv, VoxelBatchNorm(conv.out_channels), nn.ReLU())


def _check_settings(
    grid: BevGrid, channels: int, num_heads: int, layers: Sequence[int], window: int, encoder_channels: Sequence[int]
) -> None:
    if channels < 1 or num_heads < 1 or channels % num_heads or channels % _POOLING_HEADS:
        raise InputError(
            f"ScatterFormer: channels {channels} must be a multiple of {_POOLING_HEADS} and of num_heads {num_heads}"
        )
    if len(layers) != 2 or min(layers) < 0 or window < 1:
        raise InputError(f"ScatterFormer: layers {tuple(layers)} must be two numbers, and window {window} at least 1")
    if min(encoder_channels, default=0) < 1 or any(width % 2 for width in encoder_channels[:-1]):
        raise InputError(
            f"ScatterFormer: encoder_channels {tuple(encoder_channels)} must be widths, all but the last even"
        )
    if grid.shape[2] < 2:
        raise InputError(
            f"ScatterFormer: the grid has {grid.shape[2]} voxels along z, it needs two; use smaller voxels"
        )
