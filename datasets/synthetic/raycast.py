"""Solid shapes and the rays of a scanner: exact first hits, so that occlusion and 1/r^2 density come by themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
_MISS = np.inf
_NEAR = 1e-3  # metres; hits closer than this are the surface a ray starts on


class Shape(Protocol):
    """A convex solid in its item's frame."""

    lower: Array
    upper: Array

    def hit(self, origin: Array, direction: Array) -> Array:
        """``(R,)`` distance along each ``(R, 3)`` unit direction from ``origin`` (3,), inf where the ray misses."""
        ...

    def normal(self, points: Array) -> Array:
        """``(R, 3)`` outward unit normals at points on the surface."""
        ...


class Box:
    """An axis-aligned box between two corners (metres)."""

    def __init__(self, lower: ArrayLike, upper: ArrayLike) -> None:
        self.lower, self.upper = np.asarray(lower, float), np.asarray(upper, float)

    def span(self, origin: Array, direction: Array) -> tuple[Array, Array]:
        """Distances at which each ray enters and leaves the box; enter > leave where it misses."""
        with np.errstate(divide="ignore", invalid="ignore"):
            first, second = (self.lower - origin) / direction, (self.upper - origin) / direction
        enter, leave = np.fmin(first, second).T, np.fmax(first, second).T
        return np.maximum(np.maximum(enter[0], enter[1]), enter[2]), np.minimum(
            np.minimum(leave[0], leave[1]), leave[2]
        )

    def hit(self, origin: Array, direction: Array) -> Array:
        enter, leave = self.span(origin, direction)
        return np.where((enter <= leave) & (enter > _NEAR), enter, _MISS)

    def normal(self, points: Array) -> Array:
        center, half = (self.lower + self.upper) / 2, (self.upper - self.lower) / 2
        offset = points - center
        axis = np.abs(np.abs(offset) - half).argmin(1)
        rows = np.arange(len(points))
        normals = np.zeros_like(points)
        normals[rows, axis] = np.sign(offset[rows, axis])
        return normals


class Cone:
    """An upright truncated cone (a cylinder if both radii agree) standing at ``base``."""

    def __init__(self, base: ArrayLike, radius: float, top_radius: float, height: float) -> None:
        self.base, self.radius, self.top_radius, self.height = np.asarray(base, float), radius, top_radius, height
        widest = max(radius, top_radius)
        self.lower = self.base - np.array([widest, widest, 0])
        self.upper = self.base + np.array([widest, widest, height])
        self._slope = (top_radius - radius) / height

    def hit(self, origin: Array, direction: Array) -> Array:
        start = origin - self.base
        return np.fmin(self._hit_side(start, direction), self._hit_caps(start, direction))

    def _hit_side(self, start: Array, direction: Array) -> Array:
        radius = self.radius + self._slope * start[2]
        a = direction[:, 0] ** 2 + direction[:, 1] ** 2 - (self._slope * direction[:, 2]) ** 2
        b = direction[:, 0] * start[0] + direction[:, 1] * start[1] - self._slope * direction[:, 2] * radius
        c = start[0] ** 2 + start[1] ** 2 - radius**2
        best = np.full(len(direction), _MISS)
        with np.errstate(divide="ignore", invalid="ignore"):
            root = np.sqrt(b * b - a * c)
            for distance in ((-b - root) / a, (-b + root) / a):
                z = start[2] + distance * direction[:, 2]
                valid = (distance > _NEAR) & (z >= 0) & (z <= self.height)
                best = np.where(valid & (distance < best), distance, best)
        return best

    def _hit_caps(self, start: Array, direction: Array) -> Array:
        best = np.full(len(direction), _MISS)
        for level, radius in ((0.0, self.radius), (self.height, self.top_radius)):
            with np.errstate(divide="ignore", invalid="ignore"):
                distance = (level - start[2]) / direction[:, 2]
                at = start[:2] + distance[:, None] * direction[:, :2]
                valid = (distance > _NEAR) & ((at**2).sum(1) <= radius**2)
            best = np.where(valid & (distance < best), distance, best)
        return best

    def normal(self, points: Array) -> Array:
        offset = points - self.base
        reach = np.hypot(offset[:, 0], offset[:, 1])
        side = np.stack([offset[:, 0], offset[:, 1], -self._slope * reach], 1)
        side /= np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-12)
        # A point on a cap lies well inside the side surface, except at the very edge, where either normal is right.
        on_side = np.abs(reach - (self.radius + self._slope * offset[:, 2])) < 1e-6
        caps = np.zeros_like(points)
        caps[:, 2] = np.where(offset[:, 2] > self.height / 2, 1.0, -1.0)
        return np.where(on_side[:, None], side, caps)


class Ellipsoid:
    """An axis-aligned ellipsoid (cushions, bulbs)."""

    def __init__(self, center: ArrayLike, radii: ArrayLike) -> None:
        self.center, self.radii = np.asarray(center, float), np.asarray(radii, float)
        self.lower, self.upper = self.center - self.radii, self.center + self.radii

    def hit(self, origin: Array, direction: Array) -> Array:
        start, ray = (origin - self.center) / self.radii, direction / self.radii
        a, b, c = (ray * ray).sum(1), (ray * start).sum(1), (start * start).sum() - 1
        with np.errstate(invalid="ignore"):
            distance = (-b - np.sqrt(b * b - a * c)) / a
        return np.where(distance > _NEAR, distance, _MISS)

    def normal(self, points: Array) -> Array:
        gradient = (points - self.center) / self.radii**2
        return gradient / np.linalg.norm(gradient, axis=1, keepdims=True)


@dataclass
class Material:
    """Colour and texture of a surface.

    Attributes:
        color: red, green, blue of 0..255.
        texture: ``plain``, ``wood`` (grain along the longest side), ``checker`` (tiles), ``stripes`` or ``speckle``.
        second: the other colour of a texture.
        scale: size of its pattern in metres.
        returns: share of rays that come back (glass lets most of them through).
    """

    color: Array
    texture: str = "plain"
    second: Array | None = None
    scale: float = 0.1
    returns: float = 1.0


@dataclass
class Item:
    """A thing in the room: parts in its own frame (origin on the floor, front along -y), then turned and moved."""

    label: str
    parts: list[tuple[Shape, Material]]
    position: Array = field(default_factory=lambda: np.zeros(3))
    yaw: float = 0.0

    @property
    def bounds(self) -> Box:
        """Box around all parts, in the item's frame."""
        return Box(
            np.min([shape.lower for shape, _ in self.parts], axis=0),
            np.max([shape.upper for shape, _ in self.parts], axis=0),
        )

    def to_local(self, points: Array) -> Array:
        return _turn(points - self.position, -self.yaw)

    def to_room(self, points: Array) -> Array:
        return _turn(points, self.yaw) + self.position

    def footprint(self) -> tuple[Array, Array]:
        """Lower and upper (x, y, z) corner of the item in the room."""
        bounds = self.bounds
        corners = np.array(
            [[x, y, 0] for x in (bounds.lower[0], bounds.upper[0]) for y in (bounds.lower[1], bounds.upper[1])]
        )
        placed = self.to_room(corners)
        lower, upper = placed.min(0), placed.max(0)
        lower[2], upper[2] = self.position[2] + bounds.lower[2], self.position[2] + bounds.upper[2]
        return lower, upper


@dataclass
class Hits:
    """First hits of ``R`` rays on a list of items.

    Attributes:
        distance: ``(R,)`` metres, inf for a miss.
        item: ``(R,)`` int64 number of the item, -1 for a miss.
        part: ``(R,)`` int64 number of the part within it.
    """

    distance: Array
    item: NDArray[np.int64]
    part: NDArray[np.int64]


def cast(items: list[Item], origin: Array, direction: Array) -> Hits:
    """First hit of each ray.

    Args:
        items: what can be hit.
        origin: ``(3,)`` position of the scanner.
        direction: ``(R, 3)`` unit vectors.
    """
    rays = len(direction)
    hits = Hits(np.full(rays, _MISS), np.full(rays, -1, np.int64), np.full(rays, -1, np.int64))
    for number, item in enumerate(items):
        start, ray = item.to_local(origin[None])[0], _turn(direction, -item.yaw)
        enter, leave = item.bounds.span(start, ray)
        rows = np.flatnonzero((enter <= leave) & (leave > _NEAR) & (enter < hits.distance))
        if not len(rows):
            continue
        near = ray[rows]
        for part, (shape, _) in enumerate(item.parts):
            distance = shape.hit(start, near)
            closer = distance < hits.distance[rows]
            better = rows[closer]
            hits.distance[better], hits.item[better], hits.part[better] = distance[closer], number, part
    return hits


def _turn(vectors: Array, yaw: float) -> Array:
    """Rotate ``(N, 3)`` vectors about z by ``yaw`` radians."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    x, y = vectors[:, 0], vectors[:, 1]
    return np.stack([cos * x - sin * y, sin * x + cos * y, vectors[:, 2]], 1)
