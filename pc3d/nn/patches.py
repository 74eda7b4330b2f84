"""Clouds as sets of patches: farthest points, their neighbours, and a small PointNet that makes a token of each.

Grouping and tokens of Point-BERT (arXiv 2111.14819, section 3.1) and Point-MAE (arXiv 2203.06604, section 3.1), shared
by everything built on them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pc3d.errors import InputError
from pc3d.ops.neighbours import farthest_points, knn
from pc3d.points import Points

_ORIGIN_BALL = 1e-3  # squared radius that the published sampling skips


@dataclass(frozen=True)
class Patches:
    """G patches of S points of every cloud.

    Attributes:
        centres: ``(B, G, 3)``, in the order they were taken.
        rows: ``(B, G, S)`` int64 rows of the batch, nearest to the centre first.
        feat: ``(B, G, S, F)`` features of these points, the first three columns relative to the centre.
    """

    centres: Tensor
    rows: Tensor
    feat: Tensor

    def select(self, keep: Tensor) -> Patches:
        """The patches where ``keep`` (B, G), which must be equally many in every cloud."""
        return Patches(*(select_patches(values, keep) for values in (self.centres, self.rows, self.feat)))


def check_patch_sizes(who: str, patches: int, patch_points: int) -> None:
    """Raise an InputError that names the option of ``who`` if there would be no patches, or none of their points."""
    for option, value in (("patches", patches), ("patch_points", patch_points)):
        if value < 1:
            raise InputError(f"{who}.{option}: {value} must be at least 1")


def select_patches(values: Tensor, keep: Tensor) -> Tensor:
    """``(B, V, ...)`` entries of ``values`` (B, G, ...) where ``keep`` (B, G), V of every cloud, in their order."""
    return values[keep].unflatten(0, (len(values), -1))


def sample_centres(coord: Tensor, offsets: Tensor, points: int, ignore_origin: bool) -> tuple[Tensor, Tensor]:
    """Rows of up to so many farthest points of each cloud in the order they are taken, and their borders.

    With ``ignore_origin``, points within 0.0316 of the origin are never taken, but for the first row of a cloud: what
    the published CUDA sampling does.
    """
    candidates = torch.arange(len(coord), device=coord.device)
    if ignore_origin:
        kept = coord.square().sum(1) > _ORIGIN_BALL
        kept[offsets[:-1][offsets.diff() > 0]] = True
        candidates = candidates[kept]
    borders = torch.searchsorted(candidates, offsets)
    counts = borders.diff().clamp(max=points)
    sampled = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return candidates[farthest_points(coord[candidates], borders, sampled)], sampled


def group_patches(points: Points, count: int, size: int, ignore_origin: bool = False) -> Patches:
    """Patches around farthest points; ``feat`` of the points holds their coordinates in its first three columns.

    ``ignore_origin``: see :func:`centre_rows`.

    Raises:
        InputError: if a cloud has fewer points than patches, or than a patch.
    """
    counts, needed = points.offsets.diff(), max(count, size)
    if bool((counts < needed).any()):
        small = int((counts < needed).nonzero()[0, 0])
        raise InputError(
            f"{points[small].describe()}: {int(counts[small])} points do not make {count} patches of {size}; give each "
            f"cloud {needed} or more (pc3d.data.transforms.FixedPoints)"
        )
    coord, feat = points.coord, points.get("feat")
    centres = centre_rows(coord, points.offsets, count, ignore_origin)
    each = torch.arange(len(points) + 1, device=coord.device) * count
    near, _ = knn(coord[centres.flatten()], each, coord, points.offsets, size)
    rows = near.view(len(points), count, size)
    relative = feat[rows]
    return Patches(
        coord[centres], rows, torch.cat([relative[..., :3] - feat[centres, None, :3], relative[..., 3:]], -1)
    )


def centre_rows(coord: Tensor, offsets: Tensor, count: int, ignore_origin: bool) -> Tensor:
    """``(B, count)`` rows of the farthest points of each cloud, in the order they are taken.

    Where ``ignore_origin`` leaves fewer to take, the first row that may be taken repeats.
    """
    taken, borders = sample_centres(coord, offsets, count, ignore_origin)
    place = torch.arange(count, device=coord.device).expand(len(offsets) - 1, count)
    rows = taken[(borders[:-1, None] + place).clamp(max=len(taken) - 1)]
    if not ignore_origin:
        return rows
    short = place >= borders.diff()[:, None]
    return torch.where(short, _first_outside_ball(coord, offsets)[:, None], rows)


def _first_outside_ball(coord: Tensor, offsets: Tensor) -> Tensor:
    """``(B,)`` first row of each cloud that the published sampling may take; its first row if there is none."""
    outside = (coord.square().sum(1) > _ORIGIN_BALL).nonzero()[:, 0]
    start, end = torch.searchsorted(outside, offsets[:-1]), torch.searchsorted(outside, offsets[1:])
    found = torch.cat([outside, outside.new_zeros(1)])[start]
    return torch.where(start < end, found, offsets[:-1])


def block_mask(centres: Tensor, seeds: Tensor, sizes: Tensor) -> Tensor:
    """``(B, G)`` bool: of each cloud the ``sizes`` (B,) patches nearest to patch ``seeds`` (B,), itself first."""
    seed = centres[torch.arange(len(centres), device=centres.device), seeds]
    order = (centres - seed[:, None]).square().sum(-1).argsort(dim=1, stable=True)
    return order.argsort(1) < sizes[:, None]


class MiniPointNet(nn.Module):
    """One token of each patch: two shared layers, their maximum beside every point, two more, the maximum.

    Args:
        in_channels: width of a patch's points.
        channels: width of a token.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(
            nn.Linear(in_channels, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 256)
        )
        self.second_conv = nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, channels))

    def forward(self, patches: Tensor) -> Tensor:
        """``(..., channels)`` from ``(..., S, F)``."""
        *lead, size, _ = patches.shape
        each = self.first_conv(patches.flatten(0, -2))
        whole = each.unflatten(0, (-1, size)).amax(1)
        # The layer on [whole, each] in two parts: that of the whole is the same for all points of a patch.
        join, *rest = self.second_conv
        assert isinstance(join, nn.Linear)
        of_whole, of_each = join.weight.split(256, 1)
        joined = F.linear(each, of_each).unflatten(0, (-1, size)) + F.linear(whole, of_whole, join.bias)[:, None]
        x = joined.flatten(0, 1)
        for layer in rest:
            x = layer(x)
        return x.unflatten(0, (-1, size)).amax(1).unflatten(0, lead)
