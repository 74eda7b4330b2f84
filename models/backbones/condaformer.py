"""ConDaFormer: window attention disassembled into three orthogonal planes, with local structure enhancement.

Duan et al., "ConDaFormer: Disassembled Transformer with Local Structure Enhancement for 3D Point Cloud Understanding",
NeurIPS 2023 (arXiv 2312.11112). Modules below a block carry the names of the published checkpoints;
:func:`pc3d.models.convert.import_condaformer` reads them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.nn import Backbone, FeatureInfo, group_windows
from pc3d.nn.attention import Backend
from pc3d.nn.contextual import BinnedWindows, contextual_attention
from pc3d.nn.interpolation import interpolate
from pc3d.nn.mlp import MLP, DropPath
from pc3d.nn.norm import PointLayerNorm
from pc3d.ops.segment import segment_max, segment_sum
from pc3d.ops.voxelize import unique_voxels
from pc3d.points import Points
from pc3d.sparse import DepthwiseSubMConv3d, SparseModule, SparseSequential, SubMConv3d, VoxelBatchNorm
from pc3d.voxels import Voxels

PLANES = ((True, True, False), (True, False, True), (False, True, True))  # xy, xz, yz: the wide axes
Origin = Literal["cloud", "batch"]

_BatchNorm = partial(VoxelBatchNorm, eps=1e-5, momentum=0.1)
_LayerNorm = partial(PointLayerNorm, eps=1e-6)


@dataclass(frozen=True)
class SlabRule:
    """How the cells of a stage are cut into slabs, one cell thick.

    Attributes:
        window: width of a slab, in cells.
        step: edge of a position bin, in cells.
        origin: slabs begin at the lowest coordinates of each cloud, or of the whole batch as published.
    """

    window: int
    step: float
    origin: Origin

    @property
    def bins(self) -> int:
        """Bins across a slab: L, for tables of ``2 L - 1`` rows."""
        return int((self.window + 1e-4) / self.step)

    def cut(self, position: Tensor, offsets: Tensor, wide: Sequence[bool], shifted: bool) -> BinnedWindows:
        """Slabs along one plane.

        Args:
            position: ``(N, 3)`` float32, in cells.
            offsets: ``(B + 1,)`` int64 clouds.
            wide: the axes along which the slabs extend.
            shifted: by half of their size, in every axis.
        """
        edges = [float(self.window) if axis else 1.0 for axis in wide]
        size = position.new_tensor(edges)
        place = position - self._lowest(position, offsets)
        if shifted:
            place = place + size / 2
        cells = unique_voxels((place / size).floor().int(), offsets)
        x, y, z = (min(self.bins, math.ceil(edge / self.step - 1e-4)) for edge in edges)
        last = torch.tensor([x, y, z], device=position.device) - 1
        # A position on the far edge of its window, to rounding, belongs to the last bin.
        bins = ((place % size) / self.step).floor().long().clamp(min=0).minimum(last)
        return BinnedWindows(group_windows(cells.inverse, cells.counts), bins, (x, y, z))

    def _lowest(self, position: Tensor, offsets: Tensor) -> Tensor:
        if self.origin == "batch":
            return position.amin(0) if len(position) else position.new_zeros(3)
        return _per_point(-segment_max(-position, offsets), offsets, len(position))


@dataclass(eq=False)
class Level:
    """The points of a stage.

    Attributes:
        voxels: their cells and features.
        position: ``(M, 3)`` float32, mean of the input points they stand for, in cells of the input grid.
        weight: ``(M, 1)`` float32, number of these.
        offsets: ``(B + 1,)`` int64 clouds.
        slabs: the slabs cut so far.
    """

    voxels: Voxels
    position: Tensor
    weight: Tensor
    offsets: Tensor
    slabs: dict[tuple[SlabRule, bool], list[BinnedWindows]] = field(default_factory=dict)

    @property
    def feat(self) -> Tensor:
        return self.voxels.feat

    def with_feat(self, feat: Tensor) -> Level:
        return Level(self.voxels.with_feat(feat), self.position, self.weight, self.offsets, self.slabs)

    def cut(self, rule: SlabRule, shifted: bool) -> list[BinnedWindows]:
        """The slabs of the three planes, cut once for all blocks of this resolution."""
        if (rule, shifted) not in self.slabs:
            stride = self.voxels.stride
            assert isinstance(stride, int)
            place = self.position / stride
            self.slabs[rule, shifted] = [rule.cut(place, self.offsets, wide, shifted) for wide in PLANES]
        return self.slabs[rule, shifted]


class ResidualBlock(SparseModule):
    """``LeakyReLU(BN(conv(LeakyReLU(BN(conv(x))))) + x)``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = SubMConv3d(channels, channels, 3, bias=False)
        self.bn1 = _BatchNorm(channels)
        self.conv2 = SubMConv3d(channels, channels, 3, bias=False)
        self.bn2 = _BatchNorm(channels)
        self.act = nn.LeakyReLU(0.2)

    def forward(self, voxels: Voxels) -> Voxels:
        inner = self.conv1(voxels)
        inner = self.conv2(inner.with_feat(self.act(self.bn1(inner.feat))))
        return voxels.with_feat(self.act(self.bn2(inner.feat) + voxels.feat))


class PlaneAttention(nn.Module):
    """Attention in the slabs of three planes, a third of the heads in each, between two local enhancements.

    Args:
        channels: width C.
        num_heads: a multiple of 3.
        rule: how slabs are cut.
        shifted: cut them half a slab further.
        backend: see :data:`pc3d.nn.attention.Backend`.
    """

    q_table: nn.Parameter
    k_table: nn.Parameter
    v_table: nn.Parameter

    def __init__(
        self, channels: int, num_heads: int, rule: SlabRule, shifted: bool = False, backend: Backend = "auto"
    ) -> None:
        super().__init__()
        self.num_heads, self.rule, self.shifted, self.backend = num_heads, rule, shifted, backend
        width = channels // num_heads
        for name in ("q_table", "k_table", "v_table"):  # shared by the planes
            table = nn.Parameter(torch.empty(2 * rule.bins - 1, 3, num_heads // 3, width))
            nn.init.trunc_normal_(table, std=0.02)
            self.register_parameter(name, table)
        self.conv_1, self.conv_3 = _pointwise(channels), _depthwise(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.conv_1_post, self.conv_3_post = _pointwise(channels), _depthwise(channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, level: Level) -> Tensor:
        """``(M, C)``."""
        q, k, v = self.project(level).unbind(1)
        enhanced = level.with_feat(self.attend(q, k, v, level).flatten(1))
        return self.proj(_enhance(self.conv_1_post, self.conv_3_post, enhanced))

    def project(self, level: Level) -> Tensor:
        """``(M, 3, H, D)``: scaled queries, keys and values of locally enhanced features."""
        qkv = self.qkv(_enhance(self.conv_1, self.conv_3, level))
        q, k, v = qkv.view(len(qkv), 3, self.num_heads, self.proj.in_features // self.num_heads).unbind(1)
        return torch.stack([q * q.shape[-1] ** -0.5, k, v], 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, level: Level) -> Tensor:
        """``(M, H, D)``: the heads of the planes xy, xz and yz, one after the other."""
        tables = self.q_table, self.k_table, self.v_table
        slabs = level.cut(self.rule, self.shifted)
        thirds = zip(q.chunk(3, 1), k.chunk(3, 1), v.chunk(3, 1), slabs, strict=True)
        return torch.cat([contextual_attention(*third, *tables, backend=self.backend) for third in thirds], 1)


class Block(nn.Module):
    """``x + attention(LN(x))``, then ``x + MLP(LN(x))``."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        rule: SlabRule,
        shifted: bool = False,
        drop_path: float = 0.0,
        mlp_ratio: float = 4.0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.norm1 = _LayerNorm(channels)
        self.attn = PlaneAttention(channels, num_heads, rule, shifted, backend)
        self.norm2 = _LayerNorm(channels)
        self.mlp = MLP(channels, int(mlp_ratio * channels))
        self.drop_path = DropPath(drop_path)

    def forward(self, level: Level) -> Level:
        feat = level.feat + self.drop_path(self.attn(level.with_feat(self.norm1(level.feat))))
        return level.with_feat(feat + self.drop_path(self.mlp(self.norm2(feat))))


class Pool(nn.Module):
    """Norm and linear layer, then the maximum over the points of each cell of side ``stride`` input cells."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.norm = _LayerNorm(in_channels)
        self.linear = nn.Linear(in_channels, out_channels, bias=False)

    def forward(self, level: Level) -> Level:
        grid = (level.position / self.stride).int()
        # Cells are visited z slowest and x fastest, as published.
        cells = unique_voxels(grid.flip(1), level.offsets)
        rows, runs = cells.order_rows, cells.row_offsets
        weight = segment_sum(level.weight[rows], runs)
        position = segment_sum((level.weight * level.position)[rows], runs) / weight
        feat = segment_max(self.linear(self.norm(level.feat))[rows], runs)
        coord = torch.cat([level.voxels.coord[cells.first, :1], grid[cells.first]], 1)
        voxels = Voxels(coord, feat, level.voxels.batch_size, self.stride, level.voxels.voxel_size)
        return Level(voxels, position, weight, cells.voxel_offsets)


class Unpool(nn.Module):
    """Norm and linear layer on both resolutions; the coarse features are interpolated and added."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(_LayerNorm(in_channels), nn.Linear(in_channels, out_channels))
        self.proj_skip = nn.Sequential(_LayerNorm(skip_channels), nn.Linear(skip_channels, out_channels))

    def forward(self, coarse: Level, skip: Level) -> Level:
        places = skip.position, skip.offsets, coarse.position, coarse.offsets
        return skip.with_feat(self.proj_skip(skip.feat) + interpolate(*places, self.proj(coarse.feat), power=1))


class ConDaFormer(Backbone):
    """ConDaFormer.

    Args:
        in_channels: width of ``points.attrs["feat"]``: xyz and color; xyz, normal and color for ScanNet.
        grid_size: edge in metres of the cells that the pipeline has sampled.
        window: width of the slabs in cells of the stage: 8, 10 for ScanNet.
        bin_size: step of relative positions in cells of the stage.
        base_channels: width of the stem.
        channels: widths of the S encoder stages, then of the S decoder stages from coarse to fine.
        layers: blocks of the same stages; odd ones work on shifted slabs.
        head_channels: width of an attention head; the heads of a stage with blocks must be a multiple of 3.
        mlp_ratio: hidden width of the MLPs in units of the stage's width.
        drop_path: largest probability of stochastic depth: of the last encoder block, rising from 0, and of the first
            decoder block, falling to 0.
        window_origin: where slabs begin, see :class:`SlabRule`. With "cloud" no cloud depends on its batch; both agree
            on a single cloud.
        attention_backend: see :data:`pc3d.nn.attention.Backend`.

    The defaults are the published network for S3DIS, 8.4 M parameters; :meth:`base` is the one for ScanNet.
    """

    def __init__(
        self,
        in_channels: int = 6,
        grid_size: float = 0.04,
        window: int = 8,
        bin_size: float = 0.25,
        base_channels: int = 48,
        channels: Sequence[int] = (96, 192, 384, 192, 96, 48),
        layers: Sequence[int] = (2, 6, 2, 0, 0, 0),
        head_channels: int = 16,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.5,
        window_origin: Origin = "cloud",
        attention_backend: Backend = "auto",
    ) -> None:
        super().__init__()
        _check_settings(grid_size, window, bin_size, channels, layers, head_channels)
        stages = len(layers) // 2
        self.in_channels, self.out_channels, self.grid_size = in_channels, channels[-1], grid_size
        rule = SlabRule(window, bin_size, window_origin)
        self.stem = SparseSequential(
            SubMConv3d(in_channels, base_channels, 3, bias=False),
            _BatchNorm(base_channels),
            nn.LeakyReLU(0.2),
            ResidualBlock(base_channels),
        )
        rates = _rising(drop_path, sum(layers[:stages])) + _rising(drop_path, sum(layers[stages:]))[::-1]
        self.block = nn.ModuleList()
        for width, depth in zip(channels, layers, strict=True):
            own, rates = rates[:depth], rates[depth:]
            self.block.append(
                nn.Sequential(
                    *(
                        Block(width, width // head_channels, rule, i % 2 == 1, rate, mlp_ratio, attention_backend)
                        for i, rate in enumerate(own)
                    )
                )
            )
        encoder = [base_channels, *channels[:stages]]
        self.pool = nn.ModuleList(Pool(encoder[s], encoder[s + 1], 2 ** (s + 1)) for s in range(stages))
        decoder = channels[stages - 1 :]
        self.unpool = nn.ModuleList(Unpool(decoder[s], encoder[stages - 1 - s], decoder[s + 1]) for s in range(stages))
        self.feature_info = [FeatureInfo("stem", base_channels, 1)]
        self.feature_info += [FeatureInfo(f"enc{s}", encoder[s + 1], 2 ** (s + 1)) for s in range(stages)]
        self.feature_info += [
            FeatureInfo(f"dec{stages - 1 - s}", decoder[s + 1], 2 ** (stages - 1 - s)) for s in range(stages)
        ]

    @classmethod
    def base(cls, in_channels: int = 9, window: int = 10) -> ConDaFormer:
        """The published network for ScanNet, 19.8 M parameters; for ScanNet200 with ``window=8``."""
        return cls(
            in_channels,
            grid_size=0.02,
            window=window,
            channels=(96, 192, 384, 384, 384, 192, 96, 48),
            layers=(2, 2, 6, 2, 0, 0, 0, 0),
            drop_path=0.3,
        )

    def forward(self, points: Points) -> Tensor:
        """Features ``(N, out_channels)`` in input order.

        Args:
            points: clouds with ``feat`` ``(N, in_channels)`` and ``grid_coord`` ``(N, 3)``, as grid sampling leaves it.
                Several points in one cell share one voxel (their mean).

        Raises:
            InputError: if a field is missing, ``feat`` has another width, coordinates and cells do not belong
                together, or there are too few points to train on.
        """
        for _, last in self._stages(points):
            level = last
        return level.voxels.to_points()

    def forward_features(self, points: Points) -> dict[str, Voxels]:
        """The voxels after the stem, every encoder and every decoder stage, by the names of ``feature_info``."""
        return {name: level.voxels for name, level in self._stages(points)}

    def _stages(self, points: Points) -> Iterator[tuple[str, Level]]:
        level = self._input(points)
        level = level.with_feat(self.stem(level.voxels).feat)
        yield "stem", level
        stages, skips = len(self.pool), []
        for s, pool in enumerate(self.pool):
            skips.append(level)
            level = self.block[s](pool(level))
            yield f"enc{s}", level
        for s, unpool in enumerate(self.unpool):
            level = self.block[stages + s](unpool(level, skips.pop()))
            yield f"dec{stages - 1 - s}", level

    def _input(self, points: Points) -> Level:
        self.check_input(points)
        feat = torch.cat([points.get("feat"), self._positions(points)], 1)
        voxels = points.with_attrs(feat=feat).voxels()
        feat, position = voxels.feat.split([self.in_channels, 3], 1)
        counts = torch.bincount(voxels.coord[:, 0].long(), minlength=len(points))
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return Level(voxels.with_feat(feat), position.contiguous(), torch.ones_like(position[:, :1]), offsets)

    def _positions(self, points: Points) -> Tensor:
        """``(N, 3)`` float32 in cells, every point in its own cell and the smallest offset in a cell 0, per cloud."""
        offsets, rows = points.offsets, points.num_points
        grid = points.get("grid_coord").float()
        grid = grid - _per_point(_lowest(grid, offsets), offsets, rows)
        coord = points.coord.float()
        coord = (coord - _per_point(_lowest(coord, offsets), offsets, rows)) / self.grid_size
        inside = coord - grid
        inside = inside - _per_point(_lowest(inside, offsets), offsets, rows)
        if rows and float(inside.max()) > 1.01:
            raise InputError(
                f"{points.describe()}: points lie up to {float(inside.max()):.1f} cells from their 'grid_coord'; "
                f"ConDaFormer's grid_size {self.grid_size} must be the pipeline's, and clouds must not be mixed (mix3d)"
            )
        return grid + inside


def _enhance(pointwise: SparseSequential, depthwise: SparseSequential, level: Level) -> Tensor:
    """Local structure enhancement: half of the channels from the point itself, half from its 27 neighbours."""
    return torch.cat([pointwise(level.voxels).feat, depthwise(level.voxels).feat], 1)


def _pointwise(channels: int) -> SparseSequential:
    return SparseSequential(SubMConv3d(channels, channels // 2, 1, bias=False), _BatchNorm(channels // 2))


def _depthwise(channels: int) -> SparseSequential:
    conv = DepthwiseSubMConv3d(channels, 3, bias=False)
    bound = 1 / math.sqrt(channels * len(conv.weight))  # published: as for a dense kernel
    nn.init.uniform_(conv.weight, -bound, bound)
    half = nn.Linear(channels, channels // 2)
    return SparseSequential(conv, _BatchNorm(channels), nn.GELU(), half, _BatchNorm(channels // 2))


def _rising(last: float, count: int) -> list[float]:
    """``count`` numbers from 0 to ``last``."""
    return [last * i / max(count - 1, 1) for i in range(count)]


def _lowest(values: Tensor, offsets: Tensor) -> Tensor:
    return -segment_max(-values, offsets)


def _per_point(values: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """``(N, C)``: each cloud's row of ``(B, C)`` for every point of it."""
    return torch.repeat_interleave(values, offsets.diff(), dim=0, output_size=rows)


def _check_settings(
    grid_size: float,
    window: int,
    bin_size: float,
    channels: Sequence[int],
    layers: Sequence[int],
    head_channels: int,
) -> None:
    if len(channels) != len(layers) or len(layers) % 2 or not layers:
        raise InputError(
            f"ConDaFormer: channels {tuple(channels)} and layers {tuple(layers)} must have the same, even length: "
            "encoder stages, then as many decoder stages"
        )
    if grid_size <= 0 or window < 1 or not 0 < bin_size <= 1:
        raise InputError(
            f"ConDaFormer: grid_size {grid_size} must be positive, window {window} at least 1, and bin_size {bin_size} "
            "above 0, at most 1"
        )
    for width, depth in zip(channels, layers, strict=True):
        if depth and (width % head_channels or width // head_channels % 3 or width % 2):
            raise InputError(
                f"ConDaFormer: a stage of width {width} needs a multiple of 3 heads of head_channels {head_channels}, "
                "a third for each plane"
            )
