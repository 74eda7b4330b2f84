"""What a sparse convolution reads: sparsity attributes of a kernel map, bytes and time of each dataflow (SPADE).

The rates of a machine come from :mod:`pc3d.sparse.calibrate`, the choice for a layer from :mod:`pc3d.sparse.table`.

After the tile-based sparsity-aware dataflow of AccSS3D (arXiv 2011.12669). Attributes are counts, exact for the order
the voxels are in; a map whose voxels were reordered has its own. Tiles are counted from the first output row on.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise, product
from typing import Any, NamedTuple

import torch

from pc3d.ops.flows import Window
from pc3d.ops.kernel_map import KernelMap
from pc3d.ops.order import lru_misses, permute_map

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_MASK_BITS = 62  # kernel offsets per word of a mask
_SAMPLED_TILES = 64


@dataclass(frozen=True)
class Attributes:
    """Sparsity of a kernel map, whatever the order of its voxels.

    Attributes:
        num_in, num_out, kernel_volume, num_pairs: sizes N_in, N_out, K and P of the map.
        receptive_field: ARF, mean inputs per output (the centre counts).
        field_quantiles: inputs per output at the shares ``QUANTILES`` of the outputs.
        isolated: share of the outputs with at most one input.
        pairs_per_offset: pairs of each kernel offset.
    """

    num_in: int
    num_out: int
    kernel_volume: int
    num_pairs: int
    receptive_field: float
    field_quantiles: tuple[int, ...]
    isolated: float
    pairs_per_offset: tuple[int, ...]


@dataclass(frozen=True)
class Tiling:
    """How outputs are cut into tiles.

    Attributes:
        tile: outputs of a tile, T.
        window: outputs are sorted by the mask of their kernel offsets inside windows of so many rows, or all together;
            None: not sorted. Sorting fills the tiles, and gives up what neighbours share.
        splits: parts of the kernel offsets that are sorted and tiled each on its own.
    """

    tile: int = 64
    window: Window = None
    splits: int = 1

    def __post_init__(self) -> None:
        if self.tile < 1 or self.splits < 1 or (isinstance(self.window, int) and self.window < 1):
            raise ValueError(f"tile, window and splits must be positive, got {self}")
        if self.window is None and self.splits > 1:
            raise ValueError("splits only matter where outputs are sorted: give a window too")


def attributes(kernel_map: KernelMap) -> Attributes:
    """Attributes of a map, counted once and kept in its ``plans``."""
    return _kept(kernel_map, ("attributes",), lambda: _attributes(kernel_map))


def unique_inputs(kernel_map: KernelMap, tiling: Tiling, sampled: bool = False) -> float:
    """u(T): distinct input rows of each tile, summed (over mask splits too) and divided by the number of outputs.

    ``sampled`` looks at 64 evenly spaced tiles only.
    """
    return _tile_counts(kernel_map, tiling, sampled).unique


def mask_efficiency(kernel_map: KernelMap, tiling: Tiling, sampled: bool = False) -> float:
    """e(T): useful multiply-adds over those of tiles that run every kernel offset present in them on all T rows.

    ``sampled`` looks at 64 evenly spaced tiles only.
    """
    return _tile_counts(kernel_map, tiling, sampled).useful


def cache_misses(kernel_map: KernelMap, rows: int, tiling: Tiling | None = None) -> float:
    """m(C): misses per output of a least-recently-used cache of C input rows; outputs in order, offsets ascending.

    With a ``tiling`` that sorts by masks, outputs come in its order, part of the offsets after part.
    """
    window, splits = (None, 1) if tiling is None else (tiling.window, tiling.splits)
    return _kept(
        kernel_map,
        ("misses", rows, window, splits),
        lambda: lru_misses(_in_tiles(kernel_map, tiling or Tiling()), [rows])[0] / max(kernel_map.num_out, 1),
    )


def worth_reordering(sparsity: Attributes) -> bool:
    """Whether voxels share enough inputs for an order to matter: ARF of 2 or more, at most 45 % isolated."""
    return sparsity.receptive_field >= 2 and sparsity.isolated <= 0.45


class Flow(Enum):
    """What stays on the chip while the rest streams past."""

    GEMM = "gemm"  # one kernel offset: a plain product
    OUTPUT_UNIQUE = "os-u"  # outputs stay; a tile fetches each of its input rows once
    OUTPUT_GATHER = "os-g"  # outputs stay; every kernel offset gathers again
    WEIGHT = "ws"  # a kernel offset's weights stay: gather, product, scatter as three passes
    FETCH_ON_DEMAND = "fod"  # the same in one fused pass


class Pass(Enum):
    """The three products of a layer, which are chosen separately."""

    FORWARD = "fwd"
    INPUT_GRAD = "dgrad"
    WEIGHT_GRAD = "wgrad"


@dataclass(frozen=True)
class Layer:
    """Widths of a convolution, the bytes of one element, and the product that is meant.

    The input gradient is a forward pass over the inverse map with the widths exchanged. The weight gradient reads the
    rows of both sides of every pair and adds up in the weights.
    """

    in_channels: int
    out_channels: int
    element_bytes: int = 4
    op: Pass = Pass.FORWARD


@dataclass(frozen=True)
class Traffic:
    """Modelled work of one layer.

    Attributes:
        multiply_adds: those executed, wasted lanes included.
        l2_bytes: between the last-level cache and the cores.
        dram_bytes: between memory and the last-level cache.
    """

    multiply_adds: float
    l2_bytes: float
    dram_bytes: float


@dataclass(frozen=True)
class RateGrid:
    """Multiply-adds per second, measured on a grid and interpolated in the logarithm of its axes and of the rate.

    Attributes:
        axes: measured values of each axis, ascending: ``tile`` (rows), ``fill`` (pairs over outputs times kernel
            offsets), ``pairs`` (of one kernel offset), ``in_channels`` and ``out_channels``.
        values: the rates, the last axis fastest.
    """

    axes: Mapping[str, tuple[float, ...]]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.values) != math.prod(map(len, self.axes.values())) or any(v <= 0 for v in self.values):
            raise ValueError("a rate grid has one positive rate for each combination of its axes")

    def at(self, **point: float) -> float:
        """The rate at a point; beyond the measured values of an axis, that at its end."""
        corners = [(0, 1.0)]
        for name, known in self.axes.items():
            low, share = _between(known, point[name])
            corners = [
                (index * len(known) + low + step, weight * part)
                for index, weight in corners
                for step, part in ((0, 1 - share), (1, share))
                if part > 0
            ]
        return math.exp(sum(weight * math.log(self.values[index]) for index, weight in corners))


def _between(known: tuple[float, ...], value: float) -> tuple[int, float]:
    """The last known value not above ``value``, and how far ``value`` is to the next one."""
    low = bisect_right(known, value) - 1
    if low < 0:
        return 0, 0.0
    if low + 1 == len(known):
        return low, 0.0
    return low, math.log(value / known[low]) / math.log(known[low + 1] / known[low])


@dataclass(frozen=True)
class Device:
    """Measured rates of a machine for one pass of a layer.

    Attributes:
        cache_bytes: size of the last-level cache.
        l2_bandwidth, dram_bandwidth: bytes per second.
        multiply_adds: multiply-adds per second of each flow, one number or a grid.
        launch: seconds to start one pass over the pairs of a kernel offset.
        sort: seconds per output row to sort by masks.
        masked_lanes_skip: outputs without an input under a kernel offset cost no fetch.
        packed_pairs: tiles multiply the pairs they have, packed together, and no empty lane.
        fetches_per_offset: fetch on demand is launched once per kernel offset, and not once for all.
        prepare: seconds per byte of weights, to bring them into the form a flow reads.
    """

    cache_bytes: int
    l2_bandwidth: float
    dram_bandwidth: float
    multiply_adds: Mapping[Flow, float | RateGrid]
    launch: float = 0.0
    sort: float = 0.0
    masked_lanes_skip: bool = True
    packed_pairs: bool = False
    fetches_per_offset: bool = False
    prepare: Mapping[Flow, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A way to run a layer and its modelled seconds."""

    flow: Flow
    tiling: Tiling | None
    traffic: Traffic
    seconds: float


def traffic(
    kernel_map: KernelMap,
    layer: Layer,
    flow: Flow,
    device: Device,
    tiling: Tiling | None = None,
    scale: float = 1.0,
) -> Traffic:
    """Modelled work of a forward pass; for the input gradient pass ``kernel_map.inverse()`` and swap the widths.

    Bytes count input and output rows, weights and the map: a dense table of K int32 per output for the flows that keep
    outputs, 8 bytes per pair for the others. ``scale`` models a map of the same sparsity with so many times the voxels.

    Raises:
        ValueError: if a flow that keeps outputs has no ``tiling``, or ``GEMM`` is asked of more than one offset.
    """
    n, k, p = kernel_map.num_out * scale, kernel_map.kernel_volume, kernel_map.num_pairs * scale
    in_row, out_row = layer.in_channels * layer.element_bytes, layer.out_channels * layer.element_bytes
    products = float(p * layer.in_channels * layer.out_channels)
    weights = _weight_bytes(kernel_map, layer)
    if flow is Flow.GEMM:
        if k != 1:
            raise ValueError(f"a plain product serves one kernel offset, not {k}")
        moved = float(p * (in_row + out_row) + weights)
        return Traffic(products, moved, moved)
    fetched = cache_misses(kernel_map, max(device.cache_bytes // in_row, 1), tiling) * n * in_row
    if layer.op is Pass.WEIGHT_GRAD:
        if flow not in (Flow.WEIGHT, Flow.FETCH_ON_DEMAND):
            raise ValueError(f"a weight gradient adds up over the pairs of an offset: flow {flow.value} keeps outputs")
        rows = float(p * (in_row + out_row))
        moved = fetched + n * out_row + 8 * p + weights
        return Traffic(products, rows, moved + (2 * rows if flow is Flow.WEIGHT else 0))
    if flow is Flow.WEIGHT:
        moved = fetched + 2 * p * in_row + 4 * p * out_row + 8 * p + weights
        return Traffic(products, moved, moved)
    if flow is Flow.FETCH_ON_DEMAND:
        on_chip = float(p * in_row + 2 * p * out_row)
        return Traffic(products, on_chip, fetched + 2 * p * out_row + 8 * p + weights)
    if tiling is None:
        raise ValueError(f"flow {flow.value} works in tiles: give a tiling")
    useful = 1.0 if device.packed_pairs else max(mask_efficiency(kernel_map, tiling), 1e-9)
    if flow is Flow.OUTPUT_UNIQUE:
        on_chip = unique_inputs(kernel_map, tiling) * n * in_row
    else:
        on_chip = p * in_row / (1.0 if device.masked_lanes_skip else useful)
    return Traffic(products / useful, on_chip, fetched + n * out_row + weights + 4.0 * k * n)


def plan(
    kernel_map: KernelMap,
    layer: Layer,
    flow: Flow,
    device: Device,
    tiling: Tiling | None = None,
    scale: float = 1.0,
) -> Plan:
    """Modelled seconds of one flow: the slowest of arithmetic, cache and memory, plus launches, sorting and weights.

    Gather-product-scatter runs offset after offset, each with the rate of its number of pairs.
    """
    work = traffic(kernel_map, layer, flow, device, tiling, scale)
    per_offset = flow is Flow.WEIGHT or (flow is Flow.FETCH_ON_DEMAND and device.fetches_per_offset)
    launches = kernel_map.kernel_volume if per_offset else 1
    sorts = tiling.splits if tiling is not None and tiling.window is not None else 0
    rate = device.multiply_adds[flow]
    memory = max(work.l2_bytes / device.l2_bandwidth, work.dram_bytes / device.dram_bandwidth)
    if flow is Flow.WEIGHT and isinstance(rate, RateGrid) and "pairs" in rate.axes:
        bound = _per_offset(kernel_map, layer, rate, memory, scale)
    else:
        bound = max(work.multiply_adds / _rate(rate, kernel_map, layer, tiling), memory)
    extra = launches * device.launch + sorts * device.sort * kernel_map.num_out * scale
    prepared = device.prepare.get(flow, 0.0) * _weight_bytes(kernel_map, layer)
    return Plan(flow, tiling, work, bound + extra + prepared)


def _weight_bytes(kernel_map: KernelMap, layer: Layer) -> int:
    return kernel_map.kernel_volume * layer.in_channels * layer.out_channels * layer.element_bytes


def _rate(rate: float | RateGrid, kernel_map: KernelMap, layer: Layer, tiling: Tiling | None) -> float:
    if not isinstance(rate, RateGrid):
        return rate
    slots = max(kernel_map.num_out * kernel_map.kernel_volume, 1)
    tile = 1 if tiling is None else tiling.tile
    widths = {"in_channels": layer.in_channels, "out_channels": layer.out_channels}
    return rate.at(tile=tile, fill=kernel_map.num_pairs / slots, pairs=kernel_map.num_pairs, **widths)


def _per_offset(kernel_map: KernelMap, layer: Layer, rate: RateGrid, memory: float, scale: float) -> float:
    """Seconds of all kernel offsets, each bound by its products or by its share of the memory traffic."""
    total, widths = max(kernel_map.num_pairs, 1), (layer.in_channels, layer.out_channels)
    seconds = 0.0
    for pairs in attributes(kernel_map).pairs_per_offset:
        speed = rate.at(pairs=pairs * scale, in_channels=widths[0], out_channels=widths[1])
        seconds += max(pairs * scale * math.prod(widths) / speed, memory * pairs / total)
    return seconds


_WINDOWS: tuple[Window, ...] = (None, 256, 1024, 4096, "all")
TILINGS = tuple(
    Tiling(tile, window, splits)
    for tile, window, splits in product((16, 32, 64, 128), _WINDOWS, (1, 2, 3))
    if window is not None or splits == 1
)


def rank(
    kernel_map: KernelMap,
    layer: Layer,
    device: Device,
    flows: Iterable[Flow] = (Flow.OUTPUT_UNIQUE, Flow.OUTPUT_GATHER, Flow.WEIGHT, Flow.FETCH_ON_DEMAND),
    tilings: Iterable[Tiling] = TILINGS,
    scale: float = 1.0,
) -> list[Plan]:
    """Every flow and tiling, the fastest by the model first; a plain product where there is one kernel offset.

    Counts are exact and take seconds on a large map: this is for reports and tables, not for every layer of a run.

    A weight gradient sums over the pairs of an offset: give it the flows ``WEIGHT`` and ``FETCH_ON_DEMAND``.
    """
    if kernel_map.kernel_volume == 1:
        return [plan(kernel_map, layer, Flow.GEMM, device, scale=scale)]
    choices = tuple(tilings)
    plans = []
    for flow in flows:
        tiled = flow in (Flow.OUTPUT_UNIQUE, Flow.OUTPUT_GATHER)
        ways = choices if tiled else (None,)
        plans += [plan(kernel_map, layer, flow, device, tiling, scale) for tiling in ways]
    return sorted(plans, key=lambda candidate: candidate.seconds)


def _kept(kernel_map: KernelMap, key: tuple[object, ...], count: Callable[[], Any]) -> Any:
    """A count kept in the map's plans."""
    slot = ("dataflow", *key)
    if slot not in kernel_map.plans:
        kernel_map.plans[slot] = count()
    return kernel_map.plans[slot]


def _attributes(kernel_map: KernelMap) -> Attributes:
    outputs, volume = kernel_map.num_out, kernel_map.kernel_volume
    fields = torch.bincount(kernel_map.out_rows, minlength=outputs)
    up_to = torch.bincount(fields, minlength=volume + 1).cumsum(0).cpu()
    wanted = torch.tensor(QUANTILES, dtype=torch.float64) * outputs
    return Attributes(
        num_in=kernel_map.num_in,
        num_out=outputs,
        kernel_volume=volume,
        num_pairs=kernel_map.num_pairs,
        receptive_field=kernel_map.num_pairs / max(outputs, 1),
        field_quantiles=tuple(torch.searchsorted(up_to.double(), wanted).tolist()),
        isolated=int(up_to[1]) / max(outputs, 1),
        pairs_per_offset=tuple(kernel_map.offsets.diff().tolist()),
    )


class _TileCounts(NamedTuple):
    unique: float
    useful: float


def _tile_counts(kernel_map: KernelMap, tiling: Tiling, sampled: bool) -> _TileCounts:
    return _kept(kernel_map, ("tiles", tiling, sampled), lambda: _count_tiles(kernel_map, tiling, sampled))


def _count_tiles(kernel_map: KernelMap, tiling: Tiling, sampled: bool) -> _TileCounts:
    tiled = _in_tiles(kernel_map, tiling)
    kernel = torch.repeat_interleave(torch.arange(tiled.kernel_volume), tiled.offsets.diff()).to(tiled.in_rows.device)
    tile, in_rows = tiled.out_rows.long() // tiling.tile, tiled.in_rows.long()
    tiles, outputs = tiled.num_out // tiling.tile // tiling.splits, kernel_map.num_out
    if sampled and tiles > _SAMPLED_TILES:
        chosen = torch.linspace(0, tiles - 1, _SAMPLED_TILES, dtype=torch.float64).round().long()
        outputs = int((outputs - chosen * tiling.tile).clamp(max=tiling.tile).sum())
        inside = torch.isin(tile % tiles, chosen.to(tile.device))
        tile, in_rows, kernel = tile[inside], in_rows[inside], kernel[inside]
    unique = len((tile * kernel_map.num_in + in_rows).unique())
    present = len((tile * kernel_map.kernel_volume + kernel).unique())
    return _TileCounts(unique / max(outputs, 1), len(tile) / max(present * tiling.tile, 1))


def _in_tiles(kernel_map: KernelMap, tiling: Tiling) -> KernelMap:
    """The map with its outputs as the tiles have them: part of the offsets after part, each filled up to full tiles."""
    rows = -(-kernel_map.num_out // tiling.tile) * tiling.tile
    borders = [kernel_map.kernel_volume * part // tiling.splits for part in range(tiling.splits + 1)]
    parts = [_in_window_order(_offsets_between(kernel_map, *ends), tiling.window) for ends in pairwise(borders)]
    return KernelMap(
        torch.cat([part.in_rows for part in parts]),
        torch.cat([part.out_rows + i * rows for i, part in enumerate(parts)]),
        kernel_map.offsets,
        kernel_map.num_in,
        rows * tiling.splits,
    )


def _offsets_between(kernel_map: KernelMap, first: int, last: int) -> KernelMap:
    offsets = kernel_map.offsets[first : last + 1]
    pairs = slice(int(offsets[0]), int(offsets[-1]))
    return KernelMap(
        kernel_map.in_rows[pairs],
        kernel_map.out_rows[pairs],
        offsets - offsets[0],
        kernel_map.num_in,
        kernel_map.num_out,
    )


def _in_window_order(kernel_map: KernelMap, window: Window) -> KernelMap:
    """The map with the outputs of each window stably sorted by their masks, read as numbers."""
    if window is None:
        return kernel_map
    device, offsets = kernel_map.out_rows.device, kernel_map.offsets
    order = torch.arange(kernel_map.num_out, device=device)
    for low in range(0, kernel_map.kernel_volume, _MASK_BITS):
        mask = torch.zeros_like(order)
        for k in range(low, min(low + _MASK_BITS, kernel_map.kernel_volume)):
            mask[kernel_map.out_rows[offsets[k] : offsets[k + 1]].long()] |= 1 << (k - low)
        order = order[mask[order].argsort(stable=True)]
    if window != "all":
        order = order[(order // window).argsort(stable=True)]
    return permute_map(kernel_map, out_rows=order)
