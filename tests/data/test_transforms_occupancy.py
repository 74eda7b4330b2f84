"""Scans and queries drawn from surfaces and points in space; which of these are near the surface."""

from __future__ import annotations

import pytest
import torch
from clouds import seeded

from pc3d import InputError, Points
from pc3d.data.transforms import MarkBoundary, ScanAndQueries, UnitShape


def ball(surface: int = 500, space: int = 1500) -> Points:
    """A ball of radius 0.4 in the cube around it."""
    generator = seeded(0)
    on = 0.4 * torch.nn.functional.normalize(torch.randn(surface, 3, generator=generator), dim=1)
    around = torch.rand(space, 3, generator=generator) - 0.5
    occupancy = torch.cat([torch.full((surface,), -1), (around.norm(dim=1) < 0.4).long()])
    return Points(torch.cat([on, around]), attrs={"occupancy": occupancy}, meta=[{"name": "ball"}])


def test_the_scan_is_noisy_and_the_queries_are_exact() -> None:
    cloud = ball()
    sampled = ScanAndQueries(400, 300, noise=0.01)(cloud, seeded(1))
    occupancy = sampled.get("occupancy")
    assert occupancy[:400].eq(-1).all()
    assert occupancy[400:].ge(0).all()
    assert len(occupancy) == 700
    distance = sampled.coord[:400].norm(dim=1) - 0.4
    assert float(distance.std()) == pytest.approx(0.01, rel=0.2)
    assert torch.equal((sampled.coord[400:].norm(dim=1) < 0.4).long(), occupancy[400:])
    every = ScanAndQueries(10, None)(cloud, seeded(1))
    assert torch.equal(every.coord[10:], cloud.coord[500:])
    assert torch.equal(ScanAndQueries(10, 5)(cloud, seeded(2)).coord, ScanAndQueries(10, 5)(cloud, seeded(2)).coord)


def test_a_scan_without_occupancy_keeps_its_points() -> None:
    scan = Points(torch.rand(50, 3))
    assert ScanAndQueries(60)(scan) is scan
    fewer = ScanAndQueries(20)(scan, seeded(0))
    assert fewer.num_points == 20
    assert (fewer.coord[:, None] == scan.coord).all(2).any(1).all()


def test_boundary_points_have_a_near_neighbour_on_the_other_side() -> None:
    cloud = ball()
    marked = MarkBoundary(neighbours=100, radius=0.1)(cloud)
    boundary, occupancy = marked.get("boundary"), cloud.get("occupancy")
    space = occupancy >= 0
    distance = torch.cdist(cloud.coord[space], cloud.coord[space])
    other = occupancy[space][:, None] != occupancy[space]
    assert torch.equal(boundary[space], (other & (distance <= 0.1)).any(1))  # none has 100 neighbours so near
    assert not boundary[~space].any()
    queries = ScanAndQueries(10, 400, boundary=True)(marked, seeded(0)).coord[10:]
    assert (queries.norm(dim=1) - 0.4).abs().max() <= 0.1


def test_only_the_nearest_neighbours_are_asked() -> None:
    line = torch.stack([torch.tensor([0, 0.01, 0.02, 0.025, 0.035, 0.05]), *torch.zeros(2, 6)], 1)
    cloud = Points(line, attrs={"occupancy": torch.tensor([0, 0, 0, 1, 1, -1])})
    assert MarkBoundary(2, 1.0)(cloud).get("boundary").tolist() == [False, False, True, True, False, False]
    assert MarkBoundary(5, 0.011)(cloud).get("boundary").tolist() == [False, False, True, True, False, False]
    assert MarkBoundary(5, 1.0)(cloud).get("boundary").tolist() == [True] * 5 + [False]


def test_large_clouds_are_marked_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = ball()
    whole = MarkBoundary()(cloud).get("boundary")
    monkeypatch.setattr("pc3d.data.transforms.occupancy._QUERIES", 70)
    assert torch.equal(MarkBoundary()(cloud).get("boundary"), whole)


def test_the_unit_box_is_that_of_the_surface() -> None:
    cloud = ball().with_attrs(coord=ball().coord * 7 + 3)
    unit = UnitShape("box", radius=0.5)(cloud)
    assert float(unit.coord[:500].abs().max()) == pytest.approx(0.5)
    assert float(unit.coord[500:].abs().max()) > 0.5
    with pytest.raises(InputError, match="radius"):
        UnitShape(radius=0)


def test_clouds_that_cannot_be_drawn_from_are_named() -> None:
    cloud = ball()
    with pytest.raises(InputError, match=r"ball.*on the surface"):
        ScanAndQueries()(cloud.select(cloud.get("occupancy") >= 0))
    with pytest.raises(InputError, match="to ask for"):
        ScanAndQueries()(cloud.select(cloud.get("occupancy") < 0))
    with pytest.raises(InputError, match="'boundary' is missing"):
        ScanAndQueries(boundary=True)(cloud)
    with pytest.raises(InputError, match="queries 0"):
        ScanAndQueries(queries=0)
    with pytest.raises(InputError, match="neighbours 1"):
        MarkBoundary(1)
