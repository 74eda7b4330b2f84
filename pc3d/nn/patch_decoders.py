"""From features of patches to features of points: the part segmentation decoders of Point-MAE and Point-BERT."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pc3d.errors import InputError
from pc3d.nn.edge_conv import EdgeConv
from pc3d.nn.interpolation import interpolate
from pc3d.nn.patches import centre_rows
from pc3d.ops.neighbours import knn
from pc3d.points import Points

_CATEGORY_CHANNELS = 64


class PatchDecoder(nn.Module):
    """Interpolated tokens, and the largest and mean token and the category of the cloud (Point-MAE, arXiv 2203.06604).

    Args:
        channels: width of a token, of each stage; ``stages`` that are joined.
        widths: of two layers on interpolated tokens, and of two behind the joined features of point and cloud.
        categories: one-hot categories ``points.attrs["category"]`` that it sees.
    """

    def __init__(self, channels: int, stages: int, widths: Sequence[int], categories: int) -> None:
        super().__init__()
        if len(widths) != 4:
            raise InputError(f"PointViT.decoder: {list(widths)} must be four widths")
        self.categories, self.category = categories, None
        if categories:
            self.category = nn.Sequential(
                nn.Linear(categories, _CATEGORY_CHANNELS, bias=False),
                nn.BatchNorm1d(_CATEGORY_CHANNELS),
                nn.LeakyReLU(0.2),
            )
        joined = stages * channels
        self.spread = _layers(joined + 3, *widths[:2])
        self.join = _layer(widths[1] + 2 * joined + (_CATEGORY_CHANNELS if categories else 0), widths[2])
        self.last = nn.Sequential(nn.Dropout(0.5), _layer(*widths[2:]))
        self.out_channels = widths[3]

    def forward(self, points: Points, centres: Tensor, stages: Sequence[Tensor], whole: Tensor | None = None) -> Tensor:
        """``(N, out_channels)`` features of the points.

        Args:
            centres: ``(B, G, 3)`` of the patches, and ``(B, G, channels)`` their features in each of the stages.
            whole: ``(B, 2 * stages * channels)`` features of each cloud, in place of its largest and mean token.
        """
        cloud = torch.repeat_interleave(points.offsets.diff(), output_size=points.num_points)
        feat = torch.cat(list(stages), -1)
        each = self.spread(torch.cat([points.coord, _interpolate(points.coord, points.offsets, centres, feat)], -1))
        parts = [feat.amax(1), feat.mean(1)] if whole is None else [whole]
        if self.category is not None:
            parts.append(self.category(one_hot_categories(points, self.categories).to(feat.dtype)))
        # The first layer on [point, cloud] in two parts: what comes from the cloud is computed once for it.
        linear, norm, activation = self.join
        assert isinstance(linear, nn.Linear)
        of_each, of_whole = linear.weight.split([each.shape[1], linear.in_features - each.shape[1]], 1)
        x = F.linear(each, of_each) + F.linear(torch.cat(parts, -1), of_whole, linear.bias)[cloud]
        return self.last(activation(norm(x)))


class LevelDecoder(nn.Module):
    """From patches to points through two clouds of farthest points in between (Point-BERT, arXiv 2111.14819).

    Args:
        channels: width of a token, C.
        levels: points of the finer and the coarser cloud.
        categories: one-hot categories ``points.attrs["category"]`` that it sees.
        ignore_origin: see :func:`~pc3d.nn.patches.sample_centres`.
    """

    def __init__(self, channels: int, levels: Sequence[int], categories: int, ignore_origin: bool) -> None:
        super().__init__()
        if len(levels) != 2 or not levels[0] >= levels[1] >= 1:
            raise InputError(f"PointViT.levels: {list(levels)} must be two numbers of points that fall")
        self.levels, self.categories, self.ignore_origin = tuple(levels), categories, ignore_origin
        self.propagation = nn.ModuleList(
            _layers(skip + channels, 4 * channels, channels) for skip in (categories + 3, 3, 3)
        )
        self.edges = nn.ModuleList(LevelEdges(channels) for _ in self.levels)
        self.last = nn.Sequential(*_layer(channels, 128), nn.Dropout(0.5))
        self.out_channels = 128

    def forward(self, points: Points, centres: Tensor, stages: Sequence[Tensor]) -> Tensor:
        """``(N, 128)`` features of the points.

        Args:
            centres: ``(B, G, 3)`` of the patches, and ``(B, G, C)`` their features in each of three stages.

        Raises:
            InputError: if a cloud has fewer points than the finer level.
        """
        clouds = self.clouds(points)
        early, middle, late = stages
        fine, coarse = self.propagate(1, clouds[0], centres, early), self.propagate(2, clouds[1], centres, middle)
        coarse = self.edges[1](clouds[1], coarse, centres, late)
        fine = self.edges[0](clouds[0], fine, clouds[1], coarse)
        skip = [points.coord]
        if self.categories:
            cloud = torch.repeat_interleave(points.offsets.diff(), output_size=points.num_points)
            skip.insert(0, one_hot_categories(points, self.categories)[cloud].to(points.coord))
        spread = _interpolate(points.coord, points.offsets, clouds[0], fine)
        return self.last(self.propagation[0](torch.cat([*skip, spread], -1)))

    def clouds(self, points: Points) -> list[Tensor]:
        """``(B, n, 3)`` farthest points of each level."""
        if bool((short := points.counts < self.levels[0]).any()):
            small = points[int(short.nonzero()[0, 0])]
            raise InputError(
                f"{small.describe()}: {small.num_points} points, the decoder wants {self.levels[0]} or more "
                "(pc3d.data.transforms.FixedPoints)"
            )
        rows = centre_rows(points.coord, points.offsets, self.levels[0], self.ignore_origin)
        return [points.coord[rows[:, :count]] for count in self.levels]  # each level begins with the coarser one

    def propagate(self, index: int, cloud: Tensor, centres: Tensor, feat: Tensor) -> Tensor:
        """``(B, n, C)`` at the points of a level from ``(B, G, C)`` at the centres."""
        batch, count, _ = cloud.shape
        offsets = torch.arange(batch + 1, device=cloud.device) * count
        flat = cloud.flatten(0, 1)
        joined = torch.cat([flat, _interpolate(flat, offsets, centres, feat)], -1)
        return self.propagation[index](joined).unflatten(0, (batch, count))


class LevelEdges(nn.Module):
    """What a level's points take from their neighbours in a coarser cloud, then from those in their own."""

    def __init__(self, channels: int, hidden: int = 512) -> None:
        super().__init__()
        self.across, self.within = EdgeConv(channels, hidden), EdgeConv(hidden, channels)

    def forward(self, cloud: Tensor, feat: Tensor, source: Tensor, source_feat: Tensor) -> Tensor:
        """``(B, n, C)`` from ``(B, n, 3)`` points and ``(B, n, C)``, and coarser ``(B, m, 3)`` with ``(B, m, C)``."""
        feat = self.across(feat, _neighbours(cloud, source), source_feat)
        return self.within(feat, _neighbours(cloud, cloud))


def one_hot_categories(points: Points, categories: int) -> Tensor:
    """``(B, categories)`` int64 from the first ``category`` of each cloud."""
    return F.one_hot(points.get("category").reshape(-1)[points.offsets[:-1]].long(), categories)


def _layers(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(_layer(a, b) for a, b in itertools.pairwise(widths)))


def _layer(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_channels, channels), nn.BatchNorm1d(channels), nn.ReLU())


def _interpolate(coord: Tensor, offsets: Tensor, centres: Tensor, feat: Tensor) -> Tensor:
    """``(N, C)`` at packed points from ``(B, G, C)`` at ``(B, G, 3)`` centres."""
    each = torch.arange(len(centres) + 1, device=centres.device) * centres.shape[1]
    return interpolate(coord, offsets, centres.flatten(0, 1), each, feat.flatten(0, 1))


def _neighbours(query: Tensor, coord: Tensor, k: int = 4) -> Tensor:
    """``(B, n, k)`` int64 nearest of ``(B, m, 3)`` points to each of ``(B, n, 3)``, counted in their cloud."""
    each = torch.arange(len(query) + 1, device=query.device)
    k = min(k, coord.shape[1])
    rows, _ = knn(query.flatten(0, 1), each * query.shape[1], coord.flatten(0, 1), each * coord.shape[1], k)
    return rows.view(len(query), -1, k) - coord.shape[1] * each[:-1, None, None]
