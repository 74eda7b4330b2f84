"""Sparse voxels to dense volumes and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pc3d.errors import InputError
from pc3d.ops.kernel_map import Triple
from pc3d.voxels import Voxels


def bounds(voxels: Voxels) -> tuple[Triple, Triple]:
    """Lowest cell and extent (both x, y, z) of the box around all voxels of a batch; zeros without voxels."""
    if len(voxels) == 0:
        return (0, 0, 0), (0, 0, 0)
    low, high = voxels.coord[:, 1:].amin(0).tolist(), voxels.coord[:, 1:].amax(0).tolist()
    x, y, z = ((l, h - l + 1) for l, h in zip(low, high, strict=True))
    return (x[0], y[0], z[0]), (x[1], y[1], z[1])


def to_dense(
    voxels: Voxels, low: Sequence[int] = (0, 0, 0), shape: Sequence[int] | None = None, fill: float = 0.0
) -> Tensor:
    """The cells ``low <= c < low + shape`` as a volume; differentiable in the features.

    Args:
        voxels: B clouds with features ``(M, C)``.
        low: first cell along x, y, z, in cells of this grid; negative where the voxels are, see :func:`bounds`.
        shape: extent along x, y, z; by default the grid's ``spatial_shape``, or up to the highest voxel.
        fill: what cells without a voxel hold.

    Returns:
        ``(B, C, X, Y, Z)`` in the dtype of the features.

    Raises:
        InputError: if a voxel lies outside the volume.
    """
    if shape is None and tuple(low) == (0, 0, 0):
        shape = voxels.spatial_shape
    first, extent = bounds(voxels)
    if shape is None:
        shape = [max(f + e - l, 0) for f, e, l in zip(first, extent, low, strict=True)]
    inside = all(l <= f and f + e <= l + s for f, e, l, s in zip(first, extent, low, shape, strict=True))
    if len(voxels) and not inside:
        last = tuple(f + e - 1 for f, e in zip(first, extent, strict=True))
        raise InputError(
            f"voxel coordinates from {first} to {last} do not fit a volume of shape {tuple(shape)} "
            f"that starts at {tuple(low)}; set low and shape, e.g. from bounds(voxels)"
        )
    volume = voxels.feat.new_full((voxels.batch_size, *shape, voxels.feat.shape[1]), fill)
    batch, x, y, z = voxels.coord.long().unbind(1)
    cells = batch, x - low[0], y - low[1], z - low[2]
    return volume.index_put(cells, voxels.feat).permute(0, 4, 1, 2, 3)


def from_dense(
    volume: Tensor,
    mask: Tensor | None = None,
    low: Sequence[int] = (0, 0, 0),
    stride: int | Triple = 1,
    voxel_size: float = 1.0,
) -> Voxels:
    """The cells of a volume that hold something, sorted by (batch, x, y, z); differentiable in ``volume``.

    Args:
        volume: ``(B, C, X, Y, Z)``.
        mask: ``(B, X, Y, Z)`` bool, the cells that become voxels; by default those with a channel other than zero.
        low: coordinate of the first cell.
        stride, voxel_size: of the grid, see :class:`~pc3d.voxels.Voxels`.

    Raises:
        ValueError: if shapes do not fit each other.
    """
    if volume.ndim != 5:
        raise ValueError(f"a volume must be (B, C, X, Y, Z), got {tuple(volume.shape)}")
    cells = volume.permute(0, 2, 3, 4, 1)
    mask = (cells != 0).any(-1) if mask is None else mask
    if mask.shape != cells.shape[:4] or mask.dtype != torch.bool:
        raise ValueError(f"mask must be {tuple(cells.shape[:4])} bool, got {tuple(mask.shape)} {mask.dtype}")
    index = mask.nonzero()
    coord = (index + index.new_tensor([0, *low])).to(torch.int32)
    return Voxels(coord, cells[index.unbind(1)], len(volume), stride=stride, voxel_size=voxel_size)
