from __future__ import annotations

import math

import pytest
import torch
from clouds import random_points, seeded
from torch.nn import functional as F

from pc3d import InputError, Points
from pc3d.data.transforms import AssembleFeatures, EstimateNormals, HeightAboveGround, LocalGeometry, ScaleAttribute


def test_features_are_concatenated_in_order_as_float32() -> None:
    points = random_points((300, 200)).with_attrs(strength=torch.rand(500, 1))
    assemble = AssembleFeatures(["strength", "coord", "segment", "normal"])
    feat = assemble(points).get("feat")
    assert feat.dtype == torch.float32
    assert feat.shape[1] == assemble.channels == 8
    expected = [points.get("strength"), points.coord, points.get("segment")[:, None].float(), points.get("normal")]
    assert torch.equal(feat, torch.cat(expected, 1))


def test_a_column_of_the_coordinates_is_a_feature() -> None:
    points = random_points()
    assemble = AssembleFeatures(["z", "x"])
    assert assemble.channels == 2
    assert torch.equal(assemble(points).get("feat"), points.coord[:, [2, 0]])
    height = ScaleAttribute("z", 2.0, maximum=4.0, output="height")(points)
    assert torch.equal(height.get("height"), (points.coord[:, 2] * 2).clamp(max=4))
    own = points.with_attrs(z=torch.arange(500))  # an attribute of that name comes first
    assert torch.equal(AssembleFeatures(["z"])(own).get("feat")[:, 0], torch.arange(500).float())


def test_missing_and_wide_features_are_named() -> None:
    with pytest.raises(InputError, match="cloud0: field 'strength' is missing"):
        AssembleFeatures(["strength"])(random_points())
    with pytest.raises(InputError, match=r"cloud0: field 'color' has shape \(500, 4\), a feature needs \(N, 3\)"):
        AssembleFeatures(["color"])(random_points().with_attrs(color=torch.zeros(500, 4)))
    with pytest.raises(InputError, match="at least one"):
        AssembleFeatures([])


def test_scale_attribute() -> None:
    points = random_points().with_attrs(intensity=torch.arange(500, dtype=torch.int32))
    scaled = ScaleAttribute("intensity", 0.5, -1.0)(points).get("intensity")
    assert torch.equal(scaled, torch.arange(500) * 0.5 - 1)
    result = ScaleAttribute("coord", 2.0, output="twice")(points)
    assert torch.equal(result.get("twice"), points.coord * 2)
    assert torch.equal(result.coord, points.coord)
    limited = ScaleAttribute("intensity", 0.1, minimum=5, maximum=20)(points).get("intensity")
    assert torch.equal(limited, (torch.arange(500) * 0.1).clamp(5, 20))
    with pytest.raises(InputError, match="minimum 2 is above maximum 1"):
        ScaleAttribute("intensity", minimum=2, maximum=1)


def landscape(slope: float, size: float = 60.0, n: int = 40_000) -> tuple[Points, torch.Tensor, torch.Tensor]:
    """Sloping ground, a 15 m wide building without ground under it, and trees: points, true height, is ground."""
    generator = seeded(1)
    xy = torch.rand(n, 2, generator=generator) * size
    terrain = slope * xy[:, 0] + 50
    building = ((xy - 20).abs() < 7.5).all(1)
    tree = (torch.rand(n, generator=generator) < 0.2) & ~building
    height = torch.where(building, 8.0, torch.where(tree, torch.rand(n, generator=generator) * 10, 0.0))
    points = Points(torch.cat([xy, (terrain + height)[:, None]], 1), attrs={"true": height})
    return points, height, ~building & ~tree


@pytest.mark.parametrize("slope", [0.0, 0.15])
def test_height_above_ground_follows_the_slope_under_buildings_and_trees(slope: float) -> None:
    points, true, ground = landscape(slope)
    height = HeightAboveGround(cell=1.0, window=20.0)(points).get("height")
    assert height.shape == (points.num_points,)
    assert height.dtype == torch.float32
    assert height.min() >= 0
    inside = ((points.coord[:, :2] > 10) & (points.coord[:, :2] < 50)).all(1)  # half a window from the border
    assert (height - true)[inside].abs().max() <= slope * 2 + 1e-4
    assert (height - true)[ground].max() <= slope * 11 + 1e-4


def test_a_building_wider_than_the_window_counts_as_ground() -> None:
    points, true, _ = landscape(0.0)
    middle = ((points.coord[:, :2] - 20).abs() < 3).all(1)
    assert HeightAboveGround(cell=1.0, window=5.0)(points).get("height")[middle].max() < 0.1
    assert true[middle].min() == 8


def test_a_point_far_below_ground_disturbs_only_its_own_cell() -> None:
    points, _, _ = landscape(0.0)
    stray = points.coord.clone()
    row = int((stray[:, :2] - torch.tensor([40.0, 35.0])).norm(dim=1).argmin())
    stray[row, 2] = 0.0
    transform = HeightAboveGround(cell=1.0, window=20.0)
    before, after = transform(points).get("height"), transform(points.with_attrs(coord=stray)).get("height")
    cell = torch.floor(stray[:, :2] - stray[:, :2].amin(0))
    own_cell = (cell == cell[row]).all(1)
    assert torch.equal(before[~own_cell], after[~own_cell])
    assert after[own_cell].max() > 40


def test_gaps_wider_than_the_window_are_not_ground() -> None:
    near, _, _ = landscape(0.0, n=4000)
    far = near.coord + torch.tensor([500.0, 0.0, 20.0])
    transform = HeightAboveGround(cell=2.0, window=20.0)
    together = transform(Points(torch.cat([near.coord, far]))).get("height").view(2, -1)
    expected = transform(near).get("height")
    torch.testing.assert_close(together, expected.expand(2, -1), atol=1e-4, rtol=0)


def test_height_is_measured_cloud_by_cloud() -> None:
    points, _, _ = landscape(0.0)
    lifted = points.with_attrs(coord=points.coord + torch.tensor([0.0, 0.0, 30.0]))
    height = HeightAboveGround()(Points.cat([points, lifted])).get("height").view(2, -1)
    torch.testing.assert_close(height[0], height[1], atol=1e-4, rtol=0)


def test_height_grid_that_does_not_fit_is_refused() -> None:
    points = Points(torch.tensor([[0.0, 0, 0], [1e6, 1e6, 0]]), meta=[{"name": "county"}])
    with pytest.raises(InputError, match=r"county: .*larger cell"):
        HeightAboveGround(cell=1.0)(points)
    with pytest.raises(InputError, match="positive"):
        HeightAboveGround(cell=0)


def plane(normal: tuple[float, float, float], n: int = 400) -> Points:
    direction = F.normalize(torch.tensor(normal), dim=0)
    spread = torch.randn(n, 3, generator=seeded())
    return Points(spread - (spread @ direction)[:, None] * direction)


@pytest.mark.parametrize("normal", [(0.0, 0.0, 1.0), (1.0, 2.0, 3.0), (1.0, -1.0, -0.5)])
def test_normals_of_a_plane_point_to_the_sensor(normal: tuple[float, float, float]) -> None:
    direction = F.normalize(torch.tensor(normal), dim=0)
    cloud = plane(normal)
    for side in (-1, 1):
        sensor = (cloud.coord.mean(0) + side * 5 * direction).tolist()
        estimated = EstimateNormals(k=12, toward=sensor)(cloud).get("normal")
        torch.testing.assert_close(estimated, (side * direction).expand(cloud.num_points, 3), atol=1e-4, rtol=0)
    with pytest.raises(InputError, match=r"EstimateNormals\.toward"):
        EstimateNormals(toward=(0.0, 1.0))


@pytest.mark.parametrize("normal", [(0.0, 0.0, 1.0), (1.0, 2.0, 3.0), (1.0, -1.0, -0.5)])
def test_normals_of_a_plane_point_up(normal: tuple[float, float, float]) -> None:
    expected = F.normalize(torch.tensor(normal), dim=0) * math.copysign(1, normal[2])
    estimated = EstimateNormals(k=12)(plane(normal)).get("normal")
    torch.testing.assert_close(estimated, expected.expand_as(estimated), atol=1e-3, rtol=0)


def test_shapes_of_a_line_a_plane_and_a_ball() -> None:
    line = Points(torch.arange(200.0)[:, None] * torch.tensor([[0.6, 0.0, 0.8]]))
    ball = Points(torch.rand(3000, 3, generator=seeded()))
    transform = LocalGeometry(k=30)
    means = {name: transform(line).get(name).mean().item() for name in transform.features}
    assert means["linearity"] == pytest.approx(1, abs=1e-3)
    assert means["planarity"] == pytest.approx(0, abs=1e-3)
    flat = transform(plane((0.0, 0.0, 1.0), 2000))
    assert flat.get("planarity").mean() > 0.5
    assert flat.get("sphericity").max() < 1e-5
    assert flat.get("verticality").max() < 1e-5
    wall = transform(plane((1.0, 0.0, 0.0), 2000))
    assert wall.get("verticality").min() > 0.999
    assert transform(ball).get("sphericity").mean() > 0.3


def test_shapes_sum_to_one_and_equal_the_covariance_definition() -> None:
    points = random_points((200,))
    result = LocalGeometry(k=9, features=["linearity", "planarity", "sphericity", "verticality", "normal"])(points)
    total = result.get("linearity") + result.get("planarity") + result.get("sphericity")
    torch.testing.assert_close(total, torch.ones(200), atol=1e-5, rtol=0)
    near = torch.cdist(points.coord, points.coord)[7].argsort()[:9]
    values, vectors = torch.linalg.eigh(torch.cov(points.coord[near].T, correction=0))
    torch.testing.assert_close(result.get("sphericity")[7], values[0] / values[2], atol=1e-3, rtol=0)
    assert (vectors[:, 0] @ result.get("normal")[7]).abs() == pytest.approx(1, abs=1e-3)


def test_neighbourhoods_stay_inside_their_cloud() -> None:
    floor, wall = plane((0.0, 0.0, 1.0)), plane((1.0, 0.0, 0.0))
    normal = EstimateNormals(k=8)(Points.cat([floor, wall])).get("normal")
    assert normal[: len(floor.coord), 2].min() > 0.999
    assert normal[len(floor.coord) :, 0].abs().min() > 0.999


def test_coinciding_points_have_no_shape() -> None:
    result = LocalGeometry(k=4)(Points(torch.ones(10, 3)))
    for name in ("linearity", "planarity", "sphericity"):
        assert torch.equal(result.get(name), torch.zeros(10))


def test_geometry_arguments_are_checked() -> None:
    with pytest.raises(InputError, match="at least 3 neighbours"):
        EstimateNormals(k=2)
    with pytest.raises(InputError, match=r"no feature \['roundness'\]"):
        LocalGeometry(features=["roundness"])
