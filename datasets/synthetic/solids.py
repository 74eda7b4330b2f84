"""Solids with exact surfaces and insides: spheres, boxes, tori and unions of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from pc3d.datasets.synthetic.shapes import Array, Rng, Surface, Vector, block, ellipsoid


@dataclass(frozen=True)
class Solid:
    """A surface, and ``inside(points)``: which of ``(n, 3)`` points it encloses."""

    surface: Surface
    inside: Callable[[Array], Array]

    def moved(self, rotation: Array, scale: float, shift: Array) -> Solid:
        """The solid after ``scale * rotation @ p + shift``."""

        def sample(n: int, rng: Rng) -> tuple[Array, Array]:
            points, normals = self.surface.sample(n, rng)
            return scale * points @ rotation.T + shift, normals @ rotation.T

        surface = Surface(self.surface.area * scale**2, sample)
        return Solid(surface, lambda points: self.inside((points - shift) @ rotation / scale))


def sphere(rng: Rng) -> Solid:
    """Of radius 1."""
    return Solid(ellipsoid((0, 0, 0), (1, 1, 1)), lambda p: (p**2).sum(1) <= 1)


def cuboid(sides: Vector) -> Solid:
    """A box about the origin."""

    def inside(points: Array) -> Array:
        return np.all(np.abs(points) <= np.array(sides) / 2, axis=1)

    return Solid(block((0, 0, 0), sides), inside)


def box(rng: Rng) -> Solid:
    """Sides of 0.8 to 2."""
    return cuboid(rng.uniform(0.8, 2, 3).tolist())


def torus(rng: Rng) -> Solid:
    """Of radius 1 about z, 0.3 to 0.5 thick."""
    thick = rng.uniform(0.3, 0.5)

    def sample(n: int, rng: Rng) -> tuple[Array, Array]:
        around, across = rng.uniform(0, 2 * np.pi, (2, 0))
        while len(around) < n:  # the outer side is longer: places are kept in proportion
            turn = rng.uniform(0, 2 * np.pi, (2, 2 * n))
            kept = rng.random(2 * n) * (1 + thick) < 1 + thick * np.cos(turn[1])
            around, across = np.append(around, turn[0, kept]), np.append(across, turn[1, kept])
        around, across = around[:n], across[:n]
        out = np.stack([np.cos(around), np.sin(around), np.zeros(n)], 1)
        normal = np.cos(across)[:, None] * out + np.sin(across)[:, None] * np.array([0, 0, 1])
        return out + thick * normal, normal

    def inside(points: Array) -> Array:
        return (np.linalg.norm(points[:, :2], axis=1) - 1) ** 2 + points[:, 2] ** 2 <= thick**2

    return Solid(Surface(float(4 * np.pi**2 * thick), sample), inside)


def union(rng: Rng) -> Solid:
    """Two or three of the others, overlapping."""
    kinds = [(sphere, box, torus)[i] for i in rng.integers(0, 3, int(rng.integers(2, 4)))]
    return joined([kind(rng).moved(turned(rng), rng.uniform(0.5, 1), rng.uniform(-0.7, 0.7, 3)) for kind in kinds])


def joined(solids: Sequence[Solid]) -> Solid:
    """Everything that is inside one of the solids; the surface loses what is inside another."""
    areas = np.array([solid.surface.area for solid in solids])

    def sample(n: int, rng: Rng) -> tuple[Array, Array]:
        points, normals = np.zeros((0, 3)), np.zeros((0, 3))
        while len(points) < n:
            for i, count in enumerate(rng.multinomial(n, areas / areas.sum())):
                some, outward = solids[i].surface.sample(int(count), rng)
                hidden = np.any([other.inside(some) for j, other in enumerate(solids) if j != i], axis=0)
                points, normals = np.append(points, some[~hidden], 0), np.append(normals, outward[~hidden], 0)
        order = rng.permutation(len(points))[:n]
        return points[order], normals[order]

    return Solid(
        Surface(float(areas.sum()), sample), lambda points: np.any([solid.inside(points) for solid in solids], axis=0)
    )


def turned(rng: Rng) -> Array:
    """A rotation."""
    return Rotation.random(random_state=rng).as_matrix()


SOLIDS: dict[str, Callable[[Rng], Solid]] = {"sphere": sphere, "box": box, "torus": torus, "union": union}


def fitted(solid: Solid, rng: Rng) -> Solid:
    """The solid turned at random, moved and scaled so that its box is centred and its longest edge is 1."""
    solid = solid.moved(turned(rng), 1.0, np.zeros(3))
    points, _ = solid.surface.sample(20_000, rng)
    low, high = points.min(0), points.max(0)
    scale = float(1 / (high - low).max())
    return solid.moved(np.eye(3), scale, -scale * (low + high) / 2)


def surface_and_space(solid: Solid, surface: int, space: int, rng: Rng) -> tuple[Array, Array, Array, Array]:
    """Points and normals ``(surface, 3)`` of a solid, points ``(space, 3)`` around it and ``(space,)`` if inside.

    Space is the cube ``[-0.55, 0.55]^3``, as Occupancy Networks sample it.
    """
    points, normals = solid.surface.sample(surface, rng)
    around = rng.uniform(-0.55, 0.55, (space, 3))
    return points, normals, around, solid.inside(around)
