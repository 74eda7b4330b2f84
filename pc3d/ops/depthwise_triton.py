"""Depth-wise sparse convolution on a GPU: Triton kernels behind :mod:`pc3d.ops.depthwise`.

A tile of output rows and channels walks through its COIR records, kernel offset after kernel offset; weight gradients
are summed in chunks of pairs, added in a fixed order. The plans are those of :mod:`pc3d.ops.conv_triton`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, float32

from pc3d.ops.conv_triton import sum_chunks

_ROWS, _CHANNELS, _PAIRS = 32, 64, 64


@triton.jit
def _forward_kernel(
    x, w, y, masks, starts, partners, parts, rows, channels, volume, BM: tl.constexpr, BC: tl.constexpr
):
    row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    live, inside = row < rows, channel < channels
    total = tl.zeros((BM, BC), tl.float32)
    partner = tl.load(starts + row, mask=live, other=0)
    for part in range(parts):
        present = tl.load(masks + part * rows + row, mask=live, other=0)
        first = volume * part // parts
        for k in range(first, volume * (part + 1) // parts):
            has = ((present >> (k - first)) & 1) != 0
            source = tl.load(partners + partner, mask=has, other=0).to(tl.int64)
            partner += has.to(partner.dtype)
            here = has[:, None] & inside[None, :]
            values = tl.load(x + source[:, None] * channels + channel[None, :], mask=here, other=0.0).to(tl.float32)
            factors = tl.load(w + k * channels + channel, mask=inside, other=0.0).to(tl.float32)
            total += values * factors[None, :]
    tl.store(y + row[:, None] * channels + channel[None, :], total, mask=live[:, None] & inside[None, :])


@triton.jit
def _weight_grad_kernel(
    x, g, partial, in_rows, out_rows, chunk_begin, chunk_end, channels, BP: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = channel < channels
    total = tl.zeros((BC,), tl.float32)
    end = tl.load(chunk_end + chunk)
    for first in range(tl.load(chunk_begin + chunk), end, BP):
        pair = first + tl.arange(0, BP)
        real = pair < end
        i = tl.load(in_rows + pair, mask=real, other=0).to(tl.int64)
        o = tl.load(out_rows + pair, mask=real, other=0).to(tl.int64)
        here = real[:, None] & inside[None, :]
        a = tl.load(x + i[:, None] * channels + channel[None, :], mask=here, other=0.0).to(tl.float32)
        b = tl.load(g + o[:, None] * channels + channel[None, :], mask=here, other=0.0).to(tl.float32)
        total += tl.sum(a * b, 0)
    tl.store(partial + chunk * channels + channel, total, mask=inside)


def forward(feat: Tensor, weight: Tensor, plan: list[Tensor], num_out: int) -> Tensor:
    """``(num_out, C)`` in the dtype of ``feat``, summed in float32; see :func:`pc3d.ops.depthwise.depthwise_conv`."""
    feat, weight, (masks, starts, partners) = feat.contiguous(), weight.contiguous(), plan[:3]
    channels = feat.shape[1]
    out = feat.new_empty(num_out, channels)
    if out.numel():
        grid = triton.cdiv(num_out, _ROWS), triton.cdiv(channels, _CHANNELS)
        _forward_kernel[grid](
            feat, weight, out, masks, starts, partners, len(masks), num_out, channels, len(weight),
            BM=_ROWS, BC=_CHANNELS,
        )  # fmt: skip
    return out


def weight_grad(feat: Tensor, grad: Tensor, in_rows: Tensor, out_rows: Tensor, plan: list[Tensor]) -> Tensor:
    """``(K, C)`` in the dtype of ``feat``; see :func:`pc3d.ops.depthwise.depthwise_conv`."""
    begin, end, pointer = plan[6:]
    channels = feat.shape[1]
    partial = feat.new_empty(len(begin), channels, dtype=float32)
    if partial.numel():
        _weight_grad_kernel[len(begin), triton.cdiv(channels, _CHANNELS)](
            feat.contiguous(), grad.contiguous(), partial, in_rows, out_rows, begin, end, channels,
            BP=_PAIRS, BC=_CHANNELS,
        )  # fmt: skip
    return sum_chunks(partial, pointer).to(feat.dtype)
