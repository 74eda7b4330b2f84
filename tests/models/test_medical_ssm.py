"""The hierarchical point SSM on packed clouds of different sizes."""

from __future__ import annotations

import pytest
import torch

from pc3d.errors import InputError
from pc3d.models import PointSSM
from pc3d.models.backbones.point_ssm import hilbert_key, scan_rows
from pc3d.models.heads import FoldingDecoder
from pc3d.ops.point_sets import chamfer_distance, density_aware_chamfer_distance
from pc3d.points import Points

SIZES = {
    "channels": (16, 16),
    "points": (16, 8),
    "project_channels": 8,
    "neighbours": 6,
    "radius": (0.4, 0.8),
    "state": 4,
    "groups": 4,
    "dense": (16,),
}


def _points(counts: list[int], category: bool = False) -> Points:
    generator = torch.Generator().manual_seed(0)
    coord = torch.rand(sum(counts), 3, generator=generator) * 2 - 1
    attrs = {"feat": coord}
    if category:
        attrs["category"] = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)) % 3
    return Points(coord, torch.tensor([0, *counts]).cumsum(0), attrs)


def _network(**changes: object) -> PointSSM:
    torch.manual_seed(1)
    return PointSSM(**(SIZES | changes)).eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"decoder": (16, 8)},
        {"decoder": (16, 8), "query": "ball", "ffn": (2.0,), "group_ffn": (2.0, 2.0)},
        {"query": "xyz", "head": 8, "scales": 3, "channels": (16, 32)},
        {"embed_position": False},
        {"query": "embedding", "attention": False, "concat": False, "flip": False, "categories": 3},
    ],
)
def test_a_cloud_does_not_depend_on_its_batch_mates_and_learns(changes: dict[str, object]) -> None:
    network, counts = _network(**changes), [40, 23, 64]
    points = _points(counts, category="categories" in changes)
    together = network(points)
    alone = torch.cat([network(points[i]) for i in range(len(counts))])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    together.square().sum().backward()
    missing = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


def test_few_points() -> None:
    network = _network(decoder=(16, 8))
    assert network(_points([1, 2, 5])).isfinite().all()


def test_bad_settings() -> None:
    with pytest.raises(InputError, match="one value for each level"):
        _network(points=(8,))
    with pytest.raises(InputError, match="query: 'nearest'"):
        _network(query="nearest")
    with pytest.raises(InputError, match="scans: 'w'"):
        _network(scans=("w",))(_points([8]))


def test_a_folded_plane_learns_a_cloud() -> None:
    torch.manual_seed(0)
    decoder = FoldingDecoder(4, points=64, hidden=(32, 32), groups=4)
    target = torch.randn(60, 3) * torch.tensor([1.0, 1.0, 0.1])
    borders, wanted = torch.tensor([0, 64]), torch.tensor([0, 60])
    optimizer = torch.optim.Adam(decoder.parameters(), 0.01)
    losses = []
    for _ in range(60):
        loss = chamfer_distance(decoder(torch.ones(1, 4))[0], borders, target, wanted).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_distances_between_sets() -> None:
    a, b, borders = torch.rand(9, 3), torch.rand(7, 3), torch.tensor([0, 9])
    other = torch.tensor([0, 7])
    squared = torch.cdist(a, b).square()
    expected = (squared.amin(1).mean() + squared.amin(0).mean()) / 2
    torch.testing.assert_close(chamfer_distance(a, borders, b, other)[0], expected)
    unsquared = (squared.amin(1).sqrt().mean() + squared.amin(0).sqrt().mean()) / 2
    torch.testing.assert_close(chamfer_distance(a, borders, b, other, squared=False)[0], unsquared)
    assert density_aware_chamfer_distance(a, borders, a.clone(), borders)[0] < 1e-5
    assert 0 < density_aware_chamfer_distance(a, borders, b, other)[0] < 1.5
    with pytest.raises(ValueError, match="at least one point"):
        chamfer_distance(a, borders, b[:0], torch.tensor([0, 0]))


def test_the_hilbert_scan_steps_from_cell_to_neighbouring_cell() -> None:
    axis = (torch.arange(16) + 0.5) / 8 - 1
    cells = torch.cartesian_prod(axis, axis, axis)
    key = hilbert_key(cells, bins=16)
    assert torch.equal(key.sort().values, torch.arange(16**3))
    assert torch.equal((cells[key.argsort()].diff(dim=0).abs().sum(1) * 8).round(), torch.ones(16**3 - 1))
    assert int(hilbert_key(torch.tensor([[-5.0, -1.0, -1.5]]))) == 0


def test_other_scans_keep_clouds_apart() -> None:
    coord, offsets = torch.rand(30, 3) * 2 - 1, torch.tensor([0, 10, 10, 30])
    hilbert, given, _, back = scan_rows(coord, offsets, ["hilbert", "given"], flip=True)
    for start, end in ((0, 10), (10, 30)):
        assert torch.equal(hilbert[start:end].sort().values, torch.arange(start, end))
        assert torch.equal(hilbert_key(coord[hilbert[start:end]]).sort().values, hilbert_key(coord[hilbert[start:end]]))
        assert torch.equal(back[start:end], torch.arange(start, end).flip(0))
    assert torch.equal(given, torch.arange(30))
