"""Several grids to one, and grids with fewer voxels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from pc3d.ops.kernel_map import locate, union
from pc3d.sparse import maps
from pc3d.voxels import Voxels


def cat(*grids: Voxels) -> Voxels:
    """Channels side by side, ``(M, C1 + C2 + ...)``, on the union of the voxels.

    Where a grid has no voxel it counts as zeros. The result begins with the voxels of the first grid, row by row;
    voxels that only the others have follow, sorted by (batch, x, y, z). If there are none, the result lies on the first
    grid itself: its kernel maps are shared and inverse layers still find their way back. Grids that share their
    coordinate tensor are joined without any look-up.

    Raises:
        ValueError: if batch sizes, strides, devices or dtypes differ.
        InputError: if a grid repeats coordinates.
    """
    target, feats = _on_union(grids)
    return target.with_feat(torch.cat(feats, 1))


def add(*grids: Voxels) -> Voxels:
    """Sum of features on the union of the voxels, ``(M, C)``; voxels and errors as :func:`cat`, and equal widths."""
    target, feats = _on_union(grids)
    _check_widths(grids)
    return target.with_feat(reduce(torch.add, feats))


def multiply(*grids: Voxels) -> Voxels:
    """Product of features on the union of the voxels: zero where a grid has no voxel. Otherwise as :func:`add`."""
    target, feats = _on_union(grids)
    _check_widths(grids)
    return target.with_feat(reduce(torch.mul, feats))


def prune(voxels: Voxels, keep: Tensor) -> Voxels:
    """The voxels that a mask keeps, in their order.

    Maps of the whole grid are not reused. A grid that a strided layer made can still be inverted: the inverse layer
    returns to all voxels of the finer grid, and those under a removed voxel get no contribution from it.

    Args:
        voxels: M voxels.
        keep: ``(M,)`` bool.

    Raises:
        ValueError: if ``keep`` is of another shape or dtype.
    """
    if keep.shape != (len(voxels),) or keep.dtype != torch.bool:
        raise ValueError(f"keep must be ({len(voxels)},) bool, got {tuple(keep.shape)} {keep.dtype}")
    coord = voxels.coord[keep]
    maps.derive_subset(voxels, coord, keep)
    return replace(voxels, coord=coord, feat=voxels.feat[keep], point_to_voxel=None)


def _on_union(grids: Sequence[Voxels]) -> tuple[Voxels, list[Tensor]]:
    """A grid of all voxels, and the features of each grid on it."""
    if not grids:
        raise ValueError("no grids to join")
    first = grids[0]
    for other in grids[1:]:
        _check_family(first, other)
    if all(grid.coord is first.coord for grid in grids):
        return first, [grid.feat for grid in grids]
    key = ("union", *(id(grid.coord) for grid in grids))
    if key not in first.context:
        coords = [grid.coord for grid in grids]
        coord = union(coords)
        # The coordinates are kept beside the result so that their ids stay their own.
        first.context[key] = coord, [locate(coord, own) for own in coords], coords
    coord, rows, _ = first.context[key]
    feats = [
        grid.feat
        if coord is grid.coord
        else grid.feat.new_zeros(len(coord), grid.feat.shape[1]).index_copy(0, r, grid.feat)
        for grid, r in zip(grids, rows, strict=True)
    ]
    if coord is first.coord:
        return first, feats
    return replace(first, coord=coord, feat=first.feat.new_empty(len(coord), 0), point_to_voxel=None), feats


def _check_family(first: Voxels, other: Voxels) -> None:
    for name in ("batch_size", "stride", "spatial_shape"):
        a, b = getattr(first, name), getattr(other, name)
        if a != b:
            raise ValueError(f"cannot join grids of {name} {a} and {b}")
    for name in ("dtype", "device"):
        a, b = getattr(first.feat, name), getattr(other.feat, name)
        if a != b:
            raise ValueError(f"cannot join features of {name} {a} and {b}")


def _check_widths(grids: Sequence[Voxels]) -> None:
    widths = [grid.feat.shape[1] for grid in grids]
    if len(set(widths)) > 1:
        raise ValueError(
            f"features of {' and '.join(map(str, widths))} channels do not fit each other; cat() joins them"
        )
