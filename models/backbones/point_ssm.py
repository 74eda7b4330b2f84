"""Hierarchical state-space network for medical point clouds (MedPointS, arXiv 2504.13015; "PointMamba2" of flemme).

PointNet++ with state-space blocks in place of the shared MLPs: short scans over the neighbours of every centre, long
scans along several orders over all centres of a level.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pc3d.errors import InputError
from pc3d.nn import Backbone, FeatureInfo
from pc3d.nn.interpolation import interpolate
from pc3d.nn.patches import sample_centres
from pc3d.nn.point_ssm import (
    ChannelAttention,
    DenseBlock,
    GroupScan,
    PointSSMBlock,
    sequence_of_row,
    vanilla_mixer,
)
from pc3d.ops.neighbours import knn
from pc3d.ops.segment import segment_max, segment_mean
from pc3d.points import Points

SCANS = ("x", "y", "z", "center_distance")
OTHER_SCANS = ("hilbert", "given")
_BINS = 32  # of the Hilbert scan along each axis of [-1, 1]
# Octants of the Hilbert scan in the order they are visited; for each, the axes that become x, y and z inside it, and
# whether they point backwards.
_OCTANTS = ((0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 1, 1), (1, 1, 1), (1, 0, 1), (0, 0, 1))
_AXES = ((1, 2, 0), (2, 0, 1), (2, 0, 1), (0, 1, 2), (0, 1, 2), (2, 0, 1), (2, 0, 1), (1, 2, 0))
_BACKWARDS = ((0, 0, 0), (0, 0, 0), (0, 0, 0), (1, 1, 0), (1, 1, 0), (1, 0, 1), (1, 0, 1), (0, 1, 1))
Query = Literal["feature", "xyz", "embedding", "ball"]


@dataclass(frozen=True)
class Level:
    """Centres of a level: their rows in the level before, coordinates, features and position features."""

    rows: Tensor
    coord: Tensor
    feat: Tensor
    position: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class BlockOptions:
    """What the state-space blocks of a network have in common."""

    state: int
    head: int | None
    groups: int
    ffn: tuple[float, ...] | None
    group_ffn: tuple[float, ...] | None
    condition: int

    def vanilla(self, in_channels: int, channels: int, condition: int = 0) -> PointSSMBlock:
        mixer = vanilla_mixer(in_channels, self.state, self.head)
        return PointSSMBlock(in_channels, channels, mixer, self.groups, self.ffn, condition)


def middle_width(in_channels: int, channels: int) -> int:
    """Width between two blocks: a multiple of 16."""
    return -(-max(max(in_channels, channels) // 2, min(in_channels, channels)) // 16) * 16


def scan_rows(coord: Tensor, offsets: Tensor, scans: Sequence[str], flip: bool) -> list[Tensor]:
    """Rows of each scan, cloud after cloud; then all of them reversed.

    A scan goes along an axis ("x", "y", "z"), from the centroid outwards ("center_distance"), along a Hilbert curve
    ("hilbert"), or through the rows as they are ("given").
    """
    cloud = sequence_of_row(offsets, len(coord))
    orders = []
    for scan in scans:
        if scan == "center_distance":
            key = (coord - segment_mean(coord, offsets)[cloud]).norm(dim=1)
        elif scan in ("x", "y", "z"):
            key = coord[:, "xyz".index(scan)]
        elif scan == "hilbert":
            key = hilbert_key(coord)
        elif scan == "given":
            key = torch.arange(len(coord), device=coord.device)
        else:
            raise InputError(f"scans: {scan!r} is not one of {', '.join((*SCANS, *OTHER_SCANS))}")
        rows = key.argsort(stable=True)
        orders.append(rows[cloud[rows].argsort(stable=True)])
    if flip:
        mirrored = offsets[:-1][cloud] + offsets[1:][cloud] - 1 - torch.arange(len(coord), device=coord.device)
        orders += [rows[mirrored] for rows in orders]
    return orders


def hilbert_key(coord: Tensor, bins: int = _BINS) -> Tensor:
    """``(N,)`` int64 place of each point's cell along the Hilbert curve over ``bins`` cells an axis of [-1, 1].

    The curve of the released code, which is none of those in :mod:`pc3d.serialization`; cells outside are those at the
    border.
    """
    octants, axes, backwards = (torch.tensor(table, device=coord.device) for table in (_OCTANTS, _AXES, _BACKWARDS))
    powers = octants.new_tensor([4, 2, 1])
    digit_of = (octants * powers).sum(1).argsort()
    cell = ((coord.double() + 1) * (bins / 2)).clamp(0, bins - 1).long()
    key, half = torch.zeros_like(cell[:, 0]), bins // 2
    while half:
        digit = digit_of[((cell >= half) * powers).sum(1)]
        inside = (cell % half).gather(1, axes[digit])
        cell = torch.where(backwards[digit] == 1, half - 1 - inside, inside)
        key, half = 8 * key + digit, half // 2
    return key


class Grouping(nn.Module):
    """Farthest points, their neighbours at several scales, two blocks and the largest value of each neighbourhood."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        position_channels: int,
        points: int,
        neighbours: int,
        radius: float,
        scales: int,
        query: Query,
        ignore_origin: bool,
        options: BlockOptions,
    ) -> None:
        super().__init__()
        self.points, self.query, self.ignore_origin = points, query, ignore_origin
        self.neighbours = [neighbours // 2**i for i in reversed(range(scales))]
        self.radii = [radius / 2**i for i in reversed(range(scales))]
        parts = [channels // 2 ** min(i + 1, scales - 1) for i in range(scales)]
        widths = sorted(parts) if scales > 1 else [channels]
        into = position_channels + in_channels
        self.scales = nn.ModuleList()
        for width in widths:
            sizes = (into, middle_width(into, width)), (middle_width(into, width), width)
            self.scales.append(nn.ModuleList(options.vanilla(a, b, options.condition) for a, b in sizes))

    def forward(self, level: Level, condition: Tensor | None) -> Level:
        rows, offsets = sample_centres(level.coord, level.offsets, self.points, self.ignore_origin)
        coord, position = level.coord[rows], level.position[rows]
        feats = []
        for scale, (count, radius) in zip(self.scales, zip(self.neighbours, self.radii, strict=True), strict=True):
            near = self._near(level, rows, offsets, count, radius)
            relative = level.position[near] - position[:, None]
            x = torch.cat([relative, level.feat[near]], -1).flatten(0, 1)
            borders = torch.arange(len(rows) + 1, device=rows.device) * count
            per_centre = None if condition is None else condition[sequence_of_row(offsets, len(rows))]
            assert isinstance(scale, nn.ModuleList)
            for block in scale:
                x = block(x, borders, condition=per_centre)
            feats.append(x.unflatten(0, (-1, count)).amax(1))
        return Level(rows, coord, torch.cat(feats, -1), position, offsets)

    def _near(self, level: Level, rows: Tensor, offsets: Tensor, count: int, radius: float) -> Tensor:
        """``(S, count)`` rows of the neighbours, nearest first; the first again where there are fewer."""
        if self.query == "xyz":
            near, _ = knn(level.coord[rows], offsets, level.coord, level.offsets, count)
        elif self.query == "ball":
            near = _first_in_ball(level.coord[rows], offsets, level.coord, level.offsets, count, radius)
        else:
            space = level.feat if self.query == "feature" else level.position
            near = _nearest_rows(space[rows], offsets, space, level.offsets, count)
        return torch.where(near < 0, near[:, :1], near)


class PointSSM(Backbone):
    """Encoder of the hierarchical point SSM with an optional segmentation decoder.

    Args:
        in_channels: width of ``points.attrs["feat"]``.
        channels: width of each level.
        points: centres of each level.
        project_channels: width before the first level.
        neighbours, radius: of the largest scale; halved for each smaller one.
        scales: neighbourhoods of a centre.
        query: space of the neighbours: previous features, coordinates, position features, or a ball (the first points
            within the radius, then sorted by distance).
        embed_position: learned position features; else the coordinates themselves.
        scans: orders of the long scans, see :func:`scan_rows`; ``flip`` adds their reversals.
        state: of every scan, N; ``head``: channels of a head for Mamba-2 scans, None for Mamba-1.
        groups: of the group norms.
        ffn: blocks with an MLP, hidden widths as multiples; ``group_ffn`` those of the long scans.
        attention: channel attention after each level.
        concat: features of all levels at the last level's points before pooling.
        dense: widths after pooling; the last one is that of a whole cloud.
        decoder: widths of the propagation from the coarsest level to the points, one for each level; None returns one
            row per cloud.
        categories: one-hot categories ``points.attrs["category"]`` injected into every block, through layers of
            ``condition_hidden`` and ``condition_channels``.
        ignore_origin: published sampling, which never takes points within 0.0316 of the origin.
    """

    def __init__(
        self,
        in_channels: int = 3,
        channels: Sequence[int] = (64, 64, 128, 256, 512),
        points: Sequence[int] = (1024, 512, 256, 128, 64),
        project_channels: int = 64,
        neighbours: int = 32,
        radius: Sequence[float] = (0.1, 0.2, 0.4, 0.8, 1.6),
        scales: int = 2,
        query: Query = "feature",
        embed_position: bool = True,
        scans: Sequence[str] = SCANS,
        flip: bool = True,
        state: int = 64,
        head: int | None = None,
        groups: int = 8,
        ffn: Sequence[float] | None = None,
        group_ffn: Sequence[float] | None = None,
        attention: bool = True,
        concat: bool = True,
        dense: Sequence[int] = (1024, 512, 256),
        decoder: Sequence[int] | None = None,
        categories: int = 0,
        condition_hidden: int = 64,
        condition_channels: int = 128,
        ignore_origin: bool = False,
    ) -> None:
        super().__init__()
        if not len(channels) == len(points) == len(radius) == len(decoder or channels):
            raise InputError("channels, points, radius and decoder must have one value for each level")
        if query not in ("feature", "xyz", "embedding", "ball"):
            raise InputError(f"query: {query!r} is not one of feature, xyz, embedding, ball")
        self.in_channels, self.scans, self.flip, self.categories = in_channels, tuple(scans), flip, categories
        condition = condition_channels if categories else 0
        vanilla, group = (None if widths is None else tuple(widths) for widths in (ffn, group_ffn))
        options = BlockOptions(state, head, groups, vanilla, group, condition)
        self.condition: nn.Sequential | None = None
        if categories:
            self.condition = nn.Sequential(
                nn.Linear(categories, condition_hidden), nn.ReLU(), nn.Linear(condition_hidden, condition_channels)
            )
        self.point_proj = nn.Linear(in_channels, project_channels)
        self.pos_embed = nn.Linear(3, project_channels) if embed_position else nn.Identity()
        widths, position = [project_channels, *channels], project_channels if embed_position else 3
        self.grouping, self.long_scans, self.attention = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(channels):
            self.grouping.append(
                Grouping(
                    widths[i], width, position, points[i], neighbours, radius[i], scales, query, ignore_origin, options
                )
            )
            count = len(scans) * (2 if flip else 1)
            self.long_scans.append(
                nn.ModuleList(
                    PointSSMBlock(
                        width, width, GroupScan(width, count, state, head), groups, options.group_ffn, condition
                    )
                    for _ in range(2)
                )
            )
            self.attention.append(ChannelAttention() if attention else nn.Identity())
        self.concat: nn.ModuleList | None = None
        if concat:
            total, last = sum(widths), channels[-1]
            middle = middle_width(total, last)
            self.concat = nn.ModuleList(
                [DenseBlock(total, middle, groups, condition), DenseBlock(middle, last, groups, condition)]
            )
        sizes = [2 * channels[-1], *dense]
        self.dense = nn.ModuleList(DenseBlock(a, b, groups, condition) for a, b in itertools.pairwise(sizes))
        self.feature_info = [FeatureInfo(f"level{i}", width, 2 ** (i + 1)) for i, width in enumerate(channels)]
        self.decoder = None if decoder is None else Propagation(widths, sizes[-1], decoder, options)
        self.out_channels = sizes[-1] if decoder is None else decoder[-1]

    def forward(self, points: Points) -> Tensor:
        levels = self._levels(points)
        latent = self._latent(levels, self._condition(points))
        return latent if self.decoder is None else self.decoder(levels, latent)

    def forward_features(self, points: Points) -> Mapping[str, Points]:
        stages = zip(self.feature_info, self._levels(points)[1:], strict=True)
        return OrderedDict(
            (info.name, Points(level.coord, level.offsets, {"feat": level.feat}, points.meta)) for info, level in stages
        )

    def latent(self, points: Points) -> tuple[Tensor, Tensor | None]:
        """``(B, dense[-1])`` features of whole clouds, and the condition of each for a decoder that wants it."""
        condition = self._condition(points)
        return self._latent(self._levels(points), condition), condition

    def _condition(self, points: Points) -> Tensor | None:
        if self.condition is None:
            return None
        category = points.get("category").reshape(len(points.coord))[points.offsets[:-1]]
        return self.condition(F.one_hot(category.long(), self.categories).to(points.coord.dtype))

    def _levels(self, points: Points) -> list[Level]:
        self.check_input(points)
        everything = torch.arange(len(points.coord), device=points.coord.device)
        position = self.pos_embed(points.coord)
        levels = [Level(everything, points.coord, self.point_proj(points.get("feat")), position, points.offsets)]
        condition = self._condition(points)
        for grouping, long_scans, attention in zip(self.grouping, self.long_scans, self.attention, strict=True):
            level = grouping(levels[-1], condition)
            orders, x = scan_rows(level.coord, level.offsets, self.scans, self.flip), level.feat
            assert isinstance(long_scans, nn.ModuleList)
            for block in long_scans:
                x = block(x, level.offsets, orders, condition=condition)
            if isinstance(attention, ChannelAttention):
                x = attention(x, level.offsets)
            levels.append(Level(level.rows, level.coord, x, level.position, level.offsets))
        return levels

    def _latent(self, levels: Sequence[Level], condition: Tensor | None) -> Tensor:
        last = levels[-1]
        feat = last.feat
        if self.concat is not None:
            rows, parts = torch.arange(len(feat), device=feat.device), []
            for level in reversed(levels):
                parts.append(level.feat[rows])
                rows = level.rows[rows]
            feat = torch.cat(parts[::-1], -1)
            for block in self.concat:
                feat = block(feat, last.offsets, condition)
        x = torch.cat([segment_max(feat, last.offsets), segment_mean(feat, last.offsets)], -1)
        for block in self.dense:
            x = block(x, None, condition)
        return x


class Propagation(nn.Module):
    """From the features of whole clouds back to the points, level after level, two vanilla blocks each."""

    def __init__(self, widths: Sequence[int], latent: int, channels: Sequence[int], options: BlockOptions) -> None:
        super().__init__()
        into, outs = [latent, latent, *channels[:-1]], [latent, *channels]
        self.steps = nn.ModuleList()
        for skip, coarse, out in zip(reversed(widths), into, outs, strict=True):
            first = coarse + skip
            middle = middle_width(first, out)
            self.steps.append(nn.ModuleList(options.vanilla(a, b) for a, b in ((first, middle), (middle, out))))

    def forward(self, levels: Sequence[Level], latent: Tensor) -> Tensor:
        """``(N, channels[-1])``, rows of the first level."""
        last = levels[-1]
        known = latent[sequence_of_row(last.offsets, len(last.feat))]
        coarse: Level | None = None
        for fine, blocks in zip(reversed(levels), self.steps, strict=True):
            x = torch.cat([known if coarse is None else _interpolate(fine, coarse, known), fine.feat], -1)
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                x = block(x, fine.offsets)
            coarse, known = fine, x
        return known


def _interpolate(fine: Level, coarse: Level, feat: Tensor) -> Tensor:
    return interpolate(fine.coord, fine.offsets, coarse.coord, coarse.offsets, feat, power=1)


@torch.no_grad()
def _nearest_rows(query: Tensor, query_offsets: Tensor, space: Tensor, offsets: Tensor, k: int) -> Tensor:
    """``(Q, k)`` rows of the k nearest in a space of any width, ascending; -1 where a cloud has fewer."""
    out = torch.full((len(query), k), -1, dtype=torch.int64, device=query.device)
    borders = zip(query_offsets[:-1], query_offsets[1:], offsets[:-1], offsets[1:], strict=True)
    for begin, end, first, last in (tuple(map(int, b)) for b in borders):
        width = min(k, last - first)
        if begin == end or not width:
            continue
        distance = torch.cdist(query[begin:end], space[first:last], compute_mode="donot_use_mm_for_euclid_dist")
        out[begin:end, :width] = distance.topk(width, largest=False, sorted=True).indices + first
    return out


@torch.no_grad()
def _first_in_ball(
    query: Tensor, query_offsets: Tensor, coord: Tensor, offsets: Tensor, k: int, radius: float
) -> Tensor:
    """``(Q, k)`` rows of the first k points nearer than ``radius``, by row, then sorted by distance."""
    out = torch.full((len(query), k), -1, dtype=torch.int64, device=query.device)
    borders = zip(query_offsets[:-1], query_offsets[1:], offsets[:-1], offsets[1:], strict=True)
    for begin, end, first, last in (tuple(map(int, b)) for b in borders):
        if begin == end:
            continue
        squared = (query[begin:end, None] - coord[None, first:last]).square().sum(-1)
        inside = squared < radius * radius
        place = inside.cumsum(1)
        squared = squared.masked_fill(~inside | (place > k), float("inf"))
        width = min(k, last - first)
        found = squared.sort(dim=1, stable=True)
        rows = found.indices[:, :width] + first
        # Missing slots repeat the first hit by row, whose distance puts it beside itself.
        hit = inside.int().argmax(1, keepdim=True)
        filled = torch.where(found.values[:, :k].isinf(), squared.gather(1, hit), found.values[:, :k])
        rows = torch.where(found.values[:, :width].isinf(), hit + first, rows)
        out[begin:end, :width] = rows.gather(1, filled.argsort(dim=1, stable=True))
    return out
