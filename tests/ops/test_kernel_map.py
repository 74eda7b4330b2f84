"""Kernel maps against a dictionary of voxels, written from the definitions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pc3d import InputError
from pc3d.ops.backend import use_backend
from pc3d.ops.kernel_map import KernelMap, output_shape, strided_map, submanifold_map, transposed_map

Pair = tuple[int, tuple[int, ...], tuple[int, ...]]

triples = lambda low, high: st.tuples(*[st.integers(low, high)] * 3)  # noqa: E731
# Voxels of up to three clouds in a small box, and one that may lie far away.
voxels = st.lists(st.tuples(st.integers(0, 2), *[st.integers(-4, 4)] * 3), max_size=40, unique=True)
far = st.tuples(st.just(1), *[st.sampled_from([-100_003, 30_000, 100_001])] * 3)
grids = st.builds(
    lambda near, away: torch.tensor([*near, away] if away else near).reshape(-1, 4).int(), voxels, far | st.none()
)
thorough = settings(max_examples=40, deadline=None)


@pytest.fixture(params=["auto", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_backend(request.param):
        yield


def pairs(kmap: KernelMap, in_coord: Tensor, out_coord: Tensor) -> list[Pair]:
    """The pairs as coordinates, after checking the promises of :class:`KernelMap`."""
    assert kmap.in_rows.dtype == kmap.out_rows.dtype == torch.int32
    assert kmap.offsets.dtype == torch.int64
    assert (kmap.num_in, kmap.num_out) == (len(in_coord), len(out_coord))
    assert len(kmap.out_rows) == kmap.num_pairs == int(kmap.offsets[-1])
    found: list[Pair] = []
    for k, (start, end) in enumerate(itertools.pairwise(kmap.offsets.tolist())):
        outs, ins = kmap.out_rows[start:end].long(), kmap.in_rows[start:end].long()
        assert bool((outs.diff() > 0).all())
        assert len(ins.unique()) == len(ins)
        rows = zip(in_coord[ins].tolist(), out_coord[outs].tolist(), strict=True)
        found += [(k, tuple(i), tuple(o)) for i, o in rows]
    return sorted(found)


def offsets(kernel: tuple[int, int, int]) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, kernel)))


@pytest.mark.parametrize("choice", ["auto", "reference"])
@thorough
@given(coord=grids, kernel=triples(1, 4), dilation=triples(1, 2))
def test_submanifold(choice, coord, kernel, dilation):
    with use_backend(choice):
        kmap = submanifold_map(coord, kernel, dilation)
    cells = set(map(tuple, coord.tolist()))
    expected = []
    for (k, offset), (b, *xyz) in itertools.product(enumerate(offsets(kernel)), cells):
        source = (b, *[c + (o - n // 2) * d for c, o, n, d in zip(xyz, offset, kernel, dilation, strict=True)])
        if source in cells:
            expected.append((k, source, (b, *xyz)))
    assert pairs(kmap, coord, coord) == sorted(expected)


@pytest.mark.parametrize("choice", ["auto", "reference"])
@thorough
@given(
    coord=grids,
    kernel=triples(1, 3),
    stride=triples(1, 3),
    padding=triples(0, 2),
    dilation=triples(1, 2),
    shape=triples(1, 6) | st.none(),
)
def test_strided(choice, coord, kernel, stride, padding, dilation, shape):
    with use_backend(choice):
        out_coord, kmap = strided_map(coord, kernel, stride, padding, dilation, shape)
        inverse = kmap.inverse()
    bound = None if shape is None else output_shape(shape, kernel, stride, padding, dilation)
    expected = []
    for (k, offset), (b, *xyz) in itertools.product(enumerate(offsets(kernel)), coord.tolist()):
        fine = [c + p - o * d for c, p, o, d in zip(xyz, padding, offset, dilation, strict=True)]
        if any(f % s for f, s in zip(fine, stride, strict=True)):
            continue
        coarse = [f // s for f, s in zip(fine, stride, strict=True)]
        if bound is None or all(0 <= c < n for c, n in zip(coarse, bound, strict=True)):
            expected.append((k, (b, *xyz), (b, *coarse)))
    assert out_coord.dtype == torch.int32
    assert list(map(tuple, out_coord.tolist())) == sorted({out for _, _, out in expected})
    assert pairs(kmap, coord, out_coord) == sorted(expected)
    assert pairs(inverse, out_coord, coord) == sorted((k, o, i) for k, i, o in expected)
    assert kmap.inverse() is inverse


@pytest.mark.parametrize("choice", ["auto", "reference"])
@thorough
@given(
    coord=grids,
    kernel=triples(1, 3),
    stride=triples(1, 3),
    padding=triples(0, 2),
    dilation=triples(1, 2),
    shape=triples(1, 6) | st.none(),
)
def test_transposed(choice, coord, kernel, stride, padding, dilation, shape):
    with use_backend(choice):
        out_coord, kmap = transposed_map(coord, kernel, stride, padding, dilation, shape)
    expected = []
    for (k, offset), (b, *xyz) in itertools.product(enumerate(offsets(kernel)), coord.tolist()):
        axes = list(zip(xyz, offset, stride, padding, dilation, strict=True))
        fine = [c * s - p + o * d for c, o, s, p, d in axes]
        if shape is not None:
            sizes = zip(shape, kernel, stride, padding, dilation, strict=True)
            bound = [(n - 1) * s - 2 * p + d * (m - 1) + 1 for n, m, s, p, d in sizes]
            if not all(0 <= f < n for f, n in zip(fine, bound, strict=True)):
                continue
        expected.append((k, (b, *xyz), (b, *fine)))
    assert list(map(tuple, out_coord.tolist())) == sorted({out for _, _, out in expected})
    assert pairs(kmap, coord, out_coord) == sorted(expected)


BUILDERS = [
    lambda coord: submanifold_map(coord, (3, 3, 3)),
    lambda coord: strided_map(coord, (2, 2, 2), (2, 2, 2)),
    lambda coord: transposed_map(coord, (2, 2, 2), (2, 2, 2)),
]


@pytest.mark.parametrize("build", BUILDERS)
def test_duplicates_are_refused(build, backend) -> None:
    coord = torch.tensor([[0, 1, 2, 3], [1, 1, 2, 3], [0, 1, 2, 3]], dtype=torch.int32)
    with pytest.raises(
        InputError, match=r"1 of 3 rows repeat another one \(first \[batch, x, y, z\] = \[0, 1, 2, 3\]\)"
    ):
        build(coord)


@pytest.mark.parametrize("build", BUILDERS)
def test_bad_coordinates_are_refused(build, backend) -> None:
    with pytest.raises(InputError, match="field 'batch' holds -1"):
        build(torch.tensor([[-1, 0, 0, 0]], dtype=torch.int32))
    big = 2**31 - 2
    with pytest.raises(InputError, match="too wide a grid"):
        build(torch.tensor([[0, -big, -big, -big], [0, big, big, big]], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"\(M, 4\) int32"):
        build(torch.zeros(3, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"\(M, 4\) int32"):
        build(torch.zeros(3, 4))


@pytest.mark.parametrize("value", [0, (1, 2), (1, 1, -1), (1, 1, 0.5)])
def test_bad_settings_are_refused(value) -> None:
    coord = torch.zeros(1, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="kernel_size must be three integers >= 1"):
        submanifold_map(coord, value)
    with pytest.raises(ValueError, match="stride must be three integers >= 1"):
        strided_map(coord, (1, 1, 1), value)


@pytest.mark.parametrize("far_apart", [2**20, 2**30])
def test_distant_clouds_do_not_meet(far_apart: int, backend: None) -> None:
    coord = torch.tensor([[0, 0, 0, 0], [0, 0, 0, far_apart], [1, 0, 0, 1], [0, 0, 0, 1]], dtype=torch.int32)
    kmap = submanifold_map(coord, (3, 3, 3))
    assert kmap.num_pairs == len(coord) + 2
