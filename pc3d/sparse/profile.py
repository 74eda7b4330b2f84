"""What every sparse layer of a network does on a cloud: sizes, sparsity, order, flow, modelled and measured time."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pc3d.ops.coir import bytes_per_voxel
from pc3d.ops.conv import Epilogue, sparse_conv
from pc3d.ops.kernel_map import KernelMap, strided_map, submanifold_map
from pc3d.ops.order import SoarOrder
from pc3d.sparse.calibrate import model, ranked, time_pass
from pc3d.sparse.conv import SparseConv3d, SparseConvolution, SubMConv3d
from pc3d.sparse.dataflow import Layer, Pass, Tiling, attributes, cache_misses, unique_inputs, worth_reordering
from pc3d.sparse.flows import REAL_FLOWS
from pc3d.sparse.table import Choice, DataflowTable, current_table, decide

_ROUNDS = 5


@dataclass
class Row:
    """One product of one layer; times in milliseconds, traffic in megabytes.

    Attributes:
        floor_ms: ``2 pairs Cin Cout`` operations at the peak rate measured for dense products on this machine.
        unique64: distinct inputs of a tile of 64 outputs over 64; ``misses``: of a last-level cache, per output.
        reorder_ms: time of a SOAR order of the output voxels over the layers that share it.
        others_ms: the same product in plain torch: gathered rows, dense products, rows added.
    """

    layer: str
    op: str
    num_in: int
    num_out: int
    kernel_volume: int
    in_channels: int
    out_channels: int
    receptive_field: float
    field_quantiles: tuple[int, ...]
    unique64: float
    misses: float
    flow: str
    modelled_l2_mb: float
    modelled_dram_mb: float
    modelled_ms: float
    measured_ms: float
    second_best: str
    margin: float
    reorder_ms: float
    floor_ms: float
    cache_counters: str = "unavailable"
    others_ms: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Modelled over measured time."""
        return self.modelled_ms / self.measured_ms

    @property
    def from_floor(self) -> float:
        """How many times the floor the product takes."""
        return self.measured_ms / self.floor_ms if self.floor_ms else float("inf")


_HEAD = (
    f"{'layer':<24} {'op':<5} {'N_in':>7} {'N_out':>7} {'K':>3} {'Ci>Co':>8} {'ARF':>5} {'q5..q95':>14} "
    f"{'u64':>5} {'m':>5} {'flow':<8} {'L2 MB':>7} {'DRAM':>6} {'model':>7} {'ms':>7} {'ratio':>5} {'2nd best':>14} "
    f"{'reord':>6} {'floor':>7} {'x':>5} counters"
)


def _line(row: Row) -> str:
    quantiles, widths = "/".join(map(str, row.field_quantiles)), f"{row.in_channels}>{row.out_channels}"
    second = f"{row.second_best} {row.margin:+.0%}"
    return (
        f"{row.layer[-24:]:<24} {row.op:<5} {row.num_in:>7} {row.num_out:>7} {row.kernel_volume:>3} {widths:>8} "
        f"{row.receptive_field:>5.2f} {quantiles:>14} {row.unique64:>5.2f} {row.misses:>5.2f} {row.flow:<8} "
        f"{row.modelled_l2_mb:>7.1f} {row.modelled_dram_mb:>6.1f} {row.modelled_ms:>7.2f} {row.measured_ms:>7.2f} "
        f"{row.ratio:>5.2f} {second:>14} {row.reorder_ms:>6.2f} {row.floor_ms:>7.2f} {row.from_floor:>5.1f} "
        f"{row.cache_counters}"
    )


@dataclass
class Profile:
    """Every product of a network, the table behind the choices, and the shares of the time.

    Attributes:
        shares: of ``reorder``, ``map``, ``metadata`` (plans of the kernels) and ``gemm``, summing to 1.
        map_bytes: of the kernel maps per output voxel, in each form of :func:`pc3d.ops.coir.bytes_per_voxel`.
        warnings: layers whose model is off by more than 2, or whose bin the table lacks.
    """

    rows: list[Row]
    table: str
    device: str
    threads: int
    shares: dict[str, float]
    map_bytes: dict[str, float]
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """As plain values for a JSON file."""
        rows = [asdict(row) | {"ratio": row.ratio, "from_floor": row.from_floor} for row in self.rows]
        return {**asdict(self), "rows": rows, "total": self.totals()}

    def totals(self) -> dict[str, float]:
        """Milliseconds over all rows."""
        names = ("modelled_ms", "measured_ms", "floor_ms", "reorder_ms")
        return {name: sum(getattr(row, name) for row in self.rows) for name in names}

    def to_text(self) -> str:
        """As a table, one line per product."""
        lines = [_HEAD, *map(_line, self.rows)]
        total = self.totals()
        lines.append(
            f"total: modelled {total['modelled_ms']:.1f} ms, measured {total['measured_ms']:.1f} ms, floor "
            f"{total['floor_ms']:.1f} ms; reorder {total['reorder_ms']:.1f} ms"
        )
        lines.append("share of time: " + ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items()))
        lines.append("kernel maps, bytes per voxel: " + ", ".join(f"{k} {v:.1f}" for k, v in self.map_bytes.items()))
        lines.append(f"table: {self.table}; {self.device}, {self.threads} threads")
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


@dataclass(frozen=True)
class _Call:
    name: str
    module: SparseConvolution
    kernel_map: KernelMap
    coord: Tensor


def profile(network: nn.Module, run: Callable[[], object]) -> Profile:
    """Profile the sparse convolutions of a network on the CPU.

    Args:
        network: holds the layers; their names are those of ``named_modules``.
        run: a forward pass, ``run()``.

    Raises:
        ValueError: if no sparse convolution ran, or there is no dataflow table for the CPU.
    """
    table = current_table("cpu")
    if table is None:
        raise ValueError("there is no dataflow table for the CPU: run `pc3d dataflow calibrate`")
    with torch.no_grad(), _watched(network) as calls:
        run()
    if not calls:
        raise ValueError("no sparse convolution ran on the CPU: nothing to profile")
    users = Counter(id(call.kernel_map) for call in calls)
    firsts = {id(call.kernel_map): call for call in calls}
    reorder = {key: _reorder_ms(call) for key, call in firsts.items()}
    rows, warnings = [], []
    for call in calls:
        found, notes = _rows(call, table, reorder[id(call.kernel_map)] / users[id(call.kernel_map)])
        rows += found
        warnings += notes
    maps = list(firsts.values())
    shares = _shares(rows, maps, sum(reorder.values()))
    where = "forced flows" if table.path is None else str(table.path.name)
    return Profile(rows, where, table.device, torch.get_num_threads(), shares, _map_bytes(maps), warnings)


@contextlib.contextmanager
def _watched(network: nn.Module) -> Iterator[list[_Call]]:
    """Inside the block, the list grows by every convolution that runs."""
    calls: list[_Call] = []
    layers = {name: m for name, m in network.named_modules() if isinstance(m, SparseConvolution)}
    hooks = []
    try:
        for name, layer in layers.items():
            coord: list[Tensor] = []
            hooks.append(layer.register_forward_pre_hook(_remembering(coord)))
            layer.convolve = _recording(name, layer, coord, calls)  # type: ignore
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers.values():
            layer.__dict__.pop("convolve", None)


def _remembering(coord: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        coord[:] = [inputs[0].coord]

    return hook


def _recording(name: str, layer: SparseConvolution, coord: list[Tensor], calls: list[_Call]) -> Callable[..., Tensor]:
    own = layer.convolve

    def convolve(feat: Tensor, kernel_map: KernelMap, epilogue: Epilogue | None = None) -> Tensor:
        calls.append(_Call(name, layer, kernel_map, coord[0]))
        return own(feat, kernel_map, epilogue)

    return convolve


def _reorder_ms(call: _Call) -> float:
    """Time of the SOAR order of the grid of a 3^3 submanifold map; other maps are read once in any order."""
    if not isinstance(call.module, SubMConv3d) or call.module.kernel_size != (3, 3, 3):
        return 0.0
    if not worth_reordering(attributes(call.kernel_map)):
        return 0.0
    return _median_ms(lambda: SoarOrder(64).rows(call.coord, call.kernel_map))


def _map_ms(call: _Call) -> float:
    """Time to build the map; an inverse layer takes over the one of its strided layer."""
    if isinstance(call.module, SubMConv3d):
        kernel_size, dilation = call.module.kernel_size, call.module.dilation
        return _median_ms(lambda: submanifold_map(call.coord, kernel_size, dilation))
    if isinstance(call.module, SparseConv3d):
        window = call.module.window
        return _median_ms(lambda: strided_map(call.coord, *window))
    return 0.0


def _metadata_ms(kernel_map: KernelMap) -> float:
    """Time of what the kernels derive from a map: a first call on a new copy of it over a later one, one channel."""
    feat, weight = torch.ones(kernel_map.num_in, 1), torch.ones(kernel_map.kernel_volume, 1, 1)
    with torch.enable_grad():
        first = _median_ms(lambda: sparse_conv(feat, weight, replace(kernel_map, plans={})))
        return max(first - _median_ms(lambda: sparse_conv(feat, weight, kernel_map)), 0.0)


def _shares(rows: list[Row], firsts: list[_Call], reorder_ms: float) -> dict[str, float]:
    spent = {
        "reorder": reorder_ms,
        "map": sum(map(_map_ms, firsts)),
        "metadata": sum(_metadata_ms(call.kernel_map) for call in firsts),
        "gemm": sum(row.measured_ms for row in rows),
    }
    total = sum(spent.values())
    return {name: share / total for name, share in spent.items()}


def _map_bytes(firsts: list[_Call]) -> dict[str, float]:
    maps = [call.kernel_map for call in firsts]
    voxels = max(sum(kmap.num_out for kmap in maps), 1)
    sizes = [bytes_per_voxel(kmap) for kmap in maps]
    weights = [kmap.num_out / voxels for kmap in maps]
    return {form: sum(w * size[form] for w, size in zip(weights, sizes, strict=True)) for form in sizes[0]}


def _rows(call: _Call, table: DataflowTable, reorder_ms: float) -> tuple[list[Row], list[str]]:
    kmap, weight = call.kernel_map, call.module.weight
    layer = Layer(weight.shape[1], weight.shape[2], weight.element_size())
    sparsity = attributes(kmap)
    rows, warnings = [], []
    for op, choice, exact in decide(kmap, layer.in_channels, layer.out_channels, weight.dtype, "cpu"):
        if choice is None:
            raise ValueError(f"the dataflow table has no flows for {weight.dtype}: run `pc3d dataflow calibrate`")
        work = model(table, op, choice, kmap, layer)
        others = [c for c in REAL_FLOWS["cpu"][op] if c.name != choice.name]
        second, best = ranked(table, op, others, kmap, layer)[0]
        peak = max(table.rates["gemm"]["values"])
        row = Row(
            layer=call.name,
            op=op.value,
            num_in=kmap.num_in,
            num_out=kmap.num_out,
            kernel_volume=kmap.kernel_volume,
            in_channels=layer.in_channels,
            out_channels=layer.out_channels,
            receptive_field=sparsity.receptive_field,
            field_quantiles=sparsity.field_quantiles,
            unique64=unique_inputs(kmap, Tiling(64), sampled=True),
            misses=cache_misses(kmap, max(table.caches["llc"] // (layer.in_channels * layer.element_bytes), 1)),
            flow=choice.name,
            modelled_l2_mb=work.traffic.l2_bytes / 1e6,
            modelled_dram_mb=work.traffic.dram_bytes / 1e6,
            modelled_ms=work.seconds * 1e3,
            measured_ms=time_pass(op, choice, kmap, layer, weight.dtype, "cpu", 0.02) * 1e3,
            second_best=second.name,
            margin=best.seconds / work.seconds - 1,
            reorder_ms=reorder_ms if op is Pass.FORWARD else 0.0,
            floor_ms=kmap.num_pairs * layer.in_channels * layer.out_channels / peak * 1e3,
            others_ms={"torch": time_pass(op, Choice("ws"), kmap, layer, weight.dtype, "cpu", 0.0) * 1e3},
        )
        rows.append(row)
        if not 0.5 <= row.ratio <= 2:
            warnings.append(
                f"{call.name} {op.value}: modelled {row.modelled_ms:.2f} ms, measured {row.measured_ms:.2f} ms"
            )
        if not exact:
            warnings.append(f"{call.name} {op.value}: no such bin in the table, the nearest one was used")
    return rows, warnings


def _median_ms(work: Callable[[], object]) -> float:
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3
