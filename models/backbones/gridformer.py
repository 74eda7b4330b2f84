"""GridFormer: surface reconstruction by attention between points and grids (arXiv 2401.02292, AAAI 2024).

A grid, or three planes, and the points inform each other in four encoder and three decoder levels; the decoder's grids
are read at any point of space for its occupancy. Sizes and details are those of the published code (list17/GridFormer).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pc3d.errors import InputError
from pc3d.nn.backbone import FeatureInfo
from pc3d.nn.point_grid import CellAttention, GridBackbone, GridFrame, GridKind, GridPyramid, Places, sample_sum
from pc3d.points import Points
from pc3d.tasks.heads import OccupancyHead

_LEVELS = 4
_HALVED = (2, 3)  # encoder levels that begin with a pooling
_CONV: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
_NORM: dict[int, Any] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_POOL: dict[int, Any] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
_GROUPS = 8


class GridFormer(GridBackbone):
    """Point features ``(N, 2 * channels)``; :meth:`encode` gives the grids that an occupancy head reads.

    Clouds lie in about ``[-0.5, 0.5]^3`` and may differ in size.

    Args:
        in_channels: width of ``feat``: 3 coordinates, as published, or more.
        channels: width c of the first level; the encoder's levels are c, 2c, 4c and 8c wide.
        resolution: cells per axis of the first level, a multiple of 4.
        kind: ``volume`` (rooms, as published) or ``planes`` (objects).
        padding: of the grids, see :class:`~pc3d.nn.point_grid.GridFrame`.

    Raises:
        InputError: if sizes do not fit.
    """

    def __init__(
        self,
        in_channels: int = 3,
        channels: int = 32,
        resolution: int = 64,
        kind: GridKind = "volume",
        padding: float = 0.1,
    ) -> None:
        super().__init__()
        if channels < 8 or channels % 8 or resolution < 4 or resolution % 4:
            raise InputError(
                f"GridFormer: channels {channels} must be a multiple of 8, resolution {resolution} a multiple of 4"
            )
        self.frame = GridFrame(kind, padding)
        self.in_channels, self.out_channels, self.resolution = in_channels, 2 * channels, resolution
        widths = [channels << level for level in range(_LEVELS)]
        names = [*(f"encoder{i}" for i in range(_LEVELS)), "decoder0", "decoder1"]
        self.grid_channels = widths[2::-1]
        self.feature_info = [FeatureInfo(n, w, 1) for n, w in zip(names, [*widths, widths[2], widths[1]], strict=True)]
        self.embed = nn.Sequential(
            nn.Linear(in_channels, 2 * channels),
            nn.ReLU(),
            nn.Linear(2 * channels, 2 * channels),
            nn.ReLU(),
            nn.Linear(2 * channels, channels),
        )
        dimensions = self.frame.dimensions
        self.pool = _POOL[dimensions](2)
        pairs = list(zip([channels, *widths], widths, strict=False))
        self.encoder = nn.ModuleList(EncoderLevel(a, b, dimensions) for a, b in pairs)
        self.decoder = nn.ModuleList(
            DecoderLevel(widths[i + 1], widths[i], dimensions, last=i == 0) for i in reversed(range(_LEVELS - 1))
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight)

    def forward(self, points: Points) -> Tensor:
        return self._run(points)[1]["decoder1"]

    def forward_features(self, points: Points) -> dict[str, Points]:
        return {name: points.with_attrs(feat=feat) for name, feat in self._run(points)[1].items()}

    def encode(self, points: Points) -> GridPyramid:
        return self._run(points)[0]

    def _run(self, points: Points) -> tuple[GridPyramid, dict[str, Tensor]]:
        """The decoder's grids, and the point features after each level."""
        self.check_input(points)
        places = self.frame.places(points.coord, points.offsets)
        feat, features, skips, levels = self.embed(points.get("feat")), {}, [], []
        grids = [place.cells(self.resolution).mean(feat) for place in places]
        for i, level in enumerate(self.encoder):
            grids = [self.pool(grid) for grid in grids] if i in _HALVED else grids
            grids, feat = level(grids, feat, places)
            skips.append(grids)
            features[f"encoder{i}"] = feat
        for i, level in enumerate(self.decoder):
            grids, feat = level(grids, skips[-2 - i], feat, places)
            levels.append(grids)
            features[f"decoder{i}"] = feat
        return GridPyramid(self.frame, levels), features


class Mixing(nn.Module):
    """What follows the convolutions of a level: points to cells, cells to each other, cells to points.

    Args:
        point_channels: of the incoming point features.
        channels: of the grid, and of the outgoing features.
        dimensions: axes of the grid.
        merge: layers on the cells' attention, and ``final`` ones on the sum.
    """

    def __init__(self, point_channels: int, channels: int, dimensions: int, merge: nn.Module, final: nn.Module) -> None:
        super().__init__()
        self.key = nn.Linear(point_channels, channels)
        self.value = nn.Sequential(
            nn.Linear(point_channels, channels),
            nn.ReLU(),
            nn.Linear(channels, 2 * channels),
            nn.ReLU(),
            nn.Linear(2 * channels, channels),
        )
        self.attention = CellAttention(channels, dimensions, _GROUPS)
        self.merge, self.final = merge, final
        self.skip = _CONV[dimensions](channels, channels, 3, padding=1)

    def forward(self, grids: Sequence[Tensor], feat: Tensor, places: Sequence[Places]) -> tuple[list[Tensor], Tensor]:
        key, value = self.key(feat), self.value(feat)
        mixed = []
        for grid, place in zip(grids, places, strict=True):
            cells = self.attention(key, value, grid, place.cells(grid.shape[-1]))
            mixed.append(self.final(self.merge(cells) + self.skip(grid)))
        return mixed, value + sample_sum(mixed, places)


class EncoderLevel(nn.Module):
    """Two convolutions of the grid, then :class:`Mixing`."""

    def __init__(self, in_channels: int, channels: int, dimensions: int) -> None:
        super().__init__()
        if dimensions == 3:
            self.convs = _norm_conv_twice(in_channels, max(channels // 2, in_channels), channels)
        else:
            self.convs = nn.Sequential(*_conv_norm(in_channels, channels), *_conv_norm(channels, channels))
        merge = nn.Sequential(_CONV[dimensions](channels, channels, 3, padding=1), nn.ReLU())
        self.mixing = Mixing(in_channels, channels, dimensions, merge, nn.Identity())

    def forward(self, grids: Sequence[Tensor], feat: Tensor, places: Sequence[Places]) -> tuple[list[Tensor], Tensor]:
        return self.mixing([self.convs(grid) for grid in grids], feat, places)


class DecoderLevel(nn.Module):
    """The coarser grid brought to the skip's size and joined with it, convolutions, then :class:`Mixing`.

    The ``last`` level ends with its convolutions; its mixing is there for published weights only, and is not trained.
    """

    def __init__(self, in_channels: int, channels: int, dimensions: int, last: bool) -> None:
        super().__init__()
        self.last = last
        conv, norm = _CONV[dimensions], _NORM[dimensions]
        if dimensions == 3:
            self.up: nn.Module = nn.Identity()
            self.convs = _norm_conv_twice(in_channels + channels, channels, channels)
        else:
            enlarge = nn.Sequential(nn.ConvTranspose2d(in_channels, channels, 2, stride=2))
            same = nn.Sequential(nn.Conv2d(in_channels, channels, 1), nn.BatchNorm2d(channels))
            self.up = same if last else enlarge
            self.convs = nn.Sequential(*_conv_norm(2 * channels, channels))
        merge = nn.Sequential(*(conv(channels, channels, 3, padding=1, groups=channels, bias=False) for _ in range(2)))
        final = nn.Sequential(conv(channels, channels, 1), norm(channels))
        self.mixing = Mixing(2 * channels, channels, dimensions, merge, final)
        if last:
            self.mixing.requires_grad_(False)

    def forward(
        self, grids: Sequence[Tensor], skips: Sequence[Tensor], feat: Tensor, places: Sequence[Places]
    ) -> tuple[list[Tensor], Tensor]:
        grids = [self.convs(self._join(grid, skip)) for grid, skip in zip(grids, skips, strict=True)]
        return (grids, feat) if self.last else self.mixing(grids, feat, places)

    def _join(self, grid: Tensor, skip: Tensor) -> Tensor:
        if grid.ndim == 4:
            return torch.cat([self.up(grid), skip], 1)
        return torch.cat([skip, F.interpolate(grid, skip.shape[2:])], 1)


def _norm_conv_twice(in_channels: int, between: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.GroupNorm(_GROUPS, in_channels),
        nn.Conv3d(in_channels, between, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.GroupNorm(_GROUPS, between),
        nn.Conv3d(between, out_channels, 3, padding=1, bias=False),
        nn.ReLU(),
    )


def _conv_norm(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU()]


class GridFormerDecoder(OccupancyHead):
    """Occupancy logits of places, from the grids read there.

    Args:
        channels: as of the :class:`GridFormer`; also the hidden width.
        blocks: residual blocks.
    """

    def __init__(self, channels: int = 32, blocks: int = 5) -> None:
        super().__init__()
        self.in_channels = [4 * channels, 2 * channels, channels]
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * channels), nn.ReLU(), nn.Linear(2 * channels, channels))
            for width in self.in_channels
        )
        self.point = nn.Linear(3, channels)
        self.condition = nn.ModuleList(nn.Linear(channels, channels) for _ in range(blocks))
        self.blocks = nn.ModuleList(_residual(channels) for _ in range(blocks))
        self.out = nn.Sequential(nn.ReLU(), nn.Linear(channels, 1))

    def forward(self, pyramid: GridPyramid, query: Tensor, offsets: Tensor) -> Tensor:
        read = pyramid.read(query, offsets)
        known = torch.stack([level(feat) for level, feat in zip(self.levels, read, strict=True)]).sum(0)
        hidden = self.point(query)
        for condition, block in zip(self.condition, self.blocks, strict=True):
            hidden = hidden + condition(known)
            hidden = hidden + block(hidden)
        return self.out(hidden)[:, 0]


def _residual(channels: int) -> nn.Sequential:
    """The residual branch of a block; it starts as zero but for its bias."""
    last = nn.Linear(channels, channels)
    nn.init.zeros_(last.weight)
    return nn.Sequential(nn.ReLU(), nn.Linear(channels, channels), nn.ReLU(), last)
