"""ConDaFormer on packed clouds of different sizes: its slabs, its independence of batch mates, its settings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pc3d.data.transforms import GridSample
from pc3d.errors import InputError
from pc3d.models import ConDaFormer
from pc3d.models.backbones.condaformer import PLANES, SlabRule
from pc3d.points import Points

SIZE = 0.1
SMALL = {"window": 4, "base_channels": 12, "channels": (12, 24, 24, 12), "layers": (2, 2, 0, 2), "head_channels": 4}


def clouds(counts: list[int], seed: int = 0) -> Points:
    generator = torch.Generator().manual_seed(seed)
    coord = torch.rand(sum(counts), 3, generator=generator) * torch.tensor([2.0, 2.0, 0.6])
    points = Points(coord, torch.tensor([0, *counts]).cumsum(0))
    sampled = GridSample(SIZE, pick="first")(points)
    return sampled.with_attrs(feat=torch.randn(sampled.num_points, 5, generator=generator))


def network(**changes: object) -> ConDaFormer:
    torch.manual_seed(1)
    model = ConDaFormer(5, SIZE, **(SMALL | changes)).eval()
    for table in (p for name, p in model.named_parameters() if name.endswith("_table")):
        torch.nn.init.normal_(table)
    return model


def test_a_cloud_does_not_depend_on_its_batch_mates() -> None:
    model, points = network(), clouds([300, 0, 1, 120])
    with torch.no_grad():
        together = model(points)
        alone = [model(points[i]) for i in range(len(points))]
    assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert model(clouds([])).shape == (0, 12)


def test_the_published_origin_is_that_of_the_batch() -> None:
    points = clouds([300, 120])
    own, published = (network(window_origin=origin) for origin in ("cloud", "batch"))
    with torch.no_grad():
        assert_close(own(points[0]), published(points[0]))
        assert not torch.allclose(own(points), published(points), atol=1e-3)


def test_order_and_place_of_the_points_do_not_matter() -> None:
    model, points = network(), clouds([300])
    rows = torch.randperm(points.num_points, generator=torch.Generator().manual_seed(3))
    moved = points.replace(coord=points.coord + torch.tensor([40.0, -7.0, 3.0]))
    cells = points.with_attrs(grid_coord=points.get("grid_coord") + 17)
    with torch.no_grad():
        expected = model(points)
        assert_close(model(points.select(rows)), expected[rows], rtol=1e-4, atol=1e-5)
        assert_close(model(moved), expected, rtol=1e-3, atol=1e-3)
        assert_close(model(cells), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("wide", PLANES)
def test_slabs(wide: tuple[bool, bool, bool], shifted: bool) -> None:
    rule, generator = SlabRule(4, 0.25, "cloud"), torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, 90, 90, 150])
    position = torch.rand(150, 3, generator=generator) * 9
    binned = rule.cut(position, offsets, wide, shifted)
    number = torch.repeat_interleave(binned.windows.lengths())[binned.windows.slots]
    size = torch.tensor([4.0 if axis else 1.0 for axis in wide])
    low = torch.stack([position[:90].amin(0)] * 90 + [position[90:].amin(0)] * 60)
    cell = ((position - low + size / 2 * shifted) / size).floor()
    cell = torch.cat([(torch.arange(150) >= 90)[:, None], cell], 1)
    assert torch.equal(number[:, None] == number, (cell[:, None] == cell).all(2))
    assert binned.counts == tuple(16 if axis else 4 for axis in wide)
    assert bool((binned.bins >= 0).all())
    assert bool((binned.bins < torch.tensor(binned.counts)).all())


def test_whole_windows_further_is_the_same_place() -> None:
    """Integers keep the coordinates exact: the far edge of a window is the near edge of the next."""
    rule, position = SlabRule(4, 0.25, "cloud"), torch.arange(12.0)[:, None].expand(-1, 3)
    binned = rule.cut(position, torch.tensor([0, 12]), PLANES[0], False)
    assert binned.bins[:, 0].tolist() == [0, 4, 8, 12] * 3
    assert binned.bins[:, 2].tolist() == [0] * 12


def test_several_points_of_a_cell_share_their_mean() -> None:
    points = clouds([60])
    twice = Points.cat([points]).select(torch.arange(points.num_points).repeat_interleave(2))
    with torch.no_grad():
        model = network()
        assert_close(model(twice), model(points).repeat_interleave(2, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_reach_every_parameter(autocast: bool) -> None:
    model, points = network(drop_path=0.3).train(), clouds([200, 150])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out: Tensor = model(points)
    assert out.shape == (points.num_points, model.out_channels)
    out.float().square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_features_of_all_stages() -> None:
    model, points = network(), clouds([200, 150])
    stages = model.forward_features(points)
    assert [(info.name, info.channels, info.stride) for info in model.feature_info] == [
        (name, voxels.feat.shape[1], voxels.stride) for name, voxels in stages.items()
    ]
    assert list(stages) == ["stem", "enc0", "enc1", "dec1", "dec0"]


@pytest.mark.parametrize(("made", "millions"), [(ConDaFormer, 8.42), (ConDaFormer.base, 19.77)])
def test_published_sizes(made: type[ConDaFormer], millions: float) -> None:
    with torch.device("meta"):
        model = made()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == pytest.approx(millions, abs=0.011)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (1, 1)}, "must have the same, even length"),
        ({"head_channels": 6}, "a multiple of 3 heads"),
        ({"bin_size": 0.0}, "bin_size 0.0"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        network(**changes)


def test_another_grid_size_than_the_pipelines() -> None:
    points = clouds([200])
    with pytest.raises(InputError, match=r"grid_size 0\.05 must be the pipeline's"):
        ConDaFormer(5, 0.05, **SMALL)(points)
