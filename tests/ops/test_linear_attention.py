"""Linear attention inside windows: the formula, every instruction set, Triton, windows of all sizes, threads."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pc3d.ops.backend import cpu_kernels, use_backend
from pc3d.ops.linear_attention import linear_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Empty windows, of one row, around the chunks of 32 and 64 rows, and too long for one task or program.
COUNTS = [0, 1, 1, 31, 32, 33, 0, 63, 64, 65, 130, 300, 2100, 0]


def windows(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def packed(rows: int, heads: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, 3, heads, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def formula(qkv: Tensor, offsets: Tensor, eps: float = 1e-6) -> Tensor:
    """The definition, window after window and with all scores, in float64."""
    q, k, v = qkv.double().unbind(1)
    out = []
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        rows = slice(begin, end)
        scores = torch.einsum("ihd,jhd->hij", q[rows].relu(), k[rows].relu())
        out.append(torch.einsum("hij,jhd->ihd", scores, v[rows]) / (scores.sum(2).T[..., None] + eps))
    return torch.cat(out)


def run(qkv: Tensor, offsets: Tensor, backend: str) -> list[Tensor]:
    """Result and gradient."""
    leaf = qkv.clone().requires_grad_()
    with use_backend(backend):
        out = linear_attention(leaf, offsets)
        return [
            out.detach(),
            *torch.autograd.grad((out.float() * torch.linspace(-1, 1, out.shape[2]).to(out)).sum(), leaf),
        ]


def expected(qkv: Tensor, offsets: Tensor) -> list[Tensor]:
    leaf = qkv.double().requires_grad_()
    out = formula(leaf, offsets)
    return [out.detach(), *torch.autograd.grad((out * torch.linspace(-1, 1, out.shape[2]).to(out)).sum(), leaf)]


def assert_all_close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for left, right in zip(found, wanted, strict=True):
        scale = max(1.0, float(right.abs().max())) if right.numel() else 1.0
        assert_close(left.double().cpu(), right.double(), atol=tolerance * scale, rtol=tolerance)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("width", [1, 5, 8, 32])
def test_the_formula(backend: str, width: int) -> None:
    qkv, offsets = packed(sum(COUNTS), 2, width), windows(COUNTS)
    assert_all_close(run(qkv, offsets, backend), expected(qkv, offsets), 2e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision_is_rounded_once(dtype: torch.dtype, tolerance: float) -> None:
    qkv, offsets = packed(sum(COUNTS), 2, 16, dtype), windows(COUNTS)
    found = run(qkv, offsets, "auto")
    assert all(t.dtype == dtype for t in found)
    assert_all_close(found, expected(qkv, offsets), tolerance)


@pytest.mark.parametrize("isa", getattr(cpu_kernels(), "linear_attention_isas", list)())
@pytest.mark.parametrize("width", [1, 6, 16, 17, 40])
def test_every_instruction_set(isa: str, width: int) -> None:
    kernels, qkv, offsets = cpu_kernels(), packed(sum(COUNTS), 2, width), windows(COUNTS)
    out, grad = torch.full((len(qkv), 2, width), math.nan), torch.full_like(qkv, math.nan)
    kernels.linear_attention_forward(qkv, offsets, 1e-6, out, isa)
    upstream = torch.linspace(-1, 1, width).expand_as(out).contiguous()
    kernels.linear_attention_backward(upstream, qkv, offsets, 1e-6, grad, isa)
    assert_all_close([out, grad], expected(qkv, offsets), 2e-5)


@pytest.mark.gpu_kernel
@pytest.mark.parametrize("width", [5, 32])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_triton(width: int, dtype: torch.dtype, tolerance: float) -> None:
    pytest.importorskip("triton")
    counts = [0, 1, 33, 0, 520]  # the last one is two pieces
    qkv, offsets = packed(sum(counts), 2, width, dtype), windows(counts)
    found = run(qkv.to(DEVICE), offsets.to(DEVICE), "triton")
    assert all(t.dtype == dtype for t in found)
    assert_all_close(found, expected(qkv, offsets), tolerance)


@pytest.mark.parametrize("backend", ["auto", "reference", pytest.param("triton", marks=pytest.mark.gpu_kernel)])
def test_nothing_to_attend_to(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    for counts in ([], [0, 0]):
        out, grad = run(packed(0, 2, 8), windows(counts), backend)
        assert out.shape == (0, 2, 8)
        assert grad.shape == (0, 3, 2, 8)


@pytest.mark.parametrize("backend", ["auto", "reference", pytest.param("triton", marks=pytest.mark.gpu_kernel)])
def test_a_query_without_positive_channels_gives_zeros(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    qkv = packed(40, 2, 8)
    qkv[7, 0] = -qkv[7, 0].abs()
    out, grad = run(qkv, windows([40]), backend)
    assert not out[7].any()
    assert not grad[7, 0].any()
    assert bool(out[6].any())


def test_one_huge_window() -> None:
    qkv = packed(100_000, 1, 8)
    state = qkv[:, 1, 0].double().relu().T @ torch.cat([qkv[:, 2, 0], torch.ones(len(qkv), 1)], 1).double()
    sums = qkv[:, 0, 0].double().relu() @ state
    wanted = sums[:, :-1] / (sums[:, -1:] + 1e-6)
    for backend in ("auto", "reference"):
        with use_backend(backend):
            found = linear_attention(qkv, windows([100_000]))[:, 0]
        assert_close(found.double(), wanted, atol=1e-6, rtol=1e-5)


def test_not_a_number_stays_in_its_window() -> None:
    qkv, offsets = packed(60, 1, 8), windows([20, 20, 20])
    qkv[25, 1, 0, 3] = math.nan
    for backend in ("auto", "reference"):
        out = run(qkv, offsets, backend)[0]
        assert torch.equal(out.isnan().any(2).any(1), (torch.arange(60) // 20) == 1)


def test_threads_do_not_change_a_bit() -> None:
    qkv, offsets = packed(sum(COUNTS), 3, 12), windows(COUNTS)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(qkv, offsets, "auto"))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(left, right) for left, right in zip(result, results[0], strict=True))


def test_gradients_in_float64() -> None:
    qkv, offsets = packed(8, 2, 3, torch.float64).requires_grad_(), windows([1, 0, 5, 2])
    assert torch.autograd.gradcheck(lambda x: linear_attention(x, offsets), (qkv,))


def test_the_operator_keeps_its_contract() -> None:
    if cpu_kernels() is None:
        pytest.skip("the C++ extension is not built")
    qkv = packed(50, 2, 6).requires_grad_()
    torch.library.opcheck(torch.ops.pc3d.linear_attention.default, (qkv, windows([20, 30]), 1e-6))
    with torch.autocast("cpu", dtype=torch.bfloat16), use_backend("reference"):
        exact = linear_attention(qkv, windows([20, 30]))
    assert_close(exact, linear_attention(qkv, windows([20, 30])), atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    qkv = packed(10, 1, 4)
    with pytest.raises(ValueError, match=r"qkv must be \(N, 3, heads, width\)"):
        linear_attention(qkv[:, :2], windows([10]))
    with pytest.raises(ValueError, match="offsets must be"):
        linear_attention(qkv, windows([10]).int())
    for backend in ("auto", "reference"):
        with use_backend(backend), pytest.raises(ValueError, match="rise from 0 to"):
            linear_attention(qkv, windows([4, 5]))
