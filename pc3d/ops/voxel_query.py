"""Voxels near places that are no voxels, in the order of the grid and not by distance."""

from __future__ import annotations

import torch
from torch import Tensor

from pc3d.ops.backend import cpu_kernels

_CELLS_AT_ONCE = 1 << 22
_MOST_RUNS = 1 << 27


def voxel_query(
    coord: Tensor, center: Tensor, cells: Tensor, places: Tensor, reach: int, radius: float, samples: int
) -> Tensor:
    """The first voxels around every place, along x, then y, then z.

    Deng et al., "Voxel R-CNN", AAAI 2021, section 3.2.

    Args:
        coord: ``(M, 4)`` int32 voxels ``[cloud, x, y, z]``, unique.
        center: ``(M, 3)`` float32 where they are.
        cells: ``(Q, 4)`` int32 cells of the places, on the same grid; they may lie outside.
        places: ``(Q, 3)`` float32.
        reach: cells to look at, on either side along each axis.
        radius: largest distance of a centre from the place, compared in float32.
        samples: voxels to find.

    Returns:
        ``(Q, samples)`` int64 rows of voxels; the first one again where there are fewer, -1 where there is none.

    Raises:
        ValueError: if the grid is too wide to be indexed.
    """
    if not len(coord) or not len(cells):
        return torch.full((len(cells), samples), -1, dtype=torch.int64, device=cells.device)
    low = torch.cat([coord.new_zeros(1), coord[:, 1:].amin(0)])
    clouds, length, width, height = (coord.amax(0) - low + 1).tolist()
    if clouds * width * height > _MOST_RUNS:
        raise ValueError(f"voxels span {clouds} x {height} x {width} rows, more than {_MOST_RUNS}")
    own, cells = (coord - low).long(), cells - low
    run = (own[:, 0] * height + own[:, 3]) * width + own[:, 2]
    keys, order = (run * length + own[:, 1]).sort()
    kernels = cpu_kernels(coord, center, cells, places)
    if kernels is None:
        shape, part = (clouds, length, width, height), max(_CELLS_AT_ONCE // (2 * reach + 1) ** 3, 1)
        parts = zip(cells.split(part), places.split(part), strict=True)
        return torch.cat(
            [_reference(keys, order, center, cell, place, shape, reach, radius, samples) for cell, place in parts]
        )
    runs = torch.arange(clouds * height * width + 1)
    found = torch.empty(len(cells), samples, dtype=torch.int64)
    kernels.voxel_query(
        torch.searchsorted(run[order], runs),
        own[order, 1].int(),
        order,
        center.detach().float().contiguous(),
        cells.int().contiguous(),
        places.detach().float().contiguous(),
        clouds,
        height,
        width,
        reach,
        radius,
        found,
    )
    return found


def _reference(
    keys: Tensor,
    order: Tensor,
    center: Tensor,
    cells: Tensor,
    places: Tensor,
    shape: tuple[int, int, int, int],
    reach: int,
    radius: float,
    samples: int,
) -> Tensor:
    """For cells ``[cloud, x, y, z]`` counted from the lowest voxel, and sorted keys of (cloud, z, y, x)."""
    clouds, length, width, height = shape
    step = torch.arange(-reach, reach + 1, device=cells.device)
    cloud, x, y, z = (column[:, None] for column in cells.long().unbind(1))
    y, z = y + step.repeat(len(step)), z + step.repeat_interleave(len(step))
    inside = (cloud >= 0) & (cloud < clouds) & (y >= 0) & (y < width) & (z >= 0) & (z < height)
    run = ((cloud * height + z) * width + y) * length
    start = torch.searchsorted(keys, run + (x - reach).clamp(min=0, max=length))
    stop = torch.searchsorted(keys, run + (x + reach + 1).clamp(min=0, max=length))
    slot = start[..., None] + torch.arange(2 * reach + 1, device=cells.device)
    real = inside[..., None] & (slot < stop[..., None])
    row = order[slot.clamp(max=len(order) - 1)]
    apart = center.float()[row] - places.float()[:, None, None]
    squares = apart * apart
    near = (squares[..., 0] + squares[..., 1]) + squares[..., 2] <= center.new_tensor(radius, dtype=torch.float32) ** 2
    hit, row = (real & near).flatten(1), row.flatten(1)
    place = hit.cumsum(1) - 1
    first = row.gather(1, hit.int().argmax(1, keepdim=True))
    found = torch.where(hit.any(1, keepdim=True), first, -1).repeat(1, samples)
    query, at = (hit & (place < samples)).nonzero().unbind(1)
    found[query, place[query, at]] = row[query, at]
    return found
