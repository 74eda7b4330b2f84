"""Dense convolutions as the independent check of sparse ones, and random grids to run them on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pc3d import Voxels


def random_grid(
    counts: Sequence[int],
    channels: int,
    low: int = -3,
    size: int = 6,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Voxels:
    """``counts[b]`` distinct voxels per cloud in ``[low, low + size)^3``, in random order; features are leaves."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for batch, count in enumerate(counts):
        cells = torch.randperm(size**3, generator=generator)[:count]
        xyz = torch.stack([cells // size**2, cells // size % size, cells % size], 1) + low
        rows.append(torch.cat([torch.full((count, 1), batch), xyz], 1))
    coord = torch.cat(rows).to(torch.int32)
    coord = coord[torch.randperm(len(coord), generator=generator)]
    feat = torch.randn(len(coord), channels, generator=generator, dtype=dtype, requires_grad=True)
    return Voxels(coord, feat, batch_size=len(counts))


def kernel(weight: Tensor, size: Sequence[int]) -> Tensor:
    """``(K, Cin, Cout)`` as the ``(Cout, Cin, kx, ky, kz)`` of a dense convolution."""
    return weight.reshape(*size, *weight.shape[1:]).permute(4, 3, 0, 1, 2)


def volume(voxels: Voxels, low: Sequence[int], high: Sequence[int], fill: float = 0.0) -> Tensor:
    """``(B, C, X, Y, Z)`` of the cells ``low <= c < high``; cells without a voxel hold ``fill``."""
    extent = [h - l for l, h in zip(low, high, strict=True)]
    dense = voxels.feat.new_full((voxels.batch_size, *extent, voxels.feat.shape[1]), fill)
    batch, x, y, z = (voxels.coord.long() - torch.tensor([0, *low])).T
    inside = ((torch.stack([x, y, z]) >= 0) & (torch.tensor(extent) > torch.stack([x, y, z]).T).T).all(0)
    dense = dense.index_put((batch[inside], x[inside], y[inside], z[inside]), voxels.feat[inside])
    return dense.permute(0, 4, 1, 2, 3)


def at(dense: Tensor, coord: Tensor, low: Sequence[int]) -> Tensor:
    """Rows ``(M, C)`` of a dense volume whose first cell is ``low``."""
    batch, x, y, z = (coord.long() - torch.tensor([0, *low])).T
    return dense.permute(0, 2, 3, 4, 1)[batch, x, y, z]


def strided_windows(
    voxels: Voxels, window: Sequence[Sequence[int]], fill: float = 0.0, reach: int = 3
) -> tuple[Tensor, list[int]]:
    """A volume whose valid windows are the outputs ``low, low + 1, ...`` of a strided layer, and ``low``.

    Covers every window that can meet a voxel with ``|coordinate| <= reach``.
    """
    size, stride, padding, dilation = window
    low = [-((reach + d * (k - 1)) // s) - 1 for k, s, d in zip(size, stride, dilation, strict=True)]
    first = [l * s - p for l, s, p in zip(low, stride, padding, strict=True)]
    last = [reach + d * k + s for k, s, d in zip(size, stride, dilation, strict=True)]
    return volume(voxels, first, last, fill), low


def dense_conv(voxels: Voxels, weight: Tensor, window: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, list[int]]:
    """Strided convolution of the volume, which outputs some voxel contributes to, and the first output cell."""
    size, stride, _, dilation = window
    dense, low = strided_windows(voxels, window)
    out = F.conv3d(dense, kernel(weight, size), stride=tuple(stride), dilation=tuple(dilation))
    occupied, _ = strided_windows(voxels.with_feat(torch.ones(len(voxels), 1, dtype=weight.dtype)), window)
    ones = torch.ones(1, 1, *size, dtype=weight.dtype)
    active = F.conv3d(occupied, ones, stride=tuple(stride), dilation=tuple(dilation))[:, 0] > 0.5
    return out, active, low


def active_coord(active: Tensor, low: Sequence[int]) -> Tensor:
    """``(M, 4)`` int32 coordinates of the true cells, sorted by (batch, x, y, z)."""
    return (active.nonzero() + torch.tensor([0, *low])).to(torch.int32)
