"""Point operations: neighbours, farthest points, balls, distinct voxels and segments, beside every installed peer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pc3d.bench.timing import Timing, time_interleaved
from pc3d.errors import InputError
from pc3d.ops.neighbours import farthest_points, knn
from pc3d.ops.segment import segment_max, segment_mean
from pc3d.ops.voxelize import grid_coords, unique_voxels
from pc3d.points import Points

NEIGHBOURS = (16, 32)
FEW, SAMPLES = 8192, 1024  # points, and samples of them
MANY = 40_000  # points, a quarter of which is sampled
BALL, IN_BALL = 0.2, 32  # metres, neighbours at most
CHANNELS = 64
MOST_PAIRS = 1 << 24  # distances that NumPy is made to compute
TOLERANCE = 1e-4

Engines = dict[str, Callable[[], Any]]


def bench(points: Points, size: float, rounds: int) -> list[Timing]:
    """Every operation on one cloud; voxels and segments are its cells of ``size`` metres.

    Raises:
        InputError: if an engine finds other neighbours, samples, voxels or sums than the kernels.
    """
    coord, name = points.coord.contiguous(), points.describe()[-24:]
    order = torch.randperm(len(coord), generator=torch.Generator().manual_seed(0))
    few, many = coord[order[:FEW]], coord[order[:MANY]]
    centres = few[: min(SAMPLES, len(few) // 2)]
    cases: list[tuple[str, Tensor, Engines]] = []
    for k in NEIGHBOURS:
        cases.append((f"knn {k} of {name}", coord, _searches(coord, coord, min(k, len(coord)))))
    ball = _searches(few, centres, min(IN_BALL, len(few)), BALL)
    cases.append((f"ball {BALL} m, {IN_BALL} of {len(few)}", centres, ball))
    for cloud, count in ((few, len(centres)), (many, len(many) // 4)):
        cases.append((f"farthest {count} of {len(cloud)}", cloud, _samplings(cloud, count)))
    cells, voxels = _distinct(points, size)
    cases.append((f"distinct voxels of {size:g} m", coord, voxels))
    for reduce, engines in _reductions(cells, len(coord)).items():
        cases.append((f"{reduce} of {CHANNELS} channels in voxels", coord, engines))
    timings = []
    for case, rows, engines in cases:
        _check_alike(case, {engine: _comparable(run(), rows) for engine, run in engines.items()})
        timings += time_interleaved(case, len(rows), engines, rounds)
    return timings


def _comparable(found: Any, coord: Tensor) -> np.ndarray:
    """What engines must agree on. Of samples that is how far points are from them: of equal distances, any may win."""
    found = np.asarray(found)
    if found.ndim != 1 or len(found) == len(coord):
        return found
    found = coord.numpy()[found]
    ends, taken = torch.tensor([0, len(coord)]), torch.tensor([0, len(found)])
    return knn(coord, ends, torch.from_numpy(found), taken, 1)[1].max().sqrt().numpy()


def _check_alike(case: str, results: Mapping[str, np.ndarray]) -> None:
    (first, expected), *others = results.items()
    for name, found in others:
        if found.shape != expected.shape or not np.allclose(found, expected, TOLERANCE, TOLERANCE):
            raise InputError(f"{case}: {name} and {first} do not give the same result; no times are shown")


def _searches(coord: Tensor, query: Tensor, k: int, radius: float = np.inf) -> Engines:
    """Build and search; each returns the distances (Q, k), the radius where a ball has fewer."""
    from scipy.spatial import cKDTree

    ends, query_ends = torch.tensor([0, len(coord)]), torch.tensor([0, len(query)])
    array, centres = coord.numpy(), query.numpy()

    def kernels() -> Tensor:
        return knn(query, query_ends, coord, ends, k, radius)[1].sqrt_().clamp_(max=radius)

    def scipy() -> np.ndarray:
        found = cKDTree(array).query(centres, k, distance_upper_bound=radius, workers=torch.get_num_threads())[0]
        return np.minimum(found.reshape(len(centres), k), radius)

    engines: Engines = {"kernels": kernels, "scipy": scipy}
    if find_spec("open3d"):
        core = import_module("open3d").core

        def open3d() -> np.ndarray:
            search, wanted = core.nns.NearestNeighborSearch(core.Tensor(array)), core.Tensor(centres)
            if np.isfinite(radius):
                search.hybrid_index(radius)
                _, squared, counts = search.hybrid_search(wanted, radius, k)
                empty = np.arange(k) >= counts.numpy()[:, None]
                return np.where(empty, radius, np.sqrt(squared.numpy()))
            search.knn_index()
            return np.sqrt(search.knn_search(wanted, k)[1].numpy())

        engines["open3d"] = open3d
    return engines


def _samplings(coord: Tensor, count: int) -> Engines:
    """Each returns the rows of the samples. Open3D takes seconds for the smallest case and is left out."""
    ends, taken, array = torch.tensor([0, len(coord)]), torch.tensor([0, count]), coord.numpy()
    engines: Engines = {"kernels": lambda: farthest_points(coord, ends, taken)}
    if find_spec("fpsample"):
        sample = import_module("fpsample").fps_sampling
        engines["fpsample"] = lambda: sample(array, count, start_idx=0).astype(np.int64)
    if count * len(coord) <= MOST_PAIRS:
        engines["numpy"] = lambda: _farthest_by_numpy(array, count)
    return engines


def _farthest_by_numpy(coord: np.ndarray, count: int) -> np.ndarray:
    distance, chosen, rows = np.full(len(coord), np.inf, np.float32), 0, np.empty(count, np.int64)
    for i in range(count):
        rows[i] = chosen
        distance = np.minimum(distance, np.square(coord - coord[chosen]).sum(1))
        chosen = int(distance.argmax())
    return rows


def _distinct(points: Points, size: float) -> tuple[Tensor, Engines]:
    """Engines that number the voxels of points in raster order, (N,) each; and this number."""
    cells = grid_coords(points.coord, points.offsets, size)
    bits = [int(most).bit_length() for most in cells.amax(0)]
    keys = (cells[:, 0].long() << bits[1] + bits[2]) | (cells[:, 1].long() << bits[2]) | cells[:, 2].long()
    array = keys.numpy()
    engines: Engines = {
        "kernels": lambda: unique_voxels(cells, points.offsets).inverse,
        "torch": lambda: keys.unique(return_inverse=True)[1],
        "numpy": lambda: np.unique(array, return_inverse=True)[1],
    }
    return keys.unique(return_inverse=True)[1], engines


def _reductions(voxel: Tensor, rows: int) -> Mapping[str, Engines]:
    """Mean and maximum of the rows of each voxel, (M, CHANNELS)."""
    values = torch.randn(rows, CHANNELS, generator=torch.Generator().manual_seed(0))
    counts = voxel.bincount()
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    owner, index = voxel.sort().values, voxel.sort().values[:, None].expand(-1, CHANNELS)

    def index_add() -> Tensor:
        return values.new_zeros(len(counts), CHANNELS).index_add_(0, owner, values) / counts[:, None]

    def scattered(reduce: str) -> Callable[[], Tensor]:
        return lambda: values.new_zeros(len(counts), CHANNELS).scatter_reduce_(
            0, index, values, reduce, include_self=False
        )

    def runs(reduce: str) -> Callable[[], Tensor]:
        return lambda: torch.segment_reduce(values, reduce, offsets=ends, axis=0, unsafe=True)

    return {
        "mean": {
            "kernels": lambda: segment_mean(values, ends),
            "segment_reduce": runs("mean"),
            "index_add": index_add,
            "scatter_reduce": scattered("mean"),
        },
        "max": {
            "kernels": lambda: segment_max(values, ends),
            "segment_reduce": runs("max"),
            "scatter_reduce": scattered("amax"),
        },
    }
