"""PointSP around a backbone: packed clouds of different sizes, modes, misuse."""

from __future__ import annotations

import itertools

import pytest
import torch

from pc3d.errors import InputError
from pc3d.models import PointCloudMamba, PointSP
from pc3d.points import Points


def inner(channels: int = 3, **changes: object) -> PointCloudMamba:
    sizes = {"embed_channels": 8, "channels": (8, 16), "layers": (1, 2), "orders": ("xyz", "zyx", "z")}
    options = sizes | {"reducers": (2, 2), "neighbours": 5, "prompts": 2, "decoder": (16, 8)} | changes
    return PointCloudMamba(channels, **options)


def clouds(counts: list[int], extra: int = 0) -> Points:
    generator = torch.Generator().manual_seed(0)
    coord = torch.randn(sum(counts), 3, generator=generator)
    feat = torch.cat([coord, torch.randn(sum(counts), extra, generator=generator)], 1)
    return Points(coord, torch.tensor([0, *counts]).cumsum(0), {"feat": feat})


def protocol(**changes: object) -> PointSP:
    torch.manual_seed(0)
    options = {"key_points": 24, "least_points": 48} | changes
    return PointSP(3, inner(), **options).eval()


def test_one_row_per_cloud_of_its_key_points() -> None:
    model, points = protocol(), clouds([60, 7, 1, 90])
    with torch.no_grad():
        torch.manual_seed(1)
        out = model(points)
        torch.manual_seed(1)
        seen = model._resampled(points)
        rows, borders = model.sampler(seen.coord, seen.offsets)
        features = model.backbone(seen)
    assert out.shape == (4, model.out_channels)
    for cloud, (begin, end) in enumerate(itertools.pairwise(borders.tolist())):
        assert torch.equal(out[cloud], features[rows[begin:end]].amax(0))


def test_resampled_features_follow_the_coordinates() -> None:
    model = PointSP(5, inner(5), least_points=64).train()
    points = clouds([40, 30], extra=2)
    seen = model._resampled(points)
    assert torch.equal(seen.get("feat")[:, :3], seen.coord)
    known = {tuple(row) for row in points.get("feat")[:, 3:].tolist()}
    assert {tuple(row) for row in seen.get("feat")[:, 3:].tolist()} <= known
    assert seen.counts.tolist() != [40, 30]


def test_training_reaches_the_backbone() -> None:
    model = protocol().train()
    model(clouds([80, 64])).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_baseline_is_the_backbone_alone() -> None:
    rule = {"training_rule": "farthest", "inference_rule": "farthest", "resample": False, "least_points": 0}
    model, points = protocol(**rule, key_points=90), clouds([60, 90])
    with torch.no_grad():
        features = model.backbone(points)
        out = model(points)
        stages = model.forward_features(points)
    assert torch.equal(out, torch.stack([features[:60].amax(0), features[60:].amax(0)]))
    assert set(stages) == {info.name for info in model.feature_info}


def test_misuse() -> None:
    with pytest.raises(InputError, match="its backbone has 4"):
        PointSP(3, inner(4))
    with pytest.raises(InputError, match="PointCloudMamba gives 2 rows for"):
        PointSP(3, inner(decoder=None), least_points=0).eval()(clouds([60, 70]))
    points = clouds([60]).with_attrs(grid_coord=torch.zeros(60, 3, dtype=torch.int32))
    with pytest.raises(InputError, match="with grid_size: null"):
        protocol()(points)
