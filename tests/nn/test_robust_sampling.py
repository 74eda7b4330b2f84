"""Key points and resampling on packed clouds of any size."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from pc3d.errors import InputError
from pc3d.nn.robust_sampling import (
    FullPointResampler,
    KeyPointSampler,
    balanced_drop,
    filtered_farthest_points,
    isolation,
    normals,
    tangent_points,
    weighted_points,
)
from pc3d.ops.neighbours import knn
from pc3d.points import Points

COUNTS = [200, 0, 1, 5, 60]


def clouds(counts: list[int], seed: int = 0) -> Points:
    """Spheres, each with one point in twenty far away."""
    generator = torch.Generator().manual_seed(seed)
    coord = torch.randn(sum(counts), 3, generator=generator)
    coord = coord / coord.norm(dim=1, keepdim=True)
    coord[::20] *= 3
    return Points(coord, torch.tensor([0, *counts]).cumsum(0), {"feat": coord.clone()})


def test_isolation_by_its_definition() -> None:
    points = clouds([61])
    squared = torch.cdist(points.coord.double(), points.coord.double()).square().topk(20, largest=False).values
    spread = squared.mean(1)
    threshold = spread.quantile(0.5)
    found = isolation(points.coord, points.offsets)
    assert torch.equal(found.count, (squared <= threshold).sum(1))
    assert torch.equal(found.inlier, spread <= threshold)
    widest = isolation(points.coord, points.offsets, reduce="max")
    assert torch.equal(widest.inlier, squared.amax(1) <= squared.amax(1).quantile(0.5))


def test_each_cloud_by_its_own_measure() -> None:
    points = clouds(COUNTS)
    together = isolation(points.coord, points.offsets)
    alone = [isolation(cloud.coord, cloud.offsets) for cloud in points]
    for name in ("weight", "count", "inlier", "inliers"):
        assert torch.equal(getattr(together, name), torch.cat([getattr(one, name) for one in alone])), name
    assert alone[0].weight.sum() == pytest.approx(1)
    assert alone[2].count.tolist() == [1]  # a point alone has itself
    dense, far = torch.ones(200, dtype=torch.bool), torch.arange(0, 200, 20)
    dense[far] = False
    assert alone[0].count[dense].float().mean() > 5 * alone[0].count[far].float().mean()


def test_filtered_points_leave_outliers_out() -> None:
    points = clouds(COUNTS)
    weight = isolation(points.coord, points.offsets).weight
    rows, borders = filtered_farthest_points(points.coord, points.offsets, weight, 30)
    assert borders.diff().tolist() == [30, 0, 1, 4, 30]
    assert not (rows[:30] % 20 == 0).any()  # ten outliers, ten left out
    assert rows[0] == weight[:200].argmax()
    assert len(set(rows.tolist())) == len(rows)
    again, _ = filtered_farthest_points(points.coord, points.offsets, weight, 30)
    assert torch.equal(rows, again)
    starts = torch.tensor([20, 0, 0, 2, 59])
    rows, borders = filtered_farthest_points(points.coord, points.offsets, weight, 30, starts)
    filled = borders.diff() > 0
    assert torch.equal(rows[borders[:-1][filled]], (points.offsets[:-1] + starts)[filled])  # also one left out
    assert (rows[1:30] % 20 != 0).all()


def test_points_at_the_origin() -> None:
    coord = torch.cat([torch.zeros(3, 3), torch.eye(3)])
    taken = filtered_farthest_points(
        coord, torch.tensor([0, 6]), torch.ones(6), 6, torch.tensor([4]), keep=1.0, ignore_origin=True
    )[0]
    assert sorted(taken.tolist()) == [3, 4, 5]


@pytest.mark.parametrize("replace", [False, True])
def test_weights_are_the_odds(replace: bool) -> None:
    torch.manual_seed(0)
    offsets, weight = torch.tensor([0, 3, 3, 5]), torch.tensor([0.2, 0.3, 0.5, 0.9, 0.1])
    first = torch.zeros(5)
    for _ in range(2000):
        rows, borders = weighted_points(offsets, weight, 2, replace)
        assert borders.tolist() == [0, 2, 2, 4]
        assert replace or len(set(rows.tolist())) == 4
        first[rows[borders[[0, 2]]]] += 1 / 2000
    assert_close(first, weight, rtol=0, atol=0.05)
    rows, borders = weighted_points(offsets, weight, 4, replace)
    assert borders.diff().tolist() == ([4, 0, 4] if replace else [3, 0, 2])


def test_sampler_changes_with_the_mode() -> None:
    points = clouds(COUNTS)
    sampler = KeyPointSampler(16, ignore_origin=True)
    taken = [sampler.train(mode)(points.coord, points.offsets)[0] for mode in (False, False, True, True)]
    assert torch.equal(taken[0], taken[1])
    assert not torch.equal(taken[2], taken[3])
    baseline = KeyPointSampler(16, "farthest", "farthest")
    assert torch.equal(baseline(points.coord, points.offsets)[0], baseline.eval()(points.coord, points.offsets)[0])
    anywhere = KeyPointSampler(1, random_start=True).eval()
    assert len({int(anywhere(points.coord, points.offsets)[0][0]) for _ in range(20)}) > 5
    with pytest.raises(InputError, match="key points: 0"):
        KeyPointSampler(0)


def test_new_points_lie_in_the_plane() -> None:
    generator = torch.Generator().manual_seed(0)
    coord = torch.rand(80, 3, generator=generator) * torch.tensor([1.0, 1.0, 0.0])
    offsets = torch.tensor([0, 80])
    rows, squared = knn(coord, offsets, coord, offsets, 20)
    normal = normals(coord, rows)
    assert_close(normal.abs(), torch.tensor([0.0, 0.0, 1.0]).expand(80, 3), rtol=0, atol=1e-5)
    made = tangent_points(coord, normal, rows, squared, torch.randint(20, (80,), generator=generator))
    assert made[:, 2].abs().max() < 1e-5
    assert bool(((made - coord).square().sum(1) <= squared[:, 9] + 1e-6).all())
    itself = tangent_points(coord, normal, rows, squared, torch.zeros(80, dtype=torch.int64))
    assert torch.equal(itself, coord)


def test_drop_makes_a_hole_or_thins() -> None:
    coord = torch.arange(100.0)[:, None].expand(-1, 3)
    hole = balanced_drop(coord, 0.6, 0.0, 50, torch.randperm(40))
    assert hole.tolist() == [*range(30), *range(70, 100)] or hole.tolist() == [*range(31), *range(71, 100)]
    thin = balanced_drop(coord, 0.6, 1.0, 50, torch.arange(99, -1, -1))
    assert len(thin) == 60
    assert thin.diff().min() > 0


@pytest.mark.parametrize("cut", [False, True])
def test_inference_fills_clouds_up(cut: bool) -> None:
    points = clouds([*COUNTS, 300])
    filled = FullPointResampler(128, cut).eval()(points)
    assert filled.counts.tolist() == [128 if cut else 200, 0, 128, 128, 128, 128 if cut else 300]
    for before, after in zip(points, filled, strict=True):
        shared = min(before.num_points, after.num_points)
        assert torch.equal(after.coord[:shared], before.coord[:shared])
        assert after.meta == before.meta
    assert FullPointResampler(0).eval()(points).counts.tolist() == points.counts.tolist()


def test_training_varies_the_number_of_points() -> None:
    torch.manual_seed(0)
    points = clouds([100, 0, 1, 3])
    resampler = FullPointResampler(128).train()
    sizes = torch.stack([resampler(points).counts for _ in range(60)])
    assert 50 <= sizes[:, 0].min() < 70
    assert 150 < sizes[:, 0].max() <= 200
    assert bool((sizes[:, 0] < 100).any())
    assert sizes[:, 1].tolist() == [0] * 60
    assert set(sizes[:, 2].tolist()) == {1}
    assert FullPointResampler(128, augment=False).train()(points) is points
    with pytest.raises(InputError, match="points 0 must not be negative, and with cut at least 1"):
        FullPointResampler(0, cut=True)
