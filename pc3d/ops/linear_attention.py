"""Linear attention of rows inside windows of any size: ScatterFormer's "scattered linear attention".

With ``q`` and ``k`` rectified, a row's result is ``(q S) / (q s + eps)`` for ``S = sum k^T v`` and ``s = sum k`` over
the rows of its window (He et al. 2024, arXiv 2401.00912; Katharopoulos et al. 2020, arXiv 2006.16236): no scores, no
padding, no equal groups; work and memory are linear in the rows, whatever the windows.

C++ on the CPU, Triton on a GPU (:mod:`pc3d.ops.linear_attention_triton`), plain PyTorch otherwise. All walk over the
rows in chunks and add up the chunks of a window in order.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pc3d.ops.backend import cpu_kernels, on_cpu_kernels, on_triton
from pc3d.ops.segment import segment_sum

_CHUNK = 32  # rows that the reference multiplies together
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear_attention(qkv: Tensor, offsets: Tensor, eps: float = 1e-6) -> Tensor:
    """Linear attention with ReLU features among the rows of each window; differentiable in ``qkv``, once by kernels.

    Half inputs are computed in float32 and rounded once; float64 stays. On the CPU the same bits for any number of
    threads, on a GPU for any schedule.

    Args:
        qkv: ``(N, 3, H, D)`` floating point: queries, keys and values of H heads, not yet rectified; window after
            window.
        offsets: ``(W + 1,)`` int64, rows ``offsets[w]:offsets[w + 1]`` are window ``w``; empty windows allowed.
        eps: added to the denominator.

    Returns:
        ``(N, H, D)`` in the dtype of ``qkv``; zeros where all of a row's query is negative.

    Raises:
        ValueError: if shapes or dtypes do not fit, or ``offsets`` does not rise from 0 to N (values are not checked on
            a GPU: that would wait for the device).
    """
    if qkv.ndim != 4 or qkv.shape[1] != 3 or not qkv.is_floating_point():
        raise ValueError(f"qkv must be (N, 3, heads, width) floating point, got {tuple(qkv.shape)} {qkv.dtype}")
    if offsets.ndim != 1 or len(offsets) < 1 or offsets.dtype != torch.int64:
        raise ValueError(f"offsets must be (W + 1,) int64, got {tuple(offsets.shape)} {offsets.dtype}")
    fast = qkv.dtype in _KERNEL_DTYPES
    if fast and on_triton(qkv, offsets):
        from pc3d.ops import linear_attention_triton

        return linear_attention_triton.attention(qkv.contiguous(), offsets, eps)
    if fast and on_cpu_kernels(qkv, offsets):
        return _attention(qkv.float().contiguous(), offsets.contiguous(), eps).to(qkv.dtype)
    with torch.autocast(qkv.device.type, enabled=False):
        return _reference(qkv if qkv.dtype == torch.float64 else qkv.float(), offsets, eps).to(qkv.dtype)


def cut_windows(offsets: Tensor, rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Windows in pieces of at most ``length`` rows, without waiting for a device to count them.

    Args:
        offsets: ``(W + 1,)`` int64 windows of ``rows`` rows.

    Returns:
        ``(P,)`` int64 first row of each piece, ``(P,)`` int64 its window, and ``(W + 1,)`` int64, the pieces
        ``pieces[w]:pieces[w + 1]`` of each window, in order. P is the most that there can be; first row and window of
        those beyond the last piece are N and W.
    """
    windows = len(offsets) - 1
    pieces = F.pad((offsets.diff() + length - 1).div(length, rounding_mode="floor").cumsum(0), (1, 0))
    place = torch.arange(rows // length + windows, device=offsets.device)
    window = torch.searchsorted(pieces[1:], place, right=True)
    first = offsets[window] + (place - pieces[window]) * length
    return torch.where(window < windows, first, rows), window, pieces


def _reference(qkv: Tensor, offsets: Tensor, eps: float) -> Tensor:
    rows = len(qkv)
    if offsets.device.type == "cpu" and (offsets[0] != 0 or offsets[-1] != rows or bool((offsets.diff() < 0).any())):
        raise ValueError(f"offsets must rise from 0 to {rows}, got {offsets.tolist()[:8]}")
    first, window, pieces = cut_windows(offsets, rows, _CHUNK)
    last = torch.minimum(first + _CHUNK, F.pad(offsets, (0, 1), value=rows)[window + 1])
    place = first[:, None] + torch.arange(_CHUNK, device=qkv.device)
    real = place < last[:, None]
    # A last row of zeros stands for the rows that a chunk does not have.
    chunks = F.pad(qkv, (0, 0, 0, 0, 0, 0, 0, 1))[torch.where(real, place, rows)]
    q, k, v = chunks.unbind(2)
    q, k, v = q.relu(), k.relu(), F.pad(v, (0, 1), value=1.0)  # the column of ones makes the denominator
    states = torch.einsum("prhd,prhe->phde", k, v)
    states = segment_sum(states, F.pad(pieces, (0, 1), value=len(first)))
    sums = torch.einsum("prhd,phde->prhe", q, states[window])[real]
    return sums[..., :-1] / (sums[..., -1:] + eps)


@torch.library.custom_op("pc3d::linear_attention", mutates_args=())
def _attention(qkv: Tensor, offsets: Tensor, eps: float) -> Tensor:
    out = _result(qkv)
    _kernels(qkv).linear_attention_forward(qkv.detach(), offsets, eps, out)
    return out


@torch.library.custom_op("pc3d::linear_attention_backward", mutates_args=())
def _attention_backward(grad: Tensor, qkv: Tensor, offsets: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(qkv)
    _kernels(qkv).linear_attention_backward(grad.detach().contiguous(), qkv.detach(), offsets, eps, out)
    return out


def _kernels(qkv: Tensor) -> ModuleType:
    kernels = cpu_kernels(qkv)
    if kernels is None:
        raise RuntimeError("the C++ kernels do not load, or were switched off between forward and backward")
    return kernels


def _result(qkv: Tensor) -> Tensor:
    return qkv.new_empty(len(qkv), *qkv.shape[2:])


@_attention.register_fake
def _(qkv: Tensor, offsets: Tensor, eps: float) -> Tensor:
    return _result(qkv)


@_attention_backward.register_fake
def _(grad: Tensor, qkv: Tensor, offsets: Tensor, eps: float) -> Tensor:
    return torch.empty_like(qkv)


def setup(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    """Nothing but the inputs is kept for the backward pass, which computes the states anew."""
    qkv, offsets, ctx.eps = inputs
    ctx.save_for_backward(qkv, offsets)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _attention_backward(grad, *ctx.saved_tensors, ctx.eps), None, None


_attention.register_autograd(_differentiate, setup_context=setup)
