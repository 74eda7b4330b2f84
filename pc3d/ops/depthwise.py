"""Depth-wise sparse convolution over a kernel map: every channel has a filter of its own.

Forward ``Y[o] = sum_k X[i] * w_k``, input gradient ``dX[i] = sum_k dY[o] * w_k`` and weight gradient
``dw_k = sum X[i] * dY[o]`` over the pairs ``(i, o)`` of the map. Kernels and their dispatch are those of
:mod:`pc3d.ops.conv`: C++ on the CPU, Triton on a GPU, plain PyTorch otherwise; float32 sums in one fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pc3d.ops.conv import (
    Plan,
    accumulation_dtype,
    conv_plans,
    operands,
    pair_runs,
    plain,
    plan_kernels,
    planned_for_triton,
)
from pc3d.ops.kernel_map import KernelMap


def depthwise_conv(feat: Tensor, weight: Tensor, kmap: KernelMap, bias: Tensor | None = None) -> Tensor:
    """Depth-wise sparse convolution of voxel features; differentiable in ``feat``, ``weight`` and ``bias``, twice.

    Under autocast the operands are cast to its dtype; half inputs are summed in float32 and rounded once.

    Args:
        feat: ``(num_in, C)`` floating point.
        weight: ``(K, C)``, kernel offsets row-major.
        kmap: pairs of input and output rows per kernel offset.
        bias: ``(C,)`` or None.

    Returns:
        ``(num_out, C)`` in the dtype of ``feat``; a row without pairs holds the bias.

    Raises:
        ValueError: if shapes do not fit the map, or dtypes each other.
    """
    if feat.ndim != 2 or weight.shape != (kmap.kernel_volume, feat.shape[1]) or len(feat) != kmap.num_in:
        raise ValueError(
            f"feat {tuple(feat.shape)} and weight (K, C) = {tuple(weight.shape)} do not fit a kernel map of "
            f"{kmap.num_in} rows and {kmap.kernel_volume} kernel offsets"
        )
    feat, weight, bias = operands(feat, weight, bias)
    rows = kmap.in_rows, kmap.out_rows, kmap.offsets
    out = _depthwise(feat, weight, *rows, kmap.num_out, *conv_plans(feat, kmap))
    return out if bias is None else out + bias


@torch.library.custom_op("pc3d::depthwise_conv", mutates_args=())
def _depthwise(
    feat: Tensor,
    weight: Tensor,
    in_rows: Tensor,
    out_rows: Tensor,
    offsets: Tensor,
    num_out: int,
    plan: Plan,
    inverse_plan: Plan,
) -> Tensor:
    if planned_for_triton(plan):
        from pc3d.ops import depthwise_triton

        return depthwise_triton.forward(feat.detach(), weight.detach(), plan, num_out)
    kernels = plan_kernels(feat, plan)
    if kernels is not None:
        out = feat.new_empty(num_out, feat.shape[1], dtype=torch.float32)
        kernels.depthwise_forward(plain(feat), plain(weight), *plan, out)
        return out.to(feat.dtype)
    out = feat.new_zeros(num_out, feat.shape[1], dtype=accumulation_dtype(feat.dtype))
    for k, (start, end) in enumerate(pair_runs(offsets)):
        out.index_add_(0, out_rows[start:end], feat[in_rows[start:end]].to(out.dtype) * weight[k])
    return out.to(feat.dtype)


@torch.library.custom_op("pc3d::depthwise_weight_grad", mutates_args=())
def _weight_grad(
    feat: Tensor, grad: Tensor, in_rows: Tensor, out_rows: Tensor, offsets: Tensor, plan: Plan, inverse_plan: Plan
) -> Tensor:
    """``(K, C)``: ``sum feat[i] * grad[o]`` over the pairs of each kernel offset."""
    if planned_for_triton(plan):
        from pc3d.ops import depthwise_triton

        return depthwise_triton.weight_grad(feat.detach(), grad.detach(), in_rows, out_rows, plan)
    kernels = plan_kernels(feat, plan)
    if kernels is not None:
        out = feat.new_empty(len(offsets) - 1, feat.shape[1], dtype=torch.float32)
        pairs = in_rows.contiguous(), out_rows.contiguous()
        kernels.depthwise_weight_grad(plain(feat), plain(grad), *pairs, offsets, out)
        return out.to(feat.dtype)
    out = feat.new_zeros(len(offsets) - 1, feat.shape[1], dtype=torch.float64)
    for k, (start, end) in enumerate(pair_runs(offsets)):
        out[k] = (feat[in_rows[start:end]].double() * grad[out_rows[start:end]]).sum(0)
    return out.to(feat.dtype)


@_depthwise.register_fake
def _(
    feat: Tensor,
    weight: Tensor,
    in_rows: Tensor,
    out_rows: Tensor,
    offsets: Tensor,
    num_out: int,
    plan: Plan,
    inverse_plan: Plan,
) -> Tensor:
    return feat.new_empty(num_out, feat.shape[1])


@_weight_grad.register_fake
def _(
    feat: Tensor, grad: Tensor, in_rows: Tensor, out_rows: Tensor, offsets: Tensor, plan: Plan, inverse_plan: Plan
) -> Tensor:
    return feat.new_empty(len(offsets) - 1, feat.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, plan, inverse_plan = inputs
    ctx.save_for_backward(*tensors, *plan, *inverse_plan)
    ctx.plan_length = len(plan)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    feat, weight, in_rows, out_rows, offsets, plan, inverse_plan = _saved(ctx)
    grad_feat = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_feat = _depthwise(grad, weight, out_rows, in_rows, offsets, len(feat), inverse_plan, plan)
    if ctx.needs_input_grad[1]:
        grad_weight = _weight_grad(feat, grad, in_rows, out_rows, offsets, plan, inverse_plan)
    return grad_feat, grad_weight, None, None, None, None, [None] * len(plan), [None] * len(inverse_plan)


def _weight_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, plan, inverse_plan = inputs
    ctx.save_for_backward(*tensors, *plan, *inverse_plan)
    ctx.plan_length = len(plan)


def _weight_grad_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    feat, upstream, in_rows, out_rows, offsets, plan, inverse_plan = _saved(ctx)
    back = _depthwise(upstream, grad, out_rows, in_rows, offsets, len(feat), inverse_plan, plan)
    forth = _depthwise(feat, grad, in_rows, out_rows, offsets, len(upstream), plan, inverse_plan)
    return back, forth, None, None, None, [None] * len(plan), [None] * len(inverse_plan)


def _saved(ctx: Any) -> tuple[Any, ...]:
    plans = list(ctx.saved_tensors[5:])
    return *ctx.saved_tensors[:5], plans[: ctx.plan_length], plans[ctx.plan_length :]


_depthwise.register_autograd(_backward, setup_context=_setup)
_weight_grad.register_autograd(_weight_grad_backward, setup_context=_weight_grad_setup)
