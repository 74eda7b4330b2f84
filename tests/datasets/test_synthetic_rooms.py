"""Rooms by procedure: repeatable, furnished, occluded, with true normals, and no colour gives a class away."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pc3d.config import instantiate
from pc3d.datasets import SyntheticRooms
from pc3d.datasets.synthetic.raycast import Box, Cone, Ellipsoid, Item, Material, Shape, cast
from pc3d.datasets.synthetic.room import CLASSES, Room
from pc3d.errors import InputError

GREY = Material(np.full(3, 128.0))


@pytest.fixture(scope="module")
def rooms() -> SyntheticRooms:
    return SyntheticRooms(train_rooms=8, val_rooms=2, test_rooms=2, points=20_000, seed=5)


# Dataset -------------------------------------------------------------------------------------------------------------


def test_same_seed_same_room_bit_for_bit(rooms: SyntheticRooms) -> None:
    again = SyntheticRooms(train_rooms=1, points=20_000, seed=5)
    first, second = rooms.load("train", 0), again.load("train", 0)
    assert torch.equal(first.coord, second.coord)
    assert all(torch.equal(first.attrs[name], second.attrs[name]) for name in first.attrs)


def test_seed_split_and_number_make_other_rooms(rooms: SyntheticRooms) -> None:
    others = [rooms.load("train", 1), rooms.load("val", 0), SyntheticRooms(points=20_000, seed=6).load("train", 0)]
    size = rooms.load("train", 0).coord.amax(0)
    assert all(not torch.allclose(size, other.coord.amax(0), atol=0.02) for other in others)


def test_what_a_room_holds(rooms: SyntheticRooms) -> None:
    points = rooms.load("train", 0)
    assert 16_000 < points.num_points < 20_000
    assert points.coord.dtype == points.attrs["color"].dtype == torch.float32
    assert points.attrs["segment"].dtype == points.attrs["instance"].dtype == torch.int64
    assert points.attrs["color"].min() >= 0
    assert points.attrs["color"].max() <= 255
    assert torch.allclose(points.attrs["normal"].norm(dim=1), torch.ones(points.num_points), atol=1e-5)
    assert points.meta[0]["name"] == rooms.name("train", 0) == "room_train_0000"


def test_every_class_is_there(rooms: SyntheticRooms) -> None:
    counts = sum(torch.bincount(rooms.load("train", i).get("segment"), minlength=len(CLASSES)) for i in range(8))
    assert rooms.class_names == list(CLASSES)
    assert len(CLASSES) >= 8
    assert counts.min() > 500, dict(zip(CLASSES, counts.tolist(), strict=True))


def test_an_instance_has_one_class_and_holds_together(rooms: SyntheticRooms) -> None:
    points = rooms.load("train", 2)
    for instance in points.attrs["instance"].unique():
        mine = points.attrs["instance"] == instance
        assert len(points.attrs["segment"][mine].unique()) == 1
        if CLASSES[int(points.attrs["segment"][mine][0])] in ("chair", "table", "lamp", "cabinet"):
            assert (points.coord[mine].amax(0) - points.coord[mine].amin(0)).max() < 2.4


def test_points_lie_on_what_their_normals_say(rooms: SyntheticRooms) -> None:
    points = rooms.load("train", 0)
    for name, height, direction in (("floor", points.coord[:, 2].median() * 0, 1.0), ("ceiling", None, -1.0)):
        mine = points.attrs["segment"] == CLASSES.index(name)
        z = points.coord[mine, 2]
        level = z.median() if height is None else height
        assert ((z - level).abs() < 0.05).all()
        assert torch.allclose(points.attrs["normal"][mine], torch.tensor([0.0, 0.0, direction]))


def test_colour_alone_does_not_give_the_class(rooms: SyntheticRooms) -> None:
    """Nearest colours of the other rooms: far below what geometry allows."""
    known, asked = [rooms.load("train", i) for i in range(6)], rooms.load("train", 7)
    color = torch.cat([points.attrs["color"] for points in known])[::20]
    segment = torch.cat([points.attrs["segment"] for points in known])[::20]
    guess = segment[torch.cdist(asked.attrs["color"][::10], color).argmin(1)]
    truth = asked.attrs["segment"][::10]
    accuracy = torch.stack([(guess == truth)[truth == c].float().mean() for c in truth.unique()])
    assert accuracy.mean() < 0.45


def test_fewer_classes(rooms: SyntheticRooms) -> None:
    few = SyntheticRooms(points=20_000, seed=5, classes=["chair", "floor", "table"])
    points = few.load("train", 0)
    assert few.class_names == ["floor", "table", "chair"]
    assert points.attrs["segment"].unique().tolist() == [-1, 0, 1, 2]
    beds = rooms.class_names.index("bed")
    assert (rooms.load("train", 1).attrs["segment"] == beds).any()


def test_config_round_trip_and_fingerprint(rooms: SyntheticRooms) -> None:
    again = instantiate(rooms.to_config())
    assert isinstance(again, SyntheticRooms)
    assert again.fingerprint("val", 1) == rooms.fingerprint("val", 1) != rooms.fingerprint("val", 0)
    assert rooms.to_config()["class_path"] == "pc3d.datasets.SyntheticRooms"


def test_bad_options() -> None:
    with pytest.raises(InputError, match="couch unknown; there are ceiling"):
        SyntheticRooms(classes=["couch"])
    with pytest.raises(InputError, match="points 10"):
        SyntheticRooms(points=10)
    with pytest.raises(InputError, match="SyntheticRooms has no files"):
        SyntheticRooms().relocate("somewhere")


# Room and scanner ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_furniture_stands_inside_and_apart(seed: int) -> None:
    room = Room(np.random.default_rng(seed), list(CLASSES[5:]))
    big = [item for item in room.items[6:] if item.label in ("bed", "sofa", "bookcase", "cabinet", "table")]
    prints = [item.footprint() for item in big]
    for lower, upper in prints:
        assert (np.abs([lower[:2], upper[:2]]) <= room.size[:2] / 2 + 1e-6).all()
    for i, (lower, upper) in enumerate(prints):
        for low, high in prints[:i]:
            assert not ((lower[:2] < high[:2] - 1e-9).all() and (upper[:2] > low[:2] + 1e-9).all())


def test_nothing_hidden_is_seen() -> None:
    """A returned point is the first thing on the line from the scanner: none lies behind a wall or a box."""
    room = Room(np.random.default_rng(3), list(CLASSES[5:]))
    path = room._walk(4)
    scan = room._look(path[0], 4000)
    ray = scan.coord - path[0]
    distance = np.linalg.norm(ray, axis=1)
    first = cast(room.items, path[0], ray / distance[:, None]).distance
    assert np.abs(first - distance).max() < 0.05
    assert ((scan.normal * ray).sum(1) < 0).all()


def test_density_falls_with_distance() -> None:
    rng = np.random.default_rng(0)
    room = Room(rng, [])
    room.items = room.items[:2]
    height = 1.4
    scan = room._look(np.array([0.0, 0.0, height]), 200_000)
    floor = scan.coord[scan.label == CLASSES.index("floor")]
    reach = np.hypot(floor[:, 0], floor[:, 1])
    near = ((reach > 0.8) & (reach < 1.0)).sum() / (1.0**2 - 0.8**2)
    far = ((reach > 1.6) & (reach < 1.65)).sum() / (1.65**2 - 1.6**2)
    assert 2 < near / far < 8


# Shapes --------------------------------------------------------------------------------------------------------------

SHAPES: list[Shape] = [
    Box([-0.5, -0.3, 0.2], [0.5, 0.4, 0.9]),
    Cone([0.1, -0.2, 0.0], 0.4, 0.4, 1.0),
    Cone([0.0, 0.0, 0.3], 0.5, 0.2, 0.6),
    Cone([0.0, 0.0, 0.3], 0.2, 0.6, 0.5),
    Ellipsoid([0.0, 0.1, 0.5], [0.6, 0.3, 0.2]),
]


def _inside(shape: Shape, points: np.ndarray) -> np.ndarray:
    if isinstance(shape, Box):
        return ((points > shape.lower) & (points < shape.upper)).all(1)
    if isinstance(shape, Ellipsoid):
        return (((points - shape.center) / shape.radii) ** 2).sum(1) < 1
    assert isinstance(shape, Cone)
    rise = (points[:, 2] - shape.base[2]) / shape.height
    radius = shape.radius + rise * (shape.top_radius - shape.radius)
    return (rise > 0) & (rise < 1) & (((points - shape.base)[:, :2] ** 2).sum(1) < radius**2)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_ray_enters_where_it_hits(shape: Shape) -> None:
    rng = np.random.default_rng(1)
    origin = np.array([1.7, -1.1, 1.6])
    target = rng.uniform(shape.lower - 0.2, shape.upper + 0.2, (4000, 3))
    ray = (target - origin) / np.linalg.norm(target - origin, axis=1, keepdims=True)
    distance = shape.hit(origin, ray)
    hit = np.isfinite(distance)
    assert 500 < hit.sum() < 4000
    steps = np.linspace(0, 4, 2000)
    line = origin + steps[:, None, None] * ray
    within = np.stack([_inside(shape, points) for points in line])
    assert within[:, ~hit].sum() <= 0.001 * within.size  # steps may graze an edge that the exact ray misses
    first = np.where(within.any(0), steps[within.argmax(0)], np.nan)
    both = hit & within.any(0)
    assert np.abs(first - distance)[both].max() < 0.005
    assert (hit == within.any(0)).mean() > 0.98


@pytest.mark.parametrize("shape", SHAPES)
def test_normals_point_out(shape: Shape) -> None:
    rng = np.random.default_rng(2)
    origin = np.array([-1.5, 1.2, -0.7])
    target = rng.uniform(shape.lower, shape.upper, (2000, 3))
    ray = (target - origin) / np.linalg.norm(target - origin, axis=1, keepdims=True)
    distance = shape.hit(origin, ray)
    points = (origin + distance[:, None] * ray)[np.isfinite(distance)]
    normal = shape.normal(points)
    assert np.allclose(np.linalg.norm(normal, axis=1), 1)
    assert not _inside(shape, points + 1e-4 * normal).any()
    assert _inside(shape, points - 1e-4 * normal).mean() > 0.99  # all but points at a rim


def test_items_turn_and_move() -> None:
    item = Item("table", [(Box([-1, -0.2, 0], [1, 0.2, 0.7]), GREY)], np.array([2.0, 3.0, 0.0]), np.pi / 2)
    lower, upper = item.footprint()
    assert np.allclose(lower, [1.8, 2.0, 0.0])
    assert np.allclose(upper, [2.2, 4.0, 0.7])
    points = np.random.default_rng(0).random((5, 3))
    assert np.allclose(item.to_room(item.to_local(points)), points)
    hits = cast([item], np.array([2.0, 0.0, 0.3]), np.array([[0.0, 1.0, 0.0], [0.0, -1.0, 0.0]]))
    assert np.allclose(hits.distance, [2.0, np.inf])
    assert hits.item.tolist() == [0, -1]
