"""Selective scan and causal convolution by the CUDA packages mamba-ssm and causal-conv1d, where they are installed.

They know batches ``(B, channels, L)`` of equally long sequences. Packed clouds of one length are such a batch; the
convolution takes any clouds as one sequence with the number of the cloud at every token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_WIDTHS = (2, 3, 4)  # of the kernels of causal-conv1d
_CHANNEL_MULTIPLE = 8


def serves_scan(A: Tensor, B: Tensor, offsets: Tensor, initial_state: Tensor | None) -> bool:
    """Whether mamba-ssm can: all clouds of one length and no state before them, a rate for each of up to 256 states."""
    if initial_state is not None or A.shape[1] != B.shape[-1] or B.shape[-1] > 256 or len(offsets) < 2:
        return False
    sizes = offsets.diff()
    return bool((sizes == sizes[0]).all() & (sizes[0] > 0))


def serves_conv(x: Tensor, width: int) -> bool:
    """Whether causal-conv1d can."""
    return width in _WIDTHS and x.shape[1] % _CHANNEL_MULTIPLE == 0 and len(x) > 0


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    offsets: Tensor,
    softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """``y`` and the last states, which have no gradient here: asking for it is an error and not a wrong result."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    clouds = len(offsets) - 1

    def batched(tokens: Tensor | None) -> Tensor | None:
        if tokens is None:
            return None
        sequences = tokens.unflatten(0, (clouds, -1)).movedim(1, -1)
        return (sequences.flip(-1) if reverse else sequences).contiguous()

    coefficients = [batched(t) if t.ndim == 3 else t for t in (B, C)]
    y, last = selective_scan_fn(
        batched(u), batched(delta), A, *coefficients, D, batched(z), delta_bias, softplus, return_last_state=True
    )
    y = (y.flip(-1) if reverse else y).movedim(-1, 1).flatten(0, 1)
    return y, _NoGradient.apply(last, y)


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, last: Tensor, y: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return last.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, None]:
        if grad is not None:
            raise RuntimeError(
                "the kernel of mamba-ssm has no gradient for the last state: use pc3d.ops.backend.use_backend('triton')"
            )
        return None, None


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, silu: bool, reverse: bool) -> Tensor:
    """``weight`` is ``(channels, W)``."""
    from causal_conv1d import causal_conv1d_fn

    cloud = torch.repeat_interleave(offsets.diff(), output_size=len(x)).int()
    if reverse:
        x, cloud = x.flip(0), cloud.flip(0)
    y = causal_conv1d_fn(x.t()[None], weight, bias, cloud[None], activation="silu" if silu else None)[0].t()
    return y.flip(0) if reverse else y
