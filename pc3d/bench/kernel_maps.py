"""Kernel maps: submanifold, stride 2, and all those of a five-level U-Net."""

from __future__ import annotations

import itertools

import numpy as np
from torch import Tensor

from pc3d.bench.timing import Timing, check_equal, on_reference, time_interleaved
from pc3d.ops.kernel_map import KernelMap, strided_map, submanifold_map
from pc3d.points import Points

LEVELS = 5
Arrays = tuple[np.ndarray, ...]


def bench(points: Points, size: float, kernel: int, rounds: int) -> list[Timing]:
    """Time the C++ builders, the torch reference and numpy on the voxels of one cloud, cells of ``size`` metres."""
    coord = points.with_attrs(feat=points.coord).voxelize(size, "first").coord
    array, name = coord.numpy(), f"{points.describe()[-20:]}, {size:g} m"

    def submanifold() -> KernelMap:
        return submanifold_map(coord, (kernel,) * 3)

    def down() -> tuple[Tensor, KernelMap]:
        return strided_map(coord, (2, 2, 2), (2, 2, 2))

    def pyramid() -> None:
        level = coord
        for _ in range(LEVELS - 1):
            submanifold_map(level, (kernel,) * 3)
            level, _map = strided_map(level, (2, 2, 2), (2, 2, 2))
        submanifold_map(level, (kernel,) * 3)

    case = f"submanifold {kernel}^3 {name}"
    reference = on_reference(submanifold)
    found = {"kernels": _as_arrays(submanifold()), "reference": _as_arrays(reference())}
    check_equal(case, {**found, "numpy": _by_numpy(array, kernel)})
    engines = {"kernels": submanifold, "reference": reference, "numpy": lambda: _by_numpy(array, kernel)}
    timings = time_interleaved(case, len(coord), engines, rounds)
    for work, case in ((down, f"stride 2 {name}"), (pyramid, f"{LEVELS} levels {name}")):
        timings += time_interleaved(case, len(coord), {"kernels": work, "reference": on_reference(work)}, rounds)
    return timings


def _as_arrays(kmap: KernelMap) -> Arrays:
    return kmap.in_rows.numpy(), kmap.out_rows.numpy(), kmap.offsets.numpy()


def _by_numpy(coord: np.ndarray, kernel: int) -> Arrays:
    """As one writes it by hand: packed keys (``coord`` is in raster order) and a binary search per kernel offset."""
    half = kernel // 2
    cells = coord.astype(np.int64) - coord.min(0) + [0, half, half, half]
    extent = cells.max(0) + 1 + half
    radix = np.array([extent[1] * extent[2] * extent[3], extent[2] * extent[3], extent[3], 1])
    keys = cells @ radix
    in_rows, out_rows = [], []
    for offset in itertools.product(range(kernel), repeat=3):
        wanted = keys + (np.array(offset) - half) @ radix[1:]
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        out_rows.append(np.nonzero(keys[at] == wanted)[0])
        in_rows.append(at[out_rows[-1]])
    borders = np.cumsum([0, *(len(rows) for rows in out_rows)])
    return np.concatenate(in_rows).astype(np.int32), np.concatenate(out_rows).astype(np.int32), borders
