"""Rooms too large for one pass, cut in the plane as Point Cloud Mamba's test does (arXiv 2403.00762, released code)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pc3d.points import Points

_CUTS = {2: (1, 2), 4: (2, 2), 6: (2, 3), 9: (3, 3), 12: (3, 4), 16: (4, 4), 20: (4, 5), 25: (5, 5)}


def in_tiles(predict: Callable[[Points], Tensor], points: Points, limit: int) -> Tensor:
    """What ``predict`` gives for every point, clouds of more than ``limit`` points tile by tile.

    Each tile goes through it alone, its coordinates counted from its lowest ones. Tiles have ``limit`` points on
    average, not at most.
    """
    if bool((points.offsets.diff() <= limit).all()):
        return predict(points)
    results = []
    for cloud in points:
        if cloud.num_points <= limit:
            results.append(predict(cloud))
            continue
        tile = tile_of_point(cloud.coord, limit)
        rows = [(tile == number).nonzero()[:, 0] for number in tile.unique()]
        parts = [predict(_from_lowest(cloud.select(own))) for own in rows]
        whole = parts[0].new_empty(cloud.num_points, *parts[0].shape[1:])
        results.append(whole.index_copy(0, torch.cat(rows), torch.cat(parts)))
    return torch.cat(results)


def tile_of_point(coord: Tensor, limit: int) -> Tensor:
    """``(N,)`` int64 tile of each point: a grid of 2 to 25 tiles in x and y, with more cuts along the longer side."""
    wanted = len(coord) / limit
    fewer, more = _CUTS[min(_CUTS, key=lambda count: abs(count - wanted))]
    plane = coord[:, :2]
    low, high = plane.amin(0), plane.amax(0)
    width, depth = (high - low).tolist()
    cuts = (more, fewer) if width > depth else (fewer, more)
    x, y = (
        torch.searchsorted(
            torch.linspace(float(low[i]), float(high[i]), cuts[i] + 1, device=coord.device)[1:-1],
            plane[:, i].contiguous(),
            right=True,
        )
        for i in range(2)
    )
    return x * cuts[1] + y


def _from_lowest(tile: Points) -> Points:
    return tile.replace(coord=tile.coord - tile.coord.amin(0))
