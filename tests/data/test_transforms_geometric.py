from __future__ import annotations

import math

import pytest
import torch
from clouds import random_points, seeded

from pc3d import InputError, Points
from pc3d.data.transforms import (
    CenterShift,
    ElasticDistortion,
    LevelPlane,
    PointClip,
    PositiveShift,
    RandomFlip,
    RandomJitter,
    RandomRotate,
    RandomRotateTargetAngle,
    RandomScale,
)
from pc3d.data.transforms.geometric import interpolate, rotation_matrix, smooth


def point(*xyz: float) -> Points:
    coord = torch.tensor([xyz])
    return Points(coord, attrs={"normal": coord / coord.norm()})


@pytest.mark.parametrize("apply_z", [True, False])
def test_center_shift_centers_the_box_and_keeps_true_coordinates(apply_z: bool) -> None:
    points = random_points((300, 200))
    shifted = CenterShift(apply_z)(points)
    for before, after in zip(points, shifted, strict=True):
        low, high = after.coord.amin(0), after.coord.amax(0)
        torch.testing.assert_close((low + high)[:2], torch.zeros(2), atol=1e-5, rtol=0)
        torch.testing.assert_close(low[2], torch.zeros(()) if apply_z else before.coord[:, 2].min())
        true_before = before.coord.double() + torch.tensor(before.meta[0]["origin"], dtype=torch.float64)
        true_after = after.coord.double() + torch.tensor(after.meta[0]["origin"], dtype=torch.float64)
        torch.testing.assert_close(true_after, true_before, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("axis", "start", "end"),
    [("x", (0, 1, 0), (0, 0, 1)), ("y", (0, 0, 1), (1, 0, 0)), ("z", (1, 0, 0), (0, 1, 0))],
)
def test_a_quarter_turn_is_counter_clockwise(axis: str, start: tuple, end: tuple) -> None:
    turned = RandomRotate((0.5, 0.5), axis, center=(0, 0, 0), p=1)(point(*map(float, start)))
    expected = torch.tensor([end]).float()
    torch.testing.assert_close(turned.coord, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(turned.get("normal"), expected, atol=1e-6, rtol=0)


def test_rotation_turns_about_the_box_center_by_default() -> None:
    points = random_points()
    turned = RandomRotate((1, 1), "z", p=1)(points)
    pivot = (points.coord.amin(0) + points.coord.amax(0)) / 2
    expected = torch.cat([2 * pivot[:2] - points.coord[:, :2], points.coord[:, 2:]], 1)
    torch.testing.assert_close(turned.coord, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("axis", ["x", "y", "z"])
def test_rotation_keeps_distances_and_turns_normals_along(axis: str) -> None:
    points = random_points()
    turned = RandomRotate((-1, 1), axis, p=1)(points, seeded(4))
    torch.testing.assert_close(torch.pdist(turned.coord), torch.pdist(points.coord), atol=1e-4, rtol=0)
    ahead = points.coord + points.get("normal")
    both = points.replace(coord=torch.cat([points.coord, ahead]), offsets=torch.tensor([0, 2 * len(ahead)]), attrs={})
    pivot = ((points.coord.amin(0) + points.coord.amax(0)) / 2).tolist()
    moved = RandomRotate((-1, 1), axis, center=pivot, p=1)(both, seeded(4)).coord.view(2, -1, 3)
    torch.testing.assert_close(moved[1] - moved[0], turned.get("normal"), atol=1e-4, rtol=0)


def angles(transform: RandomRotate | RandomRotateTargetAngle, draws: int = 2000) -> torch.Tensor:
    """Angles in units of pi, from how the point (1, 0, 0) moves; one per cloud of a batch."""
    batch = Points(torch.tensor([[1.0, 0, 0]]).repeat(draws, 1), torch.arange(draws + 1))
    x, y, _ = transform(batch, seeded(1)).coord.T
    return torch.atan2(y, x) / math.pi


def test_angles_are_uniform_and_drawn_per_cloud() -> None:
    drawn = angles(RandomRotate((-0.25, 0.5), "z", center=(0, 0, 0), p=1))
    assert drawn.min() >= -0.25
    assert drawn.max() <= 0.5
    thirds = torch.histc(drawn, 3, -0.25, 0.5) / len(drawn)
    torch.testing.assert_close(thirds, torch.full((3,), 1 / 3), atol=0.04, rtol=0)


def test_rotation_happens_with_probability_p() -> None:
    still = (angles(RandomRotate((0.1, 0.2), center=(0, 0, 0), p=0.3)) == 0).float().mean()
    assert abs(still - 0.7) < 0.04


def test_target_angles_are_chosen_evenly() -> None:
    drawn = angles(RandomRotateTargetAngle((0.5, 1.0, 1.5), center=(0, 0, 0), p=0.75))
    share = {a: ((drawn - a).abs() < 1e-3).float().mean() for a in (0.0, 0.5, 1.0, -0.5)}
    share[1.0] += ((drawn + 1).abs() < 1e-3).float().mean()  # atan2 may give either sign
    assert sum(share.values()) == pytest.approx(1)
    assert all(abs(value - 0.25) < 0.04 for value in share.values())


def test_scale_is_one_factor_for_all_axes_of_a_cloud() -> None:
    points = random_points((100,) * 200)
    factor = RandomScale((0.9, 1.1))(points, seeded()).coord / points.coord
    per_cloud = factor.view(200, -1)
    torch.testing.assert_close(per_cloud, per_cloud[:, :1].expand_as(per_cloud), rtol=1e-5, atol=0)
    assert 0.9 <= per_cloud.min() < 0.92
    assert 1.08 < per_cloud.max() <= 1.1
    assert torch.equal(RandomScale()(points).get("normal"), points.get("normal"))


def test_flip_mirrors_x_and_y_independently_with_their_normals() -> None:
    points = random_points((1,) * 2000)
    flipped = RandomFlip(p=0.3)(points, seeded())
    signs = (flipped.coord / points.coord).round()
    torch.testing.assert_close(flipped.get("normal"), points.get("normal") * signs)
    mirrored = (signs < 0).float()
    torch.testing.assert_close(mirrored.mean(0), torch.tensor([0.3, 0.3, 0.0]), atol=0.04, rtol=0)
    assert abs(mirrored[:, :2].prod(1).mean() - 0.09) < 0.03


def test_flip_with_certainty_is_the_double_flip() -> None:
    points = random_points()
    assert torch.equal(RandomFlip(p=1)(points).coord, points.coord * torch.tensor([-1.0, -1.0, 1.0]))


def test_jitter_is_clipped_normal_noise() -> None:
    points = Points(torch.zeros(40_000, 3))
    noise = RandomJitter(sigma=0.01, clip=0.02)(points, seeded()).coord
    assert noise.abs().max() == pytest.approx(0.02)
    assert abs(noise.mean()) < 1e-4
    inside = (noise.abs() < 0.01).float().mean()
    assert inside == pytest.approx(0.6827, abs=0.01)
    assert (noise.abs() == noise.abs().max()).float().mean() == pytest.approx(0.0455, abs=0.005)


def test_smooth_is_two_passes_of_three_boxes_with_zeros_outside() -> None:
    noise = torch.randn(3, 5, 6, 7, generator=seeded(), dtype=torch.float64)
    expected = noise.clone()
    for _ in range(2):
        for axis in (1, 2, 3):
            zero = torch.zeros_like(expected.narrow(axis, 0, 1))
            padded = torch.cat([zero, expected, zero], axis)
            size = expected.shape[axis]
            expected = sum(padded.narrow(axis, shift, size) for shift in range(3)) / 3
    torch.testing.assert_close(smooth(noise), expected)


def test_interpolation_is_trilinear() -> None:
    x, y, z = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (4, 5, 6)), indexing="ij")
    field = torch.stack([x * y * z, x - 2 * y, z + 1])  # trilinear: interpolation reproduces it
    position = torch.rand(100, 3, generator=seeded(), dtype=torch.float64) * torch.tensor([3.0, 4.0, 5.0])
    px, py, pz = position.T
    expected = torch.stack([px * py * pz, px - 2 * py, pz + 1], 1)
    torch.testing.assert_close(interpolate(field, position), expected)


def test_elastic_distortion_equals_its_definition() -> None:
    granularity, magnitude = 0.5, 0.3
    points = random_points((50,))
    moved = ElasticDistortion([(granularity, magnitude)], p=1)(points, seeded(6)).coord - points.coord
    generator = seeded(6)
    torch.rand((), dtype=torch.float64, generator=generator)  # whether to distort
    low = points.coord.amin(0)
    extent = points.coord.amax(0) - low
    dims = [math.floor(e / granularity) + 3 for e in extent.tolist()]
    noise = smooth(torch.randn(3, *dims, generator=generator))
    for row in (0, 17, 49):
        node = (points.coord[row] - low) / granularity + 1  # the first node lies one step outside the box
        base = node.floor().long()
        value = torch.zeros(3)
        for corner in torch.cartesian_prod(*[torch.tensor([0, 1])] * 3):
            weight = (1 - (node - base - corner).abs()).prod()
            i, j, k = (base + corner).tolist()
            value += weight * noise[:, i, j, k]
        torch.testing.assert_close(moved[row], magnitude * value, atol=1e-5, rtol=0)


def test_the_second_distortion_starts_from_the_result_of_the_first() -> None:
    points = random_points((50,))
    both = ElasticDistortion([(0.5, 0.3), (1.0, 0.6)], p=1)(points, seeded(6))
    generator = seeded(6)
    first = ElasticDistortion([(0.5, 0.3)], p=1)(points, generator).coord
    low = first.amin(0)
    dims = [math.floor(e) + 3 for e in (first.amax(0) - low).tolist()]
    noise = smooth(torch.randn(3, *dims, generator=generator))
    torch.testing.assert_close(both.coord, first + 0.6 * interpolate(noise, first - low + 1))


def test_elastic_distortion_is_smooth_and_bounded() -> None:
    points = random_points((4000,))
    moved = ElasticDistortion(p=1)(points, seeded()).coord - points.coord
    distance = torch.cdist(points.coord, points.coord)
    distance.fill_diagonal_(math.inf)
    nearest = distance.argmin(1)
    assert moved.norm(dim=1).mean() > 0.05
    assert (moved - moved[nearest]).norm(dim=1).mean() < 0.5 * moved.norm(dim=1).mean()


def test_elastic_distortion_happens_with_probability_p() -> None:
    points = random_points((2,) * 1000)
    moved = ElasticDistortion([(2.0, 0.1)], p=0.95)(points, seeded()).coord != points.coord
    assert moved.view(1000, -1).any(1).float().mean() == pytest.approx(0.95, abs=0.02)


def test_elastic_distortion_of_a_huge_cloud_says_what_to_do() -> None:
    points = Points(torch.tensor([[0.0, 0, 0], [900.0, 900, 90]]), meta=[{"name": "town"}])
    with pytest.raises(InputError, match=r"town: .*granularity 0.2 m.*larger granularity"):
        ElasticDistortion(p=1)(points)


def test_point_clip_moves_outliers_to_the_faces() -> None:
    points = random_points((300, 200))
    low, high = torch.tensor([11.0, -4.0, 1.5]), torch.tensor([13.0, -3.0, 2.0])
    clipped = PointClip([*low.tolist(), *high.tolist()])(points)
    assert clipped.num_points == points.num_points
    assert torch.equal(clipped.coord, torch.minimum(torch.maximum(points.coord, low), high))


def test_point_range_is_checked() -> None:
    with pytest.raises(InputError, match="point_range must be"):
        PointClip([0, 0, 0, 1, -1, 1])
    with pytest.raises(InputError, match="point_range must be"):
        PointClip([0, 0, 0])


def test_positive_shift_keeps_the_true_place() -> None:
    shifted = PositiveShift()(Points(torch.tensor([[3.0, -2.0, 5.0], [4.0, 7.0, 1.0]])))
    assert shifted.coord.tolist() == [[0.0, 0.0, 4.0], [1.0, 9.0, 0.0]]
    assert shifted.meta[0]["origin"] == (3.0, -2.0, 1.0)
    assert PositiveShift()(Points(torch.zeros(0, 3))).num_points == 0


@pytest.mark.parametrize("tilt", [0.0, 0.7, math.pi / 2, 2.5, math.pi])
def test_the_largest_plane_is_levelled_below_the_sensor(tilt: float) -> None:
    """A table with a box on it, noise, and a wall smaller than the table, seen from any side."""
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(3000, 3, generator=generator) * torch.tensor([2.0, 2.0, 0.0])
    box = torch.rand(600, 3, generator=generator) * torch.tensor([0.3, 0.3, 0.0]) + torch.tensor([0.5, 0.5, 0.2])
    wall = torch.rand(900, 3, generator=generator) * torch.tensor([0.0, 2.0, 1.0])
    level = torch.cat([table, box, wall]) + torch.randn(4500, 3, generator=generator) * 0.002
    matrix = (rotation_matrix(tilt, "x") @ rotation_matrix(0.4, "y")).float()
    place = torch.tensor([3.0, -1.0, 2.0])
    cloud = Points((level @ matrix.T) + place, attrs={"normal": matrix[:, 2].expand(4500, 3).contiguous()})
    sensor = (matrix @ torch.tensor([1.0, 1.0, 1.5]) + place).tolist()
    levelled = LevelPlane(sensor=sensor)(cloud)
    height = levelled.coord[:, 2]
    torch.testing.assert_close(height, level[:, 2], atol=0.005, rtol=0)
    torch.testing.assert_close(levelled.get("normal")[:, 2], torch.ones(4500), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.pdist(levelled.coord[::90]), torch.pdist(level[::90]), atol=1e-4, rtol=1e-4)
    below = LevelPlane(sensor=(matrix @ torch.tensor([1.0, 1.0, -1.5]) + place).tolist())(cloud)
    torch.testing.assert_close(below.coord[:, 2], -level[:, 2], atol=0.005, rtol=0)


def test_without_a_plane_nothing_moves() -> None:
    line = Points(torch.arange(30.0)[:, None] * torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(LevelPlane()(line).coord, line.coord)
    with pytest.raises(InputError, match="LevelPlane: distance 0"):
        LevelPlane(distance=0)
