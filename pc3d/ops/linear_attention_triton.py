"""Linear attention inside windows on a GPU: Triton kernels behind :mod:`pc3d.ops.linear_attention`.

A program takes one head of a piece of a window and walks through its rows in chunks, the last one masked. Long windows
are several pieces: their states, numerator and denominator in one table, are added up in order before anything reads
them, so no sum depends on the schedule of the device. Everything is float32 inside, without TF32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pc3d.ops.linear_attention import cut_windows, setup

_PIECE = 512  # rows of a piece
_CHUNK = 32


@triton.jit
def _rows(first, last, begin, L: tl.constexpr):
    """Rows of a chunk, and which of them the piece has."""
    row = first + begin + tl.arange(0, L).to(tl.int64)
    return row, row < last


@triton.jit
def _load(table, row, real, parts, part, head, heads, width, L: tl.constexpr, D: tl.constexpr):
    """``(L, D)`` float32 of one head in a ``(rows, parts, heads, width)`` table; zeros where there is nothing."""
    d = tl.arange(0, D)
    at = ((row[:, None] * parts + part) * heads + head) * width + d[None, :]
    return tl.load(table + at, mask=real[:, None] & (d[None, :] < width), other=0.0).to(tl.float32)


@triton.jit
def _store(table, values, row, real, parts, part, head, heads, width, D: tl.constexpr):
    d = tl.arange(0, D)
    at = ((row[:, None] * parts + part) * heads + head) * width + d[None, :]
    tl.store(table + at, values, mask=real[:, None] & (d[None, :] < width))


@triton.jit
def _rectified(x):
    return tl.where(x <= 0, 0.0, x)  # NaN stays


@triton.jit
def _load_state(states, piece, head, heads, width, D: tl.constexpr):
    """``(D, D)`` sum of ``k^T v`` and ``(D,)`` sum of ``k``."""
    d = tl.arange(0, D)
    base = states + (piece * heads + head) * (width + 1) * width
    inside = (d[:, None] < width) & (d[None, :] < width)
    matrix = tl.load(base + d[:, None] * width + d[None, :], mask=inside, other=0.0)
    return matrix, tl.load(base + width * width + d, mask=d < width, other=0.0)


@triton.jit
def _store_state(states, matrix, vector, piece, head, heads, width, D: tl.constexpr):
    d = tl.arange(0, D)
    base = states + (piece * heads + head) * (width + 1) * width
    tl.store(base + d[:, None] * width + d[None, :], matrix, mask=(d[:, None] < width) & (d[None, :] < width))
    tl.store(base + width * width + d, vector, mask=d < width)


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _state_kernel(qkv, begins, ends, states, heads, width, L: tl.constexpr, D: tl.constexpr):
    piece, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, last = tl.load(begins + piece), tl.load(ends + piece)
    matrix, vector = tl.zeros((D, D), tl.float32), tl.zeros((D,), tl.float32)
    for begin in range(0, last - first, L):
        row, real = _rows(first, last, begin, L)
        k = _rectified(_load(qkv, row, real, 3, 1, head, heads, width, L, D))
        v = _load(qkv, row, real, 3, 2, head, heads, width, L, D)
        matrix += _dot(tl.trans(k), v)
        vector += tl.sum(k, 0)
    _store_state(states, matrix, vector, piece, head, heads, width, D)


@triton.jit
def _add_kernel(states, pieces, size, BLOCK: tl.constexpr):
    """The states of a window's pieces, in the place of its first one."""
    window = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first, last = tl.load(pieces + window), tl.load(pieces + window + 1)
    if last - first > 1:
        total = tl.zeros((BLOCK,), tl.float32)
        for piece in range(first, last):
            total += tl.load(states + piece * size + place, mask=place < size, other=0.0)
        tl.store(states + first * size + place, total, mask=place < size)


@triton.jit
def _forward_kernel(
    qkv, begins, ends, leaders, states, out, heads, width, eps, L: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    piece, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, last = tl.load(begins + piece), tl.load(ends + piece)
    matrix, vector = _load_state(states, tl.load(leaders + piece), head, heads, width, D)
    for begin in range(0, last - first, L):
        row, real = _rows(first, last, begin, L)
        q = _rectified(_load(qkv, row, real, 3, 0, head, heads, width, L, D))
        share = tl.sum(q * vector[None, :], 1) + eps
        _store(out, _dot(q, matrix) / share[:, None], row, real, 1, 0, head, heads, width, D)


@triton.jit
def _query_grad_kernel(
    qkv, grad, begins, ends, leaders, states, grad_qkv, grad_states, heads, width, eps,
    L: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Gradients of q, and what the rows of a piece add to the gradient of the state.

    Those of the numerator n and the denominator s of ``y = n / s`` are ``g / s`` and ``-(g y) / s``.
    """
    piece, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, last = tl.load(begins + piece), tl.load(ends + piece)
    matrix, vector = _load_state(states, tl.load(leaders + piece), head, heads, width, D)
    grad_matrix, grad_vector = tl.zeros((D, D), tl.float32), tl.zeros((D,), tl.float32)
    for begin in range(0, last - first, L):
        row, real = _rows(first, last, begin, L)
        q = _rectified(_load(qkv, row, real, 3, 0, head, heads, width, L, D))
        share = tl.sum(q * vector[None, :], 1) + eps
        g = _load(grad, row, real, 1, 0, head, heads, width, L, D) / share[:, None]
        error = -tl.sum(g * _dot(q, matrix), 1) / share
        dq = _dot(g, tl.trans(matrix)) + error[:, None] * vector[None, :]
        _store(grad_qkv, tl.where(q == 0, 0.0, dq), row, real, 3, 0, head, heads, width, D)
        grad_matrix += _dot(tl.trans(q), g)
        grad_vector += tl.sum(q * error[:, None], 0)
    _store_state(grad_states, grad_matrix, grad_vector, piece, head, heads, width, D)


@triton.jit
def _key_grad_kernel(
    qkv, begins, ends, leaders, grad_states, grad_qkv, heads, width, L: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    piece, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, last = tl.load(begins + piece), tl.load(ends + piece)
    matrix, vector = _load_state(grad_states, tl.load(leaders + piece), head, heads, width, D)
    for begin in range(0, last - first, L):
        row, real = _rows(first, last, begin, L)
        k = _rectified(_load(qkv, row, real, 3, 1, head, heads, width, L, D))
        v = _load(qkv, row, real, 3, 2, head, heads, width, L, D)
        dk = _dot(v, tl.trans(matrix)) + vector[None, :]
        _store(grad_qkv, tl.where(k == 0, 0.0, dk), row, real, 3, 1, head, heads, width, D)
        _store(grad_qkv, _dot(k, matrix), row, real, 3, 2, head, heads, width, D)


class _Launch:
    """The pieces of the windows, and the launches over them."""

    def __init__(self, qkv: Tensor, offsets: Tensor) -> None:
        self.qkv, (rows, _, self.heads, self.width) = qkv, qkv.shape
        self.windows = len(offsets) - 1
        self.begins, window, self.pieces = cut_windows(offsets, rows, _PIECE)
        self.ends = torch.minimum(self.begins + _PIECE, offsets[(window + 1).clamp(max=self.windows)])
        self.leaders = self.pieces[window]
        self.leaders.clamp_(max=len(window) - 1)  # of places beyond the last piece, which have no rows
        self.grid = len(window), self.heads
        self.blocks = {"L": _CHUNK, "D": max(16, triton.next_power_of_2(self.width))}

    def new_states(self) -> Tensor:
        return self.qkv.new_empty(*self.grid, self.width + 1, self.width, dtype=torch.float32)

    def add_up(self, states: Tensor) -> None:
        size = states[0].numel()
        _add_kernel[self.windows, triton.cdiv(size, 1024)](states, self.pieces, size, BLOCK=1024)

    def states(self) -> Tensor:
        """``(pieces, H, D + 1, D)``; that of a window in the place of its first piece."""
        states = self.new_states()
        _state_kernel[self.grid](self.qkv, self.begins, self.ends, states, self.heads, self.width, **self.blocks)
        self.add_up(states)
        return states


@torch.library.custom_op("pc3d::triton_linear_attention", mutates_args=())
def attention(qkv: Tensor, offsets: Tensor, eps: float) -> Tensor:
    """``(N, H, D)`` in the dtype of ``qkv``; see :func:`pc3d.ops.linear_attention.linear_attention`."""
    out = qkv.new_empty(len(qkv), *qkv.shape[2:])
    if out.numel():
        launch = _Launch(qkv.detach(), offsets)
        pieces = launch.begins, launch.ends, launch.leaders
        _forward_kernel[launch.grid](
            launch.qkv, *pieces, launch.states(), out, launch.heads, launch.width, eps, **launch.blocks
        )
    return out


@torch.library.custom_op("pc3d::triton_linear_attention_backward", mutates_args=())
def attention_backward(grad: Tensor, qkv: Tensor, offsets: Tensor, eps: float) -> Tensor:
    """The gradient of ``qkv``."""
    out = torch.empty_like(qkv)
    if out.numel():
        launch = _Launch(qkv.detach(), offsets)
        pieces, grad_states = (launch.begins, launch.ends, launch.leaders), launch.new_states()
        _query_grad_kernel[launch.grid](
            launch.qkv, grad.detach().contiguous(), *pieces, launch.states(), out, grad_states,
            launch.heads, launch.width, eps, **launch.blocks,
        )  # fmt: skip
        launch.add_up(grad_states)
        _key_grad_kernel[launch.grid](
            launch.qkv, *pieces, grad_states, out, launch.heads, launch.width, **launch.blocks
        )
    return out


@attention.register_fake
def _(qkv: Tensor, offsets: Tensor, eps: float) -> Tensor:
    return qkv.new_empty(len(qkv), *qkv.shape[2:])


@attention_backward.register_fake
def _(grad: Tensor, qkv: Tensor, offsets: Tensor, eps: float) -> Tensor:
    return torch.empty_like(qkv)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return attention_backward(grad, *ctx.saved_tensors, ctx.eps), None, None


attention.register_autograd(_differentiate, setup_context=setup)
