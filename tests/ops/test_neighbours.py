"""Nearest neighbours and farthest point sampling, kernels against the reference, bit for bit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from pc3d.ops.backend import cpu_kernels, use_backend
from pc3d.ops.neighbours import farthest_points, knn, nearest_rows

COUNTS = [300, 0, 1, 17, 40]


def _offsets(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def _clouds(kind: str, counts: list[int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    total = sum(counts)
    points = torch.randn(total, 3, generator=generator)
    return {
        "random": points,
        "grid": torch.randint(0, 4, (total, 3), generator=generator).float(),  # many ties and duplicates
        "equal": torch.ones(total, 3),
        "plane": points * torch.tensor([1.0, 1.0, 0.0]),
        "far": points * 1e-3 + 1e6,
        "wide": points * 1e12,
        "uneven": points * 10 ** (6 * torch.rand(total, 1, generator=generator) - 6),
    }[kind]


KINDS = ["random", "grid", "equal", "plane", "far", "wide", "uneven"]


@pytest.mark.parametrize("radius", [math.inf, 0.7])
@pytest.mark.parametrize("k", [1, 3, 20, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_knn_equals_sorting_all_distances(kind: str, k: int, radius: float) -> None:
    coord, offsets = _clouds(kind, COUNTS), _offsets(COUNTS)
    counts = [50, 9, 4, 0, 60]
    query, query_offsets = _clouds(kind, counts, seed=1), _offsets(counts)
    with use_backend("reference"):
        expected = knn(query, query_offsets, coord, offsets, k, radius)
    rows, distances = knn(query, query_offsets, coord, offsets, k, radius)
    assert torch.equal(distances, expected[1])
    assert torch.equal(rows, expected[0])
    for q, (begin, end) in enumerate(itertools.pairwise(query_offsets.tolist())):
        inside = rows[begin:end][rows[begin:end] >= 0]
        assert bool(((inside >= offsets[q]) & (inside < offsets[q + 1])).all())


def test_points_find_themselves_first() -> None:
    coord, offsets = _clouds("random", COUNTS), _offsets(COUNTS)
    rows, distances = knn(coord, offsets, coord, offsets, 2)
    assert torch.equal(rows[:, 0], torch.arange(len(coord)))
    assert not distances[:, 0].any()


@pytest.mark.parametrize("kind", KINDS)
def test_farthest_points_equal_the_reference(kind: str) -> None:
    coord, offsets = _clouds(kind, COUNTS), _offsets(COUNTS)
    sampled = _offsets([75, 0, 1, 17, 0])
    starts = torch.tensor([5, 0, 0, 16, 0])
    with use_backend("reference"):
        expected = farthest_points(coord, offsets, sampled, starts)
    assert torch.equal(farthest_points(coord, offsets, sampled, starts), expected)
    assert expected[0] == 5


def test_the_same_rows_for_any_number_of_threads() -> None:
    counts = [2000, 900, 10]
    coord, offsets, before = _clouds("random", counts), _offsets(counts), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            sampled = farthest_points(coord, offsets, _offsets([200, 90, 5]))
            found.append([*knn(coord, offsets, coord, offsets, 8), sampled])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def _scan(count: int) -> Tensor:
    """A floor, a dense pole, an isolated far cluster and copies: density over four orders of magnitude."""
    generator = torch.Generator().manual_seed(count)
    points = torch.rand(4, count // 4, 3, generator=generator) * torch.tensor([4.0, 4.0, 0.01])
    points[1] *= torch.tensor([1e-3, 1e-3, 200.0])
    points[2] = points[2] * 1e-3 + 500
    points[3] = points[0, torch.randint(0, 40, (count // 4,), generator=generator)]
    return points.reshape(-1, 3)[torch.randperm(count // 4 * 4, generator=generator)]


@pytest.mark.parametrize(("k", "radius"), [(1, math.inf), (16, math.inf), (16, 0.05), (150, math.inf), (300, 0.3)])
def test_every_instruction_set_gives_the_same_bits(k: int, radius: float) -> None:
    kernels = cpu_kernels()
    if kernels is None:
        pytest.skip("the C++ extension is not built")
    coord = torch.cat([_scan(3000), _clouds("random", [2])])
    offsets = torch.tensor([0, len(coord) - 2, len(coord)])
    with use_backend("reference"):
        expected = knn(coord, offsets, coord, offsets, k, radius)
        sampled = farthest_points(coord, offsets, torch.tensor([0, 400, 402]))
    for isa in kernels.neighbour_isas():
        rows, distances = torch.empty(len(coord), k, dtype=torch.int64), torch.empty(len(coord), k)
        kernels.knn(coord, offsets, coord, offsets, radius * radius, rows, distances, isa)
        assert torch.equal(distances, expected[1]), isa
        assert torch.equal(rows, expected[0]), isa
        out = torch.empty(402, dtype=torch.int64)
        kernels.farthest_points(
            coord, offsets, torch.tensor([0, 400, 402]), torch.zeros(2, dtype=torch.int64), out, isa
        )
        assert torch.equal(out, sampled), isa


def test_rows_alone_are_those_of_knn() -> None:
    coord, offsets = torch.cat([_clouds("grid", COUNTS), _scan(1000)]), _offsets([*COUNTS, 1000])
    rows = nearest_rows(coord, offsets, 18)
    assert rows.dtype == torch.int32
    assert torch.equal(rows.long(), knn(coord, offsets, coord, offsets, 18)[0])


@pytest.mark.parametrize("kind", [*KINDS, "scan"])
@pytest.mark.parametrize(("k", "inner"), [(16, 11), (16, 16), (16, 1), (11, 11), (31, 20), (32, 7), (40, 7)])
def test_the_inner_rows_come_first(kind: str, k: int, inner: int) -> None:
    kernels = cpu_kernels()
    if kernels is None:
        pytest.skip("the C++ extension is not built")
    counts = [600, 0, 1, 5, 12, 33, 200]
    coord = torch.cat([_scan(600), _clouds("random", counts[1:])]) if kind == "scan" else _clouds(kind, counts)
    offsets = _offsets(counts)
    with use_backend("reference"):
        expected = nearest_rows(coord, offsets, k)

    def parts(rows: Tensor) -> Tensor:
        return torch.cat([rows[:, :inner].sort(1)[0], rows[:, inner:].sort(1)[0]], 1)

    for isa, along_curve in itertools.product(kernels.neighbour_isas(), [False, True]):
        found = kernels.near_rows(coord, offsets, k, inner, along_curve, isa)
        assert torch.equal(parts(found), parts(expected)), (isa, along_curve)
        assert torch.equal(kernels.near_rows(coord, offsets, k, 0, along_curve, isa), expected), (isa, along_curve)
    assert torch.equal(nearest_rows(coord, offsets, k, inner), kernels.near_rows(coord, offsets, k, inner))
    with pytest.raises(ValueError, match=f"inner must be in 0..{k}, got {k + 1}"):
        nearest_rows(coord, offsets, k, k + 1)


def test_clouds_that_int32_rows_cannot_number_are_refused() -> None:
    many, offsets = torch.zeros(1, 3).expand(1 << 31, 3), torch.tensor([0, 1 << 31])
    with pytest.raises(ValueError, match="less than 2147483647 points, got 2147483648"):
        knn(many, offsets, many, offsets, 1)
    with pytest.raises(ValueError, match="less than 2147483647 points, got 2147483648"):
        nearest_rows(many, offsets, 1)
    with pytest.raises(ValueError, match="less than 2147483647 points, got 2147483648"):
        farthest_points(many, offsets, torch.tensor([0, 1]))


def test_bad_input() -> None:
    coord, offsets = torch.zeros(4, 3), _offsets([4])
    with pytest.raises(ValueError, match="k must be at least 1"):
        knn(coord, offsets, coord, offsets, 0)
    with pytest.raises(ValueError, match="not finite"):
        knn(coord, offsets, coord / 0, offsets, 1)
    with pytest.raises(ValueError, match="float32"):
        knn(coord.double(), offsets, coord, offsets, 1)
    with pytest.raises(ValueError, match="2 clouds, points 1"):
        knn(coord, _offsets([2, 2]), coord, offsets, 1)
    with pytest.raises(ValueError, match=r"cannot take \[5\] points of clouds of \[4\]"):
        farthest_points(coord, offsets, _offsets([5]))
