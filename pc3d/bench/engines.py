"""Sparse convolution by several implementations, over the same pairs: ours, plain torch, and spconv's CPU path.

Every engine gets the rows of our kernel maps in the layout it wants, made before the clock starts, so results can be
compared row by row. How long each takes to find the pairs by itself is measured apart (``build_maps``).
"""

from __future__ import annotations

import abc
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pc3d.ops.conv import Epilogue, sparse_conv
from pc3d.ops.kernel_map import KernelMap, strided_map, submanifold_map
from pc3d.sparse import SparseConvolution
from pc3d.voxels import Voxels

Product = Callable[[Tensor, Tensor], Tensor]


class Engine(abc.ABC):
    """One implementation of sparse convolution, differentiable in features and weight.

    Attributes:
        tolerance: how far its results may be from the reference's, relative to the largest value.
    """

    name: str
    tolerance = 1e-4

    def layout(self, weight: Tensor) -> Tensor:
        """``(K, Cin, Cout)`` in the engine's own layout."""
        return weight.clone()

    def convolution(self, kmap: KernelMap) -> Product:
        """``product(feat, layout(weight))`` over the pairs of a map, brought into the engine's layout once."""
        key = "bench", self.name
        if key not in kmap.plans:
            kmap.plans[key] = self._prepare(kmap)
        return kmap.plans[key]

    @abc.abstractmethod
    def _prepare(self, kmap: KernelMap) -> Product: ...

    def build_maps(self, coord: Tensor, levels: int) -> None:
        """Find the pairs of a 3^3 submanifold layer on each of ``levels`` grids, and of the 2^3 layers between them.

        Args:
            coord: ``(M, 4)`` int32, not negative.
            levels: number of grids, each twice as coarse as the one before.
        """
        raise NotImplementedError

    @property
    def builds_maps(self) -> bool:
        return type(self).build_maps is not Engine.build_maps

    def adopt(self, network: nn.Module) -> nn.Module:
        """Let this engine do every sparse convolution of a network (changed in place)."""
        for module in network.modules():
            if isinstance(module, SparseConvolution):
                module.weight = nn.Parameter(self.layout(module.weight.detach()))
                module.convolve = _Convolve(self, module)  # type: ignore[method-assign, assignment]
        return network


class _Convolve:
    def __init__(self, engine: Engine, layer: SparseConvolution) -> None:
        self.engine, self.layer = engine, layer

    def __call__(self, feat: Tensor, kmap: KernelMap, epilogue: Epilogue | None = None) -> Tensor:
        out = self.engine.convolution(kmap)(feat, self.layer.weight)
        out = out if self.layer.bias is None else out + self.layer.bias
        return out if epilogue is None else epilogue(out)


class Pc3d(Engine):
    """The kernels of this project."""

    name = "pc3d"

    def _prepare(self, kmap: KernelMap) -> Product:
        return lambda feat, weight: sparse_conv(feat, weight, kmap)

    def build_maps(self, coord: Tensor, levels: int) -> None:
        submanifold_map(coord, (3, 3, 3))
        for _ in range(levels - 1):
            coord, _map = strided_map(coord, (2, 2, 2), (2, 2, 2))
            submanifold_map(coord, (3, 3, 3))

    def adopt(self, network: nn.Module) -> nn.Module:
        return network


class Pc3dBfloat16(Engine):
    """The kernels of this project in autocast to bfloat16, casts included."""

    name = "pc3d_bf16"
    tolerance = 3e-2

    def _prepare(self, kmap: KernelMap) -> Product:
        def product(feat: Tensor, weight: Tensor) -> Tensor:
            with torch.autocast(feat.device.type, torch.bfloat16):
                return sparse_conv(feat, weight, kmap).to(feat.dtype)

        return product

    def adopt(self, network: nn.Module) -> nn.Module:
        forward = network.forward_voxels

        def in_half(voxels: Voxels) -> Voxels:
            with torch.autocast(voxels.feat.device.type, torch.bfloat16):
                out = forward(voxels)  # type: ignore[operator]
            return out.with_feat(out.feat.to(voxels.feat.dtype))

        network.forward_voxels = in_half  # type: ignore[assignment]
        return network


class TorchGather(Engine):
    """As one writes it by hand: per kernel offset gather, ``mm``, ``index_add``. The accuracy check's reference."""

    name = "torch_gather"

    @staticmethod
    def multiply(rows: Tensor, matrix: Tensor) -> Tensor:
        return torch.mm(rows, matrix)

    def _prepare(self, kmap: KernelMap) -> Product:
        runs = itertools.pairwise(kmap.offsets.tolist())
        rows = [(kmap.in_rows[a:b].long(), kmap.out_rows[a:b].long()) for a, b in runs]
        everyone = torch.arange(kmap.num_out)
        identity = [
            len(o) == kmap.num_in == kmap.num_out and torch.equal(i, o) and torch.equal(o, everyone) for i, o in rows
        ]
        return lambda feat, weight: _ByOffset.apply(feat, weight, rows, identity, kmap.num_out, self.multiply)


class TorchOneDnn(TorchGather):
    """The same with oneDNN's inner product, which uses AVX-512 where MKL stays on AVX2 (AMD)."""

    name = "torch_onednn"

    @staticmethod
    def multiply(rows: Tensor, matrix: Tensor) -> Tensor:
        operator = torch.ops.mkldnn._linear_pointwise
        return operator(rows.contiguous(), matrix.t().contiguous(), None, "none", [], "")


class _ByOffset(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, feat: Tensor, weight: Tensor, rows: list[Any], identity: list[bool], num_out: int, multiply: Product
    ) -> Tensor:
        ctx.save_for_backward(feat, weight)
        ctx.how = rows, identity, multiply
        return _sum_products(feat, weight, rows, identity, num_out, multiply)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        feat, weight = ctx.saved_tensors
        rows, identity, multiply = ctx.how
        grad_feat = grad_weight = None
        if ctx.needs_input_grad[0]:
            swapped = [(o, i) for i, o in rows]
            grad_feat = _sum_products(grad, weight.transpose(1, 2), swapped, identity, len(feat), multiply)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
            for k, (i, o) in enumerate(rows):
                torch.mm(feat.index_select(0, i).T, grad.index_select(0, o), out=grad_weight[k])
        return grad_feat, grad_weight, None, None, None, None


def _sum_products(
    feat: Tensor, weight: Tensor, rows: list[Any], identity: list[bool], num_out: int, multiply: Product
) -> Tensor:
    """The one offset where every row meets itself (a submanifold kernel's centre) needs no index."""
    out = multiply(feat, weight[identity.index(True)]) if True in identity else feat.new_zeros(num_out, weight.shape[2])
    for (i, o), matrix, done in zip(rows, weight, identity, strict=True):
        if not done and len(i):
            out.index_add_(0, o, multiply(feat.index_select(0, i), matrix))
    return out


class SpconvCpu(Engine):
    """spconv's native CPU path. On more than one thread its scatter races and some of its rows are wrong."""

    name = "spconv_cpu"

    def __init__(self) -> None:
        import spconv.pytorch.functional as functional
        import spconv.pytorch.ops as ops
        from spconv.core import ConvAlgo

        if not torch.cuda.is_available():
            ops.get_current_stream = lambda: 0  # its backward asks for a CUDA stream even on the CPU, and ignores it
        self.functional, self.ops, self.algorithm = functional, ops, ConvAlgo.Native

    def layout(self, weight: Tensor) -> Tensor:
        volume, cin, cout = weight.shape
        edge = round(volume ** (1 / 3))
        return weight.permute(2, 0, 1).contiguous().view(cout, edge, edge, edge, cin)

    def _prepare(self, kmap: KernelMap) -> Product:
        counts = kmap.offsets.diff()
        pairs = torch.full((2, kmap.kernel_volume, max(kmap.num_in, kmap.num_out)), -1, dtype=torch.int32)
        for k, (a, b) in enumerate(itertools.pairwise(kmap.offsets.tolist())):
            pairs[0, k, : b - a], pairs[1, k, : b - a] = kmap.in_rows[a:b], kmap.out_rows[a:b]
        same = kmap.kernel_volume % 2 == 1 and kmap.num_in == kmap.num_out
        product = self.functional.indice_subm_conv if same else self.functional.indice_conv
        return lambda feat, weight: product(feat, weight, pairs, counts.int(), kmap.num_out, self.algorithm)

    def build_maps(self, coord: Tensor, levels: int) -> None:
        multiple = 2 ** (levels - 1)  # an odd extent would drop border voxels
        shape = [(int(v) // multiple + 1) * multiple for v in coord[:, 1:].amax(0)]
        batch = int(coord[:, 0].max()) + 1
        find = self.ops.get_indice_pairs
        for level in range(levels):
            find(coord, batch, shape, self.algorithm, [3] * 3, [1] * 3, [1] * 3, [1] * 3, [0] * 3, True, False)
            if level < levels - 1:
                steps = [2] * 3, [2] * 3, [0] * 3, [1] * 3, [0] * 3
                coord, *_ = find(coord, batch, shape, self.algorithm, *steps, False, False)
                shape = [s // 2 for s in shape]


def installed_engines() -> list[Engine]:
    """Ours first, then every peer this machine has."""
    engines: list[Engine] = [Pc3d(), TorchGather()]
    try:
        TorchOneDnn.multiply(torch.ones(2, 16), torch.ones(16, 16))
        engines.append(TorchOneDnn())
    except (AttributeError, RuntimeError):
        pass  # torch without oneDNN
    if importlib.util.find_spec("spconv"):
        engines.append(SpconvCpu())
    return engines
