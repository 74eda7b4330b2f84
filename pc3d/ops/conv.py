"""Sparse convolution over a kernel map: forward and gradients, for every layer of ``pc3d.sparse``.

Forward ``Y[o] = sum_k X[i] W_k``, input gradient ``dX[i] = sum_k dY[o] W_k^T`` and weight gradient
``dW_k = sum X[i]^T dY[o]`` over the pairs ``(i, o)`` of the map. Results do not depend on the number of threads: each
kernel offset is one single-threaded matrix product, added to the output in ascending order of the offsets.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pc3d.ops.kernel_map import KernelMap


def sparse_conv(feat: Tensor, weight: Tensor, kmap: KernelMap, bias: Tensor | None = None) -> Tensor:
    """Sparse convolution (cross-correlation, no kernel flip) of voxel features.

    Differentiable in ``feat``, ``weight`` and ``bias``, twice. Half inputs are summed in float32 and rounded once.
    Under autocast the operands are cast to its dtype.

    Args:
        feat: ``(num_in, Cin)`` floating point.
        weight: ``(K, Cin, Cout)``, kernel offsets row-major.
        kmap: pairs of input and output rows per kernel offset.
        bias: ``(Cout,)`` or None.

    Returns:
        ``(num_out, Cout)`` in the dtype of ``feat``; a row without pairs holds the bias.

    Raises:
        ValueError: if shapes do not fit the map, or dtypes each other.
    """
    if feat.ndim != 2 or weight.ndim != 3 or feat.shape[1] != weight.shape[1]:
        raise ValueError(f"feat {tuple(feat.shape)} does not fit weight (K, Cin, Cout) = {tuple(weight.shape)}")
    if len(feat) != kmap.num_in or len(weight) != kmap.kernel_volume:
        raise ValueError(
            f"feat has {len(feat)} rows and weight {len(weight)} kernel offsets; "
            f"the kernel map has {kmap.num_in} and {kmap.kernel_volume}"
        )
    device = feat.device.type
    if torch.is_autocast_enabled(device) and feat.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        feat, weight, bias = feat.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if feat.dtype != weight.dtype:
        raise ValueError(f"feat is {feat.dtype}, weight {weight.dtype}: cast one of them, or use autocast")
    return _sparse_conv(feat, weight, bias, kmap.in_rows, kmap.out_rows, kmap.offsets, kmap.num_out)


@torch.library.custom_op("pc3d::sparse_conv", mutates_args=())
def _sparse_conv(
    feat: Tensor, weight: Tensor, bias: Tensor | None, in_rows: Tensor, out_rows: Tensor, offsets: Tensor, num_out: int
) -> Tensor:
    wide = _accumulation_dtype(feat.dtype)
    out = feat.new_zeros(num_out, weight.shape[2], dtype=wide)
    with _one_thread(feat):
        for k, (start, end) in enumerate(_runs(offsets)):
            if start < end:
                product = feat[in_rows[start:end]].to(wide) @ weight[k].to(wide)
                out.index_add_(0, out_rows[start:end], product)
    if bias is not None:
        out += bias
    return out.to(feat.dtype)


@torch.library.custom_op("pc3d::sparse_conv_weight_grad", mutates_args=())
def _weight_grad(feat: Tensor, grad: Tensor, in_rows: Tensor, out_rows: Tensor, offsets: Tensor) -> Tensor:
    """``(K, Cin, Cout)``: ``sum feat[i]^T grad[o]`` over the pairs of each kernel offset."""
    wide = _accumulation_dtype(feat.dtype)
    out = feat.new_zeros(len(offsets) - 1, feat.shape[1], grad.shape[1], dtype=wide)
    with _one_thread(feat):
        for k, (start, end) in enumerate(_runs(offsets)):
            if start < end:
                out[k] = feat[in_rows[start:end]].to(wide).T @ grad[out_rows[start:end]].to(wide)
    return out.to(feat.dtype)


@torch.library.custom_op("pc3d::sum_rows", mutates_args=())
def _sum_rows(values: Tensor) -> Tensor:
    """``(C,)`` sum of the rows; unlike ``Tensor.sum`` the same bits with any number of threads."""
    with _one_thread(values):
        return values.sum(0)


@_sparse_conv.register_fake
def _(
    feat: Tensor, weight: Tensor, bias: Tensor | None, in_rows: Tensor, out_rows: Tensor, offsets: Tensor, num_out: int
) -> Tensor:
    return feat.new_empty(num_out, weight.shape[2])


@_weight_grad.register_fake
def _(feat: Tensor, grad: Tensor, in_rows: Tensor, out_rows: Tensor, offsets: Tensor) -> Tensor:
    return feat.new_empty(len(offsets) - 1, feat.shape[1], grad.shape[1])


@_sum_rows.register_fake
def _(values: Tensor) -> Tensor:
    return values.new_empty(values.shape[1])


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    feat, weight, bias, in_rows, out_rows, offsets, _ = inputs
    ctx.save_for_backward(feat, weight, in_rows, out_rows, offsets)
    ctx.has_bias = bias is not None


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    feat, weight, in_rows, out_rows, offsets = ctx.saved_tensors
    grad_feat = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        transposed = weight.transpose(1, 2).contiguous()
        grad_feat = _sparse_conv(grad, transposed, None, out_rows, in_rows, offsets, len(feat))
    if ctx.needs_input_grad[1]:
        grad_weight = _weight_grad(feat, grad, in_rows, out_rows, offsets)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        grad_bias = _sum_rows(grad)
    return grad_feat, grad_weight, grad_bias, None, None, None, None


def _weight_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _weight_grad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    feat, upstream, in_rows, out_rows, offsets = ctx.saved_tensors
    transposed = grad.transpose(1, 2).contiguous()
    grad_feat = _sparse_conv(upstream, transposed, None, out_rows, in_rows, offsets, len(feat))
    grad_upstream = _sparse_conv(feat, grad, None, in_rows, out_rows, offsets, len(upstream))
    return grad_feat, grad_upstream, None, None, None


def _sum_rows_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.rows = len(inputs[0])


def _sum_rows_backward(ctx: Any, grad: Tensor) -> Tensor:
    return grad.expand(ctx.rows, -1)


_sparse_conv.register_autograd(_conv_backward, setup_context=_conv_setup)
_weight_grad.register_autograd(_weight_grad_backward, setup_context=_weight_grad_setup)
_sum_rows.register_autograd(_sum_rows_backward, setup_context=_sum_rows_setup)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _runs(offsets: Tensor) -> Iterator[tuple[int, int]]:
    return itertools.pairwise(offsets.tolist())


@contextlib.contextmanager
def _one_thread(tensor: Tensor) -> Iterator[None]:
    """One CPU thread: BLAS and ``sum`` split long sums by the number of threads, which would change the bits."""
    threads = torch.get_num_threads()
    if tensor.device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
