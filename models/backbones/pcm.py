"""Point Cloud Mamba: local aggregation and bidirectional Mamba over serialized points (Zhang et al., arXiv 2403.00762).

Batches are packed, clouds may differ in size. ``released=True`` computes what the released code computes, whose weights
need it: its traverse codes, windows that drop points and positions normalised point by point. The default uses the
traverse the paper describes, and no cloud depends on its batch mates.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.nn import Backbone, FeatureInfo
from pc3d.nn.interpolation import interpolate
from pc3d.nn.mamba import BidirectionalMamba, MambaBlock, scale_output_layers
from pc3d.ops.neighbours import farthest_points, knn
from pc3d.ops.segment import segment_max, segment_mean, segment_sum
from pc3d.ops.serialize import curve_codes, grid_depth, sort_codes
from pc3d.points import Points
from pc3d.serialization.traverse import TRAVERSES, released_codes, snake_order

SCAN_ORDERS = (*TRAVERSES, "z", "z-trans", "hilbert", "hilbert-trans")
_PROMPT_WIDTH = 384


@dataclass(frozen=True)
class Level:
    """Points of a stage: ``coord (M, 3)``, ``feat (M, C)``, the residual stream of the Mamba blocks, cloud borders."""

    coord: Tensor
    feat: Tensor
    offsets: Tensor
    residual: Tensor | None = None

    def take(self, rows: Tensor, offsets: Tensor | None = None) -> Level:
        residual = None if self.residual is None else self.residual[rows]
        return Level(self.coord[rows], self.feat[rows], self.offsets if offsets is None else offsets, residual)


def scan_cells(coord: Tensor, offsets: Tensor, size: float) -> Tensor:
    """``(N, 3)`` int64 cells of a grid, from 0 in every cloud."""
    cells = (coord / size).floor().long()
    cloud = _cloud(offsets, len(coord))
    low = cells.new_full((len(offsets) - 1, 3), torch.iinfo(torch.int64).max)
    low = low.scatter_reduce(0, cloud[:, None].expand(-1, 3), cells, "amin")
    return cells - low[cloud]


def scan_order(cells: Tensor, offsets: Tensor, order: str, released: bool = False) -> Tensor:
    """``(N,)`` int64 rows along a curve or traverse, cloud after cloud."""
    if order in TRAVERSES:
        if released:
            return released_codes(cells, offsets, order).argsort(stable=True)
        return snake_order(cells, offsets, order)
    if order not in SCAN_ORDERS:
        raise InputError(f"orders: {order!r} is not one of {', '.join(SCAN_ORDERS)}")
    grid = cells.int()
    return sort_codes(curve_codes(grid, offsets, grid_depth(grid), [order])[0])[0]  # type: ignore[list-item]


class ConvBNReLU(nn.Sequential):
    """Linear, batch norm and ReLU over the last axis."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = False) -> None:
        super().__init__(nn.Linear(in_channels, out_channels, bias), nn.BatchNorm1d(out_channels), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).view(*x.shape[:-1], -1)


class ResidualMLP(nn.Module):
    """``ReLU(BN(W2 ReLU(BN(W1 x))) + x)``."""

    def __init__(self, channels: int, bias: bool = False) -> None:
        super().__init__()
        self.inner = ConvBNReLU(channels, channels, bias)
        self.outer = nn.Linear(channels, channels, bias)
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.outer(self.inner(x)).flatten(0, -2)).view(x.shape)
        return torch.relu(out + x)


class LocalGrouper(nn.Module):
    """Farthest points and their neighbours, as differences to the centre over one deviation per cloud (PointMLP)."""

    def __init__(self, channels: int, reducer: int, neighbours: int) -> None:
        super().__init__()
        self.reducer, self.neighbours = reducer, neighbours
        self.alpha = nn.Parameter(torch.ones(channels + 3))
        self.beta = nn.Parameter(torch.zeros(channels + 3))

    def forward(self, level: Level) -> tuple[Level, Tensor]:
        """The centres with their own features, and ``(S, K, 2 C + 3)`` neighbourhoods."""
        centres = _farthest(level, level.offsets.diff() // self.reducer) if self.reducer > 1 else level
        rows, _ = knn(centres.coord, centres.offsets, level.coord, level.offsets, self.neighbours)
        rows = torch.where(rows < 0, rows[:, :1], rows)  # a cloud of fewer points: its nearest again
        around = torch.cat([level.feat, level.coord], -1)[rows]
        difference = around - torch.cat([centres.feat, centres.coord], -1)[:, None]
        scaled = difference / (_deviation(difference, centres.offsets) + 1e-5)
        centre = centres.feat[:, None].expand(-1, self.neighbours, -1)
        return centres, torch.cat([self.alpha * scaled + self.beta, centre], -1)


class Stage(nn.Module):
    """Local aggregation, then Mamba blocks, each over an order of its own."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        orders: Sequence[str],
        reducer: int,
        neighbours: int,
        drop_path: Sequence[float],
        prompts: bool,
        block_residual: bool,
        pre_blocks: int,
    ) -> None:
        super().__init__()
        self.orders, self.drop_path, self.block_residual = tuple(orders), tuple(drop_path), block_residual
        self.grouper = LocalGrouper(in_channels, reducer, neighbours)
        self.transfer = ConvBNReLU(2 * in_channels + 3, channels)
        self.pre = nn.Sequential(*(ResidualMLP(channels) for _ in range(pre_blocks)))
        self.pos_proj = nn.Linear(3, channels, bias=False)
        self.prompt_proj = nn.Linear(_PROMPT_WIDTH, channels, bias=False) if prompts else None
        same = in_channels == channels
        self.residual_proj = nn.Identity() if same else nn.Linear(in_channels, channels, bias=False)
        self.blocks = nn.ModuleList(
            MambaBlock(channels, BidirectionalMamba(channels), residual_float=True) for _ in orders
        )

    def aggregate(self, level: Level) -> Level:
        centres, grouped = self.grouper(level)
        feat = self.pre(self.transfer(grouped)).amax(1)
        keep = self.block_residual and centres.residual is not None
        return replace(centres, feat=feat, residual=self.residual_proj(centres.residual) if keep else None)


class PointCloudMamba(Backbone):
    """PCM encoder with an optional decoder.

    Args:
        in_channels: width of ``points.attrs["feat"]``.
        embed_channels: width before the first stage, E.
        channels: width of each stage.
        layers: Mamba blocks of each stage.
        orders: order of each block, stage after stage: a traverse ("xyz", ...), "z", "hilbert" or their "-trans".
        reducers: a stage keeps one point in so many.
        neighbours: of a centre, K.
        prompts: learned tokens per order, T, before and after each sequence; 0 for none.
        grid_size: of the cells that are ordered, in metres.
        windows: tokens of a window per stage; None for whole clouds.
        combine_pos: put the coordinates behind the features.
        decoder: widths of the propagation levels from coarse to fine; None returns one row per cloud.
        context_channels: width of the global context added to decoded points.
        categories: shapes of a part segmentation, one-hot into the decoder, from ``points.attrs["category"]`` ``(N,)``.
        drop_path: rate of the last block; rises linearly.
        block_residual: hand the residual stream on to the next stage.
        pre_blocks: residual blocks before the maximum over neighbours.
        pool: what a row of a whole cloud is made of, without a decoder; "max+mean" is their sum.
        released: compute what the released code does, see the module.
    """

    def __init__(
        self,
        in_channels: int,
        embed_channels: int = 192,
        channels: Sequence[int] = (192, 192, 384, 384),
        layers: Sequence[int] = (1, 1, 2, 2),
        orders: Sequence[str] = TRAVERSES,
        reducers: Sequence[int] = (1, 2, 2, 2),
        neighbours: int = 12,
        prompts: int = 6,
        grid_size: float = 0.02,
        windows: Sequence[int] | None = None,
        combine_pos: bool = False,
        decoder: Sequence[int] | None = None,
        context_channels: int = 64,
        categories: int = 0,
        drop_path: float = 0.1,
        block_residual: bool = True,
        pre_blocks: int = 1,
        pool: Literal["max", "mean", "max+mean"] = "max",
        released: bool = False,
    ) -> None:
        super().__init__()
        if pool not in ("max", "mean", "max+mean"):
            raise InputError(f"pool: {pool!r} is not max, mean or max+mean")
        if len(orders) != sum(layers):
            raise InputError(f"orders: {len(orders)} orders for {sum(layers)} layers; give one for each layer")
        if not len(channels) == len(layers) == len(reducers) == len(windows or channels) == len(decoder or channels):
            raise InputError("channels, layers, reducers, windows and decoder must have one value for each stage")
        self.in_channels, self.combine_pos = in_channels, combine_pos
        self.grid_size, self.released, self.pool = grid_size, released, pool
        self.windows, self.categories = None if windows is None else tuple(windows), categories
        self.embedding = ConvBNReLU(in_channels + 3 * combine_pos, embed_channels)
        self.prompt_orders = tuple(dict.fromkeys(orders))
        self.order_prompt = nn.Embedding(len(self.prompt_orders) * prompts, _PROMPT_WIDTH) if prompts else None
        self.prompts = prompts
        rates = [0.0, *torch.linspace(0, drop_path, sum(layers), device="cpu").tolist()]
        widths, self.stages, first = [embed_channels, *channels], nn.ModuleList(), 0
        for i, count in enumerate(layers):
            used = slice(first, first + count)
            self.stages.append(
                Stage(
                    widths[i],
                    widths[i + 1],
                    orders[used],
                    reducers[i],
                    neighbours,
                    rates[used],
                    prompts > 0,
                    block_residual,
                    pre_blocks,
                )
            )
            first += count
        scale_output_layers(self.stages, sum(layers))
        strides = list(accumulate(reducers, operator.mul))
        stages = enumerate(zip(channels, strides, strict=True))
        self.feature_info = [FeatureInfo(f"stage{i}", width, stride) for i, (width, stride) in stages]
        self.decoder = None if decoder is None else Decoder(widths, decoder, context_channels, categories)
        self.out_channels = channels[-1] if self.decoder is None else self.decoder.out_channels

    @classmethod
    def tiny(cls, in_channels: int, **changes: Any) -> PointCloudMamba:
        """PCM-Tiny of the paper (classification)."""
        return cls(in_channels, **changes)

    @classmethod
    def base(cls, in_channels: int, **changes: Any) -> PointCloudMamba:
        """PCM of the paper (classification)."""
        sizes: dict[str, Any] = {
            "embed_channels": 384,
            "channels": (384, 384, 768, 768),
            "layers": (1, 2, 2, 4),
            "orders": (*TRAVERSES, "hilbert", "z", "z-trans"),
        }
        return cls(in_channels, **(sizes | changes))

    def forward(self, points: Points) -> Tensor:
        levels = self._levels(points)
        if self.decoder is None:
            return _pooled(levels[-1], self.pool)
        return self.decoder(levels, self._category(points))

    def forward_features(self, points: Points) -> Mapping[str, Points]:
        stages = zip(self.feature_info, self._levels(points)[1:], strict=True)
        return OrderedDict(
            (info.name, Points(level.coord, level.offsets, {"feat": level.feat}, points.meta)) for info, level in stages
        )

    def _levels(self, points: Points) -> list[Level]:
        """The input level in input order, then every stage in the order of its last block."""
        self.check_input(points)
        feat = points.get("feat")
        if self.combine_pos:
            feat = torch.cat([feat, points.coord], -1)
        levels, current = [Level(points.coord, self.embedding(feat), points.offsets)], ""
        for i, stage in enumerate(self.stages):
            assert isinstance(stage, Stage)
            level = stage.aggregate(levels[-1])
            for block, order, rate in zip(stage.blocks, stage.orders, stage.drop_path, strict=True):
                if order != current:
                    cells = scan_cells(level.coord, level.offsets, self.grid_size)
                    level, current = level.take(scan_order(cells, level.offsets, order, self.released)), order
                level = self._mix(level, stage, block, order, rate, None if self.windows is None else self.windows[i])
            levels.append(level)
        return levels

    def _mix(self, level: Level, stage: Stage, block: nn.Module, order: str, rate: float, window: int | None) -> Level:
        coord, offsets = level.coord, level.offsets
        if window is not None and bool((offsets.diff() > window).any()):
            if self.released:
                sizes = offsets.diff()
                level = _farthest(level, torch.where(sizes > window, sizes // window * window, sizes))
            coord, offsets = level.coord, _cut(level.offsets, window)
            coord = _normalised(coord, offsets, point_by_point=self.released)
        feat, residual = level.feat + stage.pos_proj(coord), level.residual
        if self.training and rate:
            feat = _drop_clouds(feat, offsets, rate)
        if stage.prompt_proj is None or self.order_prompt is None:
            feat, residual = block(feat, residual, offsets)
            return replace(level, feat=feat, residual=residual)
        start = self.prompt_orders.index(order) * self.prompts
        prompt = stage.prompt_proj(self.order_prompt.weight[start : start + self.prompts])
        framed = _Frame(offsets, self.prompts)
        residual = None if residual is None else framed.put(residual, prompt)
        feat, residual = block(framed.put(feat, prompt), residual, framed.offsets)
        return replace(level, feat=feat[framed.rows], residual=residual[framed.rows])

    def _category(self, points: Points) -> Tensor | None:
        """``(B,)`` shape category of each cloud."""
        if not self.categories:
            return None
        category = points.get("category")
        return category.reshape(len(points.coord))[points.offsets[:-1]]


class Decoder(nn.Module):
    """Feature propagation to the input points, with a global context of all levels and the shape's category."""

    def __init__(self, widths: Sequence[int], channels: Sequence[int], context: int, categories: int) -> None:
        super().__init__()
        skips, into = widths[-2::-1], [widths[-1], *channels[:-1]]
        self.fuse = nn.ModuleList(
            ConvBNReLU(skip + coarse, out, bias=True) for skip, coarse, out in zip(skips, into, channels, strict=True)
        )
        self.extract = nn.ModuleList(ResidualMLP(out, bias=True) for out in channels)
        self.context_maps = nn.ModuleList(ConvBNReLU(width, context) for width in reversed(widths))
        self.context_end = ConvBNReLU(len(widths) * context, context)
        self.category_map = None
        if categories:
            self.category_map = nn.Sequential(ConvBNReLU(categories, context), ConvBNReLU(context, context))
        self.categories = categories
        self.out_channels = channels[-1] + context * (2 if categories else 1)

    def forward(self, levels: Sequence[Level], category: Tensor | None) -> Tensor:
        """``(N, out_channels)``, rows of the first level."""
        coarse = levels[-1]
        for fine, fuse, extract in zip(levels[-2::-1], self.fuse, self.extract, strict=True):
            places = fine.coord, fine.offsets, coarse.coord, coarse.offsets
            feat = extract(fuse(torch.cat([fine.feat, interpolate(*places, coarse.feat)], -1)))
            coarse = replace(fine, feat=feat)
        maps = zip(self.context_maps, reversed(levels), strict=True)
        context = self.context_end(torch.cat([segment_max(m(level.feat), level.offsets) for m, level in maps], -1))
        parts = [coarse.feat, context[_cloud(coarse.offsets, len(coarse.feat))]]
        if self.category_map is not None and category is not None:
            one_hot = nn.functional.one_hot(category.long(), self.categories).to(context.dtype)
            parts.append(self.category_map(one_hot)[_cloud(coarse.offsets, len(coarse.feat))])
        return torch.cat(parts, -1)


class _Frame:
    """Sequences with T prompt tokens before and after each."""

    def __init__(self, offsets: Tensor, tokens: int) -> None:
        sequence = torch.arange(len(offsets), device=offsets.device)
        self.offsets = offsets + 2 * tokens * sequence
        rows = torch.arange(int(offsets[-1]), device=offsets.device)
        self.rows = rows + tokens * (2 * _cloud(offsets, len(rows)) + 1)
        each = torch.arange(tokens, device=offsets.device)
        self.prompts = torch.cat([(self.offsets[:-1, None] + each), (self.offsets[1:, None] - tokens + each)], 1)

    def put(self, values: Tensor, prompt: Tensor) -> Tensor:
        out = values.new_zeros(int(self.offsets[-1]), values.shape[1]).index_copy(0, self.rows, values)
        prompts = prompt.to(values.dtype).repeat(2 * len(self.prompts), 1)
        return out.index_copy(0, self.prompts.flatten(), prompts)


def _cloud(offsets: Tensor, rows: int) -> Tensor:
    return torch.repeat_interleave(offsets.diff(), output_size=rows)


def _farthest(level: Level, counts: Tensor) -> Level:
    """The farthest points of each cloud, at least one, in the order they have."""
    counts = torch.minimum(counts.clamp(min=1), level.offsets.diff())
    sampled = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    rows = farthest_points(level.coord, level.offsets, sampled).sort().values
    return level.take(rows, sampled)


def _deviation(difference: Tensor, offsets: Tensor) -> Tensor:
    """``(S, 1, 1)`` unbiased standard deviation over all values ``(S, K, C)`` of each cloud."""
    cloud, values = _cloud(offsets, len(difference)), difference.flatten(1)
    count = (offsets.diff() * values.shape[1])[:, None]
    mean = segment_mean(values, offsets).mean(1, keepdim=True)
    squares = segment_sum((values - mean[cloud]).square(), offsets).sum(1, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()[cloud][:, None]


def _cut(offsets: Tensor, window: int) -> Tensor:
    """Borders of windows; the last one of a cloud may be shorter."""
    pieces = [torch.arange(a, b, window, device=offsets.device) for a, b in pairwise(offsets.tolist())]
    return torch.cat([*pieces, offsets[-1:]])


def _normalised(coord: Tensor, offsets: Tensor, point_by_point: bool) -> Tensor:
    """Positions in the unit box of their window; as released: of their own three coordinates."""
    if point_by_point:
        low, high = coord.amin(1, keepdim=True), coord.amax(1, keepdim=True)
    else:
        window = _cloud(offsets, len(coord))
        low, high = (-segment_max(-coord, offsets))[window], segment_max(coord, offsets)[window]
    return (coord - low) / (high - low + 1e-6)


def _drop_clouds(feat: Tensor, offsets: Tensor, rate: float) -> Tensor:
    """Stochastic depth, cloud by cloud."""
    kept = torch.rand(len(offsets) - 1, 1, device=feat.device).ge(rate).to(feat.dtype) / (1 - rate)
    return feat * kept[_cloud(offsets, len(feat))]


def _pooled(level: Level, pool: str) -> Tensor:
    """``(B, C)``."""
    parts = [segment_max] * ("max" in pool) + [segment_mean] * ("mean" in pool)
    return sum((reduce(level.feat, level.offsets) for reduce in parts[1:]), parts[0](level.feat, level.offsets))
