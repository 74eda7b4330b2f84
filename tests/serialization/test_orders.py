"""Orders of a batch, their permutations, and pooled levels against orders built from scratch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pc3d import Points
from pc3d.errors import InputError
from pc3d.ops import serialize as ops
from pc3d.ops.backend import use_backend
from pc3d.ops.serialize import curve_codes
from pc3d.ops.voxelize import unique_voxels
from pc3d.serialization import CURVES, Serialization, grid_depth, orders, serialize, serialize_points

BACKENDS = ["reference", "auto"]


def _batch(*counts: int, edge: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Cells (with duplicates where clouds are dense) and offsets."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randint(0, edge, (sum(counts), 3), generator=generator, dtype=torch.int32)
    return cells, torch.tensor([0, *counts]).cumsum(0)


BATCHES = {
    "one cloud": _batch(700),
    "clouds": _batch(300, 200, 400),
    "empty clouds": _batch(0, 300, 0, 0, 150, 0),
    "duplicates": _batch(400, 300, edge=4),
    "one point": _batch(1),
    "no points": _batch(0),
    "no clouds": _batch(),
    "deep": _batch(300, 100, edge=60000),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BATCHES)
def test_each_order_sorts_its_codes_cloud_after_cloud(name: str, backend: str) -> None:
    grid, offsets = BATCHES[name]
    with use_backend(backend):
        serialization = serialize(grid, offsets)
        assert serialization.depth == grid_depth(grid)
        assert serialization.num_points == len(grid)
        assert [o.curve for o in serialization] == list(CURVES)
        codes = curve_codes(grid, offsets, serialization.depth, CURVES)
        for order, expected in zip(serialization, codes, strict=True):
            assert torch.equal(order.code, expected)
            assert torch.equal(order.order, torch.argsort(expected, stable=True))
            assert torch.equal(order.order[order.inverse], torch.arange(len(grid)))
            for start, end in itertools.pairwise(offsets.tolist()):
                assert torch.equal(order.order[start:end].sort().values, torch.arange(start, end))


def test_an_order_is_sorted_once_and_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counting(codes: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(codes))
        return ops.sort_codes(codes)

    monkeypatch.setattr(orders, "sort_codes", counting)
    serialization = serialize(*BATCHES["clouds"])
    assert not calls
    first = serialization[2].order
    shuffled = serialization.permuted([2, 0, 3, 1])
    assert shuffled[0].order is first
    assert shuffled[0].inverse is serialization[2].inverse
    assert calls == [900]


def test_permutations_are_checked_and_drawn_from_the_generator() -> None:
    serialization = serialize(*BATCHES["clouds"], curves=["z", "hilbert", "z-trans"])
    assert [o.curve for o in serialization.permuted([1, 2, 0])] == ["hilbert", "z-trans", "z"]
    for wrong in ([0, 1], [0, 1, 1], [0, 1, 3]):
        with pytest.raises(ValueError, match="is not a permutation of 3 orders"):
            serialization.permuted(wrong)

    def draws(seed: int) -> list[tuple[str, ...]]:
        generator = torch.Generator().manual_seed(seed)
        return [tuple(o.curve for o in serialization.shuffled(generator)) for _ in range(60)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert len(set(draws(1))) == 6
    drawn = torch.randperm(3, generator=torch.Generator().manual_seed(1)).tolist()
    assert draws(1)[0] == tuple(serialization[i].curve for i in drawn)


def _check_pooled(grid: Tensor, offsets: Tensor, parent: Serialization, levels: int) -> tuple[Tensor, Serialization]:
    """Compare with a serialization of the coarse cells; gives the coarse cells in their rows' order."""
    child, pooling = parent.pooled(levels)
    coarse = grid >> levels
    heads = coarse[pooling.heads]
    distinct = unique_voxels(coarse, offsets)
    assert torch.equal(child.offsets, distinct.voxel_offsets)
    assert child.depth == parent.depth - levels
    expected = serialize(heads, child.offsets, [o.curve for o in parent], child.depth)
    for found, wanted in zip(child, expected, strict=True):
        assert found.curve == wanted.curve
        assert torch.equal(found.code, wanted.code)
        assert torch.equal(found.order, wanted.order)
        assert torch.equal(found.inverse, wanted.inverse)
    assert torch.equal(child[0].order, torch.arange(len(heads)))
    assert (child[0].code.diff() > 0).all(), "cells are distinct, in the order of the first curve"
    assert torch.equal(heads[pooling.cluster], coarse)
    assert torch.equal(pooling.rows.sort().values, torch.arange(len(grid)))
    counts = pooling.row_offsets.diff()
    assert (counts > 0).all()
    assert torch.equal(pooling.cluster[pooling.rows], torch.repeat_interleave(torch.arange(len(counts)), counts))
    return heads, child


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_pooled_levels_are_those_of_the_coarse_cells(name: str, first: int, backend: str) -> None:
    grid, offsets = BATCHES[name]
    with use_backend(backend):
        level = serialize(grid, offsets).permuted([first, *(i for i in range(4) if i != first)])
        for levels in (1, 2, 0, 1):
            if levels > level.depth:
                continue
            grid, level = _check_pooled(grid, level.offsets, level, levels)
            level = level.shuffled(torch.Generator().manual_seed(first))


def test_pooling_deeper_than_the_grid_merges_equal_cells_only() -> None:
    grid, offsets = BATCHES["duplicates"]
    level = serialize(grid, offsets)
    child, pooling = level.pooled(level.depth + 1)
    assert child.depth == level.depth
    assert torch.equal(child[1].code, level[1].code[pooling.heads])
    assert child.num_points == len(unique_voxels(grid, offsets))
    whole, _ = level.pooled(level.depth)
    assert whole.depth == 0
    assert whole[3].code.tolist() == [0, 1]


def test_a_forced_depth_must_hold_the_cells() -> None:
    grid, offsets = BATCHES["clouds"]
    assert serialize(grid, offsets, ["hilbert"], depth=16).depth == 16
    with pytest.raises(InputError, match="does not fit depth 4"):
        serialize(grid, offsets, ["hilbert"], depth=4)
    with pytest.raises(InputError, match="serialization needs a curve"):
        serialize(grid, offsets, [])


def test_offsets_must_fit_the_cells() -> None:
    grid, _ = BATCHES["clouds"]
    for wrong in (torch.tensor([0, 899]), torch.tensor([1, 900]), torch.tensor([0, 500, 400, 900])):
        for backend in BACKENDS:
            with use_backend(backend), pytest.raises(ValueError, match="offsets must rise from 0 to 900"):
                serialize(grid, wrong)


def test_points_are_serialized_by_their_grid_and_named_in_errors() -> None:
    grid, offsets = BATCHES["clouds"]
    points = Points(grid.float(), offsets, {"grid_coord": grid}, [{"name": "room"}, {}, {}])
    found = serialize_points(points, ["hilbert"], depth=9)
    assert torch.equal(found[0].code, serialize(grid, offsets, ["hilbert"], depth=9)[0].code)
    broken = grid.clone()
    broken[7, 0] = -1
    with pytest.raises(InputError, match=r"^room and 2 more: field 'grid_coord': cell -1 of point 7 on axis x is neg"):
        serialize_points(points.with_attrs(grid_coord=broken))
    with pytest.raises(InputError, match="room and 2 more: field 'grid_coord' is missing"):
        serialize_points(points.without_attrs("grid_coord"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", BATCHES)
def test_gpu_gives_the_same_levels(name: str) -> None:
    grid, offsets = BATCHES[name]
    here, there = serialize(grid, offsets), serialize(grid.cuda(), offsets.cuda())
    for _ in range(2):
        assert torch.equal(there.offsets.cpu(), here.offsets)
        for a, b in zip(here, there, strict=True):
            assert torch.equal(a.order, b.order.cpu())
            assert torch.equal(a.inverse, b.inverse.cpu())
        (here, at_home), (there, abroad) = here.pooled(), there.pooled()
        assert torch.equal(at_home.cluster, abroad.cluster.cpu())
