"""Streets with cars, pedestrians and cyclists, as the LiDAR on the roof of a car sees what lies ahead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pc3d.datasets.synthetic.raycast import Array, Box, Cone, Ellipsoid, Item, Material, Shape, cast
from pc3d.ops.boxes import rectangle_intersection

Rng = np.random.Generator
Parts = list[tuple[Shape, Material]]

SENSOR_HEIGHT = 1.73  # metres, of KITTI's scanner
_RANGE = 60.0  # metres
_BEAMS = np.radians(np.linspace(2.0, -24.8, 64))
_AZIMUTHS = np.radians(np.arange(-43, 43, 0.25))
_NOISE = 0.015  # metres, standard deviation of a measured distance
_LOST = 0.1  # share of rays that never come back
_ROAD, _WALK = 6.5, 10.0  # metres from the middle to the kerb, and to the fronts of the houses
_KERB = 0.12  # metres, height of the sidewalk
_CLEARANCE = 0.4  # metres around an object where no other may stand
_MOST_TRIES = 20


class Size(NamedTuple):
    """Lowest and highest length, width and height of a kind in metres."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]


SIZES = {
    "Car": Size((3.5, 1.5, 1.42), (4.4, 1.75, 1.65)),
    "Van": Size((4.6, 1.8, 1.9), (5.4, 2.0, 2.3)),
    "Pedestrian": Size((0.6, 0.5, 1.6), (0.95, 0.7, 1.85)),
    "Cyclist": Size((1.65, 0.5, 1.65), (1.85, 0.65, 1.8)),
}
_COUNTS = {"Car": (3, 10), "Van": (0, 2), "Pedestrian": (2, 7), "Cyclist": (1, 5)}  # of a street, the last excluded


@dataclass
class Sweep:
    """What one turn of the scanner gives, in its own frame.

    Attributes:
        coord: ``(N, 3)`` metres.
        strength: ``(N,)`` reflectance of 0..1.
        boxes: ``(M, 7)`` x y z dx dy dz heading of the objects.
        names: kind of each.
        visible: ``(M,)`` share of the rays towards each object that nothing else stops.
        hits: ``(M,)`` int64 points on each.
    """

    coord: Array
    strength: Array
    boxes: Array
    names: list[str]
    visible: Array
    hits: NDArray[np.int64]


def sweep(rng: Rng) -> Sweep:
    """Draw a street and scan it."""
    names, boxes = _places(rng)
    objects = [_object(rng, name, box) for name, box in zip(names, boxes, strict=True)]
    items = [*objects, *_surroundings(rng)]
    origin, direction = np.array([0.0, 0.0, SENSOR_HEIGHT]), _rays()
    found = cast(items, origin, direction)
    towards = np.array([np.isfinite(cast([item], origin, direction).distance).sum() for item in objects])
    reached = np.bincount(found.item[found.item >= 0], minlength=len(items))[: len(objects)]
    kept = (found.distance < _RANGE) & (rng.random(len(direction)) > _LOST)
    own, part = found.item[kept], found.part[kept]
    distance = found.distance[kept] + _NOISE * rng.standard_normal(len(own))
    table = np.zeros((len(items), max(len(item.parts) for item in items)))
    for row, item in zip(table, items, strict=True):
        row[: len(item.parts)] = [material.color.mean() / 255 for _, material in item.parts]
    strength = (table[own, part] + 0.04 * rng.standard_normal(len(own))).clip(0, 0.99)
    boxes[:, 2] -= SENSOR_HEIGHT
    hits = np.bincount(own, minlength=len(items))[: len(objects)]
    return Sweep(direction[kept] * distance[:, None], strength, boxes, names, reached / np.maximum(towards, 1), hits)


def _rays() -> Array:
    """``(R, 3)`` unit vectors, beam after beam."""
    elevation, azimuth = (angle.reshape(-1) for angle in np.meshgrid(_BEAMS, _AZIMUTHS, indexing="ij"))
    flat = np.cos(elevation)
    return np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)], 1)


# Objects ------------------------------------------------------------------------------------------------------------


def _places(rng: Rng) -> tuple[list[str], Array]:
    """Names and boxes ``(M, 7)`` of objects that stand apart; z counts from the ground."""
    names: list[str] = []
    boxes = np.zeros((0, 7))
    for name, (least, most) in _COUNTS.items():
        for _ in range(rng.integers(least, most)):
            for _ in range(_MOST_TRIES):
                box = _place(rng, name)
                wide = torch.from_numpy(np.vstack([boxes, box])[:, [0, 1, 3, 4, 6]])
                wide[:, 2:4] += _CLEARANCE
                if not rectangle_intersection(wide[-1:], wide[:-1]).any():
                    names.append(name)
                    boxes = np.vstack([boxes, box])
                    break
    return names, boxes


def _place(rng: Rng, name: str) -> Array:
    """``(7,)`` box of a new object."""
    size = rng.uniform(*SIZES[name])
    side = rng.choice([-1, 1])
    x = rng.uniform(6, 40)
    if name in ("Car", "Van"):  # they drive on the right, park at the kerb, or cross
        lane, crosses = rng.choice([1.8, 5.2]), rng.random() < 0.15
        along = rng.choice([-1, 1]) * np.pi / 2 if crosses else 0.0 if side < 0 else np.pi
        y, heading = side * lane + rng.normal(0, 0.2), along + rng.normal(0, 0.06)
    elif name == "Cyclist":
        y, heading = side * rng.uniform(2.5, 6.0), (0.0 if side < 0 else np.pi) + rng.normal(0, 0.2)
    else:
        y, heading = side * rng.uniform(_ROAD, _WALK - 0.6), rng.uniform(-np.pi, np.pi)
    ground = _KERB if abs(y) > _ROAD else 0.0
    return np.array([x, y, ground + size[2] / 2, *size, heading])


def _object(rng: Rng, name: str, box: Array) -> Item:
    parts = {"Car": _car, "Van": _van, "Pedestrian": _pedestrian, "Cyclist": _cyclist}[name](rng, *box[3:6])
    return Item(name, parts, np.array([box[0], box[1], box[2] - box[5] / 2]), box[6])


def _reflecting(share: float) -> Material:
    return Material(np.full(3, 255.0 * share))


def _block(x: tuple[float, float], width: float, z: tuple[float, float]) -> Box:
    return Box([x[0], -width / 2, z[0]], [x[1], width / 2, z[1]])


def _wheels(length: float, width: float) -> Parts:
    rubber = _reflecting(0.08)
    places = [(-0.32 * length, 1.0), (0.32 * length, 1.0), (-0.32 * length, -1.0), (0.32 * length, -1.0)]
    return [
        (Box([x - 0.3, y * width / 2 - 0.1, 0], [x + 0.3, y * width / 2 + 0.1, 0.55]), rubber)
        for x, side in places
        for y in (side * 0.85,)
    ]


def _car(rng: Rng, length: float, width: float, height: float) -> Parts:
    """Body, and a cabin that stands behind the middle: the front can be told from the back."""
    paint, glass = _reflecting(rng.uniform(0.25, 0.8)), _reflecting(0.1)
    body = _block((-length / 2, length / 2), width, (0.25, 0.55 * height))
    cabin = _block((-0.42 * length, 0.12 * length), 0.86 * width, (0.55 * height, height))
    return [(body, paint), (cabin, glass), *_wheels(length, width)]


def _van(rng: Rng, length: float, width: float, height: float) -> Parts:
    paint = _reflecting(rng.uniform(0.4, 0.8))
    box, nose = (
        _block((-length / 2, 0.32 * length), width, (0.3, height)),
        _block((0.32 * length, length / 2), width, (0.3, 0.55 * height)),
    )
    return [(box, paint), (nose, paint), *_wheels(length, width)]


def _pedestrian(rng: Rng, length: float, width: float, height: float) -> Parts:
    cloth, skin = _reflecting(rng.uniform(0.1, 0.5)), _reflecting(0.35)
    stride, hips = 0.5 * length - 0.12, 0.48 * height
    legs: Parts = [(Cone([side * stride * 0.7, side * 0.1, 0], 0.08, 0.11, hips), cloth) for side in (-1.0, 1.0)]
    torso = Ellipsoid([0, 0, 0.66 * height], [0.5 * length * 0.55, width / 2 * 0.9, 0.22 * height])
    head = Ellipsoid([0.03, 0, 0.93 * height], [0.11, 0.09, 0.07 * height])
    return [*legs, (torso, cloth), (head, skin)]


def _cyclist(rng: Rng, length: float, width: float, height: float) -> Parts:
    """A rider who leans forward, above the rear half of a frame between two wheels."""
    cloth, metal = _reflecting(rng.uniform(0.1, 0.6)), _reflecting(0.5)
    wheels: Parts = [
        (_block((x - 0.33, x + 0.33), 0.06, (0, 0.66)), metal) for x in (0.33 - length / 2, length / 2 - 0.33)
    ]
    frame = _block((-0.3 * length, 0.3 * length), 0.08, (0.4, 0.8))
    bar = Box([0.26 * length, -width / 2, 0.92], [0.3 * length, width / 2, 1.0])
    legs = Cone([-0.05 * length, 0, 0.25], 0.1, 0.17, 0.7)
    torso = Ellipsoid([-0.04 * length, 0, 0.7 * height], [0.28, 0.42 * width, 0.2 * height])
    head = Ellipsoid([0.08 * length, 0, 0.94 * height], [0.12, 0.1, 0.06 * height])
    return [*wheels, (frame, metal), (bar, metal), (legs, cloth), (torso, cloth), (head, _reflecting(0.35))]


# Surroundings -------------------------------------------------------------------------------------------------------


def _surroundings(rng: Rng) -> list[Item]:
    """Road, kerbs, houses with gaps between, poles, trees, hedges and bins."""
    items = [Item("road", [(Box([-5, -80, -1], [80, 80, 0]), _reflecting(0.2))])]
    for side in (-1.0, 1.0):
        walk = Box([-5, min(side * _ROAD, side * 30), 0], [80, max(side * _ROAD, side * 30), _KERB])
        items.append(Item("sidewalk", [(walk, _reflecting(0.28))]))
        x = rng.uniform(-4, 4)
        while x < 60:
            length, front = rng.uniform(6, 16), _WALK + rng.uniform(0, 2.5)
            low, high = sorted((side * front, side * (front + 8)))
            house = Box([x, low, 0], [x + length, high, rng.uniform(4, 11)])
            items.append(Item("house", [(house, _reflecting(rng.uniform(0.15, 0.4)))]))
            x += length + rng.choice([0.0, rng.uniform(2, 8)])
        for _ in range(rng.integers(3, 8)):
            place = np.array([rng.uniform(5, 50), side * rng.uniform(_ROAD + 0.4, _WALK - 0.4), 0.0])
            items.append(Item("clutter", _clutter(rng), place))
    return items


def _clutter(rng: Rng) -> Parts:
    kind = rng.integers(4)
    if kind == 0:
        return [(Cone([0, 0, 0], 0.07, 0.06, rng.uniform(2, 6)), _reflecting(0.5))]
    if kind == 1:
        trunk, crown = Cone([0, 0, 0], 0.2, 0.14, 2.4), Ellipsoid([0, 0, 3.6], rng.uniform(1.0, 1.6, 3))
        return [(trunk, _reflecting(0.25)), (crown, _reflecting(0.35))]
    if kind == 2:
        return [(_block((-1.2, 1.2), 0.6, (0, rng.uniform(0.7, 1.3))), _reflecting(0.35))]
    return [(_block((-0.3, 0.3), 0.6, (0, rng.uniform(0.9, 1.2))), _reflecting(0.4))]
