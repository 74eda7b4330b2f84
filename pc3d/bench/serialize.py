"""Serialization: codes along the curves, an order with its sort, pooled levels, and what laying out features costs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pc3d.bench.timing import Timing, check_equal, on_reference, time_interleaved
from pc3d.ops.serialize import Curve, curve_codes, grid_depth, sort_codes
from pc3d.ops.voxelize import grid_coords, unique_voxels
from pc3d.points import Points
from pc3d.serialization import Order, serialize

CHANNELS = 64
LEVELS = 4
TIMED: tuple[Curve, ...] = ("z", "hilbert")
Arrays = tuple[np.ndarray, ...]


def bench(points: Points, size: float, depth: int | None, rounds: int) -> list[Timing]:
    """Time the C++ kernels, the torch reference and numpy on the voxels of one cloud, cells of ``size`` metres.

    Voxels come in the order of their first points, as they do from grid sampling. ``levels`` is what a five-stage model
    with all four orders needs, sorts included; ``reorder`` gathers ``CHANNELS`` features along a curve and back.

    Raises:
        InputError: if the cells do not fit ``depth`` (None: the depth of published models), or engines disagree.
    """
    cells = grid_coords(points.coord, points.offsets, size)
    voxels = unique_voxels(cells, points.offsets, "input")
    grid, offsets = cells[voxels.first], voxels.voxel_offsets
    bits = grid_depth(grid) if depth is None else depth
    name = f"{points.describe()[-20:]}, {size:g} m, depth {bits}"
    timings: list[Timing] = []
    for curve in TIMED:
        timings += _bench_curve(grid, offsets, bits, curve, name, rounds)

    def levels() -> None:
        level = serialize(grid, offsets, depth=bits)
        for _ in range(LEVELS):
            _sort_all(level.orders)
            level, _pooling = level.pooled()
        _sort_all(level.orders)

    engines = {"kernels": levels, "reference": on_reference(levels)}
    timings += time_interleaved(f"{LEVELS + 1} levels {name}", len(grid), engines, rounds)
    feat, along = torch.randn(len(grid), CHANNELS), serialize(grid, offsets, ["hilbert"], bits)[0]
    order, inverse = along.order, along.inverse

    def reorder() -> Tensor:
        return feat.index_select(0, order).index_select(0, inverse)

    return timings + time_interleaved(f"reorder {name}", len(grid), {"torch": reorder}, rounds)


def _sort_all(orders: tuple[Order, ...]) -> None:
    for order in orders:
        _ = order.order


def _bench_curve(grid: Tensor, offsets: Tensor, depth: int, curve: Curve, name: str, rounds: int) -> list[Timing]:
    cells = grid.numpy()

    def codes() -> Arrays:
        return (curve_codes(grid, offsets, depth, [curve])[0].numpy(),)

    def order() -> Arrays:
        rows, positions = sort_codes(curve_codes(grid, offsets, depth, [curve])[0])
        return rows.numpy(), positions.numpy()

    def codes_by_numpy() -> Arrays:
        return (_codes_by_numpy(cells, depth, curve),)

    def order_by_numpy() -> Arrays:
        rows = np.argsort(_codes_by_numpy(cells, depth, curve), kind="stable")
        positions = np.empty_like(rows)
        positions[rows] = np.arange(len(rows))
        return rows, positions

    timings = []
    for case, work, by_numpy in (("codes", codes, codes_by_numpy), ("order", order, order_by_numpy)):
        engines = {"kernels": work, "reference": on_reference(work), "numpy": by_numpy}
        case = f"{curve} {case} {name}"
        check_equal(case, {engine: run() for engine, run in engines.items()})
        timings += time_interleaved(case, len(grid), engines, rounds)
    return timings


def _codes_by_numpy(cells: np.ndarray, depth: int, curve: Curve) -> np.ndarray:
    """As one writes it by hand, for one cloud: level by level, bit by bit."""
    axes = [cells[:, axis].astype(np.int64) for axis in range(3)]
    codes, parity = np.zeros(len(cells), np.int64), np.zeros(len(cells), np.int64)
    for level in reversed(range(depth)):
        for i in range(3):
            bit = axes[i] >> level & 1
            if curve == "hilbert":
                lower = (1 << level) - 1
                exchange = np.where(bit, 0, (axes[0] ^ axes[i]) & lower)
                axes[0] = axes[0] ^ np.where(bit, lower, exchange)
                axes[i] = axes[i] ^ exchange
                parity = parity ^ bit
                bit = parity
            codes = codes << 1 | bit
    return codes
