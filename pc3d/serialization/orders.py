"""Orders of a packed batch along space-filling curves, as Point Transformer V3 and its successors use them.

Wu et al., "Point Transformer V3: Simpler, Faster, Stronger", CVPR 2024 (section 4.1), with the codes of the Pointcept
code base.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pc3d.errors import InputError
from pc3d.ops.serialize import CURVES, Curve, curve_codes, grid_depth, sort_codes
from pc3d.points import Points, check_offsets


@dataclass(frozen=True, eq=False)
class Order:
    """The points of a batch along one curve, cloud after cloud; sorted when it is first asked for, and only once.

    Attributes:
        curve: the curve.
        code: ``(N,)`` int64, ``cloud << 3 * depth | place along the curve``; distinct where cells are.
    """

    curve: Curve
    code: Tensor

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        return sort_codes(self.code)

    @property
    def order(self) -> Tensor:
        """``(N,)`` int64: the row at each position. ``values[order]`` lays rows out along the curve."""
        return self._sorted[0]

    @property
    def inverse(self) -> Tensor:
        """``(N,)`` int64: the position of each row. ``sequence[inverse]`` puts rows back."""
        return self._sorted[1]


@dataclass(frozen=True, eq=False)
class Pooling:
    """Which rows of a level make each row of the coarser one.

    Attributes:
        rows: ``(N,)`` int64, the rows of the finer level, cell after cell.
        row_offsets: ``(M + 1,)`` int64, cell ``i`` holds ``rows[row_offsets[i]:row_offsets[i + 1]]``, never none.
        cluster: ``(N,)`` int64, the cell of each row.
    """

    rows: Tensor
    row_offsets: Tensor
    cluster: Tensor

    @property
    def heads(self) -> Tensor:
        """``(M,)`` int64: a row of each cell."""
        return self.rows.index_select(0, self.row_offsets[:-1])


@dataclass(frozen=True, eq=False)
class Serialization:
    """A batch ordered along several curves; ``serialization[i]`` is the i-th :class:`Order`.

    Attributes:
        orders: one per curve; all levels and permutations that share an order share its sort.
        depth: bits per axis of a cell.
        offsets: ``(B + 1,)`` int64 cloud borders, the same in every order.
    """

    orders: tuple[Order, ...]
    depth: int
    offsets: Tensor

    def __len__(self) -> int:
        """Number of orders."""
        return len(self.orders)

    def __getitem__(self, index: int) -> Order:
        return self.orders[index]

    def __iter__(self) -> Iterator[Order]:
        return iter(self.orders)

    @property
    def num_points(self) -> int:
        """Number of rows N."""
        return len(self.orders[0].code)

    def permuted(self, permutation: Sequence[int]) -> Serialization:
        """The same orders, the one at ``permutation[i]`` in place i.

        Raises:
            ValueError: if it is not a permutation of the orders.
        """
        if sorted(permutation) != list(range(len(self))):
            raise ValueError(f"{list(permutation)} is not a permutation of {len(self)} orders")
        return replace(self, orders=tuple(self.orders[i] for i in permutation))

    def shuffled(self, generator: torch.Generator | None = None) -> Serialization:
        """The orders in a random order, drawn from a CPU generator (None: torch's default one)."""
        return self.permuted(torch.randperm(len(self), generator=generator, device="cpu").tolist())

    def pooled(self, levels: int = 1) -> tuple[Serialization, Pooling]:
        """Merge the rows that share a cell ``2**levels`` times as wide, without encoding anything again.

        Cells come in the order of ``self[0]``, so the first order of the coarser level is the identity. At a depth
        below ``levels`` only equal cells are merged, as in the published code.

        Returns:
            The serialization of the M cells (coordinates ``grid >> levels``), and which rows went into each.
        """
        levels = levels if levels <= self.depth else 0
        rows = self[0].order
        cells = (self[0].code >> 3 * levels).index_select(0, rows)
        is_first = torch.ones_like(cells, dtype=torch.bool)
        is_first[1:] = cells[1:] != cells[:-1]
        starts = is_first.nonzero()[:, 0]
        cells_before = torch.cat([starts.new_zeros(1), is_first.cumsum(0)])  # clouds fill the same positions as rows
        pooling = Pooling(
            rows=rows,
            row_offsets=torch.cat([starts, starts.new_tensor([len(rows)])]),
            cluster=(cells_before[1:] - 1).index_select(0, self[0].inverse),
        )
        heads = pooling.heads
        orders = tuple(Order(o.curve, o.code.index_select(0, heads) >> 3 * levels) for o in self.orders)
        return Serialization(orders, self.depth - levels, cells_before.index_select(0, self.offsets)), pooling


def serialize(
    grid: Tensor, offsets: Tensor, curves: Sequence[Curve] = CURVES, depth: int | None = None
) -> Serialization:
    """Order a packed batch of cells along space-filling curves.

    Args:
        grid: ``(N, 3)`` integer cells, none negative, ``N`` may be 0. Equal cells are allowed and keep the order of
            their rows.
        offsets: ``(B + 1,)`` int64 cloud borders.
        curves: one order each.
        depth: bits per axis; None takes :func:`grid_depth`. Hilbert orders depend on it.

    Raises:
        InputError: if a cell is negative or beyond ``depth``, or the depth beyond ``MAX_DEPTH``.
        ValueError: if ``offsets`` do not fit the rows.
    """
    if not curves:
        raise InputError(f"serialization needs a curve; take some of {', '.join(CURVES)}")
    check_offsets(offsets, rows=len(grid))
    bits = grid_depth(grid) if depth is None else depth
    codes = curve_codes(grid, offsets, bits, curves)
    return Serialization(tuple(map(Order, curves, codes)), bits, offsets)


def serialize_points(points: Points, curves: Sequence[Curve] = CURVES, depth: int | None = None) -> Serialization:
    """:func:`serialize` of ``attrs["grid_coord"]``; errors name the cloud."""
    grid = points.get("grid_coord")
    try:
        return serialize(grid, points.offsets, curves, depth)
    except InputError as error:
        raise InputError(f"{points.describe()}: field 'grid_coord': {error}") from None
