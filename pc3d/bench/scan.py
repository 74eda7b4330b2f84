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
CHUNK, BLOCK = 32, 64  # of the plain-torch form: the fastest found among chunks of 16 to 128 and all channels at once
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
    """Two levels: all chunks abreast position by position, then chunk after chunk; channels block by block."""
    u, delta, A, B, C, D, z, bias = inputs
    chunks = length // CHUNK
    B, C = (t.view(batch, chunks, CHUNK, 1, -1) for t in (B, C))
    outputs = []
    for first in range(0, u.shape[1], BLOCK):
        block = slice(first, first + BLOCK)
        x, step = (t[:, block].reshape(batch, chunks, CHUNK, -1) for t in (u, F.softplus(delta + bias)))
        inflow = (step * x)[..., None] * B
        decay = torch.exp(step[..., None] * A[block])
        state, product = inflow[:, :, 0], decay[:, :, 0]
        states, products = [state], [product]
        for i in range(1, CHUNK):
            state = decay[:, :, i] * state + inflow[:, :, i]
            product = product * decay[:, :, i]
            states.append(state)
            products.append(product)
        carry, carries = torch.zeros_like(state[:, 0]), []
        for i in range(chunks):
            carries.append(carry)
            carry = product[:, i] * carry + state[:, i]
        before = torch.stack(carries, 1)[:, :, None]
        full = torch.stack(states, 2) + torch.stack(products, 2) * before
        y = (full * C).sum(-1) + D[block] * x
        outputs.append(y.reshape(batch * length, -1))
    return torch.cat(outputs, 1) * F.silu(z)
