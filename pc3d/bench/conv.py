"""Sparse convolution: the three products of a 3^3 submanifold layer, and the forward pass of stride 2 down and up."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pc3d.bench.timing import Timing, time_interleaved
from pc3d.errors import InputError
from pc3d.ops.conv import sparse_conv
from pc3d.ops.kernel_map import KernelMap, strided_map, submanifold_map
from pc3d.points import Points

CHANNELS = ((4, 32), (32, 32), (64, 64), (128, 128), (256, 256))
STRIDED_CHANNELS = (128, 256)
TOLERANCE = 1e-5  # of the largest value, forward


class Engine(NamedTuple):
    """One implementation: ``product(feat, layout(weight))``; the layout is made before the clock starts."""

    product: Callable[[Tensor, Tensor], Tensor]
    layout: Callable[[Tensor], Tensor] = torch.clone


def bench(points: Points, size: float, rounds: int) -> list[Timing]:
    """Time the kernels, plain torch (gather, ``mm``, ``index_add``) and, where installed, spconv's CPU path.

    ``fwd`` is without gradients; ``fwdbwd`` an autograd step with both gradients.

    Raises:
        InputError: if an engine's result differs from plain torch.
    """
    coord = points.with_attrs(feat=points.coord).voxelize(size, "first").coord
    name = f"{points.describe()[-20:]}, {size:g} m"
    same = submanifold_map(coord, (3, 3, 3))
    coarse, down = strided_map(coord, (2, 2, 2), (2, 2, 2))
    up = down.inverse()
    submanifold, to_coarse, to_fine = _engines(same), _engines(down), _engines(up)
    if importlib.util.find_spec("spconv"):
        pairs = _SpconvPairs(coord)
        submanifold["spconv_cpu"] = Engine(pairs.submanifold, _krsc)
        if len(coarse) == pairs.coarse:
            to_coarse["spconv_cpu"] = Engine(pairs.down, _krsc)
            to_fine["spconv_cpu"] = Engine(pairs.up, _krsc)
    timings = []
    for cin, cout in CHANNELS:
        timings += _forward(f"subm3_{cin}x{cout}_fwd {name}", submanifold, same, cin, cout, rounds)
        timings += _step(f"subm3_{cin}x{cout}_fwdbwd {name}", submanifold, same, cin, cout, rounds)
    cin, cout = STRIDED_CHANNELS
    timings += _forward(f"down2_{cin}x{cout}_fwd {name}", to_coarse, down, cin, cout, rounds, check=("torch",))
    timings += _forward(f"up2_{cout}x{cin}_fwd {name}", to_fine, up, cout, cin, rounds, check=("torch",))
    return timings


def _engines(kmap: KernelMap) -> dict[str, Engine]:
    rows = [(i.long(), o.long()) for i, o in _per_offset(kmap)]

    def by_torch(feat: Tensor, weight: Tensor) -> Tensor:
        return _GatherMultiplyScatter.apply(feat, weight, rows, kmap.num_out)

    return {"kernels": Engine(lambda feat, weight: sparse_conv(feat, weight, kmap)), "torch": Engine(by_torch)}


def _per_offset(kmap: KernelMap) -> list[tuple[Tensor, Tensor]]:
    return [(kmap.in_rows[a:b], kmap.out_rows[a:b]) for a, b in itertools.pairwise(kmap.offsets.tolist())]


def _forward(
    case: str,
    engines: Mapping[str, Engine],
    kmap: KernelMap,
    cin: int,
    cout: int,
    rounds: int,
    check: tuple[str, ...] = ("torch", "spconv_cpu"),
) -> list[Timing]:
    feat, weight = torch.randn(kmap.num_in, cin), _weight(kmap, cin, cout)

    def without_gradient(engine: Engine) -> Callable[[], Tensor]:
        own = engine.layout(weight)

        def run() -> Tensor:
            with torch.no_grad():
                return engine.product(feat, own)

        return run

    works = {name: without_gradient(engine) for name, engine in engines.items()}
    # spconv's scatter races on more than one thread, and it orders coarse voxels in its own way.
    comparable = [name for name in check if name in works and (name == "torch" or torch.get_num_threads() == 1)]
    _check_close(case, works["kernels"](), {name: works[name]() for name in comparable})
    return time_interleaved(case, kmap.num_out, works, rounds)


def _step(case: str, engines: Mapping[str, Engine], kmap: KernelMap, cin: int, cout: int, rounds: int) -> list[Timing]:
    feat = torch.randn(kmap.num_in, cin).requires_grad_()
    weight, upstream = _weight(kmap, cin, cout), torch.randn(kmap.num_out, cout)

    def with_gradients(engine: Engine) -> Callable[[], object]:
        own = engine.layout(weight).requires_grad_()
        return lambda: torch.autograd.grad(engine.product(feat, own), [feat, own], upstream)

    works = {name: with_gradients(engine) for name, engine in engines.items()}
    return time_interleaved(case, kmap.num_out, works, rounds)


def _weight(kmap: KernelMap, cin: int, cout: int) -> Tensor:
    return torch.randn(kmap.kernel_volume, cin, cout) / (kmap.kernel_volume * cin) ** 0.5


def _check_close(case: str, found: Tensor, expected: Mapping[str, Tensor]) -> None:
    for name, values in expected.items():
        error = float((found - values).abs().max() / values.abs().max())
        if not error <= TOLERANCE:
            raise InputError(f"{case}: kernels and {name} differ by {error:.1e} of the maximum; no times are shown")


class _GatherMultiplyScatter(torch.autograd.Function):
    """As one writes it by hand, with all threads of torch's matrix products."""

    @staticmethod
    def forward(ctx: Any, feat: Tensor, weight: Tensor, rows: list[tuple[Tensor, Tensor]], num_out: int) -> Tensor:
        ctx.save_for_backward(feat, weight)
        ctx.rows = rows
        out = feat.new_zeros(num_out, weight.shape[2])
        for (i, o), matrix in zip(rows, weight, strict=True):
            out.index_add_(0, o, feat.index_select(0, i) @ matrix)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        feat, weight = ctx.saved_tensors
        grad_feat, grad_weight = torch.zeros_like(feat), torch.empty_like(weight)
        for k, (i, o) in enumerate(ctx.rows):
            upstream = grad.index_select(0, o)
            grad_feat.index_add_(0, i, upstream @ weight[k].T)
            torch.mm(feat.index_select(0, i).T, upstream, out=grad_weight[k])
        return grad_feat, grad_weight, None, None


class _SpconvPairs:
    """spconv's CPU products on its own pair lists; its fine voxels have our order, its coarse ones do not."""

    def __init__(self, coord: Tensor) -> None:
        import spconv.pytorch.functional as functional
        import spconv.pytorch.ops as ops
        from spconv.core import ConvAlgo

        if not torch.cuda.is_available():
            ops.get_current_stream = lambda: 0  # its backward asks for a CUDA stream even on the CPU, and ignores it
        self.functional, self.algorithm, self.fine = functional, ConvAlgo.Native, len(coord)
        low = coord.amin(0)
        low[0] = 0
        cells = (coord - low).contiguous()
        shape = [(int(v) // 2 + 1) * 2 for v in cells[:, 1:].amax(0)]
        arguments = (cells, int(cells[:, 0].max()) + 1, shape, self.algorithm)
        _, *self.same = ops.get_indice_pairs(*arguments, [3] * 3, [1] * 3, [1] * 3, [1] * 3, [0] * 3, True, False)
        out, *self.strided = ops.get_indice_pairs(*arguments, [2] * 3, [2] * 3, [0] * 3, [1] * 3, [0] * 3, False, False)
        self.coarse = len(out)

    def submanifold(self, feat: Tensor, weight: Tensor) -> Tensor:
        return self.functional.indice_subm_conv(feat, weight, *self.same, self.fine, self.algorithm)

    def down(self, feat: Tensor, weight: Tensor) -> Tensor:
        return self.functional.indice_conv(feat, weight, *self.strided, self.coarse, self.algorithm)

    def up(self, feat: Tensor, weight: Tensor) -> Tensor:
        return self.functional.indice_inverse_conv(feat, weight, *self.strided, self.fine, self.algorithm)


def _krsc(weight: Tensor) -> Tensor:
    """``(K, Cin, Cout)`` as spconv stores it, ``(Cout, k, k, k, Cin)``."""
    volume, cin, cout = weight.shape
    edge = round(volume ** (1 / 3))
    return weight.permute(2, 0, 1).contiguous().view(cout, edge, edge, edge, cin)
