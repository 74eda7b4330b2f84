"""Corruptions of the robustness benchmarks: how many points, how strong, and what they look like."""

from __future__ import annotations

import math

import pytest
import torch
from clouds import seeded
from torch import Tensor
from torch.nn import functional as F

from pc3d import InputError, Points
from pc3d.data.boxes import add_boxes
from pc3d.data.transforms import Corrupt
from pc3d.data.transforms import corruptions as C
from pc3d.data.transforms.corruptions import KINDS, severities

# Points that the published generators give for clouds of 2,048, severity after severity.
COUNTS = {
    "lidar": [768] * 5,
    "density": [949, 874, 799, 724, 649],
    "cutout": [964, 934, 874, 814, 724],
    "upsampling": [1228, 1280, 1365, 1536, 2048],
    "background": [1046, 1049, 1053, 1058, 1075],
    "dropout_global": [768, 640, 512, 384, 256],
    "dropout_local": [924, 824, 724, 624, 524],
    "add_global": [1034, 1044, 1054, 1064, 1074],
    "add_local": [1124, 1224, 1324, 1424, 1524],
}


def object_cloud(points: int = 2048, seed: int = 0) -> Points:
    """The surface of an ellipsoid, in the unit sphere, each point with its number."""
    coord = F.normalize(torch.randn(points, 3, generator=seeded(seed)), dim=1) * torch.tensor([1.0, 0.7, 0.5])
    coord = coord - coord.mean(0)
    coord = coord / coord.norm(dim=1).amax()
    return Points(coord, attrs={"id": torch.arange(points), "normal": coord}, meta=[{"name": "ellipsoid"}])


def before_and_after(kind: str, severity: int) -> tuple[Tensor, Tensor]:
    """Where the points of a corrupted cloud were, and are, float64; made-up ones where their origin was."""
    cloud = object_cloud()
    made = Corrupt(kind, severity)(cloud, seeded(severity))
    return cloud.coord[made.get("id")].double(), made.coord.double()


def affine(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """``(3, 3)`` matrix and ``(3,)`` shift that lead from one to the other."""
    solution = torch.linalg.lstsq(F.pad(before, (0, 1), value=1.0), after).solution
    return solution[:3], solution[3]


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_points_are_the_published_ones(kind: str) -> None:
    made = [Corrupt(kind, severity)(object_cloud(), seeded(1)) for severity in severities(kind)]
    assert [cloud.num_points for cloud in made] == COUNTS.get(kind, [1024] * 5)
    for cloud in made:
        assert cloud.coord.dtype == torch.float32
        assert set(cloud.attrs) == {"id"}
        assert cloud.coord.abs().max() <= (1.25 if kind in ("lidar", "jitter") else 1 + 1e-6)
    assert not torch.equal(made[0].coord, Corrupt(kind, severities(kind)[0])(object_cloud(), seeded(2)).coord)


@pytest.mark.parametrize("kind", KINDS)
def test_size_and_place_of_a_cloud_do_not_matter(kind: str) -> None:
    small = object_cloud()
    shift = torch.tensor([10.0, -20, 5])
    large = add_boxes(small.with_attrs(coord=small.coord * 4 + shift), torch.ones(1, 7), ["thing"])
    severity = severities(kind)[2]
    expected, made = (Corrupt(kind, severity)(cloud, seeded(3)) for cloud in (small, large))
    assert torch.equal(made.get("id"), expected.get("id"))
    torch.testing.assert_close((made.coord - shift) / 4, expected.coord, rtol=0, atol=2e-4)
    assert "boxes" not in made.meta[0]


def test_a_clean_cloud_is_only_reduced() -> None:
    cloud = object_cloud()
    made = Corrupt("clean", 0, points=100)(cloud, seeded())
    assert len(made.get("id").unique()) == 100
    torch.testing.assert_close(made.coord, cloud.coord[made.get("id")], rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("points", [1, 2, 5, 40])
def test_few_and_equal_points(kind: str, points: int) -> None:
    for coord in (torch.rand(points, 3, generator=seeded()), torch.ones(points, 3)):
        made = Corrupt(kind, severities(kind)[-1])(Points(coord), seeded())
        assert made.num_points > 0
        assert made.coord.isfinite().all()


@pytest.mark.parametrize(("kind", "sigmas"), [
    ("gaussian", [0.01, 0.015, 0.02, 0.025, 0.03]), ("jitter", [0.01, 0.02, 0.03, 0.04, 0.05]),
])  # fmt: skip
def test_normal_noise(kind: str, sigmas: list[float]) -> None:
    for severity, sigma in zip(severities(kind), sigmas, strict=True):
        before, after = before_and_after(kind, severity)
        moved = after - before
        assert moved[before.abs() < 0.8].std().item() == pytest.approx(sigma, rel=0.05)
        assert kind == "jitter" or after.abs().max() <= 1 + 1e-6


def test_uniform_noise() -> None:
    for severity in range(1, 6):
        before, after = before_and_after("uniform", severity)
        matrix, shift = affine(before, after)
        moved = (after - before @ matrix - shift) / matrix.diagonal().mean()
        assert moved.abs().max().item() == pytest.approx(0.01 * severity, rel=0.1)
        assert moved.std().item() == pytest.approx(0.01 * severity / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize(("severity", "count"), [(1, 34), (2, 40), (3, 51), (4, 68), (5, 102)])
def test_impulses(severity: int, count: int) -> None:
    before, after = before_and_after("impulse", severity)
    size = (after.amax(0) - after.amin(0)).amax() / 2
    assert size.item() == pytest.approx(1)
    ratio = (after.diff(dim=0) / before.diff(dim=0)).median()  # most points keep their distances
    offset = (after - before * ratio).median(0).values
    moved = (after - before * ratio - offset) / ratio
    jumped = moved.abs().amax(1) > 1e-3
    assert jumped.sum() == count
    assert torch.allclose(moved[jumped].abs(), torch.tensor(0.1, dtype=torch.float64), atol=1e-4)
    assert len(moved[jumped].sign().unique(dim=0)) == 8


def test_added_points() -> None:
    for severity in range(1, 6):
        before, after = before_and_after("upsampling", severity)
        distance = torch.cdist(after, after).fill_diagonal_(math.inf).amin(1)
        assert distance.median() < 0.1
    before, after = before_and_after("background", 5)
    matrix, shift = affine(*(each[(before - after).norm(dim=1) < 0.3] for each in (before, after)))
    strangers = (after - (before @ matrix + shift)).norm(dim=1) > 0.05
    assert 40 <= strangers.sum() <= 51
    assert (after[strangers].std(0) > 0.4).all()  # of U(-1, 1): 0.58
    for severity in range(5):
        before, after = before_and_after("add_global", severity)
        added = after[(before - after).norm(dim=1) > 1e-6]
        assert len(added) == 10 * (severity + 1)
        assert (added.norm(dim=1) <= 1).all()
        before, after = before_and_after("add_local", severity)
        moved = (before - after).norm(dim=1)
        added = moved > 1e-6
        assert added.sum() == 100 * (severity + 1)
        assert len(before[added].unique(dim=0)) <= 7
        assert (after[added].norm(dim=1) <= 1).all()
        assert 0.075 < moved[added].square().mean().div(3).sqrt() < 0.125


@pytest.mark.parametrize("kind", ["cutout", "density", "dropout_local"])
def test_points_are_lost_in_places(kind: str) -> None:
    cloud = object_cloud(1024)
    kept = Corrupt(kind, severities(kind)[2])(cloud, seeded(4)).get("id")
    lost = torch.ones(1024, dtype=torch.bool).index_fill(0, kept, False)
    near = torch.cdist(cloud.coord, cloud.coord).topk(9, largest=False).indices[:, 1:]
    share = lost[near[lost]].float().mean()  # of the neighbours of lost points
    assert share > 2 * lost.float().mean()


def test_denser_places_keep_what_others_lose() -> None:
    cloud = object_cloud()
    rows = Corrupt("density_inc", 4)(cloud, seeded(4)).get("id")
    taken = rows.bincount(minlength=2048)
    near = torch.cdist(cloud.coord, cloud.coord).topk(21, largest=False).indices
    complete = (taken[near] > 0).all(1)
    assert 100 < complete.sum() < 400
    assert (taken > 1).sum() > 50  # the rest is drawn with repeats
    assert len(Corrupt("density_inc", 4, points=4096)(cloud, seeded(4)).get("id")) == 1024


def test_rotations() -> None:
    for severity, degrees in enumerate((2.5, 5, 7.5, 10, 15), start=1):
        matrix, _ = affine(*before_and_after("rotation", severity))
        turn = matrix / matrix.det() ** (1 / 3)
        assert torch.allclose(turn @ turn.T, torch.eye(3).double(), atol=1e-5)
        y = torch.asin(turn[0, 2])  # of x @ y @ z, for rows of coordinates
        angles = torch.stack([torch.atan2(-turn[1, 2], turn[2, 2]), y, torch.atan2(-turn[0, 1], turn[0, 0])])
        assert ((angles.rad2deg().abs() - degrees).abs() < 2.5 + 1e-3).all()
    for severity in range(5):
        turn, _ = affine(*before_and_after("rotate", severity))
        assert torch.allclose(turn @ turn.T, torch.eye(3).double(), atol=1e-5)
        y = torch.asin(-turn[2, 0])  # of z @ y @ x
        angles = torch.stack([torch.atan2(turn[2, 1], turn[2, 2]), y, torch.atan2(turn[1, 0], turn[0, 0])])
        assert angles.rad2deg().abs().amax() <= 6 * (severity + 1)


def test_shear_and_scale() -> None:
    for severity in range(1, 6):
        matrix, _ = affine(*before_and_after("shear", severity))
        matrix = matrix / matrix[0, 0]
        assert torch.allclose(matrix.diagonal(), torch.ones(3).double(), atol=1e-5)
        assert matrix[0, 1].abs() < 1e-5
        assert matrix[2, 1].abs() < 1e-5
        shares = matrix[[0, 1, 1, 2], [2, 0, 2, 0]].abs()
        assert ((shares - 0.05 * severity).abs() < 0.05 + 1e-5).all()
    for severity in range(5):
        before, after = before_and_after("scale", severity)
        matrix, _ = affine(before, after)
        factors = matrix.diagonal()
        assert torch.allclose(matrix, factors.diag(), atol=1e-5)
        assert 1.01 < factors.max() / factors.min() <= (1.6 + 0.1 * severity) ** 2
        assert after.norm(dim=1).amax().item() == pytest.approx(1, abs=1e-6)


def test_control_points_of_distortions_move_as_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(C, "_fitted", lambda coord, fit: coord)
    line = torch.linspace(-1, 1, 5, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line, line)
    for kind in ("distortion_rbf", "distortion_rbf_inv"):
        for length in (0.025, 0.125):
            moved, _ = C._KINDS[kind].change(grid, length, C._Draw(seeded(1), grid))
            norm = (moved - grid).norm(dim=1)
            assert torch.allclose(norm, torch.tensor(length).double(), atol=1e-8)
            between, _ = C._KINDS[kind].change(grid[:50] * 0.9, length, C._Draw(seeded(1), grid))
            assert 0 < (between - grid[:50] * 0.9).norm(dim=1).max() < 3 * length
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1]).double()] * 3)
    moved, _ = C._KINDS["distortion"].change(corners, 0.3, C._Draw(seeded(2), corners))
    shift = C._Draw(seeded(2), corners).uniform(-0.3, 0.3, 5, 5, 5, 3)[::4, ::4, ::4].reshape(8, 3)
    assert torch.allclose(moved, corners + 2 * shift)  # Bernstein polynomials pass through the corners
    middle, _ = C._KINDS["distortion"].change(corners * 0, 0.3, C._Draw(seeded(2), corners))
    weights = torch.tensor([1, 4, 6, 4, 1]).double() / 16
    drawn = C._Draw(seeded(2), corners).uniform(-0.3, 0.3, 5, 5, 5, 3)
    expected = 2 * torch.einsum("i,j,k,ijkc->c", weights, weights, weights, drawn)
    assert torch.allclose(middle, expected.expand(8, 3))


def test_the_far_side_is_hidden() -> None:
    sphere = F.normalize(torch.randn(4000, 3, dtype=torch.float64, generator=seeded(0)), dim=1)
    eye = torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64)
    seen = torch.zeros(4000, dtype=torch.bool).index_fill(0, C.visible(sphere, eye), True)
    truly = sphere @ eye > 1
    assert seen[truly].float().mean() > 0.99
    assert seen[~truly].float().mean() < 0.06
    wall = torch.cartesian_prod(torch.linspace(-1, 1, 30), torch.linspace(-1, 1, 30), torch.tensor([0.0, 0.5])).double()
    rows = C.visible(wall, torch.tensor([0.1, 0.2, 4.0]).double())
    assert (wall[rows, 2] == 0.5).float().mean() > 0.8
    assert len(C.visible(sphere[:2], eye)) == 2


@pytest.mark.parametrize("up", ["y", "z"])
def test_views_look_from_above_and_from_five_sides(up: C.UpAxis) -> None:
    axis = "xyz".index(up)
    ball = Points(F.normalize(torch.randn(8000, 3, generator=seeded(0)), dim=1), attrs={"id": torch.arange(8000)})
    directions = []
    for side in range(1, 6):
        made = Corrupt("occlusion", side, up=up)(ball, seeded(side))
        rows = made.get("id")
        assert made.num_points == 1024 == len(rows.unique())
        direction = F.normalize(ball.coord[rows].mean(0), dim=0)
        assert 0.45 < direction[axis] < 0.9  # 30 to 60 degrees
        directions.append(math.atan2(direction[(axis + 2) % 3], direction[(axis + 1) % 3]))
    assert len({round((d / (2 * math.pi / 5)) % 5) % 5 for d in directions}) == 5


def test_lidar_points_lie_on_rings() -> None:
    ball = Points(F.normalize(torch.randn(8000, 3, generator=seeded(0)), dim=1), attrs={"id": torch.arange(8000)})
    rays = ball.coord.double() - torch.tensor([4.0, 0, 2])
    on_rings, hit = C._on_rings(rays)
    assert torch.allclose(on_rings.norm(dim=1), rays[hit].norm(dim=1))
    polar = torch.rad2deg(torch.atan2(on_rings[:, :2].norm(dim=1), on_rings[:, 2]))
    lowest = torch.rad2deg(torch.atan2(rays[:, :2].norm(dim=1), rays[:, 2])).min()
    place = polar - lowest
    assert torch.allclose(place % 1, torch.tensor(0.5).double(), atol=1e-6)
    assert 10 < len(place.round().unique()) < 60
    assert 0.4 < len(hit) / len(rays) < 0.6
    made = Corrupt("lidar", 2)(ball, seeded(1))
    assert made.num_points == 768
    height = F.normalize(ball.coord[made.get("id")].mean(0), dim=0)[2]
    assert height == pytest.approx(math.sin(math.radians(22.5)), abs=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corruption": "fog", "severity": 1}, "'fog' is none of clean, occlusion"),
        ({"corruption": "impulse", "severity": 0}, "0 of impulse is not 1 to 5"),
        ({"corruption": "rotate", "severity": 5}, "5 of rotate is not 0 to 4"),
        ({"corruption": "rotate", "severity": 1, "points": 0}, "points 0"),
        ({"corruption": "rotate", "severity": 1, "up": "x"}, "up 'x'"),
    ],
)
def test_what_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Corrupt(**options)
