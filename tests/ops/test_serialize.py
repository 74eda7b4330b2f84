"""Codes along space-filling curves and their stable sort: both backends against loops over single bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pc3d.errors import InputError
from pc3d.ops.backend import cpu_kernels, use_backend
from pc3d.ops.serialize import CURVES, MAX_DEPTH, Curve, curve_codes, grid_depth, sort_codes

BACKENDS = ["reference", "auto"]
LARGEST = 2**MAX_DEPTH - 1
OCTANTS = torch.tensor([[i >> 2, i >> 1 & 1, i & 1] for i in range(8)], dtype=torch.int32)


def _offsets(*counts: int) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def _cells(rows: int, depth: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**depth, (rows, 3), generator=generator, dtype=torch.int32)


def _code_of_one_cell(cell: list[int], depth: int, curve: Curve) -> int:
    """Bit by bit, with python integers."""
    axes = [cell[1], cell[0], cell[2]] if curve.endswith("-trans") else list(cell)
    if curve.startswith("hilbert"):
        for level in reversed(range(depth)):
            lower = (1 << level) - 1
            for i in range(3):
                if axes[i] >> level & 1:
                    axes[0] ^= lower
                else:
                    exchange = (axes[0] ^ axes[i]) & lower
                    axes[0] ^= exchange
                    axes[i] ^= exchange
    code = parity = 0
    for level in reversed(range(depth)):
        for axis in axes:
            bit = axis >> level & 1
            parity = parity ^ bit if curve.startswith("hilbert") else bit
            code = code << 1 | parity
    return code


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("depth", range(MAX_DEPTH + 1))
def test_codes_are_those_of_a_loop_over_bits(depth: int, backend: str) -> None:
    cells = torch.cat([_cells(60, depth, seed=depth), torch.zeros(1, 3, dtype=torch.int32), OCTANTS * (2**depth - 1)])
    offsets = _offsets(20, 0, len(cells) - 20, 0)
    batch = [0] * 20 + [2] * (len(cells) - 20)
    with use_backend(backend):
        found = curve_codes(cells, offsets, depth, CURVES)
    for curve, codes in zip(CURVES, found, strict=True):
        expected = [
            cloud << 3 * depth | _code_of_one_cell(cell, depth, curve)
            for cloud, cell in zip(batch, cells.tolist(), strict=True)
        ]
        assert codes.dtype == torch.int64
        assert codes.tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_octants_are_visited_in_the_published_order(backend: str) -> None:
    with use_backend(backend):
        z, hilbert = curve_codes(OCTANTS, _offsets(8), 1, ["z", "hilbert"])
    assert z.tolist() == list(range(8))
    visited = ["".join(map(str, cell)) for cell in OCTANTS[hilbert.argsort()].tolist()]
    assert visited == ["000", "001", "011", "010", "110", "111", "101", "100"]


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_hilbert_walks_through_a_cube_one_cell_at_a_time(depth: int) -> None:
    edge = torch.arange(2**depth, dtype=torch.int32)
    cube = torch.cartesian_prod(edge, edge, edge)
    for codes in curve_codes(cube, _offsets(len(cube)), depth, ["hilbert", "hilbert-trans"]):
        assert torch.equal(codes.sort().values, torch.arange(len(cube)))
        assert (cube[codes.argsort()].diff(dim=0).abs().sum(1) == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_coarser_cell_has_the_prefix_of_the_code(backend: str) -> None:
    cells, offsets = _cells(2000, MAX_DEPTH), _offsets(1200, 800)
    with use_backend(backend):
        for depth in range(MAX_DEPTH, 0, -1):
            fine = curve_codes(cells, offsets, depth, CURVES)
            cells = cells >> 1
            coarse = curve_codes(cells, offsets, depth - 1, CURVES)
            assert all(torch.equal(f >> 3, c) for f, c in zip(fine, coarse, strict=True))


def test_depth_turns_hilbert_every_third_level_only() -> None:
    cells, offsets = _cells(500, 9), _offsets(500)
    of_depth = {depth: curve_codes(cells, offsets, depth, ["z", "hilbert"]) for depth in (9, 10, 12, 15)}
    assert all(torch.equal(of_depth[9][0], codes[0]) for codes in of_depth.values())
    assert torch.equal(of_depth[9][1], of_depth[12][1])
    assert torch.equal(of_depth[9][1], of_depth[15][1])
    assert not torch.equal(of_depth[9][1], of_depth[10][1])


def test_depth_of_a_batch_follows_the_release() -> None:
    for largest, current, earlier in [(0, 1, 0), (1, 2, 1), (126, 7, 7), (127, 8, 7), (128, 8, 8), (65534, 16, 16)]:
        cells = torch.tensor([[0, 0, 0], [0, largest, 0]], dtype=torch.int32)
        assert grid_depth(cells) == current
        assert grid_depth(cells, headroom=0) == earlier
    assert grid_depth(torch.zeros(0, 3, dtype=torch.int32)) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_cells_and_depths_are_refused(backend: str) -> None:
    cells, offsets = _cells(40, 7), _offsets(40)
    cells[:] = cells.clamp(max=126)
    with use_backend(backend):
        for bad, dtype in ((-3, torch.int32), (-(2**40), torch.int64)):
            broken = cells.to(dtype, copy=True)
            broken[17, 2] = bad
            for call in (lambda b=broken: grid_depth(b), lambda b=broken: curve_codes(b, offsets, 7, ["z"])):
                with pytest.raises(InputError, match=f"cell {bad} of point 17 on axis z is negative; subtract"):
                    call()
        for bad, dtype in ((128, torch.int32), (2**32 + 5, torch.int64)):
            broken = cells.to(dtype, copy=True)
            broken[5, 1] = bad
            with pytest.raises(InputError, match=rf"cell {bad} of point 5 on axis y does not fit depth 7 \(0 to 127\)"):
                curve_codes(broken, offsets, 7, ["hilbert"])
        too_far = torch.tensor([[0, LARGEST, 0]])
        assert len(curve_codes(too_far, _offsets(1), MAX_DEPTH, ["z"])[0]) == 1
        with pytest.raises(InputError, match=f"cell {LARGEST} of point 0 on axis y needs depth 17, the limit is 16"):
            grid_depth(too_far)
        for depth in (-1, 17):
            with pytest.raises(InputError, match=f"depth must be 0 to 16 bits per axis, got {depth}"):
                curve_codes(cells, offsets, depth, ["z"])
        with pytest.raises(InputError, match="unknown curve 'peano'; take one of z, z-trans, hilbert, hilbert-trans"):
            curve_codes(cells, offsets, 7, ["peano"])
        for wrong in (cells.float(), cells[:, :2], cells[0]):
            with pytest.raises(ValueError, match="grid must be"):
                curve_codes(wrong, offsets, 7, ["z"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_clouds_fill_what_63_bits_leave(backend: str) -> None:
    cells = torch.full((1, 3), LARGEST, dtype=torch.int32)
    most = torch.zeros(2**15, dtype=torch.int64)
    most[-1] = 1
    with use_backend(backend):
        for codes in curve_codes(cells, most, MAX_DEPTH, ["z", "hilbert"]):
            assert codes.item() >> 48 == 2**15 - 2
        with pytest.raises(InputError, match="a batch of 32768 clouds at serialization depth 16 does not fit 63 bits"):
            curve_codes(cells, torch.cat([most, most[-1:]]), MAX_DEPTH, ["z"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout_and_integer_type_gives_the_same_codes(backend: str) -> None:
    cells, offsets = _cells(300, 14), _offsets(100, 200)
    with use_backend(backend):
        expected = curve_codes(cells, offsets, 14, CURVES)
        strided = cells.repeat(1, 2)[:, 3:]
        for same in (strided, cells.T.contiguous().T, cells.to(torch.int16), cells.long()):
            for found, codes in zip(curve_codes(same, offsets, 14, CURVES), expected, strict=True):
                assert torch.equal(found, codes)
        for empty in (_offsets(0), _offsets(), _offsets(0, 0)):
            assert [len(c) for c in curve_codes(cells[:0], empty, 14, CURVES)] == [0] * 4
        for wrong in (_offsets(100), torch.tensor([0, 400]), torch.tensor([0, 301, 300])):
            with pytest.raises((ValueError, RuntimeError)):
                curve_codes(cells, wrong, 14, ["z"])


def _check_sorted(codes: Tensor) -> None:
    order, inverse = sort_codes(codes)
    expected = np.argsort(codes.numpy(), kind="stable")
    np.testing.assert_array_equal(order.numpy(), expected)
    np.testing.assert_array_equal(inverse.numpy()[expected], np.arange(len(codes)))
    assert order.dtype == inverse.dtype == torch.int64


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 2, 3, 50, 3000]),
    bits=st.integers(0, 63),
    distinct=st.sampled_from([1, 2, 10**6]),
    seed=st.integers(0, 10**6),
)
def test_sort_is_stable_up_to_63_bits(rows: int, bits: int, distinct: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    values = random.integers(0, 2**63 - 1, min(distinct, max(rows, 1))) >> (63 - bits)
    codes = torch.from_numpy(random.choice(values, rows))
    for backend in BACKENDS:
        with use_backend(backend):
            _check_sorted(codes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sort_of_codes_that_are_in_order_or_strided(backend: str) -> None:
    with use_backend(backend):
        _check_sorted(torch.arange(100) // 3 << 40)
        _check_sorted(torch.arange(100).flip(0))
        _check_sorted(torch.randint(0, 2**62, (200,))[::2])
        _check_sorted(torch.tensor([2**63 - 1, 0, 2**63 - 1, 1]))


@pytest.mark.skipif(cpu_kernels() is None, reason="C++ kernels are not built")
def test_kernels_refuse_negative_codes() -> None:
    with pytest.raises(ValueError, match="codes must not be negative"):
        sort_codes(torch.tensor([3, -1, 2]))


def test_any_thread_count_gives_the_same_bits() -> None:
    cells, offsets = _cells(120_000, MAX_DEPTH, seed=3), _offsets(50_000, 0, 70_000)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            codes = curve_codes(cells, offsets, MAX_DEPTH, CURVES)
            results.append([*codes, *sort_codes(codes[2]), *sort_codes(codes[0] >> 24)])
    finally:
        torch.set_num_threads(before)
    with use_backend("reference"):
        codes = curve_codes(cells, offsets, MAX_DEPTH, CURVES)
        results.append([*codes, *sort_codes(codes[2]), *sort_codes(codes[0] >> 24)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_gives_the_same_integers() -> None:
    cells, offsets = _cells(5000, MAX_DEPTH, seed=4), _offsets(2000, 0, 3000)
    for depth in (7, 11, MAX_DEPTH):
        small = cells >> (MAX_DEPTH - depth)
        on_gpu = curve_codes(small.cuda(), offsets.cuda(), depth, CURVES)
        for codes, expected in zip(on_gpu, curve_codes(small, offsets, depth, CURVES), strict=True):
            assert torch.equal(codes.cpu(), expected)
            for found, rows in zip(sort_codes(codes), sort_codes(expected), strict=True):
                assert torch.equal(found.cpu(), rows)
