"""Nearest neighbours and farthest point sampling in packed clouds; exact, the same on every device.

Squared distances are ``(dx*dx + dy*dy) + dz*dz`` in float32, ties go to the smaller row.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from pc3d.ops.backend import cpu_kernels

_MOST_POINTS = (1 << 31) - 1  # of a cloud: its rows are int32 numbers inside
_REFERENCE_PAIRS = 1 << 24  # distances the reference holds at a time


def knn(
    query: Tensor, query_offsets: Tensor, coord: Tensor, offsets: Tensor, k: int, radius: float = math.inf
) -> tuple[Tensor, Tensor]:
    """The k nearest points of the same cloud, for every query point; not differentiable.

    Args:
        query: ``(Q, 3)`` float32, any points; ``query_offsets (S + 1,)`` int64 their clouds.
        coord: ``(N, 3)`` float32; ``offsets (S + 1,)`` int64 their clouds.
        k: neighbours, at least 1. A point that is also a query finds itself first.
        radius: neighbours farther than this are left out.

    Returns:
        Rows of ``coord``, ``(Q, k)`` int64 ascending by distance, and the squared distances ``(Q, k)`` float32.
        Where a cloud has fewer points: -1 and infinity.

    Raises:
        ValueError: if ``k`` is not positive, shapes do not fit, a coordinate is not finite, or a cloud has 2^31 points.
    """
    _check_k(k)
    if len(query_offsets) != len(offsets):
        raise ValueError(f"queries have {len(query_offsets) - 1} clouds, points {len(offsets) - 1}")
    _check_sizes(query_offsets, offsets)
    query, coord = checked_coord("query", query), checked_coord("coord", coord)
    limit = radius * radius
    kernels = cpu_kernels(query, coord)
    if kernels is not None:
        rows, distances = torch.empty(len(query), k, dtype=torch.int64), torch.empty(len(query), k)
        kernels.knn(query, query_offsets.contiguous(), coord, offsets.contiguous(), limit, rows, distances)
        return rows, distances
    rows = torch.full((len(query), k), -1, dtype=torch.int64, device=query.device)
    distances = torch.full((len(query), k), math.inf, device=query.device)
    clouds = zip(itertools.pairwise(query_offsets.tolist()), itertools.pairwise(offsets.tolist()), strict=True)
    for (begin, end), (first, last) in clouds:
        if first == last:
            continue
        for some in torch.arange(begin, end, device=query.device).split(max(_REFERENCE_PAIRS // (last - first), 1)):
            found, order = _squared_distances(query[some], coord[first:last]).sort(dim=1, stable=True)
            found, order = found[:, :k], order[:, :k]
            width = found.shape[1]
            distances[some, :width] = found.masked_fill(found > limit, math.inf)
            rows[some, :width] = (order + first).masked_fill(found > limit, -1)
    return rows, distances


def nearest_rows(coord: Tensor, offsets: Tensor, k: int, inner: int = 0, along_curve: bool = False) -> Tensor:
    """``(N, k)`` int32: the rows that :func:`knn` finds for the points themselves; a third of its memory.

    Args:
        coord, offsets, k: as there.
        inner: above 0, the ``inner`` nearest come first, then the others, in no order but that. Faster.
        along_curve: the points of each cloud lie so that neighbours are together; any order is right. Faster.

    Raises:
        ValueError: as :func:`knn`; if ``inner`` is not in 0..k; and if there are 2^31 points, in any number of clouds.
    """
    _check_k(k)
    if not 0 <= inner <= k:
        raise ValueError(f"inner must be in 0..{k}, got {inner}")
    _check_sizes(offsets[[0, -1]])
    kernels = cpu_kernels(coord)
    if kernels is None:
        return knn(coord, offsets, coord, offsets, k)[0].int()
    return kernels.near_rows(checked_coord("coord", coord), offsets.contiguous(), k, inner, along_curve)


def farthest_points(coord: Tensor, offsets: Tensor, sampled: Tensor, starts: Tensor | None = None) -> Tensor:
    """Farthest point sampling: each point taken is the farthest from those taken before it, in its cloud.

    Args:
        coord: ``(N, 3)`` float32; ``offsets (S + 1,)`` int64 their clouds.
        sampled: ``(S + 1,)`` int64, offsets of the points to take: ``sampled[s + 1] - sampled[s]`` of cloud s.
        starts: ``(S,)`` int64, the first point of each cloud, counted from its first row; 0 by default.

    Returns:
        ``(sampled[-1],)`` int64 rows of ``coord`` in the order they were taken.

    Raises:
        ValueError: if a cloud has fewer points than are asked for, or 2^31, or a coordinate is not finite.
    """
    _check_sizes(offsets)
    coord = checked_coord("coord", coord)
    counts, sizes = sampled.diff(), offsets.diff()
    if len(sampled) != len(offsets) or bool((counts > sizes).any()) or bool((counts < 0).any()):
        raise ValueError(f"cannot take {counts.tolist()[:8]} points of clouds of {sizes.tolist()[:8]}")
    if starts is None:
        starts = torch.zeros_like(sizes)
    out = torch.empty(int(sampled[-1]), dtype=torch.int64, device=coord.device)
    kernels = cpu_kernels(coord)
    if kernels is not None:
        kernels.farthest_points(coord, offsets.contiguous(), sampled.contiguous(), starts.contiguous(), out)
        return out
    clouds = zip(
        itertools.pairwise(offsets.tolist()), itertools.pairwise(sampled.tolist()), starts.tolist(), strict=True
    )
    for (first, last), (begin, end), start in clouds:
        points = coord[first:last]
        chosen = torch.tensor(start, device=coord.device)
        distance = torch.full((len(points),), math.inf, device=coord.device)
        for i in range(begin, end):
            out[i] = chosen + first
            distance = torch.minimum(distance, _squared_distances(points[chosen][None], points)[0])
            chosen = (distance == distance.max()).nonzero()[0, 0]
    return out


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")


def _check_sizes(*offsets: Tensor) -> None:
    most = max((int(each.diff().max()) for each in offsets if len(each) > 1), default=0)
    if most >= _MOST_POINTS:
        raise ValueError(f"a cloud must have less than {_MOST_POINTS} points, got {most}: cut it into tiles")


def checked_coord(name: str, coord: Tensor) -> Tensor:
    """``(N, 3)`` float32, contiguous, without its gradient.

    Raises:
        ValueError: if it has another shape or dtype, or a coordinate is not finite.
    """
    if coord.ndim != 2 or coord.shape[1] != 3 or coord.dtype != torch.float32:
        raise ValueError(f"{name} must be (N, 3) float32, got {tuple(coord.shape)} {coord.dtype}")
    # A sum is finite only if all are, and faster than looking at each; it may overflow.
    if not bool(coord.sum().isfinite()) and not bool(coord.isfinite().all()):
        raise ValueError(f"{name} has coordinates that are not finite")
    return coord.detach().contiguous()


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """``(A, B)`` from ``(A, 3)`` and ``(B, 3)``."""
    dx, dy, dz = (a[:, None, axis] - b[None, :, axis] for axis in range(3))
    return (dx * dx + dy * dy) + dz * dz
