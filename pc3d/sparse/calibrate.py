"""Calibration of the dataflow table: times of the real flows on synthetic shells, and the rates they come from."""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pc3d.ops.conv import sparse_conv
from pc3d.ops.kernel_map import KernelMap, strided_map, submanifold_map
from pc3d.ops.order import CurveOrder
from pc3d.sparse.dataflow import Device, Flow, Layer, Pass, Plan, RateGrid, Tiling, mask_efficiency, plan
from pc3d.sparse.flows import flows_of
from pc3d.sparse.table import ARF_EDGES, Choice, DataflowTable, field_bin, key_of

SHELL_FIELDS = (2, 4, 6, 8, 11, 14, 20)
WIDTHS = (16, 32, 64, 128, 256)
TABLE_WIDTHS = (16, 32, 64, 96, 128, 256)
SIZES = range(8, 23, 2)
NEAR_TIE = 1.5
_MODEL_FLOW = {"os": Flow.OUTPUT_GATHER, "ws": Flow.WEIGHT, "fod": Flow.FETCH_ON_DEMAND}

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        fields: ARF of the shells.
        widths: channels, every input width with every output width.
        voxels: of a shell.
        seconds: time to spend on one measurement, beyond its first run.
    """

    fields: Sequence[int] = SHELL_FIELDS
    widths: Sequence[int] = WIDTHS
    voxels: int = 4000
    seconds: float = 0.02


QUICK = Effort(fields=(2, 8), widths=(16, 32), voxels=800, seconds=0.002)


class Run(NamedTuple):
    """One measured product of a layer."""

    op: Pass
    choice: Choice
    kernel_map: KernelMap
    layer: Layer
    seconds: float


def shell(receptive_field: float, voxels: int, seed: int = 0) -> Tensor:
    """``(M, 4)`` int32 voxels of a sphere, raster order: thick enough for the ARF, thinned out at random to meet it."""
    generator = torch.Generator().manual_seed(seed)
    thickness, share, radius = 1.0, 1.0, 8.0
    for _ in range(12):
        radius = max((voxels / (12.57 * thickness * share)) ** 0.5, 2 * thickness)
        coord = _sphere(radius, thickness)
        dense = submanifold_map(coord, (3, 3, 3)).num_pairs / len(coord)
        if dense >= receptive_field:
            share = (receptive_field - 1) / (dense - 1)
            if abs(len(coord) * share / voxels - 1) < 0.1:
                break
        else:
            thickness += 0.5
    kept = torch.rand(len(coord), generator=generator) < share
    return coord[kept]


def _sphere(radius: float, thickness: float) -> Tensor:
    reach = int(radius + thickness) + 1
    axis = torch.arange(-reach, reach + 1)
    cells = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).view(-1, 3)
    distance = cells.double().norm(dim=1)
    cells = cells[(distance >= radius - thickness / 2) & (distance < radius + thickness / 2)]
    return torch.cat([cells.new_zeros(len(cells), 1), cells], 1).int()


def time_pass(
    op: Pass, choice: Choice, kernel_map: KernelMap, layer: Layer, dtype: torch.dtype, device: str, seconds: float
) -> float:
    """Seconds of one product of a layer, the fastest of at least three runs; plans and workspaces are warm."""
    needs = {Pass.INPUT_GRAD: "feat", Pass.WEIGHT_GRAD: "weight"}.get(op)
    tensors = {
        "feat": torch.randn(kernel_map.num_in, layer.in_channels, device=device, dtype=dtype),
        "weight": torch.randn(
            kernel_map.kernel_volume, layer.in_channels, layer.out_channels, device=device, dtype=dtype
        ),
    }
    if needs is not None:
        tensors[needs].requires_grad_()
    flows = flows_of({op: choice})
    with torch.set_grad_enabled(needs is not None):
        out = sparse_conv(tensors["feat"], tensors["weight"], kernel_map, flows=flows)
        upstream = torch.ones_like(out)

        def run() -> None:
            if needs is None:
                sparse_conv(tensors["feat"], tensors["weight"], kernel_map, flows=flows)
            else:
                torch.autograd.grad(out, tensors[needs], upstream, retain_graph=True)

        return _fastest(run, seconds, device)


def _fastest(run: Callable[[], object], budget: float, device: str) -> float:
    times: list[float] = []
    run()
    while len(times) < 3 or (sum(times) < budget and len(times) < 50):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# Rates --------------------------------------------------------------------------------------------------------------


def cache_sizes(device: str) -> dict[str, int]:
    """Bytes of the ``l1``, ``l2`` and last-level (``llc``) caches; common sizes where the system does not tell."""
    if device == "cuda":
        chip = torch.cuda.get_device_properties(0)
        return {"l1": 128 << 10, "l2": chip.L2_cache_size, "llc": chip.L2_cache_size}
    found = {"l1": 32 << 10, "l2": 512 << 10, "llc": 8 << 20}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction" and size.endswith("K"):
            found[{"1": "l1", "2": "l2"}.get(level, "llc")] = int(size[:-1]) << 10
    return found


def _gather_rates(device: str, caches: Mapping[str, int], effort: Effort) -> dict[str, dict[str, float]]:
    """Bytes per second of rows gathered from the last-level cache, and at random from memory, by row size."""
    rates: dict[str, dict[str, float]] = {}
    for row_bytes in (32, 64, 128, 256, 512, 1024):
        speeds = {}
        for place, size in (("cached", caches["llc"] // 4), ("memory", caches["llc"] * 2)):
            rows = max(min(size, 1 << 27) // row_bytes, 1)
            source = torch.zeros(rows, row_bytes // 4, device=device)
            picked = torch.randint(0, rows, (min(rows, 1 << 16),), device=device)
            work = partial(torch.index_select, source, 0, picked)
            speeds[place] = len(picked) * row_bytes / _fastest(work, effort.seconds, device)
        rates[str(row_bytes)] = speeds
    return rates


def _gemm_rates(device: str, dtype: torch.dtype, effort: Effort) -> dict[str, Any]:
    """Multiply-adds per second of plain products of p rows."""
    rows = (64, 1024, 16384) if effort is QUICK else (64, 1024, 16384, 1 << 17)
    axes = {"pairs": rows, "in_channels": tuple(effort.widths), "out_channels": tuple(effort.widths)}
    values = []
    for p, cin, cout in product(*axes.values()):
        a, b = (torch.ones(shape, device=device, dtype=dtype) for shape in ((p, cin), (cin, cout)))
        values.append(p * cin * cout / _fastest(partial(torch.mm, a, b), effort.seconds / 4, device))
    return {"axes": {name: list(axis) for name, axis in axes.items()}, "values": [round(v) for v in values]}


def _overheads(op: Pass, choice: Choice, dtype: torch.dtype, device: str, effort: Effort) -> dict[str, float]:
    """Seconds per launch and per byte of weights, from a map that leaves next to nothing else to do."""
    tiny = submanifold_map(torch.tensor([[0, 0, 0, x] for x in range(8)], dtype=torch.int32).to(device), (3, 3, 3))
    low, high = effort.widths[0], effort.widths[-1]
    times = [
        time_pass(op, choice, tiny, Layer(width, width, dtype.itemsize), dtype, device, effort.seconds)
        for width in (low, high)
    ]
    per_byte = max(times[1] - times[0], 0.0) / (27 * (high**2 - low**2) * dtype.itemsize)
    return {"launch": times[0] / _launches(op, choice.flow, 27), "prepare": per_byte}


def _shell_runs(
    ways: Mapping[Pass, Sequence[Choice]], dtype: torch.dtype, device: str, effort: Effort, progress: Progress
) -> Iterator[Run]:
    maps = [submanifold_map(_in_hilbert_order(shell(f, effort.voxels)).to(device), (3, 3, 3)) for f in effort.fields]
    cells = list(product(maps, effort.widths, effort.widths))
    for done, (kernel_map, cin, cout) in enumerate(cells):
        progress("measuring flows", done / len(cells))
        layer = Layer(cin, cout, dtype.itemsize)
        for op, choices in ways.items():
            for choice in choices:
                seconds = time_pass(op, choice, kernel_map, layer, dtype, device, effort.seconds)
                yield Run(op, choice, kernel_map, layer, seconds)


def _in_hilbert_order(coord: Tensor) -> Tensor:
    return coord[CurveOrder("hilbert").rows(coord)]


def _launches(op: Pass, flow: str, volume: int) -> int:
    return volume if flow == "ws" or (flow == "fod" and op is not Pass.WEIGHT_GRAD) else 1


def _grids(
    runs: Sequence[Run], overheads: Mapping[str, Mapping[str, float]], packed: bool
) -> dict[str, dict[str, Any]]:
    """A rate grid for every pass and flow, from what their runs took beyond launches and weights.

    Args:
        packed: tiles multiply the pairs they have; else empty lanes count as executed.
    """
    groups: dict[tuple[Pass, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.op, run.choice.flow), []).append(run)
    return {f"{op.value}|{flow}": _grid(group, overheads, packed) for (op, flow), group in groups.items()}


def _grid(runs: Sequence[Run], overheads: Mapping[str, Mapping[str, float]], packed: bool) -> dict[str, Any]:
    flow = runs[0].choice.flow
    points: dict[tuple[float, ...], list[float]] = {}
    for run in runs:
        kmap, layer = run.kernel_map, run.layer
        extra = overheads[f"{run.op.value}|{run.choice.name}"]
        weights = kmap.kernel_volume * layer.in_channels * layer.out_channels * layer.element_bytes
        spent = run.seconds - _launches(run.op, flow, kmap.kernel_volume) * extra["launch"] - extra["prepare"] * weights
        place = kmap.num_pairs / kmap.kernel_volume / (1 if flow == "ws" else kmap.num_out)
        cin, cout = _model_widths(run.op, layer)
        useful = 1.0
        if flow == "os" and not packed:
            tiled = kmap.inverse() if run.op is Pass.INPUT_GRAD else kmap
            useful = mask_efficiency(tiled, _tiling(run.choice))
        rate = kmap.num_pairs * cin * cout / useful / max(spent, run.seconds / 5)
        point = (place, cin, cout) if flow == "ws" else (run.choice.tile or 1, place, cin, cout)
        points.setdefault(point, []).append(rate)
    names = (*(("pairs",) if flow == "ws" else ("tile", "fill")), "in_channels", "out_channels")
    axes = {name: sorted({point[i] for point in points}) for i, name in enumerate(names)}
    return {
        "axes": axes,
        "values": [round(statistics.geometric_mean(points[point])) for point in product(*axes.values())],
    }


def _model_widths(op: Pass, layer: Layer) -> tuple[int, int]:
    """The input gradient is a layer from the output channels to the input channels."""
    widths = layer.in_channels, layer.out_channels
    return widths[::-1] if op is Pass.INPUT_GRAD else widths


# Model --------------------------------------------------------------------------------------------------------------


def model_device(table: DataflowTable, op: Pass, choice: Choice) -> Device:
    """What the cost model needs to know of a machine for one pass and flow."""
    rates = table.rates
    grid = rates["flows"][f"{op.value}|{choice.flow}"]
    extra = rates["overheads"][f"{op.value}|{choice.name}"]
    flow, cpu = _MODEL_FLOW[choice.flow], table.device.startswith("cpu")
    gemm = _as_grid(rates["gemm"])
    return Device(
        cache_bytes=table.caches["llc"],
        l2_bandwidth=rates["l2_bandwidth"],
        dram_bandwidth=rates["dram_bandwidth"],
        multiply_adds={flow: _as_grid(grid), Flow.GEMM: gemm},
        launch=extra["launch"],
        sort=rates["sort"],
        packed_pairs=cpu,
        fetches_per_offset=_launches(op, choice.flow, 2) > 1,
        prepare={flow: extra["prepare"]},
    )


def _tiling(choice: Choice) -> Tiling:
    return Tiling(choice.tile or 1, choice.window, choice.splits)


def _as_grid(grid: Mapping[str, Any]) -> RateGrid:
    return RateGrid({name: tuple(axis) for name, axis in grid["axes"].items()}, tuple(grid["values"]))


def model(
    table: DataflowTable, op: Pass, choice: Choice, kernel_map: KernelMap, layer: Layer, scale: float = 1.0
) -> Plan:
    """Modelled work and time of one pass of a layer (widths those of its forward pass) run by one flow."""
    if op is Pass.INPUT_GRAD:
        kernel_map = kernel_map.inverse()
    cin, cout = _model_widths(op, layer)
    layer = Layer(cin, cout, layer.element_bytes, op)
    flow = Flow.GEMM if kernel_map.kernel_volume == 1 else _MODEL_FLOW[choice.flow]
    tiling = _tiling(choice) if flow is Flow.OUTPUT_GATHER else None
    return plan(kernel_map, layer, flow, model_device(table, op, choice), tiling, scale)


def ranked(
    table: DataflowTable,
    op: Pass,
    ways: Sequence[Choice],
    kernel_map: KernelMap,
    layer: Layer,
    scale: float = 1.0,
) -> list[tuple[Choice, Plan]]:
    """Every flow with its modelled work, the fastest first."""
    plans = [(choice, model(table, op, choice, kernel_map, layer, scale)) for choice in ways]
    return sorted(plans, key=lambda found: found[1].seconds)


def _fill(
    table: DataflowTable, ways: Mapping[Pass, Sequence[Choice]], dtype: torch.dtype, effort: Effort, progress: Progress
) -> None:
    """Choices for every bin, from the model on one map per kernel and ARF, scaled to every size."""
    widths = TABLE_WIDTHS if effort is not QUICK else effort.widths
    maps = list(_table_maps(effort))
    for done, kernel_map in enumerate(maps):
        progress("filling the table", done / len(maps))
        for cin, cout, log2 in product(widths, widths, SIZES):
            layer, scale = Layer(cin, cout, dtype.itemsize), 1.5 * 2**log2 / kernel_map.num_out
            for op, choices in ways.items():
                plans = ranked(table, op, choices, kernel_map, layer, scale)
                # Measured, tile sizes differ less than the model says: only a clear gain leaves the usual way.
                near = [way for way, plan in plans if plan.seconds <= NEAR_TIE * plans[0][1].seconds]
                taken = choices[0] if choices[0] in near else plans[0][0]
                seconds = {way: plan.seconds for way, plan in plans}
                choice = replace(taken, microseconds=round(seconds[taken] * 1e6, 1))
                others = [way for way, _ in plans if way != taken]
                if others:
                    margin = round(seconds[others[0]] / seconds[taken] - 1, 3)
                    choice = replace(choice, second_best=others[0].name, margin=margin)
                key = key_of(op, kernel_map, cin, cout, dtype)
                outputs = kernel_map.num_in if op is Pass.INPUT_GRAD else kernel_map.num_out
                size = min(max(int(outputs * scale).bit_length() - 1, SIZES[0]), SIZES[-1])
                table.table[replace(key, size_bin=size)] = choice


def _table_maps(effort: Effort) -> Iterator[KernelMap]:
    """One 3^3 submanifold map per ARF bin, and 2^3 stride-2 maps with their inverses."""
    seen = set()
    for low, high in pairwise(ARF_EDGES):
        wanted = min((low + high) / 2, 22)
        coord = _in_hilbert_order(shell(wanted, effort.voxels))
        kernel_map = submanifold_map(coord, (3, 3, 3))
        fields = field_bin(kernel_map.num_pairs / kernel_map.num_out)
        if fields not in seen:
            seen.add(fields)
            yield kernel_map
    for wanted in (2, 8, 20):
        down = strided_map(_in_hilbert_order(shell(wanted, effort.voxels)), (2, 2, 2), (2, 2, 2))[1]
        yield down
        yield down.inverse()


def calibrate(
    ways: Mapping[Pass, Sequence[Choice]],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    effort: Effort | None = None,
    progress: Progress = lambda stage, share: None,
) -> DataflowTable:
    """Measure a machine and fill its table.

    Args:
        ways: the flows to choose from, per pass; the first is taken unless another is faster by ``NEAR_TIE``.
        device: ``cpu`` (with as many threads as torch has now) or ``cuda``.
        dtype: element type of features and weights.
        effort: how much to measure.
        progress: told a stage and the share of it that is done.
    """
    effort = effort or Effort()
    caches = cache_sizes(device)
    progress("measuring overheads", 0.0)
    overheads = {
        f"{op.value}|{choice.name}": _overheads(op, choice, dtype, device, effort)
        for op, choices in ways.items()
        for choice in choices
    }
    progress("measuring memory and products", 0.0)
    gather = _gather_rates(device, caches, effort)
    rates: dict[str, Any] = {"gemm": _gemm_rates(device, dtype, effort), "gather": gather, "overheads": overheads}
    keys = torch.randint(0, 1 << 27, (1 << 16,), device=device)
    rates["sort"] = _fastest(lambda: keys.sort(stable=True), effort.seconds, device) / len(keys)
    runs = list(_shell_runs(ways, dtype, device, effort, progress))
    rates["flows"] = _grids(runs, overheads, packed=device == "cpu")
    for name, place in (("l2_bandwidth", "cached"), ("dram_bandwidth", "memory")):
        rates[name] = max(speeds[place] for speeds in gather.values())
    table = DataflowTable(device_name(device), library(), [_dtype_name(dtype)], caches, rates, {}, {})
    _raise_bandwidths(table, runs)
    table.fitted_error = _error_of(table, runs)
    _fill(table, ways, dtype, effort, progress)
    progress("filling the table", 1.0)
    return replace(table, _axes={}, _found={})  # what look-ups need follows from the choices


def _raise_bandwidths(table: DataflowTable, runs: Sequence[Run]) -> None:
    """A bandwidth must not contradict a run that moved its bytes faster."""
    for run in runs:
        work = model(table, run.op, run.choice, run.kernel_map, run.layer).traffic
        table.rates["l2_bandwidth"] = max(table.rates["l2_bandwidth"], work.l2_bytes / run.seconds)
        table.rates["dram_bandwidth"] = max(table.rates["dram_bandwidth"], work.dram_bytes / run.seconds)


def _error_of(table: DataflowTable, runs: Sequence[Run]) -> dict[str, float]:
    errors = sorted(
        abs(model(table, run.op, run.choice, run.kernel_map, run.layer).seconds / run.seconds - 1) for run in runs
    )
    return {"median": round(statistics.median(errors), 4), "p95": round(errors[int(0.95 * (len(errors) - 1))], 4)}


def device_name(device: str) -> str:
    """``cpu:<model>:<threads> threads`` or ``cuda:<name>``."""
    if device == "cuda":
        return f"cuda:{torch.cuda.get_device_name()}"
    return f"cpu:{_cpu_name()}:{torch.get_num_threads()} threads"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def library() -> str:
    """Versions that times depend on."""
    from pc3d import __version__

    return f"pc3d {__version__}, torch {torch.__version__}"


def file_name(table: DataflowTable) -> str:
    """``dataflow-<device>-<hash>.json``; the hash is of the machine, its library versions and the dtypes."""
    told = json.dumps([table.device, table.library, table.dtype])
    return f"dataflow-{table.device.split(':')[0]}-{hashlib.sha1(told.encode()).hexdigest()[:8]}.json"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
