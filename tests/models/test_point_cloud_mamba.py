"""Point Cloud Mamba on packed clouds of different sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pc3d.errors import InputError
from pc3d.models import PointCloudMamba
from pc3d.points import Points
from pc3d.serialization.traverse import TRAVERSES, snake_order

SIZES = {"embed_channels": 8, "channels": (8, 16), "layers": (1, 2), "orders": ("xyz", "zyx", "z"), "reducers": (2, 2)}


def _points(counts: list[int], seed: int = 0) -> Points:
    generator = torch.Generator().manual_seed(seed)
    coord = torch.rand(sum(counts), 3, generator=generator)
    feat = torch.randn(sum(counts), 4, generator=generator)
    return Points(coord, torch.tensor([0, *counts]).cumsum(0), {"feat": feat})


def _network(**changes: object) -> PointCloudMamba:
    torch.manual_seed(1)
    return PointCloudMamba(4, neighbours=5, prompts=2, **(SIZES | changes)).eval()


@pytest.mark.parametrize("traverse", TRAVERSES)
def test_snake_visits_neighbouring_cells(traverse: str) -> None:
    axes = (torch.arange(3), torch.arange(4), torch.arange(5))
    cells = torch.cartesian_prod(*axes)[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    rows = snake_order(cells, torch.tensor([0, 60]), traverse)
    assert bool((cells[rows].diff(dim=0).abs().sum(1) == 1).all())
    steps = cells[rows].diff(dim=0)[:, "xyz".index(traverse[0])]
    assert (steps != 0).sum() > 30  # the first axis runs fastest


@pytest.mark.parametrize("changes", [{}, {"decoder": (16, 8)}, {"decoder": (16, 8), "windows": (16, 8)}])
def test_a_cloud_does_not_depend_on_its_batch_mates(changes: dict[str, object]) -> None:
    network, counts = _network(**changes), [70, 41, 90]
    points = _points(counts)
    with torch.no_grad():
        together = network(points)
        alone = [network(points[i]) for i in range(len(counts))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_permuted_points_permute_the_features() -> None:
    network, points = _network(decoder=(16, 8), reducers=(1, 1)), _points([80])
    rows = torch.randperm(80, generator=torch.Generator().manual_seed(3))
    shuffled = Points(points.coord[rows], points.offsets, {"feat": points.get("feat")[rows]})
    with torch.no_grad():
        torch.testing.assert_close(network(shuffled), network(points)[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("windows", [None, (16, 8)])
@pytest.mark.parametrize("released", [False, True])
def test_gradients_reach_every_parameter(released: bool, windows: tuple[int, int] | None) -> None:
    network = _network(decoder=(16, 8), windows=windows, released=released, drop_path=0.5).train()
    points = _points([64, 64])
    out = network(points)
    assert out.shape == (128, network.out_channels)
    out.square().sum().backward()
    missing = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


def test_few_points() -> None:
    network = _network(decoder=(16, 8))
    with torch.no_grad():
        assert network(_points([1, 2, 3])).isfinite().all()
        assert {tuple(v.coord.shape) for v in network.forward_features(_points([8])).values()} == {(4, 3), (2, 3)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"orders": ("xyz",)}, "orders: 1 orders for 3 layers"),
        ({"orders": ("xyz", "xyz", "abc")}, "orders: 'abc' is not one of"),
        ({"reducers": (1,)}, "one value for each stage"),
        ({"pool": "median"}, "pool: 'median'"),
    ],
)
def test_bad_settings(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _network(**changes)(_points([8]))


@pytest.mark.parametrize(("pool", "parts"), [("max", ("max",)), ("mean", ("mean",)), ("max+mean", ("max", "mean"))])
def test_pooling_of_whole_clouds(pool: str, parts: tuple[str, ...]) -> None:
    network, points = _network(pool=pool), _points([40])
    with torch.no_grad():
        last: Tensor = network.forward_features(points)["stage1"].get("feat")
        expected = sum(last.amax(0) if part == "max" else last.mean(0) for part in parts)
        torch.testing.assert_close(network(points)[0], expected)
