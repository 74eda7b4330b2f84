"""Sparse convolution on a GPU: Triton kernels behind :mod:`pc3d.ops.conv`.

Forward and input gradient are an implicit matrix product over COIR records (:mod:`pc3d.ops.coir`): a tile of output
rows walks through its records, kernel offset after kernel offset, and skips offsets that none of its rows has. Rows are
ordered by the set of offsets they have, so that tiles skip much, for parts of at most 32 offsets. The other flow, fetch
on demand, multiplies the pairs of one kernel offset after the other and adds to the rows of the output. Every output
has one writer at a time and one order of summation, and the partial weight gradients are added in a fixed order:
nothing depends on the schedule of the device.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pc3d.errors import InputError
from pc3d.ops.coir import Coir, Field, encode
from pc3d.ops.flows import Way
from pc3d.ops.kernel_map import KernelMap
from pc3d.ops.tune import fastest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_WORD = 32  # kernel offsets of one part, at most
USUAL = Way("os", 64, "all")
_CHUNK = 4096  # pairs of one partial weight gradient, at least
_MOST_CHUNKS = 128

# (output columns, input channels, warps, stages)
_FORWARD_BLOCKS = ((32, 32, 4, 3), (64, 32, 4, 3), (128, 32, 8, 3), (64, 64, 8, 2), (32, 16, 2, 3))
# (input channels, output channels, pairs, warps)
_GRADIENT_BLOCKS = ((32, 32, 32, 4), (64, 64, 32, 4), (64, 64, 64, 8), (32, 64, 64, 4))


@triton.jit
def _multiply_rows(
    total, rows, real, filters, inside, cin, stride_in,
    BK: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Adds the product of rows, where they are real, and the columns of a filter that are inside it."""
    for first in range(0, cin, BK):
        channel = first + tl.arange(0, BK)
        known = channel < cin
        a = tl.load(rows[:, None] + channel[None, :], mask=real[:, None] & known[None, :], other=0.0)
        b = tl.load(filters + channel[:, None] * stride_in, mask=known[:, None] & inside[None, :], other=0.0)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def _forward_kernel(
    x, w, bias, y, masks, starts, partners, order, tile_ptr, tile_offset, rows, cin, cout,
    first_offset, stride_k, stride_in, stride_out,
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
        has = ((present >> (offset - first_offset)) & 1) != 0
        base = tl.load(partners + partner, mask=has, other=0).to(tl.int64) * cin
        partner += has.to(partner.dtype)  # the tile visits every offset of its records, in their order
        k = offset.to(tl.int64)
        filters = w + k * stride_k + columns[None, :] * stride_out
        total = _multiply_rows(total, x + base, has, filters, inside, cin, stride_in, BK, PRECISION, WIDEN)
    tl.store(target, total, mask=keep)


@triton.jit
def _scatter_kernel(
    x, w, y, in_rows, out_rows, begin, end, cin, cout, stride_in, stride_out,
    BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Pairs of one kernel offset, under which a row occurs once: nobody else writes to it meanwhile."""
    pair = begin + tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    real, inside = pair < end, columns < cout
    i = tl.load(in_rows + pair, mask=real, other=0).to(tl.int64)
    o = tl.load(out_rows + pair, mask=real, other=0).to(tl.int64)
    target = y + o[:, None] * cout + columns[None, :]
    keep = real[:, None] & inside[None, :]
    total = tl.load(target, mask=keep, other=0.0)
    filters = w + columns[None, :] * stride_out
    total = _multiply_rows(total, x + i * cin, real, filters, inside, cin, stride_in, BK, PRECISION, WIDEN)
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


def plan(records: Coir, offsets: Tensor, way: Way = USUAL) -> list[Tensor]:
    """What the kernels want of a kernel map, on its device.

    Args:
        records: of the rows added to.
        offsets: ``(K + 1,)`` int64 on the CPU, pairs of each kernel offset.
        way: tiles and sorting.

    Returns:
        ``masks`` and ``starts (W, rows)`` of the records, for each part of the offsets, and their ``partners (P,)``;
        ``order (W, rows)`` int32 rows, those with the same offsets together; ``tile_ptr (W * (tiles + 1),)`` and
        ``tile_offset`` the offsets that occur in each tile; ``chunk_begin``, ``chunk_end`` pairs of each partial weight
        gradient, and ``chunk_ptr (K + 1,)`` those of each offset; all int32.
    """
    device, rows = records.masks.device, len(records.masks)
    tiles = -(-rows // way.tile)
    masks, starts, orders, pointers, lists, listed = [], [], [], [], [], 0
    for first, last in _parts(records.kernel_volume, way.splits):
        present, start = records.part(first, last)
        order = _sorted_rows(present, way)
        padded = present.new_zeros(tiles * way.tile)
        padded[:rows] = present[order]
        bits = torch.arange(last - first, dtype=torch.int32, device=device)
        occurs = (padded.view(tiles, way.tile, 1) >> bits & 1).any(1)
        counts = occurs.sum(1)
        masks.append(present)
        starts.append(start)
        orders.append(order.to(torch.int32))
        pointers.append(listed + torch.cat([counts.new_zeros(1), counts.cumsum(0)]))
        lists.append(occurs.nonzero()[:, 1] + first)
        listed += len(lists[-1])
    begin, end, chunk_ptr = _chunks(offsets)
    return [
        torch.stack(masks),
        torch.stack(starts),
        records.partners,
        torch.stack(orders),
        torch.cat(pointers).to(torch.int32),
        torch.cat(lists).to(torch.int32),
        *(t.to(device=device, dtype=torch.int32) for t in (begin, end, chunk_ptr)),
    ]


def _parts(volume: int, splits: int) -> list[tuple[int, int]]:
    """First and last kernel offset of each part."""
    parts = max(splits, -(-volume // _WORD))
    return list(itertools.pairwise(volume * i // parts for i in range(parts + 1)))


def _sorted_rows(masks: Tensor, way: Way) -> Tensor:
    rows = torch.arange(len(masks), device=masks.device)
    if way.window is None:
        return rows
    order = masks.argsort(stable=True)
    return order if way.window == "all" else order[(order // way.window).argsort(stable=True)]


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


def kernel_map_plans(kmap: KernelMap, forward: str, input_grad: str) -> tuple[list[Tensor], list[Tensor]]:
    """Plans of a map and of its inverse for these flows, built once; the second is empty without gradients."""
    forth = _kept_plan(kmap, Field.CORF, forward)
    return forth, _kept_plan(kmap, Field.CIRF, input_grad) if torch.is_grad_enabled() else []


def _kept_plan(kmap: KernelMap, field: Field, flow: str) -> list[Tensor]:
    way = tiling(flow)
    slot = ("triton", field, way)
    if slot not in kmap.plans:
        kmap.plans[slot] = plan(encode(kmap, field), kmap.offsets, way)
    return kmap.plans[slot]


def tiling(flow: str) -> Way:
    """Tiles and sorting of an output-stationary flow; the usual ones for the others, which have none.

    Raises:
        InputError: if the flow exists on the CPU only.
    """
    way = Way.parse(flow)
    if not way.on_gpu:
        raise InputError(f"dataflow {flow!r} exists on the CPU only")
    return way if way.tile else USUAL


def forward(
    feat: Tensor, weight: Tensor, bias: Tensor | None, plan: list[Tensor], num_out: int, flow: str = "os"
) -> Tensor:
    """``(num_out, Cout)`` in the dtype of ``feat``, summed in float32; see :func:`pc3d.ops.conv.sparse_conv`."""
    masks, starts, partners, orders, pointer, lists = plan[:6]
    feat, (volume, cin, cout) = feat.contiguous(), weight.shape
    way = tiling(flow)
    parts, tiles = _parts(volume, way.splits), -(-num_out // way.tile)
    out = feat.new_empty(num_out, cout, dtype=torch.float32 if len(parts) > 1 else feat.dtype)
    if out.numel() == 0:
        return out.to(feat.dtype)

    def launch(blocks: tuple[int, ...]) -> None:
        columns, channels, warps, stages = blocks
        for part, (first, _) in enumerate(parts):
            _forward_kernel[tiles, triton.cdiv(cout, columns)](
                feat, weight, feat if bias is None else bias, out, masks[part], starts[part], partners,
                orders[part], pointer[part * (tiles + 1) :], lists, num_out, cin, cout, first, *weight.stride(),
                HAS_BIAS=bias is not None, ADD=part > 0, BM=way.tile, BN=columns, BK=channels,
                PRECISION=_precision(feat), WIDEN=INTERPRETED, num_warps=warps, num_stages=stages,
            )  # fmt: skip

    key = ("sparse_conv", way.name, volume, cin, cout, num_out.bit_length(), str(feat.dtype), _precision(feat))
    launch(_FORWARD_BLOCKS[0] if INTERPRETED else fastest(key, _FORWARD_BLOCKS, launch, feat.device))
    return out.to(feat.dtype)


def fetch_on_demand(
    feat: Tensor, weight: Tensor, bias: Tensor | None, in_rows: Tensor, out_rows: Tensor, offsets: Tensor, num_out: int
) -> Tensor:
    """The same as :func:`forward`, the pairs of one kernel offset after the other."""
    feat, (_, cin, cout) = feat.contiguous(), weight.shape
    out = feat.new_zeros(num_out, cout, dtype=torch.float32)
    if bias is not None:
        out += bias
    runs = [(k, begin, end) for k, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())) if begin < end]

    def launch(blocks: tuple[int, ...], target: Tensor) -> None:
        columns, channels, warps, stages = blocks
        for k, begin, end in runs:
            _scatter_kernel[triton.cdiv(end - begin, USUAL.tile), triton.cdiv(cout, columns)](
                feat, weight[k], target, in_rows, out_rows, begin, end, cin, cout, *weight.stride()[1:],
                BP=USUAL.tile, BN=columns, BK=channels, PRECISION=_precision(feat), WIDEN=INTERPRETED,
                num_warps=warps, num_stages=stages,
            )  # fmt: skip

    key = ("fetch_on_demand", cin, cout, len(in_rows).bit_length(), str(feat.dtype), _precision(feat))
    blocks: tuple[int, ...] = _FORWARD_BLOCKS[0]
    if runs and cout and not INTERPRETED:
        blocks = fastest(key, _FORWARD_BLOCKS, lambda tried: launch(tried, torch.zeros_like(out)), feat.device)
    if cout:
        launch(blocks, out)
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
