"""Sparse convolution on a GPU: Triton kernels behind :mod:`pc3d.ops.conv`.

Forward and input gradient are an implicit matrix product over COIR records (:mod:`pc3d.ops.coir`): a tile of output
rows walks through its records, kernel offset after kernel offset, and skips offsets that none of its rows has. Rows are
ordered by the set of offsets they have, in windows of 32 offsets, so that tiles skip much. Every output has one writer
and one order of summation, and the partial weight gradients are added in a fixed order: nothing depends on the schedule
of the device.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pc3d.ops.coir import Coir, Field, encode
from pc3d.ops.kernel_map import KernelMap
from pc3d.ops.tune import fastest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WINDOW = 32  # kernel offsets whose presence sorts the rows of one pass
TILE = 64  # output rows of a tile
_CHUNK = 4096  # pairs of one partial weight gradient, at least
_MOST_CHUNKS = 128

# (output columns, input channels, warps, stages)
_FORWARD_BLOCKS = ((32, 32, 4, 3), (64, 32, 4, 3), (128, 32, 8, 3), (64, 64, 8, 2), (32, 16, 2, 3))
# (input channels, output channels, pairs, warps)
_GRADIENT_BLOCKS = ((32, 32, 32, 4), (64, 64, 32, 4), (64, 64, 64, 8), (32, 64, 64, 4))


@triton.jit
def _forward_kernel(
    x, w, bias, y, masks, starts, partners, order, tile_ptr, tile_offset, rows, cin, cout,
    stride_k, stride_in, stride_out,
    HAS_BIAS: tl.constexpr, ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    place = tile * BM + tl.arange(0, BM)
    live = place < rows
    out = tl.load(order + place, mask=live, other=0).to(tl.int64)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = columns < cout
    target = y + out[:, None] * cout + columns[None, :]
    keep = live[:, None] & inside[None, :]
    if ADD:
        total = tl.load(target, mask=keep, other=0.0)
    else:
        total = tl.zeros((BM, BN), tl.float32)
        if HAS_BIAS:
            total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    present = tl.load(masks + out, mask=live, other=0)
    partner = tl.load(starts + out, mask=live, other=0)
    for at in range(tl.load(tile_ptr + tile), tl.load(tile_ptr + tile + 1)):
        offset = tl.load(tile_offset + at)
        has = ((present >> offset % 32) & 1) != 0
        base = tl.load(partners + partner, mask=has, other=0).to(tl.int64) * cin
        partner += has.to(partner.dtype)  # the tile visits every offset of its records, in their order
        k = offset.to(tl.int64)
        for first in range(0, cin, BK):
            channel = first + tl.arange(0, BK)
            known = channel < cin
            a = tl.load(x + base[:, None] + channel[None, :], mask=has[:, None] & known[None, :], other=0.0)
            b = tl.load(
                w + k * stride_k + channel[:, None] * stride_in + columns[None, :] * stride_out,
                mask=known[:, None] & inside[None, :],
                other=0.0,
            )
            if WIDEN:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            total = tl.dot(a, b, total, input_precision=PRECISION)
    tl.store(target, total, mask=keep)


@triton.jit
def _weight_grad_kernel(
    x, g, partial, in_rows, out_rows, chunk_begin, chunk_end, cin, cout,
    BI: tl.constexpr, BO: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    left = tl.program_id(1) * BI + tl.arange(0, BI)
    right = tl.program_id(2) * BO + tl.arange(0, BO)
    total = tl.zeros((BI, BO), tl.float32)
    end = tl.load(chunk_end + chunk)
    for first in range(tl.load(chunk_begin + chunk), end, BP):
        pair = first + tl.arange(0, BP)
        real = pair < end
        i = tl.load(in_rows + pair, mask=real, other=0).to(tl.int64)
        o = tl.load(out_rows + pair, mask=real, other=0).to(tl.int64)
        a = tl.load(x + i[:, None] * cin + left[None, :], mask=real[:, None] & (left < cin)[None, :], other=0.0)
        b = tl.load(g + o[:, None] * cout + right[None, :], mask=real[:, None] & (right < cout)[None, :], other=0.0)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
    keep = (left < cin)[:, None] & (right < cout)[None, :]
    tl.store(partial + (chunk * cin + left[:, None]) * cout + right[None, :], total, mask=keep)


@triton.jit
def _sum_chunks_kernel(partial, out, chunk_ptr, size, BLOCK: tl.constexpr):
    k = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    total = tl.zeros((BLOCK,), tl.float32)
    for chunk in range(tl.load(chunk_ptr + k), tl.load(chunk_ptr + k + 1)):
        total += tl.load(partial + chunk * size + place, mask=inside, other=0.0)
    tl.store(out + k * size + place, total, mask=inside)


def plan(records: Coir, offsets: Tensor) -> list[Tensor]:
    """What the kernels want of a kernel map, on its device.

    Args:
        records: of the rows added to.
        offsets: ``(K + 1,)`` int64 on the CPU, pairs of each kernel offset.

    Returns:
        ``masks`` and ``starts (W, rows)`` of the records per window of offsets, and their ``partners (P,)``;
        ``order (W, rows)`` int32 rows, those with the same offsets together; ``tile_ptr (W * (tiles + 1),)`` and
        ``tile_offset`` the offsets that occur in each tile; ``chunk_begin``, ``chunk_end`` pairs of each partial weight
        gradient, and ``chunk_ptr (K + 1,)`` those of each offset; all int32.
    """
    device, volume, rows = records.masks.device, records.kernel_volume, len(records.masks)
    masks = records.masks.T.contiguous()
    orders, pointers, lists, start = [], [], [], 0
    tiles = -(-rows // TILE)
    for first in range(0, volume, WINDOW):
        present = masks[first // WINDOW]
        order = present.argsort(stable=True)
        padded = present.new_zeros(tiles * TILE)
        padded[:rows] = present[order]
        bits = torch.arange(min(WINDOW, volume - first), dtype=torch.int32, device=device)
        occurs = (padded.view(tiles, TILE, 1) >> bits & 1).any(1)
        counts = occurs.sum(1)
        orders.append(order.to(torch.int32))
        pointers.append(start + torch.cat([counts.new_zeros(1), counts.cumsum(0)]))
        lists.append(occurs.nonzero()[:, 1] + first)
        start += len(lists[-1])
    begin, end, chunk_ptr = _chunks(offsets)
    chunks = (t.to(device=device, dtype=torch.int32) for t in (begin, end, chunk_ptr))
    empty = torch.empty(0, dtype=torch.int32, device=device)
    pointer = torch.cat(pointers).to(torch.int32) if pointers else empty
    return [
        masks,
        records.starts.T.contiguous(),
        records.partners,
        torch.stack(orders) if orders else empty[None],
        pointer,
        torch.cat(lists).to(torch.int32) if lists else empty,
        *chunks,
    ]


def _chunks(offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First and last pair of every chunk, and the chunks of every offset: the same for any device."""
    length = max(_CHUNK, -(-int(offsets[-1]) // _MOST_CHUNKS))
    begin: list[int] = []
    end: list[int] = []
    counts = [0]
    for a, b in zip(offsets.tolist()[:-1], offsets.tolist()[1:], strict=True):
        begin += range(a, b, length)
        end += [min(first + length, b) for first in range(a, b, length)]
        counts.append(len(begin))
    return torch.tensor(begin), torch.tensor(end), torch.tensor(counts)


def kernel_map_plans(kmap: KernelMap) -> tuple[list[Tensor], list[Tensor]]:
    """Plans of a map and of its inverse, built once; the second is empty without gradients."""
    if "triton" not in kmap.plans:
        kmap.plans["triton"] = plan(encode(kmap, Field.CORF), kmap.offsets)
    if not torch.is_grad_enabled():
        return kmap.plans["triton"], []
    if "triton_inverse" not in kmap.plans:
        kmap.plans["triton_inverse"] = plan(encode(kmap, Field.CIRF), kmap.offsets)
    return kmap.plans["triton"], kmap.plans["triton_inverse"]


def forward(feat: Tensor, weight: Tensor, bias: Tensor | None, plan: list[Tensor], num_out: int) -> Tensor:
    """``(num_out, Cout)`` in the dtype of ``feat``, summed in float32; see :func:`pc3d.ops.conv.sparse_conv`."""
    masks, starts, partners, orders, pointer, lists = plan[:6]
    feat, (volume, cin, cout) = feat.contiguous(), weight.shape
    windows, tiles = len(orders), -(-num_out // TILE)
    out = feat.new_empty(num_out, cout, dtype=torch.float32 if windows > 1 else feat.dtype)
    if out.numel() == 0:
        return out.to(feat.dtype)

    def launch(blocks: tuple[int, ...]) -> None:
        columns, channels, warps, stages = blocks
        for window in range(windows):
            _forward_kernel[tiles, triton.cdiv(cout, columns)](
                feat, weight, feat if bias is None else bias, out, masks[window], starts[window], partners,
                orders[window], pointer[window * (tiles + 1) :], lists, num_out, cin, cout, *weight.stride(),
                HAS_BIAS=bias is not None, ADD=window > 0, BM=TILE, BN=columns, BK=channels,
                PRECISION=_precision(feat), WIDEN=INTERPRETED, num_warps=warps, num_stages=stages,
            )  # fmt: skip

    key = ("sparse_conv", volume, cin, cout, num_out.bit_length(), str(feat.dtype), _precision(feat))
    launch(_FORWARD_BLOCKS[0] if INTERPRETED else fastest(key, _FORWARD_BLOCKS, launch, feat.device))
    return out.to(feat.dtype)


def weight_grad(feat: Tensor, grad: Tensor, in_rows: Tensor, out_rows: Tensor, plan: list[Tensor]) -> Tensor:
    """``(K, Cin, Cout)`` in the dtype of ``feat``; see :func:`pc3d.ops.conv.sparse_conv`."""
    begin, end, pointer = plan[6:]
    feat, grad = feat.contiguous(), grad.contiguous()
    cin, cout, volume = feat.shape[1], grad.shape[1], len(pointer) - 1
    partial = feat.new_empty(len(begin), cin, cout, dtype=torch.float32)
    if partial.numel() == 0:
        return feat.new_zeros(volume, cin, cout)

    def launch(blocks: tuple[int, ...]) -> None:
        left, right, pairs, warps = blocks
        _weight_grad_kernel[len(begin), triton.cdiv(cin, left), triton.cdiv(cout, right)](
            feat, grad, partial, in_rows, out_rows, begin, end, cin, cout,
            BI=left, BO=right, BP=pairs, PRECISION=_precision(feat), WIDEN=INTERPRETED, num_warps=warps,
        )  # fmt: skip

    key = ("weight_grad", cin, cout, len(in_rows).bit_length(), str(feat.dtype), _precision(feat))
    launch(_GRADIENT_BLOCKS[0] if INTERPRETED else fastest(key, _GRADIENT_BLOCKS, launch, feat.device))
    return sum_chunks(partial, pointer).to(feat.dtype)


def sum_chunks(partial: Tensor, chunk_ptr: Tensor) -> Tensor:
    """``(K, ...)`` float32 sums of the partial gradients ``(chunks, ...)`` of every kernel offset, in their order."""
    out = partial.new_zeros(len(chunk_ptr) - 1, *partial.shape[1:])
    if partial.numel():
        size, block = out[0].numel(), 1024
        _sum_chunks_kernel[len(out), triton.cdiv(size, block)](partial, out, chunk_ptr, size, BLOCK=block)
    return out


def _precision(feat: Tensor) -> Any:
    """TF32 where PyTorch's own matrix products may use it."""
    return "tf32" if feat.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
