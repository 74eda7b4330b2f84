"""Attention inside windows of points on the CPU, in C++: no scores of more than a few queries ever exist.

Dao et al. 2022, "FlashAttention" (arXiv 2205.14135). :func:`pc3d.nn.attention.window_attention` chooses it; its
``loop`` backend is the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pc3d.ops.backend import cpu_kernels, on_cpu_kernels


def on_attention_kernels(q: Tensor) -> bool:
    """Whether :func:`attend` can serve queries of this device and dtype."""
    return q.dtype in (torch.float32, torch.bfloat16, torch.float16) and on_cpu_kernels(q)


def attend(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, slots: Tensor, groups: Sequence[tuple[int, int]], scale: float
) -> Tensor:
    """``softmax(scale * q k^T) v`` of every point in the window of its own slot; differentiable in q, k and v, once.

    Computed in float32; results, gradients too, do not depend on the number of threads.

    Args:
        q, k, v: ``(N, H, D)`` float32, bfloat16 or float16 on the CPU.
        rows: ``(S,)`` int64, the point in each slot.
        slots: ``(N,)`` int64, each point's own slot. In other slots it is a key and a value, but no query.
        groups: windows ``(count, length)``, one behind the other; together S slots.
        scale: of the scores.

    Returns:
        ``(N, H, D)`` in the dtype of ``q``, under autocast in its dtype.
    """
    lengths = [number for group in groups for number in group]
    out, _ = _attention(_rows(q), _rows(k), _rows(v), rows, slots, lengths, scale)
    return out.to(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype)


def _rows(tensor: Tensor) -> Tensor:
    """Float32 with heads beside each other; rows may lie apart, as those of a packed ``(N, 3, H, D)`` do."""
    tensor = tensor.float()
    return tensor if tensor.stride()[1:] == (tensor.shape[2], 1) else tensor.contiguous()


@torch.library.custom_op("pc3d::window_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, slots: Tensor, groups: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """The result, and ``(N, H, 2)`` what the backward pass needs of each softmax."""
    out, statistics = _results(q)
    tensors = (t.detach() for t in (q, k, v))
    _kernels(q).attention_forward(*tensors, rows, slots, groups, scale, out, statistics)
    return out, statistics


@torch.library.custom_op("pc3d::window_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    slots: Tensor,
    groups: list[int],
    scale: float,
    out: Tensor,
    statistics: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    dq, dk, dv = (torch.empty_like(out) for _ in range(3))
    upstream, *tensors = (t.detach() for t in (grad.contiguous(), q, k, v))
    _kernels(q).attention_backward(upstream, *tensors, rows, slots, groups, scale, out, statistics, dq, dk, dv)
    return dq, dk, dv


def _kernels(q: Tensor) -> ModuleType:
    kernels = cpu_kernels(q)
    if kernels is None:
        raise RuntimeError("the C++ kernels do not load, or were switched off between forward and backward")
    return kernels


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(*q.shape[:2], 2)


@_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, slots: Tensor, groups: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    return _results(q)


@_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    slots: Tensor,
    groups: list[int],
    scale: float,
    out: Tensor,
    statistics: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(out), torch.empty_like(out), torch.empty_like(out)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.groups, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, rows, slots, out, statistics = ctx.saved_tensors
    grads = _attention_backward(grad, q, k, v, rows, slots, ctx.groups, ctx.scale, out, statistics)
    return *grads, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_setup)
