"""PointSP: sampling that keeps outliers and changed densities away from a classifier.

Li et al. 2024, "PointSP: a sampling protocol for corrupted point clouds" (arXiv 2408.12062). Two parts: which points
become key points (:class:`KeyPointSampler`), and how many points a network sees (:class:`FullPointResampler`). Both
switch between their training and inference settings with ``train()`` and ``eval()``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.nn.patches import sample_centres
from pc3d.ops.neighbours import farthest_points, knn
from pc3d.points import Points

KeyPoints = Literal["weighted", "filtered", "farthest"]
NEIGHBOURS = 20
_ORIGIN_BALL = 1e-3  # squared radius that the published sampling never enters


@dataclass(frozen=True)
class Isolation:
    """How many near neighbours points have, each cloud by its own measure.

    Attributes:
        weight: ``(N,)`` float32, ``count`` over its sum in the cloud.
        count: ``(N,)`` int64, neighbours (the point itself among them) within the cloud's threshold.
        inlier: ``(N,)`` bool, whether the point's own mean distance is within it.
        inliers: ``(N,)`` int64, neighbours that are inliers.
    """

    weight: Tensor
    count: Tensor
    inlier: Tensor
    inliers: Tensor


def isolation(
    coord: Tensor, offsets: Tensor, neighbours: int = NEIGHBOURS, reduce: Literal["mean", "max"] = "mean"
) -> Isolation:
    """Isolation of every point: about ``neighbours`` in dense places, 1 for an outlier.

    The threshold of a cloud is the median over its points of the mean squared distance to their nearest neighbours
    (``reduce="max"``: of the largest). Clouds of fewer points have fewer neighbours.

    Args:
        coord: ``(N, 3)`` float32; ``offsets (B + 1,)`` int64 clouds.
    """
    rows, squared = knn(coord, offsets, coord, offsets, neighbours)
    there = rows >= 0
    known = squared.masked_fill(~there, 0)
    spread = known.amax(1) if reduce == "max" else known.sum(1) / there.sum(1).clamp(min=1)
    cloud = torch.repeat_interleave(offsets.diff(), output_size=len(coord))
    threshold = _medians(spread, cloud, offsets)[cloud]
    inlier = spread <= threshold
    count = (squared <= threshold[:, None]).sum(1)
    inliers = (inlier[rows.clamp(min=0)] & there).sum(1)
    total = torch.zeros(len(offsets) - 1, device=coord.device).index_add(0, cloud, count.float())
    return Isolation(count / total[cloud], count, inlier, inliers)


def filtered_farthest_points(
    coord: Tensor,
    offsets: Tensor,
    weight: Tensor,
    points: int,
    starts: Tensor | None = None,
    keep: float = 0.95,
    ignore_origin: bool = False,
) -> tuple[Tensor, Tensor]:
    """Farthest points of each cloud among those with the largest weights.

    Args:
        coord: ``(N, 3)`` float32; ``offsets (B + 1,)`` int64 clouds.
        weight: ``(N,)``; of ties the later rows are left out.
        points: of a cloud; fewer where fewer may be taken.
        starts: ``(B,)`` int64, the first point taken, counted from the cloud's first row (it may be one left out);
            default the one of the largest weight.
        keep: share of a cloud that may be taken.
        ignore_origin: never take points within 0.0316 of the origin, as published, but for the start.

    Returns:
        ``(M,)`` int64 rows in the order they are taken, and their ``(B + 1,)`` borders.
    """
    cloud = torch.repeat_interleave(offsets.diff(), output_size=len(coord))
    best_first = weight.argsort(descending=True, stable=True)
    best_first = best_first[cloud[best_first].argsort(stable=True)]  # cloud after cloud, best first
    rank = torch.empty_like(best_first)
    rank[best_first] = torch.arange(len(coord), device=coord.device)
    allowed = (rank - offsets[:-1][cloud]) < (keep * offsets.diff().double()).long()[cloud]
    if ignore_origin:
        allowed &= coord.square().sum(1) > _ORIGIN_BALL
    filled = offsets.diff() > 0
    first = offsets[:-1][filled]
    first = best_first[first] if starts is None else first + starts[filled]
    allowed[first] = True
    candidates = allowed.nonzero()[:, 0]
    borders = torch.searchsorted(candidates, offsets)
    counts = borders.diff().clamp(max=points)
    sampled = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    begin = torch.zeros_like(counts)
    begin[filled] = torch.searchsorted(candidates, first) - borders[:-1][filled]
    return candidates[farthest_points(coord[candidates], borders, sampled, begin)], sampled


def weighted_points(offsets: Tensor, weight: Tensor, points: int, replace: bool) -> tuple[Tensor, Tensor]:
    """Random points of each cloud, drawn in proportion to their weights; shapes as :func:`filtered_farthest_points`.

    Args:
        replace: a point may be drawn again; otherwise a cloud gives at most all of its points.
    """
    sizes = offsets.diff()
    counts = torch.where(sizes > 0, points, 0) if replace else sizes.clamp(max=points)
    sampled = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    cloud = torch.repeat_interleave(sizes, output_size=len(weight))
    if not replace:  # Efraimidis and Spirakis 2006: the largest of u ** (1 / weight)
        key = torch.rand_like(weight).clamp(min=1e-30).log() / weight
        order = key.argsort(descending=True)
        order = order[cloud[order].argsort(stable=True)]
        place = torch.arange(len(weight), device=weight.device) - offsets[:-1][cloud]
        return order[place < counts[cloud]], sampled
    drawn = torch.repeat_interleave(counts)
    ends = torch.cat([weight.new_zeros(1), weight]).double().cumsum(0)
    low, high = ends[offsets[:-1]][drawn], ends[offsets[1:]][drawn]
    rows = torch.searchsorted(ends[1:], low + torch.rand_like(low) * (high - low), right=True)
    return torch.minimum(torch.maximum(rows, offsets[:-1][drawn]), offsets[1:][drawn] - 1), sampled


class KeyPointSampler(nn.Module):
    """The points of a cloud that count: random by isolation weight in training, filtered farthest points in inference.

    Args:
        points: of a cloud, n.
        training_rule, inference_rule: ``weighted``, ``filtered`` or ``farthest`` (the baseline, from the first row).
        replace: weighted points may be drawn again, as published where they select what is pooled.
        random_start: begin filtered sampling at any point, as published; default at the densest one.
        ignore_origin: as published, see :func:`filtered_farthest_points`.
    """

    def __init__(
        self,
        points: int = 512,
        training_rule: KeyPoints = "weighted",
        inference_rule: KeyPoints = "filtered",
        replace: bool = True,
        random_start: bool = False,
        ignore_origin: bool = False,
    ) -> None:
        super().__init__()
        if points < 1:
            raise InputError(f"key points: {points} must be at least 1")
        self.points, self.training_rule, self.inference_rule = points, training_rule, inference_rule
        self.replace, self.random_start, self.ignore_origin = replace, random_start, ignore_origin

    @torch.no_grad()
    def forward(self, coord: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """``(M,)`` int64 rows, cloud after cloud, and their ``(B + 1,)`` borders; clouds smaller than n give fewer."""
        rule = self.training_rule if self.training else self.inference_rule
        if rule == "farthest":
            return sample_centres(coord, offsets, self.points, self.ignore_origin)
        weight = isolation(coord, offsets).weight
        if rule == "weighted":
            return weighted_points(offsets, weight, self.points, self.replace)
        starts = None
        if self.random_start:
            draw = torch.rand(len(offsets) - 1, device=coord.device)
            starts = (draw * offsets.diff()).long()
        return filtered_farthest_points(coord, offsets, weight, self.points, starts, ignore_origin=self.ignore_origin)


# How many points ------------------------------------------------------------------------------------------------------


def normals(coord: Tensor, rows: Tensor) -> Tensor:
    """``(N, 3)`` unit normals of no certain sign: least spread of the neighbours ``rows`` ``(N, K)``, -1 for none."""
    there = (rows >= 0)[..., None]
    around = coord[rows.clamp(min=0)].double() * there
    count = there.sum(1).clamp(min=1)
    centred = (around - (around.sum(1) / count)[:, None]) * there
    return torch.linalg.eigh(centred.mT @ centred).eigenvectors[..., 0].to(coord.dtype)


def tangent_points(coord: Tensor, normal: Tensor, rows: Tensor, squared: Tensor, rank: Tensor) -> Tensor:
    """``(N, 3)``: from every point half way to one of its neighbours, in the tangent plane.

    A step is at most the root of the lower median of the squared distances.

    Args:
        normal: ``(N, 3)`` unit normals of any sign.
        rows, squared: ``(N, K)`` neighbours, the point itself first, and their squared distances; -1 and infinity for
            none.
        rank: ``(N,)`` int64, which neighbour; the point itself gives itself.
    """
    target = coord[rows.gather(1, rank[:, None])[:, 0]]
    along = target - coord
    along = along - (along * normal).sum(1, keepdim=True) * normal
    length = along.norm(dim=1).clamp(min=1e-6)
    middle = ((rows >= 0).sum(1) - 1) // 2
    limit = squared.gather(1, middle[:, None])[:, 0].sqrt()
    return coord + along / length[:, None] * torch.minimum(length / 2, limit)[:, None]


def balanced_drop(coord: Tensor, keep: float, score: float, centre: int, ranks: Tensor) -> Tensor:
    """Rows of one cloud that stay, in their order: a hole where ``score`` is 0, an even thinning where it is 1.

    Args:
        coord: ``(N, 3)``.
        keep: share of the points that stay, in (0, 1].
        score: in [0, 1].
        centre: row around which points are dropped.
        ranks: permutation of the M nearest, M from :func:`drop_pool`; the first ones are dropped.
    """
    dropped = drop_pool(len(coord), keep, score)[0]
    distance = (coord - coord[centre]).square().sum(1)
    stay = torch.ones(len(coord), dtype=torch.bool, device=coord.device)
    stay[distance.argsort(stable=True)[ranks[:dropped]]] = False
    return stay.nonzero()[:, 0]


def drop_pool(points: int, keep: float, score: float) -> tuple[int, int]:
    """How many points of a cloud are dropped, and among how many of the nearest."""
    dropped = int(points * (1 - keep))
    return dropped, int((points - dropped) * score) + dropped


class FullPointResampler(nn.Module):
    """Other numbers of points: half to twice as many in training, not too few in inference.

    In training every cloud draws a ratio, log-uniform in [1/2, 2] (published: one for the batch), and loses points by
    :func:`balanced_drop` or gains some by :func:`tangent_points`. In inference a cloud with fewer than ``points`` is
    made denser until it has that many.

    Args:
        points: fewest in inference; 0 leaves clouds as they are.
        cut: keep only the first ``points`` in inference, as published for PCT.
        training: resample in training.
    """

    def __init__(self, points: int = 1024, cut: bool = False, augment: bool = True) -> None:
        super().__init__()
        if points < 0 or (cut and not points):
            raise InputError(f"resampling: points {points} must not be negative, and with cut at least 1")
        self.points, self.cut, self.augment = points, cut, augment

    @torch.no_grad()
    def forward(self, points: Points) -> Points:
        """Clouds of other sizes. New points carry the attributes of the one they were made from, but for ``coord``."""
        change = self._vary if self.training and self.augment else self._fill
        if self.training and not self.augment:
            return points
        clouds = [change(cloud) if cloud.num_points else cloud for cloud in points]
        return Points.cat(clouds) if clouds else points

    def _vary(self, cloud: Points) -> Points:
        ratio = 2 ** (2 * float(torch.rand(())) - 1)
        n, device = cloud.num_points, cloud.device
        if ratio > 1:
            chosen = torch.randperm(n, device=device)[: int((ratio - 1) * n)]
            return _joined(cloud, _denser(cloud).select(chosen))
        score = float(torch.rand(()))
        ranks = torch.randperm(drop_pool(n, ratio, score)[1], device=device)
        return cloud.select(balanced_drop(cloud.coord, ratio, score, int(torch.randint(n, ())), ranks))

    def _fill(self, cloud: Points) -> Points:
        whole = cloud
        while whole.num_points < self.points:
            whole = _joined(whole, _denser(cloud))
        size = self.points if self.cut or cloud.num_points < self.points else whole.num_points
        return whole if size >= whole.num_points else whole.select(torch.arange(size, device=cloud.device))


def resampled(points: Points, resampler: FullPointResampler) -> Points:
    """What a network sees: clouds of other sizes, whose first three columns of ``feat`` are their coordinates again.

    Raises:
        InputError: if the points come in cells.
    """
    if "grid_coord" in points:
        raise InputError(
            f"{points.describe()}: points come in cells, which resampling would leave; use a pipeline with "
            "grid_size: null"
        )
    points = resampler(points)
    return points.with_attrs(feat=torch.cat([points.coord, points.get("feat")[:, 3:]], 1))


def _denser(cloud: Points) -> Points:
    """One new point for every point of a cloud."""
    rows, squared = knn(cloud.coord, cloud.offsets, cloud.coord, cloud.offsets, NEIGHBOURS)
    there = (rows >= 0).sum(1)
    rank = (torch.rand(len(rows), device=rows.device) * there).long()
    return cloud.replace(
        coord=tangent_points(cloud.coord, normals(cloud.coord, rows), rows, squared, rank), source=None
    )


def _joined(first: Points, second: Points) -> Points:
    """The points of two clouds as one cloud."""
    both = Points.cat([first.replace(source=None), second.replace(source=None)])
    return Points(both.coord, attrs=both.attrs, meta=first.meta)


def _medians(values: Tensor, cloud: Tensor, offsets: Tensor) -> Tensor:
    """``(B,)`` median of each cloud, the mean of the middle two; an empty cloud gives 0."""
    if not len(values):
        return values.new_zeros(len(offsets) - 1)
    ascending = values.argsort(stable=True)
    ascending = values[ascending[cloud[ascending].argsort(stable=True)]]
    last = offsets.diff().clamp(min=1) - 1
    first = offsets[:-1].clamp(max=len(values) - 1)
    low, high = ascending[first + last // 2], ascending[first + (last + 1) // 2]
    return torch.where(offsets.diff() > 0, low + (high - low) / 2, 0)
