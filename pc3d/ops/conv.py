"""Sparse convolution over a kernel map: forward and gradients, for every layer of ``pc3d.sparse``.

Forward ``Y[o] = sum_k X[i] W_k``, input gradient ``dX[i] = sum_k dY[o] W_k^T`` and weight gradient
``dW_k = sum X[i]^T dY[o]`` over the pairs ``(i, o)`` of the map. Float32 and half tensors go to the C++ kernels on the
CPU, which work tile by tile of the output, and on a GPU to the Triton kernels (:mod:`pc3d.ops.conv_triton`) or, where
chosen, to the package spconv (:mod:`pc3d.ops.conv_spconv`); everything else goes to the plain-PyTorch reference.
But for spconv's, results do not depend on the number of threads: the kernels give every sum one owner and one order,
and in the reference each kernel offset is one single-threaded matrix product, added to the output in ascending order of
the offsets.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pc3d.errors import InputError
from pc3d.ops.backend import cpu_kernels, on_spconv, on_triton
from pc3d.ops.flows import Way
from pc3d.ops.kernel_map import KernelMap

# Pairs as the kernels want them: gathered rows, rows added to, first pair of every group of rows; see `_plan`.
Plan = list[Tensor]
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Flows:
    """Which dataflow runs each product of a layer, named as in :mod:`pc3d.ops.flows`; results differ in rounding only.

    Attributes:
        forward, input_grad: ``os`` keeps tiles of outputs (``os@ROWS``: of so many rows; on a GPU also sorted,
            ``os@64w1024s2``); ``ws`` keeps the weights of a kernel offset: gather, product, scatter, in plain PyTorch,
            on one thread; ``fod``, on a GPU only, does the same in one pass.
        weight_grad: ``fod`` gathers inside the product; ``ws`` before it, in plain PyTorch, on one thread.
    """

    forward: str = "os"
    input_grad: str = "os"
    weight_grad: str = "fod"

    def __post_init__(self) -> None:
        for name, flow in vars(self).items():
            if name == "weight_grad" and flow not in ("fod", "ws"):
                raise ValueError(f"{name}: no flow {flow!r}, choose fod or ws")
            Way.parse(flow)


_USUAL = Flows()


@dataclass(frozen=True, eq=False)
class Epilogue:
    """What follows a convolution row by row: ``relu(out * scale + shift + residual)``, each part optional.

    Attributes:
        scale, shift: ``(Cout,)``, both or none: a batch normalisation with fixed statistics.
        residual: ``(num_out, Cout)``.
        relu: whether negative values become 0.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None
    relu: bool = False

    def __call__(self, out: Tensor) -> Tensor:
        """The same as a layer of its own, differentiable."""
        if self.scale is not None and self.shift is not None:
            out = torch.addcmul(self.shift, out, self.scale).to(out.dtype)
        if self.residual is not None:
            out = out + self.residual
        return out.relu() if self.relu else out


def sparse_conv(
    feat: Tensor,
    weight: Tensor,
    kmap: KernelMap,
    bias: Tensor | None = None,
    flows: Flows | None = None,
    epilogue: Epilogue | None = None,
) -> Tensor:
    """Sparse convolution (cross-correlation, no kernel flip) of voxel features.

    Differentiable in ``feat``, ``weight`` and ``bias``, twice. Half inputs are summed in float32 and rounded once.
    Under autocast the operands are cast to its dtype.

    Args:
        feat: ``(num_in, Cin)`` floating point.
        weight: ``(K, Cin, Cout)``, kernel offsets row-major.
        kmap: pairs of input and output rows per kernel offset.
        bias: ``(Cout,)`` or None.
        flows: how the C++ or Triton kernels go about it; None leaves it to them. The reference has one way.
        epilogue: applied to the result; without gradients the CPU kernels do it while the rows are in the cache, in
            float32 also where the features are bfloat16.

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
    feat, weight, bias = operands(feat, weight, bias)
    if on_spconv(feat, kmap.in_rows) and not torch.compiler.is_compiling():
        from pc3d.ops import conv_spconv

        if feat.dtype in conv_spconv.DTYPES:
            out = conv_spconv.sparse_conv(feat, weight, kmap, bias)
            return out if epilogue is None else epilogue(out)
    flows = flows or _USUAL
    plan, inverse_plan = conv_plans(feat, kmap, flows)
    chosen = ",".join(astuple(flows))
    rows = kmap.in_rows, kmap.out_rows, kmap.offsets
    if epilogue is not None and _fuses(feat, plan, chosen):
        return _multiply(feat, weight, bias, plan, kmap.num_out, chosen, epilogue)
    out = _sparse_conv(feat, weight, bias, *rows, kmap.num_out, plan, inverse_plan, chosen)
    return out if epilogue is None else epilogue(out)


def operands(feat: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As autocast wants them, where it is on.

    Raises:
        ValueError: if features and weight differ in dtype.
    """
    device = feat.device.type
    if torch.is_autocast_enabled(device) and feat.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        feat, weight, bias = feat.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if feat.dtype != weight.dtype:
        raise ValueError(f"feat is {feat.dtype}, weight {weight.dtype}: cast one of them, or use autocast")
    return feat, weight, bias


def _fuses(feat: Tensor, plan: Plan, flows: str) -> bool:
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and flows.startswith("os")
        and plan_kernels(feat, plan) is not None
    )


def _multiply(
    feat: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, num_out: int, flows: str, epilogue: Epilogue
) -> Tensor:
    """The forward of the CPU kernels, output-stationary."""
    kernels = plan_kernels(feat, plan)
    assert kernels is not None
    dtype, feat = feat.dtype, _features(feat)
    out = feat.new_empty(num_out, weight.shape[2])
    _, _, tile = flows.split(",")[0].partition("@")
    first, scale, shift = (None if t is None else plain(t) for t in (bias, epilogue.scale, epilogue.shift))
    residual = None if epilogue.residual is None else epilogue.residual.detach().to(feat.dtype).contiguous()
    kernels.conv_forward(
        feat, plain(weight, strided=True), first, *plan, out, scale, shift, residual, epilogue.relu,
        tile_rows=int(tile or 0),
    )  # fmt: skip
    return out.to(dtype)


@torch.library.custom_op("pc3d::sparse_conv", mutates_args=())
def _sparse_conv(
    feat: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_rows: Tensor,
    out_rows: Tensor,
    offsets: Tensor,
    num_out: int,
    plan: Plan,
    inverse_plan: Plan,
    flows: str,
) -> Tensor:
    forward = flows.split(",")[0]
    if planned_for_triton(plan) and forward != "ws":
        from pc3d.ops import conv_triton

        detached = feat.detach(), weight.detach(), None if bias is None else bias.detach()
        if forward == "fod":
            return conv_triton.fetch_on_demand(*detached, in_rows, out_rows, offsets, num_out)
        return conv_triton.forward(*detached, plan, num_out, forward)
    if flows.startswith("os") and plan_kernels(feat, plan) is not None:
        return _multiply(feat, weight, bias, plan, num_out, flows, Epilogue())
    wide = accumulation_dtype(feat.dtype)
    out = feat.new_zeros(num_out, weight.shape[2], dtype=wide)
    with _exact_sums(feat):
        for k, (start, end) in enumerate(pair_runs(offsets)):
            if start < end:
                product = feat[in_rows[start:end]].to(wide) @ weight[k].to(wide)
                out.index_add_(0, out_rows[start:end], product)
    if bias is not None:
        out += bias
    return out.to(feat.dtype)


@torch.library.custom_op("pc3d::sparse_conv_weight_grad", mutates_args=())
def _weight_grad(
    feat: Tensor,
    grad: Tensor,
    in_rows: Tensor,
    out_rows: Tensor,
    offsets: Tensor,
    plan: Plan,
    inverse_plan: Plan,
    flows: str,
) -> Tensor:
    """``(K, Cin, Cout)``: ``sum feat[i]^T grad[o]`` over the pairs of each kernel offset."""
    if planned_for_triton(plan) and flows.split(",")[2] != "ws":
        from pc3d.ops import conv_triton

        return conv_triton.weight_grad(feat.detach(), grad.detach(), in_rows, out_rows, plan)
    kernels = plan_kernels(feat, plan) if flows.split(",")[2] == "fod" else None
    if kernels is not None:
        out = feat.new_empty(len(offsets) - 1, feat.shape[1], grad.shape[1], dtype=torch.float32)
        left, right = _features(feat), _features(grad.to(feat.dtype))
        kernels.conv_weight_grad(left, right, *plan, out)
        return out.to(feat.dtype)
    wide = accumulation_dtype(feat.dtype)
    out = feat.new_zeros(len(offsets) - 1, feat.shape[1], grad.shape[1], dtype=wide)
    with _exact_sums(feat):
        for k, (start, end) in enumerate(pair_runs(offsets)):
            if start < end:
                out[k] = feat[in_rows[start:end]].to(wide).T @ grad[out_rows[start:end]].to(wide)
    return out.to(feat.dtype)


@torch.library.custom_op("pc3d::sum_rows", mutates_args=())
def _sum_rows(values: Tensor) -> Tensor:
    """``(C,)`` sum of the rows; unlike ``Tensor.sum`` the same bits with any number of threads."""
    with _exact_sums(values):
        return values.sum(0)


@_sparse_conv.register_fake
def _(
    feat: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_rows: Tensor,
    out_rows: Tensor,
    offsets: Tensor,
    num_out: int,
    plan: Plan,
    inverse_plan: Plan,
    flows: str,
) -> Tensor:
    return feat.new_empty(num_out, weight.shape[2])


@_weight_grad.register_fake
def _(
    feat: Tensor,
    grad: Tensor,
    in_rows: Tensor,
    out_rows: Tensor,
    offsets: Tensor,
    plan: Plan,
    inverse_plan: Plan,
    flows: str,
) -> Tensor:
    return feat.new_empty(len(offsets) - 1, feat.shape[1], grad.shape[1])


@_sum_rows.register_fake
def _(values: Tensor) -> Tensor:
    return values.new_empty(values.shape[1])


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    feat, weight, bias, in_rows, out_rows, offsets, _, plan, inverse_plan, flows = inputs
    ctx.save_for_backward(feat, weight, in_rows, out_rows, offsets, *plan, *inverse_plan)
    ctx.has_bias, ctx.plan_length, ctx.flows = bias is not None, len(plan), flows


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    feat, weight, in_rows, out_rows, offsets, *plans = ctx.saved_tensors
    plan, inverse_plan = plans[: ctx.plan_length], plans[ctx.plan_length :]
    grad_feat = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        transposed = weight.transpose(1, 2)
        exchanged = _exchanged(ctx.flows)
        grad_feat = _sparse_conv(
            grad, transposed, None, out_rows, in_rows, offsets, len(feat), inverse_plan, plan, exchanged
        )
    if ctx.needs_input_grad[1]:
        grad_weight = _weight_grad(feat, grad, in_rows, out_rows, offsets, plan, inverse_plan, ctx.flows)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        grad_bias = _sum_rows(grad)
    plan_grads = [None] * len(plan), [None] * len(inverse_plan)
    return grad_feat, grad_weight, grad_bias, None, None, None, None, *plan_grads, None


def _weight_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, plan, inverse_plan, flows = inputs
    ctx.save_for_backward(*tensors, *plan, *inverse_plan)
    ctx.plan_length, ctx.flows = len(plan), flows


def _weight_grad_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    feat, upstream, in_rows, out_rows, offsets, *plans = ctx.saved_tensors
    plan, inverse_plan = plans[: ctx.plan_length], plans[ctx.plan_length :]
    transposed = grad.transpose(1, 2)
    back = upstream, transposed, None, out_rows, in_rows, offsets, len(feat), inverse_plan, plan, _exchanged(ctx.flows)
    forth = feat, grad, None, in_rows, out_rows, offsets, len(upstream), plan, inverse_plan, ctx.flows
    plan_grads = [None] * len(plan), [None] * len(inverse_plan)
    return _sparse_conv(*back), _sparse_conv(*forth), None, None, None, *plan_grads, None


def _exchanged(flows: str) -> str:
    """The flows of the layer that an input gradient is."""
    forward, input_grad, weight_grad = flows.split(",")
    return f"{input_grad},{forward},{weight_grad}"


def _sum_rows_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.rows = len(inputs[0])


def _sum_rows_backward(ctx: Any, grad: Tensor) -> Tensor:
    return grad.expand(ctx.rows, -1)


_sparse_conv.register_autograd(_conv_backward, setup_context=_conv_setup)
_weight_grad.register_autograd(_weight_grad_backward, setup_context=_weight_grad_setup)
_sum_rows.register_autograd(_sum_rows_backward, setup_context=_sum_rows_setup)


def conv_plans(feat: Tensor, kmap: KernelMap, flows: Flows = _USUAL) -> tuple[Plan, Plan]:
    """Plans of the map and of its inverse, which only gradients need; empty where the reference serves ``feat``.

    Raises:
        InputError: if the device of ``feat`` has no such flows.
    """
    if feat.dtype in _KERNEL_DTYPES and on_triton(feat, kmap.in_rows):
        from pc3d.ops.conv_triton import kernel_map_plans

        return kernel_map_plans(kmap, flows.forward, flows.input_grad)
    kernels = cpu_kernels(feat, kmap.in_rows) if feat.dtype in _KERNEL_DTYPES else None
    if kernels is None:
        return [], []
    for flow in (flows.forward, flows.input_grad):
        if flow == "fod" or not Way.parse(flow).on_cpu:
            raise InputError(f"dataflow {flow!r} exists on a GPU only")
    if "conv" not in kmap.plans:
        kmap.plans["conv"] = _plan(kernels, kmap.in_rows, kmap.out_rows, kmap.offsets, kmap.num_in, kmap.num_out)
    plan = kmap.plans["conv"]
    if not torch.is_grad_enabled():
        return plan, []
    if "conv_inverse" not in kmap.plans:
        inverse_plan = _plan(kernels, kmap.out_rows, kmap.in_rows, kmap.offsets, kmap.num_out, kmap.num_in)
        kmap.plans["conv_inverse"] = inverse_plan
    return plan, kmap.plans["conv_inverse"]


def planned_for_triton(plan: Plan) -> bool:
    return len(plan) == 9  # the C++ kernels' plans have three parts, the reference's none


def _plan(kernels: ModuleType, gather: Tensor, scatter: Tensor, offsets: Tensor, sources: int, rows: int) -> Plan:
    """Pairs grouped, under each kernel offset, by runs of rows added to; the pairs themselves where they already are.

    Raises:
        ValueError: if the map names a row that does not exist, or one row twice under an offset.
    """
    gather, scatter = gather.contiguous(), scatter.contiguous()
    granules = -(-rows // kernels.CONV_GRANULE)
    starts = torch.empty(len(offsets) - 1, granules + 1, dtype=torch.int64)
    if kernels.conv_plan_starts(gather, scatter, offsets, sources, rows, starts):
        return [gather, scatter, starts]
    grouped_gather, grouped_scatter = torch.empty_like(gather), torch.empty_like(scatter)
    kernels.conv_plan_pairs(gather, scatter, offsets, starts, grouped_gather, grouped_scatter)
    return [grouped_gather, grouped_scatter, starts]


def plan_kernels(feat: Tensor, plan: Plan) -> ModuleType | None:
    """The C++ kernels, where they serve ``feat`` with this plan."""
    usable = plan and not planned_for_triton(plan) and feat.dtype in _KERNEL_DTYPES
    return cpu_kernels(feat, *plan) if usable else None


def _features(feat: Tensor) -> Tensor:
    """What the kernels read: float32 or bfloat16, without autograd, contiguous."""
    feat = feat.detach().contiguous()
    return feat if feat.dtype == torch.bfloat16 else feat.float()


def plain(tensor: Tensor, strided: bool = False) -> Tensor:
    """Parameters as the kernels read them: float32, without autograd, contiguous unless ``strided``."""
    tensor = tensor.detach().float()
    return tensor if strided else tensor.contiguous()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def pair_runs(offsets: Tensor) -> Iterator[tuple[int, int]]:
    return itertools.pairwise(offsets.tolist())


@contextlib.contextmanager
def _exact_sums(tensor: Tensor) -> Iterator[None]:
    """No autocast, which would round float32 products to half; and on the CPU one thread.

    BLAS and ``sum`` split long sums by the number of threads, which would change the bits.
    """
    threads = torch.get_num_threads()
    serial = tensor.device.type == "cpu" and threads > 1
    with torch.autocast(tensor.device.type, enabled=False):
        if serial:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            if serial:
                torch.set_num_threads(threads)
