"""Features of a coarse cloud at the points of a finer one (Qi et al. 2017, "PointNet++", equation 2)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pc3d.ops.neighbours import knn


def interpolate(
    query: Tensor, query_offsets: Tensor, coord: Tensor, offsets: Tensor, feat: Tensor, power: Literal[1, 2] = 2
) -> Tensor:
    """Mean of the features of the three nearest points, weighted by ``1 / (distance ** power + 1e-8)``.

    Args:
        query: ``(Q, 3)`` float32 points to fill; ``query_offsets (B + 1,)`` int64 their clouds.
        coord: ``(M, 3)`` float32 points with features; ``offsets (B + 1,)`` int64 their clouds, none of them empty
            where its queries are not. In a cloud of one or two points these are all.
        feat: ``(M, C)``; the result is differentiable in it.
        power: 2 as published with PointNet++, 1 as in the point transformers.

    Returns:
        ``(Q, C)`` in the dtype of ``feat``.
    """
    rows, squared = knn(query, query_offsets, coord, offsets, 3)
    weight = 1 / ((squared if power == 2 else squared.sqrt()) + 1e-8)  # a missing neighbour is infinitely far
    weight = (weight / weight.sum(1, keepdim=True)).to(feat.dtype)
    return torch.einsum("qkc,qk->qc", feat[rows.clamp(min=0)], weight)
