"""Reductions over runs of rows, against plain loops and finite differences."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from pc3d.ops import segment
from pc3d.ops.backend import use_backend
from pc3d.ops.segment import segment_expand, segment_max, segment_mean, segment_softmax, segment_sum

BACKENDS = ["reference", "auto"]
REDUCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]] = {
    "sum": (segment_sum, lambda rows: rows.sum(0)),
    "mean": (segment_mean, lambda rows: rows.mean(0)),
    "max": (segment_max, lambda rows: rows.amax(0)),
}
CASES = {
    "plain": ([3, 1, 5], (8,)),
    "empty segments": ([0, 3, 0, 0, 2, 0], (4,)),
    "no rows": ([0, 0], (4,)),
    "no segments": ([], (4,)),
    "one column": ([2, 2], (1,)),
    "no columns": ([2, 2], (0,)),
    "vector": ([4, 1, 2], ()),
    "three axes": ([4, 1, 2], (2, 3)),
    "many": ([7] * 300, (33,)),
}


def _case(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    counts, columns = CASES[name]
    values = torch.randn(sum(counts), *columns, generator=torch.Generator().manual_seed(1))
    return values.to(dtype), torch.tensor([0, *counts]).cumsum(0)


def _loop(values: Tensor, offsets: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    runs = [values[a:b] for a, b in itertools.pairwise(offsets.tolist())]
    rows = [reduce(run) if len(run) else run.new_zeros(run.shape[1:]) for run in runs]
    return torch.stack(rows) if rows else values.new_zeros(0, *values.shape[1:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_value_and_gradient_equal_a_plain_loop(name: str, case: str, backend: str) -> None:
    op, reduce = REDUCTIONS[name]
    values, offsets = _case(case)
    values.requires_grad_()
    expected = _loop(values, offsets, reduce)
    weight = torch.randn_like(expected)
    expected_grad = torch.zeros_like(values)
    if expected.requires_grad:  # a loop over no rows is a constant
        expected_grad = torch.autograd.grad((expected * weight).sum(), values)[0]
    with use_backend(backend):
        out = op(values, offsets)
        grad = torch.autograd.grad((out * weight).sum(), values)[0]
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_gradcheck(name: str, backend: str) -> None:
    values, offsets = _case("empty segments", torch.float64)
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda v: REDUCTIONS[name][0](v, offsets), values.requires_grad_())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_other_dtypes_round_once(name: str, dtype: torch.dtype, backend: str) -> None:
    op, reduce = REDUCTIONS[name]
    values, offsets = _case("many", dtype)
    with use_backend(backend):
        out = op(values, offsets)
    torch.testing.assert_close(out, _loop(values.double(), offsets, reduce).to(dtype))
    assert out.dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_share_the_gradient_of_the_maximum(backend: str) -> None:
    values = torch.tensor([[1.0], [3.0], [3.0], [2.0], [2.0]], requires_grad=True)
    with use_backend(backend):
        segment_max(values, torch.tensor([0, 4, 5])).sum().backward()
    assert values.grad is not None
    assert values.grad[:, 0].tolist() == [0, 0.5, 0.5, 0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_are_kept(backend: str) -> None:
    values = torch.tensor([[1.0, 2.0], [torch.nan, -torch.inf], [5.0, -torch.inf]])
    offsets = torch.tensor([0, 2, 3])
    with use_backend(backend):
        expected = torch.tensor([[torch.nan, 2.0], [5.0, -torch.inf]])
        torch.testing.assert_close(segment_max(values, offsets), expected, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_views_and_thread_counts_give_the_same_bits(name: str, backend: str) -> None:
    values, offsets = _case("many")
    wide = torch.cat([values, values], 1)[:, ::2]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            with use_backend(backend):
                results.append(REDUCTIONS[name][0](wide, offsets))
    finally:
        torch.set_num_threads(before)
    with use_backend(backend):
        assert torch.equal(results[0], REDUCTIONS[name][0](wide.clone(), offsets))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("name", REDUCTIONS)
def test_wrong_arguments_are_named(name: str) -> None:
    values, offsets = _case("plain")
    with pytest.raises(ValueError, match=r"floating point, got torch\.int64"):
        REDUCTIONS[name][0](values.long(), offsets)
    with pytest.raises(ValueError, match="int64, got"):
        REDUCTIONS[name][0](values, offsets.int())


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_outside_the_rows_are_refused(backend: str) -> None:
    values, _ = _case("plain")
    for offsets in ([0, 8], [0, 10], [1, 9], [0, 5, 3, 9]):
        with use_backend(backend), pytest.raises(ValueError, match="offsets must rise from 0 to 9"):
            segment_sum(values, torch.tensor(offsets))


@pytest.mark.parametrize("name", ["segment_sum", "segment_max"])
def test_operators_are_registered_correctly(name: str) -> None:
    values, offsets = _case("plain")
    torch.library.opcheck(getattr(torch.ops.pc3d, name), (values.requires_grad_(), offsets))


def test_sums_by_torch_scatter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the CUDA package, which does what its manual says."""

    def segment_csr(src: Tensor, indptr: Tensor, reduce: str) -> Tensor:
        assert reduce == "sum"
        return torch.stack([src[a:b].sum(0) for a, b in itertools.pairwise(indptr)])

    package = ModuleType("torch_scatter")
    package.segment_csr = segment_csr
    monkeypatch.setitem(sys.modules, "torch_scatter", package)
    values, offsets = torch.randn(9, 3, requires_grad=True), torch.tensor([0, 4, 4, 9])
    torch.testing.assert_close(segment._sum_by_torch_scatter(values, offsets), segment.segment_sum(values, offsets))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_softmax_equals_a_plain_loop(case: str, backend: str) -> None:
    values, offsets = _case(case, torch.float64)
    values.requires_grad_()
    runs = [values[a:b].softmax(0) for a, b in itertools.pairwise(offsets.tolist())]
    expected = torch.cat([values[:0], *runs])
    weight = torch.randn_like(expected)
    with use_backend(backend):
        out = segment_softmax(values, offsets)
        grad = torch.autograd.grad((out * weight).sum(), values)[0]
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad, torch.autograd.grad((expected * weight).sum(), values)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax_of_huge_values_in_large_segments(dtype: torch.dtype, backend: str) -> None:
    """Thousands of rows, values that overflow an exponential, and shares that bfloat16 could not add up."""
    offsets = torch.tensor([0, 5000, 5000, 5001])
    values = torch.full((5001, 2), 1e4, dtype=dtype)
    values[:, 1] = torch.linspace(-3e4, 3e4, 5001)
    with use_backend(backend):
        share = segment_softmax(values, offsets)
        total = segment_sum(share, offsets)
    assert share.dtype == torch.float32
    torch.testing.assert_close(total, torch.tensor([[1.0, 1], [0, 0], [1, 1]]), atol=1e-4, rtol=0)  # one by one
    torch.testing.assert_close(share[:5000, 0], torch.full((5000,), 1 / 5000), atol=1e-7, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanding_repeats_rows_and_sums_gradients(backend: str) -> None:
    offsets = torch.tensor([0, 2, 2, 5])
    values = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    with use_backend(backend):
        assert torch.equal(segment_expand(values, offsets, 5), values[[0, 0, 2, 2, 2]])
        assert segment_expand(values.bfloat16(), offsets, 5).dtype == torch.bfloat16
        assert torch.autograd.gradcheck(lambda v: segment_expand(v, offsets, 5), values)
