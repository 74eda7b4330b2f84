"""COIR records and their tile-local form against the kernel maps they came from."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from pc3d.ops.coir import Field, bytes_per_voxel, compress, decode, encode
from pc3d.ops.conv import sparse_conv
from pc3d.ops.kernel_map import KernelMap, strided_map, submanifold_map, transposed_map
from pc3d.ops.order import CurveOrder, SoarOrder


def random_voxels(density: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coord = torch.nonzero(torch.rand(2, 9, 8, 7, generator=generator) < density).int()
    return coord[torch.randperm(len(coord), generator=generator)] - torch.tensor([0, 4, 3, 2], dtype=torch.int32)


def maps(coord: torch.Tensor) -> dict[str, KernelMap]:
    down = strided_map(coord, (2, 2, 2), (2, 2, 2))[1]
    return {
        "3^3": submanifold_map(coord, (3, 3, 3)),
        "5^3": submanifold_map(coord, (5, 5, 5)),
        "dilated": submanifold_map(coord, (3, 3, 3), (2, 2, 2)),
        "2^3 down": down,
        "2^3 up": down.inverse(),
        "3^3 down": strided_map(coord, (3, 3, 3), (2, 2, 2), (1, 1, 1))[1],
        "transposed": transposed_map(coord, (3, 3, 3), (2, 2, 2))[1],
    }


def assert_same(found: KernelMap, expected: KernelMap) -> None:
    assert (found.num_in, found.num_out) == (expected.num_in, expected.num_out)
    for name in ("in_rows", "out_rows", "offsets"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("field", list(Field))
@pytest.mark.parametrize("density", [0.0, 0.01, 0.4, 1.0])
@pytest.mark.parametrize("tile", [1, 16, 1000])
def test_every_kind_of_map_comes_back(field: Field, density: float, tile: int) -> None:
    for kmap in maps(random_voxels(density)).values():
        coir = encode(kmap, field)
        assert_same(decode(coir), kmap)
        assert_same(decode(compress(coir, tile).expand()), kmap)


def test_records_by_hand() -> None:
    kmap = submanifold_map(torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 5, 5, 5]], dtype=torch.int32), (3, 3, 3))
    corf, cirf = encode(kmap, Field.CORF), encode(kmap, Field.CIRF)
    assert corf.masks[:, 0].tolist() == [1 << 13 | 1 << 14, 1 << 12 | 1 << 13, 1 << 13]
    assert corf.partners.tolist() == [0, 1, 0, 1, 2]
    assert cirf.masks[:, 0].tolist() == [1 << 12 | 1 << 13, 1 << 13 | 1 << 14, 1 << 13]
    tiles = compress(corf, 2)
    assert (tiles.listed.tolist(), tiles.starts.tolist()) == ([0, 1, 2], [0, 2, 3])
    assert tiles.positions.tolist() == [0, 1, 0, 1, 0]


def test_positions_are_as_wide_as_the_longest_list_needs() -> None:
    corf = encode(submanifold_map(random_voxels(1.0), (3, 3, 3)), Field.CORF)
    assert compress(corf, 8).positions.dtype == torch.uint8
    assert compress(corf, 1000).positions.dtype == torch.uint16
    with pytest.raises(ValueError, match="tile must be 1 record or more, got 0"):
        compress(corf, 0)


@pytest.mark.parametrize(
    ("golden", "hilbert", "soar"),
    [("scannet-0.05", 17.2, 16.3), ("fragment-0.02", 22.4, 21.5), ("lidar-0.1", 16.5, 15.6)],
)
def test_sizes_on_real_clouds(golden: str, hilbert: float, soar: float, golden_dir: Path) -> None:
    """Bytes per voxel measured by another implementation; the starts of the tiles (0.06 bytes) were not counted."""
    data = np.load(golden_dir / f"dataflow-{golden}.npz")
    key = next(k for k in data.files if data[k].ndim == 2 and data[k].shape[1] in (3, 4))
    coord = torch.from_numpy(data[key].astype(np.int32))
    if coord.shape[1] == 3:
        coord = torch.cat([coord.new_zeros(len(coord), 1), coord], 1)
    natural = submanifold_map(coord, (3, 3, 3))
    for rows, expected in (
        (CurveOrder("hilbert").rows(coord), hilbert),
        (SoarOrder(chunk=64).rows(coord, natural), soar),
    ):
        sizes = bytes_per_voxel(submanifold_map(coord[rows], (3, 3, 3)))
        assert sizes["tile_local"] - 4 / 64 == pytest.approx(expected, abs=0.06)
        assert sizes["dense"] == 108
        assert sizes["tile_local"] < sizes["corf"] < sizes["pairs"] < sizes["dense"]


def test_maps_with_their_plans_stay_small() -> None:
    """At most 16 bytes per pair and 8 per voxel, what both gradients need included."""
    coord = torch.nonzero(torch.rand(1, 24, 24, 24, generator=torch.Generator().manual_seed(0)) < 0.3).int()
    kmap = submanifold_map(coord, (3, 3, 3))
    feat, weight = torch.randn(len(coord), 4, requires_grad=True), torch.randn(27, 4, 8, requires_grad=True)
    sparse_conv(feat, weight, kmap).sum().backward()
    kept = [kmap.in_rows, kmap.out_rows, kmap.offsets, *itertools.chain.from_iterable(kmap.plans.values())]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    assert len(kmap.plans) == 2
    assert sum(storages.values()) <= 16 * kmap.num_pairs + 8 * len(coord)
