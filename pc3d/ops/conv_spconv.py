"""Sparse convolution by the package spconv 2.x, over our kernel maps: an alternative back end of :mod:`pc3d.ops.conv`.

Gather, matrix product and scatter per kernel offset (spconv's "native" algorithm). Chosen by
``use_backend("spconv")`` or ``PC3D_BACKEND=spconv``, and by itself on a GPU where Triton is missing. float32 and
float16; once differentiable; on a GPU sums of atomics, so bits may differ from run to run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pc3d.ops.kernel_map import KernelMap

DTYPES = (torch.float32, torch.float16)


def sparse_conv(feat: Tensor, weight: Tensor, kmap: KernelMap, bias: Tensor | None) -> Tensor:
    """``(num_out, Cout)``; arguments as :func:`pc3d.ops.conv.sparse_conv`, ``feat`` and ``weight`` of one dtype."""
    if kmap.num_pairs == 0 or 0 in weight.shape:
        out = feat.new_zeros(kmap.num_out, weight.shape[2]) + 0 * (feat.sum() + weight.sum())
    else:
        out = _Convolution.apply(feat, weight, *_pairs(kmap), kmap.num_out)
    return out if bias is None else out + bias


def _pairs(kmap: KernelMap) -> tuple[Tensor, Tensor]:
    """``(2, K, most)`` int32 rows of every offset, -1 beyond its pairs, and their number ``(K,)`` int32; built once."""
    if "spconv" not in kmap.plans:
        counts = kmap.offsets.diff()
        device, most = kmap.in_rows.device, max(int(counts.max()), kmap.num_in, kmap.num_out)
        offset = torch.repeat_interleave(torch.arange(len(counts)), counts)
        place = torch.arange(len(offset)) - kmap.offsets[offset]
        pairs = torch.full((2, len(counts), most), -1, dtype=torch.int32, device=device)
        pairs[:, offset.to(device), place.to(device)] = torch.stack([kmap.in_rows, kmap.out_rows])
        kmap.plans["spconv"] = pairs, counts.to(device=device, dtype=torch.int32)
    return kmap.plans["spconv"]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, feat: Tensor, weight: Tensor, pairs: Tensor, counts: Tensor, num_out: int) -> Tensor:
        from spconv.pytorch import ops

        feat, filters = feat.contiguous(), _filters(weight)
        ctx.save_for_backward(feat, filters, pairs, counts)
        return ops.indice_conv(feat, filters, pairs, counts, num_out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from spconv.pytorch import ops

        feat, filters, pairs, counts = ctx.saved_tensors
        grad_feat, grad_filters = ops.indice_conv_backward(feat, filters, grad.contiguous(), pairs, counts)
        cout, volume, *_, cin = filters.shape
        return grad_feat, grad_filters.reshape(cout, volume, cin).permute(1, 2, 0), None, None, None


def _filters(weight: Tensor) -> Tensor:
    """``(Cout, K, 1, 1, Cin)``, spconv's layout, from ``(K, Cin, Cout)``."""
    return weight.permute(2, 0, 1).contiguous()[:, :, None, None]
