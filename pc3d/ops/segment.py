"""Reductions over runs of rows (CSR): the points of a voxel, the points of a cloud, the neighbours of a point."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pc3d.ops.backend import cpu_kernels, on_package


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum of each run of rows; differentiable.

    Args:
        values: ``(N, ...)`` floating point, segment after segment. Half precision is summed in float32.
        offsets: ``(S + 1,)`` int64, rows ``offsets[s]:offsets[s + 1]`` are segment ``s``; empty segments allowed.

    Returns:
        ``(S, ...)`` in the dtype of ``values``; an empty segment gives zeros. The same bits for any thread count.

    Raises:
        ValueError: if ``values`` is not floating point, or ``offsets`` is not ``(S + 1,)`` int64 rising from 0 to N
            (their values are not checked on a GPU: that would wait for the device).
    """
    _check(values, offsets)
    total = torch.ops.pc3d.segment_sum(_as_table(_wide(values)), offsets)
    return _like_rows(total, values)


def segment_mean(values: Tensor, offsets: Tensor) -> Tensor:
    """Mean of each run of rows, with shapes and errors as :func:`segment_sum`; an empty segment gives zeros."""
    _check(values, offsets)
    total = torch.ops.pc3d.segment_sum(_as_table(_wide(values)), offsets)
    return _like_rows(total.div_(offsets.diff().clamp(min=1)[:, None]), values)


def segment_max(values: Tensor, offsets: Tensor) -> Tensor:
    """Largest value per column of each run of rows, with shapes and errors as :func:`segment_sum`.

    An empty segment gives zeros, NaN wins over every number, and rows that tie share the gradient evenly
    (as :func:`torch.amax`).
    """
    _check(values, offsets)
    largest = torch.ops.pc3d.segment_max(_as_table(_wide(values)), offsets)
    return _like_rows(largest, values)


def segment_expand(values: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """Each segment's row of ``values`` (S, ...) once per row of the segment: ``(rows, ...)``; differentiable.

    Args:
        offsets: as for :func:`segment_sum`.
        rows: ``offsets[-1]``, given so that no device has to be waited for.
    """
    _check(values, offsets)
    return _like_rows(torch.ops.pc3d.segment_expand(_as_table(_wide(values)), offsets, rows), values)


def segment_softmax(values: Tensor, offsets: Tensor) -> Tensor:
    """Softmax over each run of rows, of each column by itself; differentiable.

    Args:
        values, offsets: as for :func:`segment_sum`. The largest value of a segment is subtracted first, so that no
            exponential overflows; a segment of one row gives 1.

    Returns:
        ``(N, ...)``, at least float32: a share of thousands of rows is lost in half precision.
    """
    _check(values, offsets)
    table, rows = _as_table(_wide(values)), len(values)
    power = (table - segment_expand(segment_max(table.detach(), offsets), offsets, rows)).exp()
    return (power / segment_expand(segment_sum(power, offsets), offsets, rows)).view(values.shape)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _as_table(values: Tensor) -> Tensor:
    """``(N, C)`` view of ``(N, ...)``."""
    return values.reshape(len(values), values.shape[1:].numel())


def _like_rows(table: Tensor, values: Tensor) -> Tensor:
    """``(S, C)`` as ``(S, ...)``, trailing shape and dtype of ``values``."""
    return table.view(len(table), *values.shape[1:]).to(values.dtype)


def _check(values: Tensor, offsets: Tensor) -> None:
    if not values.is_floating_point():
        raise ValueError(f"values must be floating point, got {values.dtype}")
    if offsets.ndim != 1 or len(offsets) < 1 or offsets.dtype != torch.int64:
        raise ValueError(f"offsets must be (S + 1,) int64, got {tuple(offsets.shape)} {offsets.dtype}")


def _segment_of_row(offsets: Tensor, rows: int) -> Tensor:
    segments = torch.arange(len(offsets) - 1, device=offsets.device)
    return torch.repeat_interleave(segments, offsets.diff(), output_size=rows)


# The operators PyTorch knows: one kernel each, (N, C) float32 or float64 -> (S, C) ------------------------------------


@torch.library.custom_op("pc3d::segment_sum", mutates_args=())
def _segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    return _reduce("sum", values, offsets)


@torch.library.custom_op("pc3d::segment_max", mutates_args=())
def _segment_max(values: Tensor, offsets: Tensor) -> Tensor:
    return _reduce("max", values, offsets)


def _reduce(name: str, values: Tensor, offsets: Tensor) -> Tensor:
    kernels = cpu_kernels(values, offsets)
    if kernels is not None:
        out = values.new_empty(len(offsets) - 1, values.shape[1])
        getattr(kernels, f"segment_{name}")(values.detach().contiguous(), offsets.contiguous(), out)
        return out
    if values.device.type == "cpu":
        _check_borders(values, offsets)
    if values.numel() == 0:  # torch.segment_reduce cannot
        return values.new_zeros(len(offsets) - 1, values.shape[1])
    if name == "sum" and on_package("torch_scatter", values, offsets):
        return _sum_by_torch_scatter(values, offsets)
    out = torch.segment_reduce(values, name, offsets=offsets, axis=0, unsafe=True)
    return out.masked_fill_((offsets.diff() == 0)[:, None], 0)


def _sum_by_torch_scatter(values: Tensor, offsets: Tensor) -> Tensor:
    """Like torch's, one sum after the other in the order of the rows; its maximum is not used, NaN gets lost there."""
    from torch_scatter import segment_csr

    return segment_csr(values.detach().contiguous(), offsets, reduce="sum")


def _check_borders(values: Tensor, offsets: Tensor) -> None:
    if offsets[0] != 0 or offsets[-1] != len(values) or bool((offsets.diff() < 0).any()):
        raise ValueError(f"offsets must rise from 0 to {len(values)}, got {offsets.tolist()[:8]}")


@torch.library.custom_op("pc3d::segment_max_backward", mutates_args=())
def _segment_max_backward(grad: Tensor, values: Tensor, largest: Tensor, offsets: Tensor) -> Tensor:
    kernels = cpu_kernels(grad, values, largest, offsets)
    if kernels is not None:
        out = torch.empty_like(values, memory_format=torch.contiguous_format)
        tensors = (t.detach().contiguous() for t in (grad, values, largest, offsets))
        kernels.segment_max_backward(*tensors, out)
        return out
    segment = _segment_of_row(offsets, len(values))
    is_largest = values == largest[segment]
    ties = _reduce("sum", is_largest.to(values.dtype), offsets)
    return (grad / ties.clamp(min=1))[segment].masked_fill_(~is_largest, 0)


@torch.library.custom_op("pc3d::segment_expand", mutates_args=())
def _segment_expand(values: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """``(S, C)`` -> ``(rows, C)``: each segment's row once per row of the segment."""
    kernels = cpu_kernels(values, offsets)
    if kernels is None:
        return values[_segment_of_row(offsets, rows)]
    out = values.new_empty(rows, values.shape[1])
    kernels.segment_expand(values.detach().contiguous(), offsets.contiguous(), out)
    return out


@_segment_sum.register_fake
@_segment_max.register_fake
def _(values: Tensor, offsets: Tensor) -> Tensor:
    return values.new_empty(len(offsets) - 1, values.shape[1])


@_segment_max_backward.register_fake
def _(grad: Tensor, values: Tensor, largest: Tensor, offsets: Tensor) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


@_segment_expand.register_fake
def _(values: Tensor, offsets: Tensor, rows: int) -> Tensor:
    return values.new_empty(rows, values.shape[1])


def _save_sum(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.rows = len(inputs[0])
    ctx.save_for_backward(inputs[1])


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.pc3d.segment_expand(grad, ctx.saved_tensors[0], ctx.rows), None


def _save_max(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _max_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    values, offsets, largest = ctx.saved_tensors
    return torch.ops.pc3d.segment_max_backward(grad, values, largest, offsets), None


def _save_expand(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _expand_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return segment_sum(grad, ctx.saved_tensors[0]), None, None


_segment_expand.register_autograd(_expand_backward, setup_context=_save_expand)
_segment_sum.register_autograd(_sum_backward, setup_context=_save_sum)
_segment_max.register_autograd(_max_backward, setup_context=_save_max)
