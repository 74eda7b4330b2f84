"""Orders of voxels: kernels against the reference, what every order promises, and networks that run in one."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from pc3d import Voxels
from pc3d.errors import InputError
from pc3d.ops.backend import cpu_kernels, use_backend
from pc3d.ops.kernel_map import KernelMap, strided_map, submanifold_map
from pc3d.ops.order import (
    BlockSoarOrder,
    CurveOrder,
    Order,
    SoarOrder,
    WindowOrder,
    inverse_permutation,
    lru_misses,
    permute_map,
)
from pc3d.sparse import SparseConv3d, SparseInverseConv3d, SubMConv3d, apply_in_order, reorder
from pc3d.sparse.maps import submanifold

needs_kernels = pytest.mark.skipif(cpu_kernels() is None, reason="C++ kernels are not built")

ORDERS: list[Order] = [
    CurveOrder("raster"),
    CurveOrder("morton"),
    CurveOrder("hilbert"),
    SoarOrder(1),
    SoarOrder(16),
    SoarOrder(5, outer=12),
    BlockSoarOrder(16, block_bits=6),
    BlockSoarOrder(16, block_bits=0),
    WindowOrder(3),
]
all_orders = pytest.mark.parametrize("order", ORDERS, ids=str)


def voxels(count: int, span: int, seed: int = 0, batch: int = 2, low: int = -3) -> Tensor:
    """Up to ``count`` distinct voxels in random order."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randint(low, low + span, (count, 3), generator=generator)
    clouds = torch.randint(0, batch, (count, 1), generator=generator)
    coord = torch.cat([clouds, cells], 1).unique(dim=0).int()
    return coord[torch.randperm(len(coord), generator=generator)]


def surface(side: int, batch: int = 1) -> Tensor:
    """A tilted wave, one voxel thick; each cloud a little further along."""
    x, y = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    clouds = []
    for b in range(batch):
        z = (6 * torch.sin((x + 7 * b) / 5.0) + y / 3).round().long()
        clouds.append(torch.stack([torch.full_like(x, b), x, y, z], -1).reshape(-1, 4))
    return torch.cat(clouds).int()


@needs_kernels
@all_orders
@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 400), span=st.integers(1, 40), batch=st.integers(1, 4), seed=st.integers(0, 1000))
def test_kernels_equal_the_reference(order: Order, count: int, span: int, batch: int, seed: int) -> None:
    coord = voxels(count, span, seed, batch, low=-(seed % 50))
    fast = order.rows(coord)
    with use_backend("reference"):
        slow = order.rows(coord)
    assert torch.equal(fast, slow)


@all_orders
def test_an_order_visits_every_voxel_once_and_does_not_depend_on_the_order_given(order: Order) -> None:
    coord = voxels(700, 12, batch=3)
    rows = order.rows(coord)
    assert torch.equal(rows.sort().values, torch.arange(len(coord)))
    assert (coord[rows, 0].diff() >= 0).all()
    other = coord[torch.randperm(len(coord), generator=torch.Generator().manual_seed(5))]
    assert torch.equal(other[order.rows(other)], coord[rows])


@pytest.mark.parametrize("order", [order for order in ORDERS if isinstance(order, SoarOrder)], ids=str)
def test_soar_of_a_batch_is_soar_of_each_cloud(order: Order) -> None:
    coord = surface(21, batch=3)
    rows = order.rows(coord)
    for cloud in range(3):
        inside = (coord[:, 0] == cloud).nonzero().squeeze(1)
        assert torch.equal(rows[coord[rows, 0] == cloud], inside[order.rows(coord[inside])])


def test_raster_and_morton_orders_by_definition() -> None:
    coord = voxels(300, 9, batch=3, low=-4)
    low = coord[:, 1:].amin(0)

    def morton(row: int) -> int:
        cell = (coord[row, 1:] - low).tolist()
        return sum((v >> bit & 1) << (3 * bit + 2 - axis) for bit in range(8) for axis, v in enumerate(cell))

    everyone = range(len(coord))
    assert CurveOrder("raster").rows(coord).tolist() == sorted(everyone, key=lambda row: coord[row].tolist())
    wanted = sorted(everyone, key=lambda row: (int(coord[row, 0]), morton(row)))
    assert CurveOrder("morton").rows(coord).tolist() == wanted


@pytest.mark.parametrize("side", [1, 2, 8, 16])
def test_the_hilbert_curve_fills_a_cube_step_by_step(side: int) -> None:
    cells = torch.tensor(list(itertools.product(range(side), repeat=3)))
    coord = torch.cat([torch.zeros(len(cells), 1), cells], 1).int()
    visited = cells[CurveOrder("hilbert").rows(coord)]
    assert visited[0].tolist() == [0, 0, 0]
    assert (visited.diff(dim=0).abs().sum(1) == 1).all()


@pytest.mark.parametrize("bits", [12, 15, 21])
@pytest.mark.parametrize("curve", ["raster", "morton", "hilbert"])
def test_coordinates_too_wide_for_one_key(curve: str, bits: int) -> None:
    """Between cells a power of two apart, the curve leads the same way as between neighbours."""
    coord = voxels(800, 300, batch=3, low=0)
    coord = torch.cat([coord, torch.tensor([[batch, *[extreme] * 3] for batch in range(3) for extreme in (0, 299)])])
    coord = coord.unique(dim=0)
    far = coord * torch.tensor([1, *[1 << bits] * 3]) - torch.tensor([0, 1 << 30, 7, 0])
    order = CurveOrder(curve)
    assert torch.equal(order.rows(far.int()), order.rows(coord.int()))


@all_orders
def test_no_voxels_and_one_voxel(order: Order) -> None:
    for backend in ("auto", "reference"):
        with use_backend(backend):
            assert order.rows(torch.zeros(0, 4, dtype=torch.int32)).shape == (0,)
            assert order.rows(torch.tensor([[3, -7, 0, 9]], dtype=torch.int32)).tolist() == [0]


def test_soar_grows_from_the_loneliest_voxel_and_then_from_the_rim() -> None:
    # A line of five and a pair: the pair's voxels and the ends of the line have one neighbour each.
    line = [[0, x, 0, 0] for x in range(5)]
    pair = [[0, 9, 0, 0], [0, 9, 0, 1]]
    coord = torch.tensor([*pair, *line], dtype=torch.int32)
    visited = coord[SoarOrder(3).rows(coord)][:, 1:].tolist()
    assert visited == [[0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0], [4, 0, 0], [9, 0, 0], [9, 0, 1]]


def test_soar_shares_more_inputs_than_the_curves() -> None:
    coord = surface(60)
    kmap = submanifold_map(coord, (3, 3, 3))

    def misses(order: Order) -> int:
        rows = order.rows(coord, kmap)
        return lru_misses(permute_map(kmap, rows, rows), [96])[0]

    soar, blocks, hilbert = misses(SoarOrder(64)), misses(BlockSoarOrder(64)), misses(CurveOrder("hilbert"))
    assert soar < 0.95 * hilbert
    assert blocks <= 1.05 * soar


@needs_kernels
def test_any_thread_count_gives_the_same_bits() -> None:
    coord = voxels(30_000, 70, batch=3)
    orders = CurveOrder("hilbert"), SoarOrder(64, outer=1024), BlockSoarOrder()
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append([order.rows(coord) for order in orders])
    finally:
        torch.set_num_threads(before)
    for rows in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(rows, found[0], strict=True))


def test_settings_that_make_no_sense_are_refused() -> None:
    for make in (
        lambda: CurveOrder("peano"),
        lambda: SoarOrder(0),
        lambda: SoarOrder(64, outer=64),
        lambda: BlockSoarOrder(0),
        lambda: BlockSoarOrder(64, block_bits=-1),
    ):
        with pytest.raises(ValueError, match="must be"):
            make()
    coord = voxels(50, 6)
    with pytest.raises(ValueError, match="must be the 3x3x3 submanifold map of"):
        SoarOrder().rows(coord, submanifold_map(coord, (5, 5, 5)))
    with pytest.raises(ValueError, match="must be the 3x3x3 submanifold map of"):
        SoarOrder().rows(coord, submanifold_map(coord[:20], (3, 3, 3)))
    with pytest.raises(ValueError, match=r"must be \(M, 4\)"):
        CurveOrder("raster").rows(coord[:, 1:])
    with pytest.raises(InputError, match="repeat another one"):
        SoarOrder().rows(torch.cat([coord, coord[:2]]))
    with pytest.raises(ValueError, match="at least one row"):
        lru_misses(submanifold_map(coord, (3, 3, 3)), [0])


@needs_kernels
def test_kernels_refuse_rows_they_cannot_follow() -> None:
    kernels = cpu_kernels()
    assert kernels is not None
    coord = surface(5)
    kmap = submanifold_map(coord, (3, 3, 3))
    pairs, all_rows, borders = (kmap.in_rows, kmap.out_rows, kmap.offsets), torch.arange(25), torch.tensor([0, 25])
    with pytest.raises(ValueError, match="permutation"):
        kernels.soar_order(*pairs, torch.zeros(25, dtype=torch.int64), borders, borders, [4], True)
    with pytest.raises(ValueError, match="borders"):
        kernels.soar_order(*pairs, all_rows, borders, torch.tensor([0, 24]), [4], True)
    with pytest.raises(ValueError, match="rows out of range"):
        kernels.soar_order(kmap.in_rows + 1, *pairs[1:], all_rows, borders, borders, [4], True)
    with pytest.raises(ValueError, match="must ascend"):
        kernels.lru_misses(kmap.in_rows, kmap.out_rows.flip(0), kmap.offsets, 25, 25, [4])


def same_map(a: KernelMap, b: KernelMap) -> None:
    assert (a.num_in, a.num_out) == (b.num_in, b.num_out)
    for name in ("in_rows", "out_rows", "offsets"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_renumbered_maps_equal_maps_built_anew(backend) -> None:
    coord = voxels(400, 9)
    rows = torch.randperm(len(coord), generator=torch.Generator().manual_seed(2))
    with use_backend(backend):
        same_map(permute_map(submanifold_map(coord, (3, 3, 3)), rows, rows), submanifold_map(coord[rows], (3, 3, 3)))
        down, window = strided_map(coord, (2, 2, 2), (2, 2, 2))
        same_map(permute_map(window, rows), strided_map(coord[rows], (2, 2, 2), (2, 2, 2))[1])
        turned = permute_map(window, out_rows=torch.arange(len(down)).flip(0))
    for k in range(turned.kernel_volume):
        pairs = slice(int(turned.offsets[k]), int(turned.offsets[k + 1]))
        assert (turned.out_rows[pairs].diff() > 0).all()
        wanted = set(
            zip(window.in_rows[pairs].tolist(), (len(down) - 1 - window.out_rows[pairs]).tolist(), strict=True)
        )
        assert set(zip(turned.in_rows[pairs].tolist(), turned.out_rows[pairs].tolist(), strict=True)) == wanted


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_lru_misses_of_a_map_by_hand(backend) -> None:
    # Outputs read the rows 0 | 1, 0 | 2, 1 | 0.
    kmap = KernelMap(
        torch.tensor([1, 2, 0, 0, 1], dtype=torch.int32),
        torch.tensor([1, 2, 3, 1, 2], dtype=torch.int32),
        torch.tensor([0, 3, 5]),
        num_in=3,
        num_out=4,
    )
    with use_backend(backend):
        # reads 1, 0 | 2, 1 | 0
        assert lru_misses(kmap, [1, 2, 3]) == [5, 5, 3]


class UNet(nn.Module):
    """Two levels down and back up."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SubMConv3d(4, 8, 3)
        self.down = nn.ModuleList([SparseConv3d(8, 8, 2, stride=2), SparseConv3d(8, 8, 3, stride=2, padding=1)])
        self.mid = nn.ModuleList([SubMConv3d(8, 8, 3), SubMConv3d(8, 8, 3)])
        self.up = nn.ModuleList([SparseInverseConv3d(8, 8, 3), SparseInverseConv3d(8, 8, 2)])
        self.grids: list[Voxels] = []

    def forward(self, voxels: Voxels) -> Voxels:
        x = self.stem(voxels)
        self.grids = [x]
        for down, mid in zip(self.down, self.mid, strict=True):
            x = mid(down(x))
            self.grids.append(x)
        for up in self.up:
            x = up(x)
        return x


def grid(seed: int = 0) -> Voxels:
    coord = torch.cat([surface(24, batch=2), voxels(60, 20, seed, low=40)])
    coord = coord[torch.randperm(len(coord), generator=torch.Generator().manual_seed(seed))]
    feat = torch.randn(len(coord), 4, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    return Voxels(coord, feat, batch_size=2, point_to_voxel=torch.arange(len(coord)).repeat(2))


@all_orders
def test_a_network_in_any_order_gives_the_plain_result_in_the_callers_order(order: Order) -> None:
    torch.manual_seed(0)
    network, voxels = UNet(), grid()
    results = []
    for run in (network, lambda v: apply_in_order(network, v, order)):
        out = run(voxels)
        assert out.coord is voxels.coord
        weights = torch.linspace(-1, 1, out.feat.numel()).view_as(out.feat)
        grads = torch.autograd.grad((out.feat * weights).sum(), [voxels.feat, *network.parameters()])
        results.append((out.feat, grads))
    (plain, plain_grads), (permuted, permuted_grads) = results
    scale = float(plain.detach().abs().max())
    assert_close(permuted, plain, rtol=1e-5, atol=1e-5 * scale)
    for a, b in zip(permuted_grads, plain_grads, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@all_orders
def test_every_level_is_put_in_the_order_again(order: Order) -> None:
    network = UNet()
    apply_in_order(network, grid(), order)
    assert len(network.grids) == 3
    for level in network.grids:
        assert torch.equal(order.rows(level.coord), torch.arange(len(level)))
        same_map(submanifold(level, (3, 3, 3), (1, 1, 1)), submanifold_map(level.coord, (3, 3, 3)))


def test_reordering_is_done_once_and_leaves_the_caller_alone() -> None:
    voxels = grid()
    coord, feat = voxels.coord.clone(), voxels.feat.detach().clone()
    first, permutation = reorder(voxels, SoarOrder(16))
    second, again = reorder(voxels.with_feat(voxels.feat * 2), SoarOrder(16))
    other, _ = reorder(voxels, SoarOrder(8))
    assert first.coord is second.coord
    assert first.context is second.context
    assert permutation is again
    assert other.coord is not first.coord
    assert torch.equal(voxels.coord, coord)
    assert torch.equal(voxels.feat, feat)
    assert torch.equal(first.coord, permutation.apply(voxels.coord))
    assert torch.equal(permutation.undo(first.feat), voxels.feat)
    assert torch.equal(first.to_points(), voxels.to_points())
    assert torch.equal(inverse_permutation(permutation.rows), permutation.positions)
    coarse = SparseConv3d(4, 4, 2, stride=2)(voxels)
    assert torch.equal(CurveOrder("raster").rows(coarse.coord), torch.arange(len(coarse)))


def test_a_network_that_stays_coarse_is_refused() -> None:
    with pytest.raises(ValueError, match="must return to its input grid, this one ends at stride 2"):
        apply_in_order(SparseConv3d(4, 4, 2, stride=2), grid(), SoarOrder(16))
