"""Selective scan: the C++ kernels beside the sequential reference and the chunked form in plain torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pc3d.bench.timing import Timing, on_reference, time_interleaved
from pc3d.errors import InputError
from pc3d.ops.scan import selective_scan

SHAPES = ((8, 1024, 384, 16), (1, 65536, 128, 16))
LENGTHS = (10_000, 31_623, 100_000, 316_228, 1_000_000)
CHUNK = 256  # of the plain-torch form, the fastest of powers of two from 64 to 1024
TOLERANCE = 1e-4

Shape = tuple[int, int, int, int]


def shape(text: str) -> Shape:
    """``BATCHxLENGTHxCHANNELSxSTATE``."""
    parts = text.lower().split("x")
    if len(parts) != 4 or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not BATCHxLENGTHxCHANNELSxSTATE, as in 8x1024x384x16")
    batch, length, channels, state = map(int, parts)
    return batch, length, channels, state


def bench(size: Shape, rounds: int, growth: bool = False) -> list[Timing]:
    """Forward, and forward with backward, of one shape; only the kernels with ``growth``.

    Raises:
        InputError: if the engines disagree.
    """
    inputs, offsets = _inputs(size)
    batch, length, _, _ = size

    def scan() -> Tensor:
        u, delta, A, B, C, D, z, bias = inputs
        return selective_scan(u, delta, A, B, C, offsets, D, z, bias, delta_softplus=True)[0]

    def chunked() -> Tensor:
        return _chunked(inputs, batch, length)

    engines: dict[str, Callable[[], Tensor]] = {"kernels": scan}
    if not growth:
        engines |= {"torch chunked": chunked, "reference": on_reference(scan)}
    name = "x".join(map(str, size))
    with torch.no_grad():
        results = {engine: run() for engine, run in engines.items()}
        for engine, found in results.items():
            worst = (found - results["kernels"]).abs().max() / results["kernels"].abs().max()
            if not worst <= TOLERANCE:
                raise InputError(f"scan {name}: {engine} and kernels differ by {worst:.1e}; no times are shown")
        timings = time_interleaved(f"scan {name} fwd", batch * length, engines, rounds)
    steps = {engine: _with_backward(run, inputs) for engine, run in engines.items()}
    return timings + time_interleaved(f"scan {name} fwdbwd", batch * length, steps, rounds)


def _with_backward(run: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    return lambda: torch.autograd.grad(run().sum(), inputs)


def _inputs(size: Shape) -> tuple[list[Tensor], Tensor]:
    batch, length, channels, state = size
    tokens, generator = batch * length, torch.Generator().manual_seed(0)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    A = -torch.arange(1.0, state + 1).repeat(channels, 1)
    inputs = [randn(tokens, channels), randn(tokens, channels), A, randn(tokens, 1, state), randn(tokens, 1, state),
              torch.ones(channels), randn(tokens, channels), randn(channels) - 3]  # fmt: skip
    return [t.requires_grad_() for t in inputs], torch.arange(batch + 1) * length


def _chunked(inputs: list[Tensor], batch: int, length: int) -> Tensor:
    """Two passes over all chunks abreast, position by position: what each chunk adds and how much of what enters it
    stays, then, with the states carried from chunk to chunk in between, the outputs.
    """
    u, delta, A, B, C, D, z, bias = inputs
    chunk = min(CHUNK, length)
    chunks = length // chunk
    x, step = (t.view(batch * chunks, chunk, -1) for t in (u, F.softplus(delta + bias)))
    B, C = (t.view(batch * chunks, chunk, 1, -1) for t in (B, C))
    inflow, kept, added = step * x, [], []
    state = x.new_zeros(batch * chunks, *A.shape)
    for i in range(chunk):
        kept.append(torch.exp(step[:, i, :, None] * A))
        added.append(inflow[:, i, :, None] * B[:, i])
        state = torch.addcmul(added[-1], kept[-1], state)
    ends = state.unflatten(0, (batch, chunks))
    totals = torch.exp(step.sum(1)[..., None] * A).unflatten(0, (batch, chunks))
    carry, carries = torch.zeros_like(ends[:, 0]), []
    for i in range(chunks):
        carries.append(carry)
        carry = torch.addcmul(ends[:, i], totals[:, i], carry)
    state, outputs = torch.stack(carries, 1).flatten(0, 1), []
    for i in range(chunk):
        state = torch.addcmul(added[i], kept[i], state)
        outputs.append((state * C[:, i]).sum(-1))
    y = torch.stack(outputs, 1) + D * x
    return y.view(batch * length, -1) * F.silu(z)
