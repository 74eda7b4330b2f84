"""ScatterFormer on batches of clouds: order, windows, reach, sizes, settings, training; its neck."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pc3d import Voxels
from pc3d.config import instantiate
from pc3d.errors import InputError
from pc3d.models import ScatterFormer
from pc3d.models.backbones.scatterformer import VoxelEncoder, WindowLayers
from pc3d.nn.bev import BevGrid
from pc3d.nn.cascade_ded import CascadeDED
from pc3d.points import Points
from pc3d.sparse import reorder

GRID = BevGrid([-4.0, -3.0, -1.0, 4.0, 3.0, 1.0], [0.5, 0.5, 0.25])
WAYMO = BevGrid([-76.8, -76.8, -2.0, 76.8, 76.8, 4.0], [0.32, 0.32, 0.1875])
NUSCENES = BevGrid([-54.0, -54.0, -5.0, 54.0, 54.0, 3.0], [0.3, 0.3, 0.2])


def clouds(counts: list[int], seed: int = 0) -> Points:
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([9.0, 7.0, 2.2])  # some beyond the range
    coord = (torch.rand(sum(counts), 3, generator=generator) - 0.5) * size
    strength = torch.rand(sum(counts), 1, generator=generator)
    return Points(coord, torch.tensor([0, *counts]).cumsum(0), {"feat": torch.cat([coord, strength], 1)})


def network(**changes: object) -> ScatterFormer:
    torch.manual_seed(1)
    small = {"channels": 16, "num_heads": 2, "layers": (1, 1), "window": 3, "encoder_channels": (8, 8), "neck_units": 0}
    return ScatterFormer(4, GRID, **(small | changes)).eval()


def voxels(count: int, channels: int, side: int = 24) -> Voxels:
    generator = torch.Generator().manual_seed(0)
    low, high = torch.tensor([0, -side // 2, -side // 2, 0]), torch.tensor([2, side // 2, side // 2, 6])
    coord = (torch.rand(count, 4, generator=generator) * (high - low)).floor() + low
    coord = coord.unique(dim=0).int()
    return Voxels(coord, torch.randn(len(coord), channels, generator=generator), 2)


@pytest.mark.parametrize(("grid", "window", "total"), [(WAYMO, 12, 4.242), (NUSCENES, 20, 4.245)])
def test_published_sizes(grid: BevGrid, window: int, total: float) -> None:
    model = ScatterFormer(5, grid, window=window)
    counts = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in model.encoder.named_children()}
    assert round(sum(counts.values()), 3) == total
    if grid is WAYMO:
        expected = {"cpe": 2.927, "stage1": 0.845, "stage2": 0.402, "app": 0.067}
        assert {name: round(count, 3) for name, count in counts.items()} == expected
    assert grid.bev_shape(model.stride) == ((240, 240) if grid is WAYMO else (180, 180))
    assert len(model.neck.layers) == 4


def test_points_reach_the_cell_they_lie_in() -> None:
    model, point = network(), torch.tensor([[2.6, -2.2, 0.1]])
    points = Points(point, torch.tensor([0, 0, 1]), {"feat": torch.ones(1, 4)})
    with torch.no_grad():
        bev = model(points)
    assert bev.shape == (2, 16, 6, 8)
    # Voxel (13, 1) lies in the windows of the strided convolution at 6 and 7 along x, at 0 and 1 along y.
    assert bev.abs().sum(1).nonzero().tolist() == [[1, 0, 6], [1, 0, 7], [1, 1, 6], [1, 1, 7]]


def test_order_of_points_and_batch_mates_do_not_matter() -> None:
    model, points = network(), clouds([300, 0, 1, 120])
    rows = torch.cat([torch.randperm(300, generator=torch.Generator().manual_seed(2)), torch.arange(300, 421)])
    with torch.no_grad():
        together = model(points)
        alone = torch.cat([model(points[i]) for i in range(len(points))])
        shuffled = model(points.select(rows))
        assert model(clouds([])).shape == (0, 16, 6, 8)
        assert not model(clouds([0, 0])).any()
    assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert_close(shuffled, together, rtol=1e-4, atol=1e-4)
    assert not together[1].any()


def test_rows_of_voxels_may_come_in_any_order() -> None:
    layers, given = WindowLayers(16, 2, 2, 4).eval(), voxels(600, 16)
    rows = torch.randperm(len(given), generator=torch.Generator().manual_seed(1))
    shuffled = Voxels(given.coord[rows], given.feat[rows], 2)
    with torch.no_grad():
        first, second = layers(given), layers(shuffled)
    assert torch.equal(first.coord, second.coord)
    assert_close(first.feat, second.feat)


def test_a_voxel_changes_its_window_and_what_convolutions_reach() -> None:
    layers, given = WindowLayers(16, 2, 1, 4).eval(), voxels(600, 16)
    grouped, _ = reorder(given, layers.order)
    changed = grouped.feat.clone()
    changed[100] += 1.0
    offsets, chosen = layers.order.offsets(grouped.coord), grouped.coord[100]
    with torch.no_grad():
        attend = layers.attn_layers[0]
        moved = (attend(changed, offsets) != attend(grouped.feat, offsets)).any(1)
        block_moved = (layers(grouped.with_feat(changed)).feat != layers(grouped).feat).any(1)
    window = grouped.coord.clone()
    window[:, 1:3] = window[:, 1:3].div(4, rounding_mode="floor")
    same_window = (window[:, :3] == window[100, :3]).all(1)
    assert bool(moved[100])
    assert torch.equal(moved | same_window, same_window)
    # A window of 4 along each axis, and half of a kernel of 5 beyond it.
    reach = (grouped.coord[:, 1:3] - chosen[1:3]).abs().amax(1) <= 3 + 2
    within = reach & (grouped.coord[:, 0] == chosen[0])
    assert torch.equal(block_moved | within, within)
    assert bool((block_moved & ~same_window).any())


def test_voxel_features_are_means_centres_and_maxima() -> None:
    points, encoder = clouds([200, 50]), VoxelEncoder(4, GRID, (6, 5)).eval()
    with torch.no_grad():
        found = encoder(points)
        expected = {}
        cells = ((points.coord - torch.tensor([-4.0, -3.0, -1.0])) / torch.tensor([0.5, 0.5, 0.25])).floor()
        inside = ((cells >= 0) & (cells < torch.tensor([16, 12, 8]))).all(1)
        keys = torch.cat([points.batch[:, None], cells], 1).long()
        for key in keys[inside].unique(dim=0):
            rows = (keys == key).all(1)
            xyz = points.coord[rows]
            center = torch.tensor([-4.0, -3.0, -1.0]) + (key[1:] + 0.5) * torch.tensor([0.5, 0.5, 0.25])
            feat = torch.cat([points.get("feat")[rows], xyz - xyz.mean(0), xyz - center], 1)
            first, last = encoder.pfn_layers
            feat = first.norm(first.linear(feat)).relu()
            feat = torch.cat([feat, feat.amax(0).expand_as(feat)], 1)
            expected[tuple(key.tolist())] = last.norm(last.linear(feat)).relu().amax(0)
    assert [tuple(row) for row in found.coord.tolist()] == sorted(expected)
    assert_close(found.feat, torch.stack([expected[key] for key in sorted(expected)]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("missing", "from_zero", "expected"), [(0, False, -1), (0, True, 0), (1, False, 0)])
def test_the_maximum_of_a_column_counts_empty_heights_as_zero(missing: int, from_zero: bool, expected: float) -> None:
    pooling = network(pool_from_zero=from_zero).encoder.app
    height = pooling.height - missing
    coord = torch.stack([torch.tensor([0, 2, 3, z]) for z in range(height)]).int()
    seen: list[Tensor] = []
    pooling.self_attn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pooling(Voxels(coord, torch.full((height, 16), -1.0), 1))
    assert bool((seen[0] == expected).all())


def test_training_moves_every_parameter() -> None:
    model, points = network(neck_units=1).train(), clouds([300, 200])
    loss = (model(points) * torch.linspace(-1, 1, 16)[:, None, None]).square().mean()
    loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    with pytest.raises(InputError, match="needs two"):
        model(clouds([1]))


def test_half_precision_follows_single() -> None:
    model, points = network(neck_units=1), clouds([300, 200])
    exact = model(points)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(points)
        half.float().square().mean().backward()
    error = (half.float() - exact).norm() / exact.norm()
    assert float(error) < 0.05
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_neck_keeps_the_size_of_odd_maps() -> None:
    neck = CascadeDED(8, units=2, blocks=(2, 1, 1)).eval()
    assert neck(torch.randn(2, 8, 7, 13)).shape == (2, 8, 7, 13)
    keys = set(neck.state_dict())
    assert {"layers.1.encoder.1.0.downsample_layer.1.weight", "layers.0.decoder.1.0.weight"} <= keys
    assert "layers.0.encoder.0.0.downsample_layer.0.weight" not in keys


def test_config_and_settings() -> None:
    model = network()
    again = instantiate(model.to_config()).eval()
    again.load_state_dict(model.state_dict())
    points = clouds([50])
    with torch.no_grad():
        assert_close(again(points), model(points))
    for changes, message in (
        ({"channels": 12}, "multiple of 8"),
        ({"layers": (1,)}, "two numbers"),
        ({"window": 0}, "window 0"),
        ({"encoder_channels": (7, 8)}, "all but the last even"),
        ({"encoder_channels": (0, 8)}, "all but the last even"),
        ({"num_heads": 0}, "num_heads 0"),
        ({"layers": (-1, 1)}, "two numbers"),
    ):
        with pytest.raises(InputError, match=message):
            network(**changes)
    with pytest.raises(InputError, match="voxels along z"):
        ScatterFormer(4, BevGrid([0, 0, 0, 4, 4, 1], [1.0, 1.0, 1.0]))
    with pytest.raises(InputError, match="'feat'"):
        model(points.with_attrs(feat=torch.ones(50, 3)))
    with pytest.raises(InputError, match="must not be negative"):
        network(neck_units=-1)
