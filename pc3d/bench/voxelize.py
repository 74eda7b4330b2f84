"""Grid sampling: cells, distinct voxels with a representative, inverse map and counts."""

from __future__ import annotations

import numpy as np

from pc3d.bench.timing import Timing, check_equal, on_reference, time_interleaved
from pc3d.ops.voxelize import UniqueVoxels, grid_coords, unique_voxels
from pc3d.points import Points

Arrays = tuple[np.ndarray, ...]


def bench(points: Points, size: float, rounds: int) -> list[Timing]:
    """Time the C++ kernels, the torch reference and numpy on one cloud, with cells of ``size`` metres."""

    def sample() -> UniqueVoxels:
        return unique_voxels(grid_coords(points.coord, points.offsets, size), points.offsets)

    reference, coord = on_reference(sample), points.coord.numpy()
    voxels = sample()
    case = f"voxelize {points.describe()[-24:]}, {size:g} m, {len(voxels)} voxels"
    check_equal(
        case,
        {"kernels": _as_arrays(voxels), "reference": _as_arrays(reference()), "numpy": _by_numpy(coord, size)},
    )
    engines = {"kernels": sample, "reference": reference, "numpy": lambda: _by_numpy(coord, size)}
    return time_interleaved(case, len(coord), engines, rounds)


def _as_arrays(voxels: UniqueVoxels) -> Arrays:
    return voxels.first.numpy(), voxels.inverse.numpy(), voxels.counts.numpy()


def _by_numpy(coord: np.ndarray, size: float) -> Arrays:
    """As one writes it by hand: cells, one packed key per point, ``np.unique``."""
    cells = np.floor(coord.astype(np.float64) / size).astype(np.int64)
    cells -= cells.min(0)
    extent = cells.max(0) + 1
    keys = (cells[:, 0] * extent[1] + cells[:, 1]) * extent[2] + cells[:, 2]
    _, first, inverse, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    return first, inverse.reshape(-1), counts
