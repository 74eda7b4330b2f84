"""Transforms for single objects: fixed sizes, unit frames, shifts, heights."""

from __future__ import annotations

import pytest
import torch
from clouds import random_points, seeded

from pc3d import InputError, Points
from pc3d.data.pipeline import Pipeline
from pc3d.data.transforms import (
    DropAttribute,
    FixedPoints,
    HeightAboveLowest,
    RandomJitter,
    RandomScale,
    RandomShift,
    UnitShape,
)
from pc3d.data.transforms.geometric import from_unit_frame


def rows_of(sampled: Points, cloud: Points) -> torch.Tensor:
    """Row of ``cloud`` that each sampled point is."""
    same = (sampled.coord[:, None] == cloud.coord[None]).all(2)
    assert same.any(1).all()
    return same.int().argmax(1)


def test_fixed_points() -> None:
    cloud = random_points((50,))
    first = FixedPoints(20, "first")(cloud)
    assert rows_of(first, cloud).tolist() == list(range(20))
    assert rows_of(FixedPoints(120, "first")(cloud), cloud).tolist() == [i % 50 for i in range(120)]
    random = rows_of(FixedPoints(20)(cloud, seeded(1)), cloud)
    assert len(random.unique()) == 20
    assert len(rows_of(FixedPoints(50, replace=True)(cloud, seeded(1)), cloud).unique()) < 50
    more = rows_of(FixedPoints(60)(cloud, seeded(1)), cloud)
    assert more.unique().tolist() == list(range(50))
    far = rows_of(FixedPoints(4, "farthest")(cloud), cloud).tolist()
    taken = [0]
    for _ in range(3):
        distance = torch.cdist(cloud.coord.double(), cloud.coord[taken].double()).amin(1)
        taken.append(int(distance.argmax()))
    assert far == taken
    for options in ({"count": 0}, {"count": 5, "pick": "best"}, {"count": 5, "pick": "first", "replace": True}):
        with pytest.raises(InputError, match="FixedPoints"):
            FixedPoints(**options)


def test_fixed_points_tell_who_stands_for_whom() -> None:
    cloud = random_points((80,))
    sampled = FixedPoints(10, "farthest", inverse=True)(cloud)
    assert sampled.source is not None
    nearest = torch.cdist(cloud.coord.double(), sampled.coord.double()).argmin(1)
    assert torch.equal(sampled.source_rows(), nearest)


def pair() -> Points:
    there, wanted = random_points((30,)).coord, random_points((70,)).coord * 3 + 5
    target = torch.cat([torch.zeros(30), torch.ones(70)]).long()
    return Points(torch.cat([there, wanted]), attrs={"target": target}, meta=[{"name": "pair"}])


def test_either_side_of_a_pair_gets_its_points() -> None:
    sampled = FixedPoints(40)(pair(), seeded(0))
    assert sampled.get("target").bincount().tolist() == [40, 40]


def test_unit_shapes() -> None:
    cloud = random_points((60,))
    sphere, box = UnitShape()(cloud), UnitShape("box")(cloud)
    torch.testing.assert_close(sphere.coord.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    assert sphere.coord.norm(dim=1).max() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(box.coord.amax(0), -box.coord.amin(0), atol=1e-5, rtol=0)
    assert box.coord.abs().max() == pytest.approx(1, abs=1e-6)
    twice = UnitShape()(RandomScale((2.0, 2.0))(box))
    assert twice.coord.norm(dim=1).max() == pytest.approx(1, abs=1e-6)
    again = UnitShape("box")(UnitShape()(cloud))
    for unit in (sphere, box, again):
        torch.testing.assert_close(from_unit_frame(unit.coord, unit.meta[0]), cloud.coord, atol=1e-4, rtol=1e-5)
    point = Points(torch.tensor([[3.0, 4.0, 5.0]]))
    assert UnitShape()(point).coord.tolist() == [[0, 0, 0]]
    with pytest.raises(InputError, match=r"UnitShape\.fit"):
        UnitShape("cube")


def test_pairs_share_the_frame_of_what_is_there_or_have_their_own() -> None:
    both = pair()
    there = both.get("target") == 0
    alone = UnitShape("box")(both.select(there))
    shared, own = UnitShape("box")(both), UnitShape("box", separate=True)(both)
    torch.testing.assert_close(shared.coord[there], alone.coord)
    torch.testing.assert_close(from_unit_frame(shared.coord, shared.meta[0]), both.coord, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(own.coord[there], alone.coord)
    assert own.coord[~there].abs().max() == pytest.approx(1, abs=1e-6)
    assert shared.coord[~there].abs().max() > 2


def test_axes_are_scaled_and_moved_by_themselves() -> None:
    cloud = random_points((40,))
    factors = (RandomScale((0.5, 2.0), anisotropic=True)(cloud, seeded(2)).coord / cloud.coord)[0]
    assert len({round(float(f), 4) for f in factors}) == 3
    assert ((factors >= 0.5) & (factors <= 2)).all()
    shift = (RandomShift((-0.2, 0.1))(cloud, seeded(2)).coord - cloud.coord)[0]
    assert len({round(float(s), 4) for s in shift}) == 3
    assert ((shift >= -0.21) & (shift <= 0.11)).all()
    height = HeightAboveLowest("y")(cloud).get("height")
    torch.testing.assert_close(height, cloud.coord[:, 1] - cloud.coord[:, 1].min())
    dropped = [bool((DropAttribute("color", 0.5)(cloud, seeded(i)).get("color") == 0).all()) for i in range(40)]
    assert 8 < sum(dropped) < 32


def test_a_pipeline_without_a_grid_keeps_every_point() -> None:
    cloud = random_points((90,))
    lines = Pipeline(None, ["coord"], prepare=[UnitShape()], augment=[RandomJitter()])
    assert lines.train(cloud, seeded(0)).num_points == 90
    evaluated = lines.evaluate(cloud)
    assert torch.equal(evaluated.source_rows(), torch.arange(90))
    fixed = Pipeline(None, ["coord"], crop=[FixedPoints(30)], select=[FixedPoints(20, "farthest", inverse=True)])
    assert fixed.train(cloud, seeded(0)).num_points == 30
    chosen = fixed.evaluate(cloud)
    assert chosen.num_points == 20
    assert chosen.source is not None
    assert chosen.source.num_points == 90
    alone = Pipeline(None, ["coord"], select=[FixedPoints(20, "farthest")]).evaluate(cloud)
    assert alone.source is not None
    assert alone.source.num_points == 20
    both = Pipeline(0.2, ["coord"], select=[FixedPoints(10, inverse=True)]).evaluate(cloud, generator=seeded(0))
    assert both.num_points == 10
    with pytest.raises(InputError, match="not cut into fragments"):
        next(iter(lines.fragments(cloud)))
