"""Orders and order metrics of three real scans against recorded ones: orders bit for bit, metrics to four decimals."""

from __future__ import annotations

import pytest
import torch
from harness import Golden, golden_files, needs_gpu
from torch import Tensor

from pc3d.ops.backend import Backend, use_backend
from pc3d.ops.kernel_map import KernelMap, submanifold_map
from pc3d.ops.order import CurveOrder, Order, SoarOrder, permute_map
from pc3d.sparse.dataflow import Tiling, attributes, cache_misses, mask_efficiency, unique_inputs

ORDERS: dict[str, Order] = {
    "raster": CurveOrder("raster"),
    "morton": CurveOrder("morton"),
    "hilbert": CurveOrder("hilbert"),
    "soar32": SoarOrder(32),
    "soar64": SoarOrder(64),
    "soar128": SoarOrder(128),
    "soar256": SoarOrder(256),
    "soar1024/64": SoarOrder(64, outer=1024),
}
RECORDED = ("morton", "hilbert", "soar64")


def scan(golden: Golden, device: str = "cpu") -> tuple[Tensor, KernelMap]:
    cells = golden.tensor("in/coords").int()
    coord = torch.cat([cells.new_zeros(len(cells), 1), cells], 1).to(device)
    return coord, submanifold_map(coord, (3, 3, 3))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("golden", golden_files("dataflow"))
def test_orders(golden: Golden, backend: Backend) -> None:
    coord, kmap = scan(golden)
    for name in RECORDED:
        with use_backend(backend):
            rows = ORDERS[name].rows(coord, kmap)
        assert torch.equal(rows, golden.tensor(f"out/order_{name}").long()), name


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("golden", golden_files("dataflow"))
def test_orders_on_gpu(golden: Golden) -> None:
    coord, kmap = scan(golden, "cuda")
    for name in RECORDED:
        rows = ORDERS[name].rows(coord, kmap)
        assert rows.device.type == "cuda"
        assert torch.equal(rows.cpu(), golden.tensor(f"out/order_{name}").long()), name


@pytest.mark.parametrize("golden", golden_files("dataflow"))
def test_metrics(golden: Golden) -> None:
    coord, kmap = scan(golden)
    assert set(ORDERS) == set(golden.meta["expected"])
    for name, expected in golden.meta["expected"].items():
        rows = ORDERS[name].rows(coord, kmap)
        permuted = permute_map(kmap, rows, rows)
        sparsity = attributes(permuted)
        assert (sparsity.num_out, sparsity.num_pairs) == (golden.meta["n"], golden.meta["pairs"])
        assert sparsity.receptive_field == pytest.approx(golden.meta["arf"], abs=1e-12)
        for tile, value in expected["U_over_T"].items():
            assert round(unique_inputs(permuted, Tiling(int(tile))), 4) == value, (name, tile)
        for rows_held, value in expected["lru_miss_per_voxel"].items():
            assert round(cache_misses(permuted, int(rows_held)), 4) == value, (name, rows_held)
        assert round(mask_efficiency(permuted, Tiling(64)), 4) == expected["mask_eff_T64"], name
