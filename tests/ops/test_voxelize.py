"""Grid cells and distinct voxels: the C++ kernels and the plain-torch reference against numpy."""

from __future__ import annotations

import itertools
import multiprocessing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pc3d.errors import InputError
from pc3d.ops.backend import cpu_kernels, use_backend
from pc3d.ops.voxelize import MAX_CELLS_PER_AXIS, UniqueVoxels, grid_coords, random_rows, unique_voxels

BACKENDS = ["reference", "auto"]


def _offsets(*counts: int) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def _cloud(rows: int, seed: int = 0, scale: float = 10.0) -> Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed)) * scale


def _clouds() -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (coord, offsets): the inputs that break voxelizers."""
    return {
        "random": (_cloud(5000), _offsets(5000)),
        "batch": (_cloud(3000), _offsets(1000, 500, 1500)),
        "empty elements": (_cloud(700), _offsets(0, 300, 0, 0, 400, 0)),
        "no points": (_cloud(0), _offsets(0)),
        "no clouds": (_cloud(0), torch.zeros(1, dtype=torch.int64)),
        "one point": (_cloud(1), _offsets(1)),
        "one voxel": (_cloud(1000, scale=1e-6) + 0.05, _offsets(1000)),
        "duplicates": (_cloud(50).repeat(20, 1), _offsets(400, 600)),
        "huge": (_cloud(500) + torch.tensor([6.5e5, -4.9e6, 120.0]), _offsets(500)),
        "on cell borders": (torch.randint(-30, 30, (2000, 3)) * 0.1, _offsets(900, 1100)),
        "non-contiguous": (_cloud(4000, seed=3).repeat(1, 2)[::2, 1:4], _offsets(2000)),
        "float64": (_cloud(800).double() * 1e3 + 4.9e6, _offsets(800)),
        "half": (_cloud(800).half(), _offsets(800)),
        "needs gradient": (_cloud(100).requires_grad_(), _offsets(100)),
    }


CLOUDS = _clouds()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CLOUDS)
def test_grid_coords_is_floor_from_the_lowest_cell_of_each_cloud(name: str, backend: str) -> None:
    coord, offsets = CLOUDS[name]
    with use_backend(backend):
        grid = grid_coords(coord, offsets, 0.1)
    expected = np.floor(coord.detach().double().numpy() / 0.1)
    for start, end in itertools.pairwise(offsets.tolist()):
        if end > start:
            expected[start:end] -= expected[start:end].min(0)
    assert grid.dtype == torch.int32
    np.testing.assert_array_equal(grid.numpy(), expected.astype(np.int32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_grid_coords_refuses_what_does_not_fit(backend: str) -> None:
    coord, offsets = _cloud(100), _offsets(40, 60)
    with use_backend(backend):
        for size in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(InputError, match="grid size must be"):
                grid_coords(coord, offsets, size)
        for bad in (float("nan"), float("inf"), -float("inf")):
            broken = coord.clone()
            broken[70, 1] = bad
            with pytest.raises(InputError, match=r"1 points have non-finite coordinates \(first: point 70"):
                grid_coords(broken, offsets, 0.1)
        edge = torch.tensor([[0.0, 0, 0], [0, MAX_CELLS_PER_AXIS - 1, 0]])
        assert grid_coords(edge, _offsets(2), 1.0)[1, 1] == MAX_CELLS_PER_AXIS - 1
        with pytest.raises(InputError, match=f"axis y into {MAX_CELLS_PER_AXIS + 1} cells"):
            grid_coords(edge + torch.tensor([[0.0], [1.0]]), _offsets(2), 1.0)
        far = torch.tensor([[0.0, 0, 0], [1e30, 0, 0]])
        with pytest.raises(InputError, match="axis x"):
            grid_coords(far, _offsets(2), 0.01)
        with pytest.raises(InputError, match="grid size 1e-308 m cuts axis"):
            grid_coords(torch.full((2, 3), 3e38), _offsets(2), 1e-308)
        assert grid_coords(far, _offsets(1, 1), 0.01).eq(0).all(), "each cloud counts from its own lowest cell"


def _check_against_numpy(voxels: UniqueVoxels, grid: Tensor, offsets: Tensor) -> None:
    batch = np.repeat(np.arange(len(offsets) - 1), offsets.diff().numpy())
    rows = np.column_stack([batch, grid.numpy().astype(np.int64)])
    _, first, inverse, counts = np.unique(rows, axis=0, return_index=True, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(-1)
    np.testing.assert_array_equal(voxels.first.numpy(), first)
    np.testing.assert_array_equal(voxels.inverse.numpy(), inverse)
    np.testing.assert_array_equal(voxels.counts.numpy(), counts)
    np.testing.assert_array_equal(voxels.order_rows.numpy(), np.argsort(inverse, kind="stable"))
    per_cloud = np.bincount(batch[first], minlength=len(offsets) - 1)
    np.testing.assert_array_equal(voxels.voxel_offsets.diff().numpy(), per_cloud)
    assert voxels.voxel_offsets[0] == 0
    assert all(t.dtype == torch.int64 for t in vars(voxels).values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CLOUDS)
def test_unique_voxels_in_raster_order(name: str, backend: str) -> None:
    coord, offsets = CLOUDS[name]
    grid = grid_coords(coord, offsets, 0.7) - 5
    with use_backend(backend):
        voxels = unique_voxels(grid, offsets)
    _check_against_numpy(voxels, grid, offsets)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=0, max_size=6),
    low=st.integers(-(2**31), 2**31 - 1),
    span=st.tuples(*[st.sampled_from([1, 2, 3, 100, 70000, 2**20])] * 3),
    seed=st.integers(0, 1000),
)
def test_unique_voxels_of_arbitrary_int32_grids(counts: list[int], low: int, span: tuple[int, ...], seed: int) -> None:
    low = min(low, 2**31 - 1 - max(span))
    random = np.random.default_rng(seed)
    grid = torch.from_numpy(random.integers(low, np.array(span) + low, (sum(counts), 3)).astype(np.int32))
    offsets = _offsets(*counts)
    with use_backend("reference"):
        _check_against_numpy(unique_voxels(grid, offsets), grid, offsets)
    _check_against_numpy(unique_voxels(grid, offsets), grid, offsets)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unique_voxels_in_input_order_are_the_same_voxels(backend: str) -> None:
    coord, offsets = CLOUDS["batch"]
    grid = grid_coords(coord, offsets, 2.0)
    with use_backend(backend):
        raster, as_given = unique_voxels(grid, offsets), unique_voxels(grid, offsets, "input")
    assert torch.equal(as_given.first, raster.first.sort().values)
    assert torch.equal(as_given.first[as_given.inverse], raster.first[raster.inverse])
    assert torch.equal(as_given.counts, torch.bincount(as_given.inverse))
    assert torch.equal(as_given.order_rows, torch.argsort(as_given.inverse, stable=True))
    assert torch.equal(as_given.voxel_offsets, raster.voxel_offsets)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unique_voxels_refuses_keys_beyond_63_bits(backend: str) -> None:
    grid = torch.tensor([[0, 0, 0], [2**21 - 1, 2**21 - 1, 2**21 - 1]], dtype=torch.int32)
    with use_backend(backend):
        assert len(unique_voxels(grid, _offsets(2))) == 2
        with pytest.raises(InputError, match="a batch of 2 clouds over 2097152 x 2097152 x 2097152 cells"):
            unique_voxels(grid, _offsets(1, 1))
        with pytest.raises(ValueError, match="int32"):
            unique_voxels(grid.long(), _offsets(2))


def test_any_thread_count_gives_the_same_bits() -> None:
    coord = _cloud(120_000, seed=5)
    offsets = _offsets(50_000, 0, 70_000)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            grid = grid_coords(coord, offsets, 0.3)
            results.append([grid, *vars(unique_voxels(grid, offsets)).values()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


class _SampledClouds(Dataset[Tensor]):
    """One cloud, voxelized where it is asked for, with the thread count of the parent."""

    def __init__(self, coord: Tensor, threads: int) -> None:
        self.coord, self.threads = coord, threads

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Tensor:
        torch.set_num_threads(self.threads)  # a worker starts with one thread; ask for trouble
        offsets = _offsets(len(self.coord))
        return unique_voxels(grid_coords(self.coord, offsets, 0.3), offsets).inverse


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.skipif(cpu_kernels() is None, reason="C++ kernels are not built")
def test_kernels_run_in_workers_forked_after_the_parent_used_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        clouds = _SampledClouds(_cloud(100_000, seed=7), threads=4)
        expected = clouds[0]
        loader = DataLoader(clouds, batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60)
        assert torch.equal(next(iter(loader)), expected)
    finally:
        torch.set_num_threads(before)


def test_random_rows_draws_each_point_of_a_voxel() -> None:
    grid = torch.tensor([[0, 0, 0]] * 3 + [[1, 0, 0]] + [[2, 0, 0]] * 2, dtype=torch.int32)
    voxels = unique_voxels(grid, _offsets(6))
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([random_rows(voxels, generator) for _ in range(600)])
    assert [sorted(set(column.tolist())) for column in draws.T] == [[0, 1, 2], [3], [4, 5]]
    assert torch.bincount(draws[:, 0]).min() > 150
