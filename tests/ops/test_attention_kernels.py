"""Attention in C++: every instruction set, widths of heads, guests in a second window, threads, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pc3d.nn.attention import Windows, split_windows, window_attention
from pc3d.ops.attention import attend
from pc3d.ops.backend import use_backend

_C = pytest.importorskip("pc3d._C")


def shuffled_windows(counts: list[int], size: int) -> Windows:
    """Windows along an order that mixes the rows of each cloud."""
    offsets = torch.tensor([0, *counts]).cumsum(0)
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(n, generator=generator) + o for n, o in zip(counts, offsets, strict=False)])
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    return split_windows(offsets, size).along(order, inverse)


def packed(points: int, heads: int, width: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(points, 3, heads, width, generator=generator) * scale


def run(isa: str, qkv: Tensor, windows: Windows, upstream: Tensor) -> list[Tensor]:
    """Result and gradients of one instruction set."""
    groups = [number for group in windows.groups for number in group]
    q, k, v = qkv.unbind(1)
    out, statistics = torch.empty_like(upstream), torch.empty(*upstream.shape[:2], 2)
    arguments = (q, k, v, windows.rows, windows.slots, groups, q.shape[2] ** -0.5)
    _C.attention_forward(*arguments, out, statistics, isa)
    grads = [torch.full_like(upstream, math.nan) for _ in range(3)]
    _C.attention_backward(upstream, *arguments, out, statistics, *grads, isa)
    return [out, *grads]


def reference(qkv: Tensor, windows: Windows, upstream: Tensor) -> list[Tensor]:
    tensors = [t.double().requires_grad_() for t in qkv.unbind(1)]
    out = window_attention(*tensors, windows, backend="loop")
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream.double())]


@pytest.mark.parametrize("isa", _C.attention_isas())
@pytest.mark.parametrize("width", [1, 6, 16, 17, 18, 40])
@pytest.mark.parametrize("size", [7, 300])
def test_every_instruction_set(isa: str, width: int, size: int) -> None:
    counts = [700, 1, 0, 3, 301]  # windows longer than a block of keys, odd ends, guests
    windows, qkv = shuffled_windows(counts, size), packed(sum(counts), 2, width)
    upstream = torch.randn(sum(counts), 2, width, generator=torch.Generator().manual_seed(2))
    for actual, expected in zip(run(isa, qkv, windows, upstream), reference(qkv, windows, upstream), strict=True):
        assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


def test_large_scores_do_not_overflow() -> None:
    """Scores of some hundreds, as no float32 exponential can hold them."""
    windows, qkv = shuffled_windows([600], 600), packed(600, 1, 8, scale=12.0)
    upstream = torch.ones(600, 1, 8)
    for actual, expected in zip(run("", qkv, windows, upstream), reference(qkv, windows, upstream), strict=True):
        assert_close(actual.double(), expected, rtol=1e-3, atol=1e-3)


def test_not_a_number_stays_one() -> None:
    windows, qkv = shuffled_windows([40], 16), packed(40, 1, 8)
    qkv[3, 1] = math.nan
    out = run("", qkv, windows, torch.ones(40, 1, 8))[0]
    expected = window_attention(*qkv.unbind(1), windows, backend="loop")
    assert torch.equal(out.isnan(), expected.isnan())
    assert 0 < int(out.isnan().sum()) < out.numel()


def test_threads_do_not_change_a_bit() -> None:
    windows, qkv = shuffled_windows([500, 90], 64), packed(590, 3, 18).requires_grad_()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            out = window_attention(*qkv.unbind(1), windows, backend="kernels")
            results.append([out, *torch.autograd.grad(out.sin().sum(), qkv)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_operator_keeps_its_contract() -> None:
    windows, qkv = shuffled_windows([50], 16), packed(50, 2, 6).requires_grad_()
    groups = [number for group in windows.groups for number in group]
    arguments = (*(t.contiguous() for t in qkv.unbind(1)), windows.rows, windows.slots, groups, 0.5)
    torch.library.opcheck(torch.ops.pc3d.window_attention.default, arguments)
    with use_backend("reference"):
        assert_close(window_attention(*qkv.unbind(1), windows), attend_now(qkv, windows), rtol=1e-4, atol=1e-5)


def attend_now(qkv: Tensor, windows: Windows) -> Tensor:
    with use_backend("auto"):
        q, k, v = qkv.unbind(1)
        return attend(q, k, v, windows.rows, windows.slots, windows.groups, q.shape[2] ** -0.5)


def test_misfits_are_refused() -> None:
    windows, qkv = shuffled_windows([20], 8), packed(20, 1, 4)
    q, k, v = qkv.unbind(1)
    with pytest.raises(ValueError, match="windows do not fill the slots"):
        attend(q, k, v, windows.rows, windows.slots, ((1, 8),), 0.5)
    with pytest.raises(ValueError, match="a slot holds no point"):
        attend(q, k, v, windows.rows + 20, windows.slots, windows.groups, 0.5)
    with pytest.raises(ValueError, match="the slot of a point does not hold it"):
        attend(q, k, v, windows.rows, windows.slots.flip(0), windows.groups, 0.5)
    with pytest.raises(ValueError, match="one shape"):
        attend(q, k[:, :, :2], v, windows.rows, windows.slots, windows.groups, 0.5)
