"""Selective scan on a GPU: Triton kernels behind :mod:`pc3d.ops.scan`.

Every cloud is cut into chunks of 64 tokens. One kernel scans all chunks at once from an empty state, one carries the
states from chunk to chunk, one scans again from the right state and writes the result; the gradient goes the same way
back. Kept between them is one state per chunk, so memory grows with tokens x channels, and no sum depends on the
schedule of the device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 64
_SPLITS = 4  # programs that share the channels of a group in the backward pass
_LARGEST_STATE = 64  # a chunk's states of one channel stay in registers


@triton.jit
def _compose(a1, b1, a2, b2):
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _step(delta, bias, rows, channel, channels, real, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Step widths of a chunk's tokens, 0 beyond its end, and the slope of the softplus."""
    step = tl.load(delta + rows * channels + channel, mask=real, other=0.0)
    if HAS_BIAS:
        step += tl.load(bias + channel)
    slope = tl.full(step.shape, 1.0, tl.float32)
    if SOFTPLUS:
        slope = 1.0 / (1.0 + tl.exp(-step))
        step = tl.where(step > 20.0, step, tl.log(1.0 + tl.exp(tl.minimum(step, 20.0))))
    return tl.where(real, step, 0.0), slope


@triton.jit
def _scan_chunk(step, x, rate, drive):
    """Products of decays ``(L, N)`` and states from an empty one ``(L, N)`` along a chunk, and what each token adds."""
    decay = tl.exp(step[:, None] * rate[None, :])
    added = (step * x)[:, None] * drive
    product, state = tl.associative_scan((decay, added), 0, _compose)
    return product, state, added


@triton.jit
def _local_kernel(
    u, delta, rates, drives, bias, first, length, local, total, channels, groups, states, sign,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, L: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    chunk, channel = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place, n = tl.arange(0, L), tl.arange(0, N)
    real, known = place < tl.load(length + chunk), n < states
    rows = tl.load(first + chunk) + sign * place.to(tl.int64)
    group = channel // (channels // groups)
    step, _ = _step(delta, bias, rows, channel, channels, real, SOFTPLUS, HAS_BIAS)
    x = tl.load(u + rows * channels + channel, mask=real, other=0.0)
    rate = tl.load(rates + channel * states + n, mask=known, other=0.0)
    at = (rows[:, None] * groups + group) * states + n[None, :]
    drive = tl.load(drives + at, mask=real[:, None] & known[None, :], other=0.0)
    _, state, _ = _scan_chunk(step, x, rate, drive)
    out = (chunk * channels + channel) * states + n
    tl.store(local + out, tl.sum(tl.where(place[:, None] == L - 1, state, 0.0), 0), mask=known)
    tl.store(total + out, tl.exp(rate * tl.sum(step, 0)), mask=known)


@triton.jit
def _carry_kernel(
    local, total, carried, edge, chunk_ptr, size, BACKWARD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """``carried[chunk]`` is what enters a chunk; ``edge`` (clouds, size) enters the first one and leaves the last."""
    cloud = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    state = tl.load(edge + cloud * size + place, mask=inside, other=0.0)
    begin, end = tl.load(chunk_ptr + cloud).to(tl.int64), tl.load(chunk_ptr + cloud + 1).to(tl.int64)
    for i in range(begin, end):
        chunk = i
        if BACKWARD:
            chunk = begin + end - 1 - i
        at = chunk * size + place
        tl.store(carried + at, state, mask=inside)
        state = tl.load(total + at, mask=inside, other=0.0) * state + tl.load(local + at, mask=inside, other=0.0)
    tl.store(edge + cloud * size + place, state, mask=inside)


@triton.jit
def _output_kernel(
    u, delta, rates, drives, reads, skip, gate, bias, first, length, carried, y, channels, groups, states, sign,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_GATE: tl.constexpr,
    L: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    chunk, channel = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place, n = tl.arange(0, L), tl.arange(0, N)
    real, known = place < tl.load(length + chunk), n < states
    rows = tl.load(first + chunk) + sign * place.to(tl.int64)
    group = channel // (channels // groups)
    step, _ = _step(delta, bias, rows, channel, channels, real, SOFTPLUS, HAS_BIAS)
    x = tl.load(u + rows * channels + channel, mask=real, other=0.0)
    rate = tl.load(rates + channel * states + n, mask=known, other=0.0)
    at = (rows[:, None] * groups + group) * states + n[None, :]
    both = real[:, None] & known[None, :]
    product, state, _ = _scan_chunk(step, x, rate, tl.load(drives + at, mask=both, other=0.0))
    state += product * tl.load(carried + (chunk * channels + channel) * states + n, mask=known, other=0.0)[None, :]
    out = tl.sum(state * tl.load(reads + at, mask=both, other=0.0), 1)
    if HAS_SKIP:
        out += tl.load(skip + channel) * x
    if HAS_GATE:
        z = tl.load(gate + rows * channels + channel, mask=real, other=0.0)
        out *= z / (1.0 + tl.exp(-z))
    tl.store(y + rows * channels + channel, out, mask=real)


@triton.jit
def _adjoint_chunk(step, dy, rate, read, delta, bias, rows, channel, channels, place, real, last, sign,
                   SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr):  # fmt: skip
    """Products and gradients of the states ``(L, N)``, from the end of a chunk on, nothing flowing in there."""
    following = place + 1 < last
    later, _ = _step(delta, bias, rows + sign, channel, channels, following, SOFTPLUS, HAS_BIAS)
    decay = tl.where(following[:, None], tl.exp(later[:, None] * rate[None, :]), 1.0)
    return tl.associative_scan((decay, dy[:, None] * read), 0, _compose, reverse=True)


@triton.jit
def _upstream(grad, gate, rows, channel, channels, real, HAS_GATE: tl.constexpr):
    g = tl.load(grad + rows * channels + channel, mask=real, other=0.0)
    if HAS_GATE:
        z = tl.load(gate + rows * channels + channel, mask=real, other=0.0)
        g *= z / (1.0 + tl.exp(-z))
    return g


@triton.jit
def _local_adjoint_kernel(
    grad, delta, rates, reads, gate, bias, first, length, local, channels, groups, states, sign,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, L: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    chunk, channel = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place, n = tl.arange(0, L), tl.arange(0, N)
    last = tl.load(length + chunk)
    real, known = place < last, n < states
    rows = tl.load(first + chunk) + sign * place.to(tl.int64)
    group = channel // (channels // groups)
    dy = _upstream(grad, gate, rows, channel, channels, real, HAS_GATE)
    rate = tl.load(rates + channel * states + n, mask=known, other=0.0)
    at = (rows[:, None] * groups + group) * states + n[None, :]
    read = tl.load(reads + at, mask=real[:, None] & known[None, :], other=0.0)
    _, dstate = _adjoint_chunk(step=dy, dy=dy, rate=rate, read=read, delta=delta, bias=bias, rows=rows, channel=channel,
                               channels=channels, place=place, real=real, last=last, sign=sign,
                               SOFTPLUS=SOFTPLUS, HAS_BIAS=HAS_BIAS)  # fmt: skip
    step, _ = _step(delta, bias, rows, channel, channels, real, SOFTPLUS, HAS_BIAS)
    start = tl.sum(tl.where(place == 0, step, 0.0), 0)
    flows = tl.exp(start * rate) * tl.sum(tl.where(place[:, None] == 0, dstate, 0.0), 0)
    tl.store(local + (chunk * channels + channel) * states + n, flows, mask=known)


@triton.jit
def _gradient_kernel(
    grad, u, delta, rates, drives, reads, skip, gate, bias, first, length, carried, returned,
    du, ddelta, dgate, drate, ddrive, dread, dskip, tokens, channels, groups, states, sign, per_split,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_GATE: tl.constexpr,
    L: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    chunk, group, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    place, n = tl.arange(0, L), tl.arange(0, N)
    last = tl.load(length + chunk)
    real, known = place < last, n < states
    rows = tl.load(first + chunk) + sign * place.to(tl.int64)
    both = real[:, None] & known[None, :]
    at = (rows[:, None] * groups + group) * states + n[None, :]
    drive = tl.load(drives + at, mask=both, other=0.0)
    read = tl.load(reads + at, mask=both, other=0.0)
    into_drive = tl.zeros((L, N), tl.float32)
    into_read = tl.zeros((L, N), tl.float32)
    width = channels // groups
    begin = group * width + split * per_split
    end = tl.minimum(begin + per_split, (group + 1) * width)
    for channel in range(begin, end):
        place_of = rows * channels + channel
        step, slope = _step(delta, bias, rows, channel, channels, real, SOFTPLUS, HAS_BIAS)
        x = tl.load(u + place_of, mask=real, other=0.0)
        rate = tl.load(rates + channel * states + n, mask=known, other=0.0)
        edge = (chunk * channels + channel) * states + n
        product, state, added = _scan_chunk(step, x, rate, drive)
        state += product * tl.load(carried + edge, mask=known, other=0.0)[None, :]
        g = tl.load(grad + place_of, mask=real, other=0.0)
        dy = g
        factor = 0.0
        if HAS_SKIP:
            factor = tl.load(skip + channel)
        if HAS_GATE:
            z = tl.load(gate + place_of, mask=real, other=0.0)
            sigmoid = 1.0 / (1.0 + tl.exp(-z))
            plain = tl.sum(state * read, 1) + factor * x
            tl.store(dgate + place_of, g * plain * sigmoid * (1.0 + z * (1.0 - sigmoid)), mask=real)
            dy = g * z * sigmoid
        back, dstate = _adjoint_chunk(step=dy, dy=dy, rate=rate, read=read, delta=delta, bias=bias, rows=rows,
                                      channel=channel, channels=channels, place=place, real=real, last=last, sign=sign,
                                      SOFTPLUS=SOFTPLUS, HAS_BIAS=HAS_BIAS)  # fmt: skip
        dstate += back * tl.load(returned + edge, mask=known, other=0.0)[None, :]
        dstate = tl.where(both, dstate, 0.0)
        kept = state - added  # decay times the state before
        into_drive += dstate * (step * x)[:, None]
        into_read += dy[:, None] * state
        along = tl.sum(dstate * drive, 1)
        tl.store(du + place_of, dy * factor + along * step, mask=real)
        dstep = tl.sum(dstate * kept * rate[None, :], 1) + along * x
        tl.store(ddelta + place_of, dstep * slope, mask=real)
        tl.store(drate + edge, tl.sum(dstate * kept * step[:, None], 0), mask=known)
        tl.store(dskip + chunk * channels + channel, tl.sum(dy * x, 0))
    out = split * tokens * groups * states + at
    tl.store(ddrive + out, into_drive, mask=both)
    tl.store(dread + out, into_read, mask=both)


def serves(B: Tensor, C: Tensor) -> bool:
    """Whether the kernels can: coefficients per token, and not too many states."""
    return B.ndim == 3 and C.ndim == 3 and B.shape[-1] <= _LARGEST_STATE


def _chunks(offsets: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """First row and length of every chunk in the order of the walk, and the chunks of every cloud."""
    sizes = offsets.diff()
    counts = (sizes + CHUNK - 1) // CHUNK
    pointer = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    total = int(pointer[-1])
    cloud = torch.repeat_interleave(counts, output_size=total)
    begin = CHUNK * (torch.arange(total, device=offsets.device) - pointer[:-1][cloud])
    length = (sizes[cloud] - begin).clamp(max=CHUNK)
    first = offsets[1:][cloud] - 1 - begin if reverse else offsets[:-1][cloud] + begin
    return first, length.to(torch.int32), pointer.to(torch.int32)


def _flags(
    skip: Tensor | None, gate: Tensor | None, bias: Tensor | None, softplus: bool, states: int
) -> dict[str, Any]:
    return {
        "SOFTPLUS": softplus, "HAS_BIAS": bias is not None, "HAS_SKIP": skip is not None, "HAS_GATE": gate is not None,
        "L": CHUNK, "N": triton.next_power_of_2(states),
    }  # fmt: skip


def _some(flags: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: flags[name] for name in (*names, "SOFTPLUS", "HAS_BIAS", "L", "N")}


@torch.library.custom_op("pc3d::selective_scan_triton", mutates_args=())
def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    offsets: Tensor,
    softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``y``, last states, and per chunk the state that enters it and its total decay ``(chunks, channels, N)``."""
    u, delta, A, B, C = (t.detach().contiguous() for t in (u, delta, A, B, C))
    D, z, delta_bias = (None if t is None else t.detach().contiguous() for t in (D, z, delta_bias))
    (_, channels), groups, states = u.shape, B.shape[1], B.shape[2]
    first, length, pointer = _chunks(offsets, reverse)
    chunks, clouds, sign = len(first), len(offsets) - 1, -1 if reverse else 1
    local, total, carried = (u.new_empty(chunks, channels, states) for _ in range(3))
    last = u.new_zeros(clouds, channels, states) if initial_state is None else initial_state.detach().clone()
    y = torch.empty_like(u)
    if chunks == 0 or channels == 0:
        return y, last, carried, total
    flags = _flags(D, z, delta_bias, softplus, states)
    shape = channels, groups, states, sign
    bias, skip, gate = (u if t is None else t for t in (delta_bias, D, z))
    _local_kernel[chunks, channels](u, delta, A, B, bias, first, length, local, total, *shape, **_some(flags))
    _carry(local, total, carried, last, pointer, backward=False)
    _output_kernel[chunks, channels](
        u, delta, A, B, C, skip, gate, bias, first, length, carried, y, *shape, **flags
    )  # fmt: skip
    return y, last, carried, total


def _carry(local: Tensor, total: Tensor, carried: Tensor, edge: Tensor, pointer: Tensor, backward: bool) -> None:
    size, block = edge.shape[1] * edge.shape[2], 256
    grid = len(edge), triton.cdiv(size, block)
    _carry_kernel[grid](local, total, carried, edge, pointer, size, BACKWARD=backward, BLOCK=block)


@torch.library.custom_op("pc3d::selective_scan_triton_backward", mutates_args=())
def scan_backward(
    grad: Tensor,
    grad_last: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    offsets: Tensor,
    carried: Tensor,
    total: Tensor,
    softplus: bool,
    reverse: bool,
) -> list[Tensor]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias and the initial state; of a missing one they mean nothing."""
    grad, u, delta, A, B, C = (t.detach().contiguous() for t in (grad, u, delta, A, B, C))
    D, z, delta_bias = (None if t is None else t.detach().contiguous() for t in (D, z, delta_bias))
    (tokens, channels), groups, states = u.shape, B.shape[1], B.shape[2]
    first, length, pointer = _chunks(offsets, reverse)
    chunks, sign = len(first), -1 if reverse else 1
    edge = u.new_zeros(len(offsets) - 1, channels, states) if grad_last is None else grad_last.detach().clone()
    du, ddelta, dz = (torch.zeros_like(u) for _ in range(3))
    if chunks == 0 or channels == 0:
        return [du, ddelta, torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(C), u.new_zeros(channels), dz,
                u.new_zeros(channels), edge]  # fmt: skip
    local, returned, drate = (torch.empty_like(carried) for _ in range(3))
    dskip = u.new_empty(chunks, channels)
    splits = min(_SPLITS, channels // groups)
    ddrive, dread = (u.new_empty(splits, tokens, groups, states) for _ in range(2))
    flags = _flags(D, z, delta_bias, softplus, states)
    bias, skip, gate = (u if t is None else t for t in (delta_bias, D, z))
    shape = channels, groups, states, sign
    _local_adjoint_kernel[chunks, channels](
        grad, delta, A, C, gate, bias, first, length, local, *shape, **_some(flags, "HAS_GATE")
    )
    _carry(local, total, returned, edge, pointer, backward=True)
    _gradient_kernel[chunks, groups, splits](
        grad, u, delta, A, B, C, skip, gate, bias, first, length, carried, returned,
        du, ddelta, dz, drate, ddrive, dread, dskip, tokens, *shape, triton.cdiv(channels // groups, splits), **flags,
    )  # fmt: skip
    return [du, ddelta, drate.sum(0), ddrive.sum(0), dread.sum(0), dskip.sum(0), dz, ddelta.sum(0), edge]


@scan.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    offsets: Tensor,
    softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = u.shape[1], B.shape[2]
    chunks = torch.library.get_ctx().new_dynamic_size()
    kept = [u.new_empty(chunks, *shape) for _ in range(2)]
    return torch.empty_like(u), u.new_empty(len(offsets) - 1, *shape), kept[0], kept[1]


@scan_backward.register_fake
def _(
    grad: Tensor,
    grad_last: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    offsets: Tensor,
    carried: Tensor,
    total: Tensor,
    softplus: bool,
    reverse: bool,
) -> list[Tensor]:
    channels = u.shape[1]
    edge = u.new_empty(len(offsets) - 1, channels, B.shape[2])
    row = [u.new_empty(channels) for _ in range(2)]
    like = [torch.empty_like(t) for t in (u, delta, A, B, C)]
    return [*like, row[0], torch.empty_like(u), row[1], edge]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.softplus, ctx.reverse = inputs
    ctx.save_for_backward(*tensors, output[2], output[3])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_last: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    *inputs, offsets, carried, total = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(inputs[0])
    grads = scan_backward(grad, grad_last, *inputs[:8], offsets, carried, total, ctx.softplus, ctx.reverse)
    return *(None if t is None else g for t, g in zip(inputs, grads, strict=True)), None, None, None


scan.register_autograd(_backward, setup_context=_setup)
