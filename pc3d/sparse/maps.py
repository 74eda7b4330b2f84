"""Kernel maps and derived grids of ``Voxels``, built once per grid and rule and kept in ``voxels.context``.

A grid is known by its coordinate tensor (the object, not a name given by the user): layers that see the same grid share
its maps, a grid with other voxels never meets a stale one, and a coarse grid remembers the fine one it was made from.
Coordinate tensors must therefore not be changed in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pc3d.ops.kernel_map import (
    KernelMap,
    Triple,
    locate,
    output_shape,
    restrict,
    strided_map,
    submanifold_map,
    transposed_map,
    transposed_shape,
    triple,
)
from pc3d.ops.order import Order, permute_map
from pc3d.voxels import Voxels

_NEIGHBOURS: tuple[Triple, Triple] = (3, 3, 3), (1, 1, 1)


class Window(NamedTuple):
    """How a kernel slides over a grid: three values each, in voxels."""

    kernel_size: Triple
    stride: Triple
    padding: Triple
    dilation: Triple


@dataclass(frozen=True)
class Derivation:
    """A grid made from another one by a strided or transposed convolution, or a pooling.

    Attributes:
        coord: ``(M2, 4)`` int32, the voxels made.
        kernel_map: pairs from the parent's rows to the rows of ``coord``.
        window: the rule of the kernel.
        parent: the grid it was made from; features and context left out.
    """

    coord: Tensor
    kernel_map: KernelMap
    window: Window
    stride: int | Triple
    spatial_shape: Triple | None
    parent: Voxels

    def grid(self, voxels: Voxels, feat: Tensor) -> Voxels:
        """The derived grid of ``voxels`` with features ``(M2, C)``."""
        return replace(
            voxels,
            coord=self.coord,
            feat=feat,
            stride=self.stride,
            point_to_voxel=None,
            spatial_shape=self.spatial_shape,
        )

    def parent_grid(self, voxels: Voxels, feat: Tensor) -> Voxels:
        """The parent grid of ``voxels`` with features ``(M, C)``."""
        return replace(self.parent, feat=feat, context=voxels.context)


def window(
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
) -> Window:
    """A window from one number for all axes, or three, per setting.

    Raises:
        ValueError: if a number is not a positive integer (``padding``: not negative).
    """
    return Window(
        triple("kernel_size", kernel_size),
        triple("stride", stride),
        triple("padding", padding, least=0),
        triple("dilation", dilation),
    )


def submanifold(voxels: Voxels, kernel_size: Triple, dilation: Triple) -> KernelMap:
    """Map of a submanifold convolution on this grid."""
    key = _submanifold_key(voxels.coord, kernel_size, dilation)
    if key not in voxels.context:
        # The tensor is kept beside the map so that its id stays its own.
        voxels.context[key] = voxels.coord, submanifold_map(voxels.coord, kernel_size, dilation)
    return voxels.context[key][1]


def ordered(voxels: Voxels, order: Order, context: dict[Any, Any]) -> tuple[Tensor, Tensor]:
    """The coordinates of a grid in another order, and the ``(M,)`` int64 row each one had.

    The neighbours an order needs are those of a 3x3x3 layer, so that map is renumbered and kept in ``context``.
    """
    if not order.follows_neighbours:
        rows = order.rows(voxels.coord)
        return voxels.coord[rows], rows
    key = _submanifold_key(voxels.coord, *_NEIGHBOURS)
    kmap = voxels.context[key][1] if key in voxels.context else submanifold_map(voxels.coord, *_NEIGHBOURS)
    rows = order.rows(voxels.coord, kmap)
    coord = voxels.coord[rows]
    context[_submanifold_key(coord, *_NEIGHBOURS)] = coord, permute_map(kmap, rows, rows)
    return coord, rows


def strided(voxels: Voxels, rule: Window) -> Derivation:
    """The coarser grid under a strided kernel; bounded where the grid has a ``spatial_shape``."""
    key = ("strided", id(voxels.coord), rule, voxels.spatial_shape)
    if key not in voxels.context:
        coord, kmap = _in_order(voxels, *strided_map(voxels.coord, *rule, spatial_shape=voxels.spatial_shape))
        shape = None if voxels.spatial_shape is None else output_shape(voxels.spatial_shape, *rule)
        stride = _as_stride(s * w for s, w in zip(triple("stride", voxels.stride), rule.stride, strict=True))
        _remember(voxels, key, Derivation(coord, kmap, rule, stride, shape, _without_features(voxels)))
    return voxels.context[key]


def transposed(voxels: Voxels, rule: Window) -> Derivation:
    """The finer grid that a transposed kernel makes; bounded where the grid has a ``spatial_shape``.

    Raises:
        ValueError: if the grid's stride is not a multiple of the kernel's.
    """
    key = ("transposed", id(voxels.coord), rule, voxels.spatial_shape)
    if key not in voxels.context:
        stride = _finer_stride(voxels, rule)
        coord, kmap = _in_order(voxels, *transposed_map(voxels.coord, *rule, spatial_shape=voxels.spatial_shape))
        shape = None if voxels.spatial_shape is None else transposed_shape(voxels.spatial_shape, *rule)
        _remember(voxels, key, Derivation(coord, kmap, rule, stride, shape, _without_features(voxels)))
    return voxels.context[key]


def transposed_onto(voxels: Voxels, rule: Window, target: Voxels) -> KernelMap:
    """Map of a transposed kernel to the voxels of a grid that exists already; what it reaches beyond them is dropped.

    Raises:
        ValueError: if the stride of ``target`` is not the one the kernel leads to, or the batch sizes differ.
    """
    key = ("transposed onto", id(voxels.coord), rule, id(target.coord))
    if key not in voxels.context:
        finer = _finer_stride(voxels, rule)
        if triple("stride", target.stride) != triple("stride", finer) or target.batch_size != voxels.batch_size:
            raise ValueError(
                f"a transposed convolution of stride {rule.stride} on {voxels.batch_size} clouds of stride "
                f"{voxels.stride} leads to stride {finer}; the target has {target.batch_size} clouds of stride "
                f"{target.stride}"
            )
        coord, kmap = transposed_map(voxels.coord, *rule)
        # The tensors are kept beside the map so that their ids stay their own.
        onto = restrict(kmap, locate(target.coord, coord), len(target))
        voxels.context[key] = onto, voxels.coord, target.coord
    return voxels.context[key][0]


def derive_subset(voxels: Voxels, coord: Tensor, keep: Tensor) -> None:
    """Remember that the rows ``keep`` ``(M,)`` bool of a grid, ``coord``, were made as the grid itself was."""
    made = derivation(voxels)
    if made is None:
        return
    rows = torch.where(keep, keep.cumsum(0) - 1, -1)
    subset = replace(made, coord=coord, kernel_map=restrict(made.kernel_map, rows, len(coord)))
    voxels.context["derivation", id(coord)] = subset


def derivation(voxels: Voxels) -> Derivation | None:
    """How this grid was made, or None for an input grid."""
    return voxels.context.get(("derivation", id(voxels.coord)))


def _submanifold_key(coord: Tensor, kernel_size: Triple, dilation: Triple) -> tuple[object, ...]:
    return "submanifold", id(coord), kernel_size, dilation


def _in_order(voxels: Voxels, coord: Tensor, kmap: KernelMap) -> tuple[Tensor, KernelMap]:
    """New voxels in the order of the grid they were made from: an order is run again on every level."""
    order = voxels.context.get("order")
    if order is None:
        return coord, kmap
    coord, rows = ordered(replace(voxels, coord=coord, feat=voxels.feat[:0]), order, voxels.context)
    return coord, permute_map(kmap, out_rows=rows)


def _remember(voxels: Voxels, key: tuple[object, ...], made: Derivation) -> None:
    voxels.context[key] = made
    voxels.context["derivation", id(made.coord)] = made


def _without_features(voxels: Voxels) -> Voxels:
    return replace(voxels, feat=voxels.feat.new_empty(len(voxels), 0), context={})


def _finer_stride(voxels: Voxels, rule: Window) -> int | Triple:
    strides = list(zip(triple("stride", voxels.stride), rule.stride, strict=True))
    if any(s % w for s, w in strides):
        raise ValueError(
            f"a transposed convolution of stride {rule.stride} needs a grid whose stride is a multiple of it, "
            f"this one has stride {voxels.stride}"
        )
    return _as_stride(s // w for s, w in strides)


def _as_stride(factors: Iterable[int]) -> int | Triple:
    x, y, z = factors
    return x if x == y == z else (x, y, z)
