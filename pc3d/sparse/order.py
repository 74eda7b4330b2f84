"""Networks that work on voxels in a cache-friendly order, while their callers keep their own.

>>> out = apply_in_order(network, voxels, SoarOrder(chunk=64, outer=1024))  # rows as in ``voxels``
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pc3d.errors import InputError
from pc3d.ops.order import BlockSoarOrder, CurveOrder, Order, SoarOrder, WindowOrder, inverse_permutation
from pc3d.sparse import maps
from pc3d.voxels import Voxels

__all__ = [
    "ORDERS",
    "BlockSoarOrder",
    "CurveOrder",
    "Order",
    "Permutation",
    "SoarOrder",
    "WindowOrder",
    "apply_in_order",
    "named_order",
    "reorder",
]


@dataclass(frozen=True, eq=False)
class Permutation:
    """A change of the order of M rows.

    Attributes:
        rows: ``(M,)`` int64, the caller's row at each position.
        positions: ``(M,)`` int64, the position of each of the caller's rows.
    """

    rows: Tensor
    positions: Tensor

    def apply(self, values: Tensor) -> Tensor:
        """``(M, ...)`` rows from the caller's order into this one."""
        return values.index_select(0, self.rows)

    def undo(self, values: Tensor) -> Tensor:
        """``(M, ...)`` rows back into the caller's order."""
        return values.index_select(0, self.positions)


@dataclass(frozen=True)
class _Reordered:
    coord: Tensor
    permutation: Permutation
    context: dict[Any, Any]


ORDERS: Mapping[str, Order] = {
    "raster": CurveOrder("raster"),
    "morton": CurveOrder("morton"),
    "hilbert": CurveOrder("hilbert"),
    "soar": SoarOrder(64),
    "soar_two_level": SoarOrder(64, 1024),
    "soar_blocks": BlockSoarOrder(),
}


def named_order(name: str) -> Order:
    """The order that a config names, one of :data:`ORDERS`.

    Raises:
        InputError: if there is none of this name.
    """
    if name not in ORDERS:
        raise InputError(f"order {name!r}: there is no such order of voxels, choose from {', '.join(ORDERS)}")
    return ORDERS[name]


def reorder(voxels: Voxels, order: Order) -> tuple[Voxels, Permutation]:
    """The same voxels in another order.

    Computed once per grid and order, and kept in ``voxels.context``. The new grid has a context of its own: the grids
    derived from it are put in the same order, run again on each level (an order of the fine voxels does not carry over
    to the coarse ones).

    Args:
        voxels: M voxels in any order.
        order: a curve or SOAR.

    Returns:
        The reordered grid, ``point_to_voxel`` renumbered with it, and the permutation whose ``undo`` brings features
        back into the order of ``voxels``.

    Raises:
        InputError: if coordinates repeat, a batch number is negative or the grid is too wide for the order.
    """
    # The coordinates are kept beside the result so that their id stays their own.
    key = ("reordered", id(voxels.coord), order)
    if key not in voxels.context:
        context: dict[Any, Any] = {"order": order}
        coord, rows = maps.ordered(voxels, order, context)
        voxels.context[key] = voxels.coord, _Reordered(coord, Permutation(rows, inverse_permutation(rows)), context)
    found: _Reordered = voxels.context[key][1]
    points = None if voxels.point_to_voxel is None else found.permutation.positions[voxels.point_to_voxel]
    grid = replace(
        voxels,
        coord=found.coord,
        feat=found.permutation.apply(voxels.feat),
        point_to_voxel=points,
        context=found.context,
    )
    return grid, found.permutation


def apply_in_order(network: Callable[[Voxels], Voxels], voxels: Voxels, order: Order) -> Voxels:
    """``network(voxels)``, computed on reordered voxels; the result has the rows and the context of ``voxels``.

    Raises:
        ValueError: if the network does not come back to the grid it was given.
    """
    inner, permutation = reorder(voxels, order)
    out = network(inner)
    if out.coord is not inner.coord:
        raise ValueError(
            f"a network applied in another order must return to its input grid, this one ends at stride {out.stride} "
            f"with {len(out)} voxels for {len(voxels)}"
        )
    return voxels.with_feat(permutation.undo(out.feat))
