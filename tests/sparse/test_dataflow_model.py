"""Sparsity attributes against brute force, and the modelled bytes against the formulas by hand."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from torch import Tensor

from pc3d.ops.backend import use_backend
from pc3d.ops.kernel_map import KernelMap, strided_map, submanifold_map
from pc3d.ops.order import CurveOrder, permute_map
from pc3d.sparse.dataflow import (
    TILINGS,
    Attributes,
    Device,
    Flow,
    Layer,
    Tiling,
    attributes,
    cache_misses,
    mask_efficiency,
    plan,
    rank,
    traffic,
    unique_inputs,
    worth_reordering,
)

DEVICE = Device(
    cache_bytes=32 * 64 * 4,
    l2_bandwidth=50e9,
    dram_bandwidth=10e9,
    multiply_adds={flow: 40e9 for flow in Flow},
    launch=1e-5,
    sort=1e-8,
)


def voxels(count: int, span: int, seed: int = 0) -> Tensor:
    cells = torch.randint(0, span, (count, 3), generator=torch.Generator().manual_seed(seed)).unique(dim=0)
    return torch.cat([torch.zeros(len(cells), 1), cells], 1).int()


def inputs_of(kmap: KernelMap) -> list[list[tuple[int, int]]]:
    """``(kernel offset, input row)`` of every output, offsets ascending."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(kmap.num_out)]
    for k in range(kmap.kernel_volume):
        pairs = slice(int(kmap.offsets[k]), int(kmap.offsets[k + 1]))
        for out, row in zip(kmap.out_rows[pairs].tolist(), kmap.in_rows[pairs].tolist(), strict=True):
            found[out].append((k, row))
    return found


def expected_counts(kmap: KernelMap, tiling: Tiling) -> tuple[float, float]:
    """u and e by their definition."""
    fields, unique, lanes = inputs_of(kmap), 0, 0
    for part in range(tiling.splits):
        first, last = (kmap.kernel_volume * p // tiling.splits for p in (part, part + 1))
        mine = [[(k, row) for k, row in field if first <= k < last] for field in fields]
        order = list(range(kmap.num_out))
        if tiling.window is not None:
            window = kmap.num_out if tiling.window == "all" else tiling.window
            order.sort(key=lambda out: (out // window, sum(1 << k for k, _ in mine[out])))
        for begin in range(0, len(order), tiling.tile):
            tile = [pair for out in order[begin : begin + tiling.tile] for pair in mine[out]]
            unique += len({row for _, row in tile})
            lanes += tiling.tile * len({k for k, _ in tile})
    return unique / kmap.num_out, kmap.num_pairs / lanes


MAPS = {
    "submanifold 3": submanifold_map(voxels(300, 9), (3, 3, 3)),
    "submanifold 5": submanifold_map(voxels(150, 8), (5, 5, 5)),
    "strided": strided_map(voxels(300, 14), (2, 2, 2), (2, 2, 2))[1],
    "inverse": strided_map(voxels(300, 14), (3, 3, 3), (2, 2, 2), (1, 1, 1))[1].inverse(),
}
TILES = [Tiling(1), Tiling(16), Tiling(64), Tiling(16, 50), Tiling(16, 64, 3), Tiling(7, "all", 2), Tiling(1000, "all")]


@pytest.mark.parametrize("tiling", TILES, ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_tile_counts_by_definition(name: str, tiling: Tiling) -> None:
    unique, useful = expected_counts(MAPS[name], tiling)
    assert unique_inputs(MAPS[name], tiling) == pytest.approx(unique, abs=1e-12)
    assert mask_efficiency(MAPS[name], tiling) == pytest.approx(useful, abs=1e-12)


@pytest.mark.parametrize("name", MAPS)
def test_attributes_by_definition(name: str) -> None:
    kmap = MAPS[name]
    sizes = sorted(len(field) for field in inputs_of(kmap))
    found = attributes(kmap)
    assert (found.num_in, found.num_out, found.num_pairs) == (kmap.num_in, kmap.num_out, sum(sizes))
    assert found.receptive_field == pytest.approx(sum(sizes) / len(sizes))
    assert found.isolated == pytest.approx(sum(size <= 1 for size in sizes) / len(sizes))
    assert found.pairs_per_offset == tuple(kmap.offsets.diff().tolist())
    for share, field in zip((0.05, 0.25, 0.5, 0.75, 0.95), found.field_quantiles, strict=True):
        below, up_to = sum(size < field for size in sizes), sum(size <= field for size in sizes)
        assert below < share * len(sizes) <= up_to


def test_what_depends_on_the_order_and_what_does_not() -> None:
    kmap = submanifold_map(voxels(900, 14), (3, 3, 3))
    shuffle = torch.randperm(kmap.num_out, generator=torch.Generator().manual_seed(0))
    shuffled = permute_map(kmap, shuffle, shuffle)
    assert attributes(shuffled) == attributes(kmap)
    assert unique_inputs(shuffled, Tiling(32)) > 1.2 * unique_inputs(kmap, Tiling(32))
    assert cache_misses(shuffled, 64) > 1.2 * cache_misses(kmap, 64)


def test_misses_in_the_order_of_sorted_tiles() -> None:
    kmap = submanifold_map(voxels(400, 10), (3, 3, 3))
    mask: dict[int, int] = defaultdict(int)
    for out, field in enumerate(inputs_of(kmap)):
        mask[out] = sum(1 << k for k, _ in field)
    order = torch.tensor(sorted(range(kmap.num_out), key=lambda out: (out // 100, mask[out])))
    wanted = cache_misses(permute_map(kmap, out_rows=order), 40)
    assert cache_misses(kmap, 40, Tiling(16, window=100)) == wanted > cache_misses(kmap, 40)
    with use_backend("reference"):
        fresh = KernelMap(kmap.in_rows, kmap.out_rows, kmap.offsets, kmap.num_in, kmap.num_out)
        assert cache_misses(fresh, 40, Tiling(16, window=100)) == wanted
    # A cache that holds everything reads each row once, however often the parts pass over it.
    assert cache_misses(kmap, kmap.num_in, Tiling(16, "all", splits=3)) == 1


def test_sampled_counts_are_close_and_exact_on_few_tiles() -> None:
    few = submanifold_map(voxels(300, 9), (3, 3, 3))
    assert unique_inputs(few, Tiling(16), sampled=True) == unique_inputs(few, Tiling(16))
    many = submanifold_map(voxels(9000, 40), (3, 3, 3))
    for tiling in (Tiling(16), Tiling(16, 256, 2)):
        assert unique_inputs(many, tiling, sampled=True) == pytest.approx(unique_inputs(many, tiling), rel=0.1)
        assert mask_efficiency(many, tiling, sampled=True) == pytest.approx(mask_efficiency(many, tiling), rel=0.1)
        assert unique_inputs(many, tiling, sampled=True) != unique_inputs(many, tiling)


def test_a_map_without_outputs() -> None:
    kmap = submanifold_map(torch.zeros(0, 4, dtype=torch.int32), (3, 3, 3))
    assert attributes(kmap) == Attributes(0, 0, 27, 0, 0.0, (0,) * 5, 0.0, (0,) * 27)
    for tiling in TILES:
        assert (unique_inputs(kmap, tiling), mask_efficiency(kmap, tiling), cache_misses(kmap, 8, tiling)) == (0, 0, 0)
    assert rank(kmap, Layer(8, 8), DEVICE)[0].traffic.multiply_adds == 0


def test_traffic_by_the_formulas() -> None:
    kmap = submanifold_map(voxels(2000, 16), (3, 3, 3))
    n, p, layer, tiling = kmap.num_out, kmap.num_pairs, Layer(32, 48, element_bytes=2), Tiling(64)
    read, write, weights = 64, 96, 27 * 32 * 48 * 2
    fetched = cache_misses(kmap, DEVICE.cache_bytes // read) * n * read
    unique, useful = unique_inputs(kmap, tiling), mask_efficiency(kmap, tiling)
    products = p * 32 * 48
    wanted = {
        Flow.OUTPUT_UNIQUE: (products / useful, unique * n * read, fetched + n * write + weights + 27 * 4 * n),
        Flow.OUTPUT_GATHER: (products / useful, p * read, fetched + n * write + weights + 27 * 4 * n),
        Flow.WEIGHT: (products, *(2 * [fetched + 2 * p * read + 4 * p * write + 8 * p + weights])),
        Flow.FETCH_ON_DEMAND: (products, p * read + 2 * p * write, fetched + 2 * p * write + 8 * p + weights),
    }
    for flow, (multiply_adds, l2, dram) in wanted.items():
        found = traffic(kmap, layer, flow, DEVICE, tiling)
        assert (found.multiply_adds, found.l2_bytes, found.dram_bytes) == pytest.approx((multiply_adds, l2, dram)), flow
    no_skip = Device(**{**vars(DEVICE), "masked_lanes_skip": False})
    assert traffic(kmap, layer, Flow.OUTPUT_GATHER, no_skip, tiling).l2_bytes == pytest.approx(p * read / useful)


def test_plans_are_bound_by_the_slowest_and_ranked() -> None:
    coord = voxels(2000, 16)
    kmap, layer = submanifold_map(coord, (3, 3, 3)), Layer(32, 32)
    pairs = kmap.num_pairs * 32 * 32
    slow_products = Device(**{**vars(DEVICE), "multiply_adds": {flow: 1e6 for flow in Flow}})
    assert plan(kmap, layer, Flow.FETCH_ON_DEMAND, slow_products).seconds == pytest.approx(pairs / 1e6 + 1e-5)
    assert plan(kmap, layer, Flow.WEIGHT, slow_products).seconds == pytest.approx(pairs / 1e6 + 27e-5)
    slow_memory = Device(**{**vars(DEVICE), "dram_bandwidth": 1e3})
    sorting = plan(kmap, layer, Flow.OUTPUT_UNIQUE, slow_memory, Tiling(64, 256, 3))
    assert sorting.seconds == pytest.approx(sorting.traffic.dram_bytes / 1e3 + 1e-5 + 3e-8 * kmap.num_out)

    ranked = rank(kmap, layer, DEVICE)
    assert len(ranked) == 2 * len(TILINGS) + 2
    assert [p.seconds for p in ranked] == sorted(p.seconds for p in ranked)
    backward = rank(kmap, layer, DEVICE, flows=(Flow.WEIGHT, Flow.FETCH_ON_DEMAND))
    assert {p.flow for p in backward} == {Flow.WEIGHT, Flow.FETCH_ON_DEMAND}
    pointwise = rank(submanifold_map(coord, (1, 1, 1)), layer, DEVICE)
    assert [p.flow for p in pointwise] == [Flow.GEMM]


def test_misuse_is_refused() -> None:
    kmap = MAPS["submanifold 3"]
    with pytest.raises(ValueError, match="works in tiles"):
        traffic(kmap, Layer(8, 8), Flow.OUTPUT_UNIQUE, DEVICE)
    with pytest.raises(ValueError, match="one kernel offset, not 27"):
        traffic(kmap, Layer(8, 8), Flow.GEMM, DEVICE)
    for make in (lambda: Tiling(0), lambda: Tiling(64, 0), lambda: Tiling(64, "all", 0)):
        with pytest.raises(ValueError, match="must be positive"):
            make()
    with pytest.raises(ValueError, match="give a window too"):
        Tiling(64, splits=2)


def test_thin_clouds_are_not_worth_reordering() -> None:
    dense, thin = submanifold_map(voxels(2000, 16), (3, 3, 3)), submanifold_map(voxels(300, 60), (3, 3, 3))
    assert worth_reordering(attributes(dense))
    assert not worth_reordering(attributes(thin))
    assert CurveOrder("raster").follows_neighbours is False
