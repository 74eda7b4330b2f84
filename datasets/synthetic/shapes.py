"""Objects by procedure: surfaces put together from simple solids, with normals and part numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Rng = np.random.Generator
Vector = Sequence[float]


@dataclass(frozen=True)
class Surface:
    """A piece of surface: its area, and ``sample(n, rng)`` giving ``(n, 3)`` points and outward normals."""

    area: float
    sample: Callable[[int, Rng], tuple[Array, Array]]


def block(center: Vector, size: Vector) -> Surface:
    """The six faces of a box."""
    sides = np.array(size, float)
    areas = np.array([sides[1] * sides[2], sides[0] * sides[2], sides[0] * sides[1]])

    def sample(n: int, rng: Rng) -> tuple[Array, Array]:
        axis, sign = rng.choice(3, n, p=areas / areas.sum()), rng.choice([-0.5, 0.5], n)
        place, normal = rng.uniform(-0.5, 0.5, (n, 3)), np.zeros((n, 3))
        place[np.arange(n), axis], normal[np.arange(n), axis] = sign, 2 * sign
        return np.array(center) + place * sides, normal

    return Surface(2 * float(areas.sum()), sample)


def ellipsoid(center: Vector, radii: Vector, part: float = 1.0) -> Surface:
    """The upper ``part`` of an ellipsoid (1: all of it)."""
    r = np.array(radii, float)
    p = 1.6075  # Thomsen's approximation of the area
    area = 4 * np.pi * (((r[0] * r[1]) ** p + (r[0] * r[2]) ** p + (r[1] * r[2]) ** p) / 3) ** (1 / p)

    def sample(n: int, rng: Rng) -> tuple[Array, Array]:
        z, turn = rng.uniform(1 - 2 * part, 1, n), rng.uniform(0, 2 * np.pi, n)
        flat = np.sqrt(1 - z**2)
        unit = np.stack([flat * np.cos(turn), flat * np.sin(turn), z], 1)
        return np.array(center) + unit * r, _unit(unit / r)

    return Surface(float(area) * part, sample)


def lathe(start: Vector, end: Vector, radius: float, top: float | None = None, caps: bool = True) -> Surface:
    """A cylinder or, with another radius at the ``top``, a cone from ``start`` to ``end``."""
    a, b, last = np.array(start, float), np.array(end, float), radius if top is None else top
    axis, length = _unit((b - a)[None])[0], float(np.linalg.norm(b - a))
    side, other = _across(axis)
    slant = float(np.hypot(length, radius - last))
    areas = np.array([np.pi * (radius + last) * slant, *(np.pi * r * r * caps for r in (radius, last))])

    def sample(n: int, rng: Rng) -> tuple[Array, Array]:
        piece, turn, height = rng.choice(3, n, p=areas / areas.sum()), rng.uniform(0, 2 * np.pi, n), rng.random(n)
        height = np.where(piece == 1, 0.0, np.where(piece == 2, 1.0, height))
        around = np.cos(turn)[:, None] * side + np.sin(turn)[:, None] * other
        reach = (radius + (last - radius) * height) * np.where(piece > 0, np.sqrt(rng.random(n)), 1)
        wall = _unit(around * length + axis * (radius - last))
        normal = np.where((piece > 0)[:, None], np.where((piece == 1)[:, None], -axis, axis), wall)
        return a + height[:, None] * (b - a) + around * reach[:, None], normal

    return Surface(float(areas.sum()), sample)


def tube(path: Array, radius: float | Array) -> Surface:
    """A tube of one radius, or one per corner, along a ``(P, 3)`` line."""
    thick = np.broadcast_to(np.asarray(radius, float), len(path))
    steps = np.linalg.norm(np.diff(path, axis=0), axis=1)
    weight = steps * (thick[1:] + thick[:-1])

    def sample(n: int, rng: Rng) -> tuple[Array, Array]:
        i, share, turn = rng.choice(len(steps), n, p=weight / weight.sum()), rng.random(n), rng.uniform(0, 2 * np.pi, n)
        axis = _unit(path[i + 1] - path[i])
        helper = np.where(np.abs(axis[:, :1]) < 0.9, [[1.0, 0, 0]], [[0, 1.0, 0]])
        side = _unit(np.cross(axis, helper))
        normal = np.cos(turn)[:, None] * side + np.sin(turn)[:, None] * np.cross(axis, side)
        reach = thick[i] * (1 - share) + thick[i + 1] * share
        return path[i] * (1 - share)[:, None] + path[i + 1] * share[:, None] + normal * reach[:, None], normal

    return Surface(float(np.pi * weight.sum()), sample)


def ring(center: Vector, radius: float, thick: float, normal: Vector = (0, 0, 1), arc: float = 1.0) -> Surface:
    """A torus, or the first ``arc`` of its turn."""
    side, other = _across(_unit(np.array([normal], float))[0])
    turn = np.linspace(0, 2 * np.pi * arc, 25)[:, None]
    return tube(np.array(center) + radius * (np.cos(turn) * side + np.sin(turn) * other), thick)


def _unit(vectors: Array) -> Array:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _across(axis: Array) -> tuple[Array, Array]:
    """Two directions at right angles to ``(3,)`` axis and to each other."""
    side = np.cross(axis, [1.0, 0, 0] if abs(axis[0]) < 0.9 else [0, 1.0, 0])
    side = side / np.linalg.norm(side)
    return side, np.cross(axis, side)


# Recipes: pieces of surface with the number of the part they belong to, z up, about one metre large. ----------------

Pieces = list[tuple[Surface, int]]


def _legs(rng: Rng, width: float, depth: float, height: float, part: int) -> Pieces:
    thick = rng.uniform(0.02, 0.04)
    places = [(sx * (width / 2 - thick), sy * (depth / 2 - thick)) for sx in (-1, 1) for sy in (-1, 1)]
    return [(lathe((x, y, 0), (x, y, height), thick), part) for x, y in places]


def chair(rng: Rng) -> Pieces:
    """Back 0, seat 1, legs 2, arms 3."""
    width, depth, seat, back = rng.uniform((0.45, 0.45, 0.4, 0.4), (0.6, 0.6, 0.55, 0.7))
    pieces: Pieces = [(block((0, depth / 2 - 0.02, seat + back / 2), (width, 0.04, back)), 0)]
    pieces += [(block((0, 0, seat), (width, depth, 0.05)), 1), *_legs(rng, width, depth, seat, 2)]
    if rng.random() < 0.5:
        pieces += [(block((s * width / 2, 0, seat + 0.2), (0.04, depth, 0.04)), 3) for s in (-1, 1)]
    return pieces


def table(rng: Rng) -> Pieces:
    """Top 0, legs 1, shelf below 2."""
    width, depth, height = rng.uniform((0.8, 0.6, 0.5), (1.4, 0.9, 0.75))
    if rng.random() < 0.3:
        radius = depth / 2 + 0.1
        top: Pieces = [(lathe((0, 0, height), (0, 0, height + 0.04), radius), 0)]
        return [*top, (lathe((0, 0, 0), (0, 0, height), 0.05), 1), (lathe((0, 0, 0), (0, 0, 0.03), radius / 2), 1)]
    pieces: Pieces = [(block((0, 0, height), (width, depth, 0.04)), 0), *_legs(rng, width, depth, height, 1)]
    return pieces + ([(block((0, 0, 0.15), (width * 0.9, depth * 0.9, 0.03)), 2)] if rng.random() < 0.3 else [])


def airplane(rng: Rng) -> Pieces:
    """Body 0, wings 1, tail 2, engines 3."""
    length, span, sweep = rng.uniform((0.8, 0.7, 0.05), (1.1, 1.2, 0.25))
    pieces: Pieces = [(ellipsoid((0, 0, 0), (length / 2, 0.06, 0.06)), 0)]
    for side in (-1, 1):
        tip = np.array([-sweep, side * span / 2, 0.02])
        pieces.append((tube(np.linspace([0, 0, 0], tip, 5), np.linspace(0.06, 0.02, 5) * 0.6), 1))
        pieces.append((block((-sweep / 2, side * span / 4, 0), (0.12, span / 2, 0.015)), 1))
        pieces.append((block((-length / 2 + 0.05, side * 0.1, 0.03), (0.08, 0.2, 0.012)), 2))
        pieces.append((lathe((0, side * span / 5, -0.05), (0.14, side * span / 5, -0.05), 0.03), 3))
    return [*pieces, (block((-length / 2 + 0.05, 0, 0.1), (0.1, 0.012, 0.2)), 2)]


def mug(rng: Rng) -> Pieces:
    """Handle 0, body 1."""
    radius, height = rng.uniform((0.28, 0.6), (0.4, 0.9))
    handle = ring((radius, 0, height / 2), rng.uniform(0.15, 0.22), 0.035, (0, 1, 0))
    return [
        (handle, 0),
        (lathe((0, 0, 0), (0, 0, height), radius, caps=False), 1),
        (lathe((0, 0, 0), (0, 0, 0.02), radius), 1),
    ]


def lamp(rng: Rng) -> Pieces:
    """Base 0, shade 1, pole 2."""
    height, shade = rng.uniform((0.7, 0.18), (1.2, 0.35))
    pieces: Pieces = [(lathe((0, 0, 0), (0, 0, 0.04), rng.uniform(0.12, 0.22)), 0)]
    pieces.append((lathe((0, 0, height - 0.15), (0, 0, height + 0.15), shade, shade * rng.uniform(0.4, 0.8), False), 1))
    return [*pieces, (lathe((0, 0, 0.04), (0, 0, height), 0.018), 2)]


def cap(rng: Rng) -> Pieces:
    """Crown 0, peak 1."""
    radius, peak = rng.uniform((0.35, 0.2), (0.45, 0.35))
    crown = ellipsoid((0, 0, 0), (radius, radius, radius * rng.uniform(0.7, 1)), 0.5)
    return [(crown, 0), (block((0, radius + peak / 2, 0.01), (radius * 1.3, peak, 0.02)), 1)]


def bottle(rng: Rng) -> Pieces:
    """Body 0, neck 1."""
    radius, height, neck = rng.uniform((0.14, 0.55, 0.15), (0.22, 0.8, 0.3))
    slim = radius * rng.uniform(0.25, 0.45)
    body = [lathe((0, 0, 0), (0, 0, height), radius), lathe((0, 0, height), (0, 0, height + 0.1), radius, slim, False)]
    return [*((piece, 0) for piece in body), (lathe((0, 0, height + 0.1), (0, 0, height + 0.1 + neck), slim), 1)]


def bed(rng: Rng) -> Pieces:
    """Mattress 0, head board 1, pillow 2."""
    width, length = rng.uniform((0.7, 1.1), (1.0, 1.3))
    pieces: Pieces = [
        (block((0, 0, 0.2), (width, length, 0.25)), 0),
        (block((0, length / 2, 0.35), (width, 0.05, 0.7)), 1),
    ]
    return [*pieces, (ellipsoid((0, length / 2 - 0.2, 0.36), (width / 3, 0.13, 0.06)), 2)]


def sofa(rng: Rng) -> Pieces:
    """Seat 0, back 1, arms 2."""
    width, depth = rng.uniform((1.0, 0.45), (1.5, 0.6))
    pieces: Pieces = [(block((0, 0, 0.2), (width, depth, 0.3)), 0)]
    pieces.append((block((0, depth / 2, 0.4), (width, 0.15, rng.uniform(0.6, 0.8))), 1))
    return pieces + [(block((side * width / 2, 0, 0.3), (0.15, depth, 0.45)), 2) for side in (-1, 1)]


def car(rng: Rng) -> Pieces:
    """Roof 0, hood and body 1, wheels 2."""
    length, width = rng.uniform((0.95, 0.4), (1.2, 0.5))
    pieces: Pieces = [(block((0, 0, 0.2), (length, width, 0.2)), 1)]
    pieces.append((block((-0.05, 0, 0.38), (length * rng.uniform(0.4, 0.65), width * 0.9, 0.18)), 0))
    for sx, sy in ((sx, sy) for sx in (-1, 1) for sy in (-1, 1)):
        x, y = sx * length * 0.32, sy * width / 2
        pieces.append((lathe((x, y - 0.04, 0.1), (x, y + 0.04, 0.1), 0.1), 2))
    return pieces


def shelf(rng: Rng) -> Pieces:
    """Boards 0, sides 1."""
    width, height, depth = rng.uniform((0.6, 1.0, 0.22), (0.9, 1.4, 0.32))
    count = rng.integers(3, 6)
    boards = [block((0, 0, height * i / count), (width, depth, 0.025)) for i in range(count + 1)]
    sides = [block((side * width / 2, 0, height / 2), (0.025, depth, height)) for side in (-1, 1)]
    return [*((piece, 0) for piece in boards), *((piece, 1) for piece in sides)]


def monitor(rng: Rng) -> Pieces:
    """Screen 0, stand 1."""
    width, height = rng.uniform((0.7, 0.4), (1.0, 0.6))
    stand: Pieces = [(lathe((0, 0, 0), (0, 0, 0.25), 0.03), 1), (block((0, 0, 0.01), (0.3, 0.2, 0.02)), 1)]
    return [(block((0, 0, 0.25 + height / 2), (width, 0.05, height)), 0), *stand]


def pillow(rng: Rng) -> Pieces:
    """One part."""
    return [(ellipsoid((0, 0, 0), tuple(rng.uniform((0.35, 0.25, 0.08), (0.5, 0.4, 0.16)))), 0)]


def carton(rng: Rng) -> Pieces:
    """One part."""
    return [(block((0, 0, 0), tuple(rng.uniform(0.4, 0.8, 3))), 0)]


SHAPES: dict[str, Callable[[Rng], Pieces]] = {
    "airplane": airplane,
    "bed": bed,
    "bottle": bottle,
    "cap": cap,
    "car": car,
    "carton": carton,
    "chair": chair,
    "lamp": lamp,
    "monitor": monitor,
    "mug": mug,
    "pillow": pillow,
    "shelf": shelf,
    "sofa": sofa,
    "table": table,
}


def scan(pieces: Pieces, count: int, rng: Rng, noise: float = 0.0) -> tuple[Array, Array, Array]:
    """``(count, 3)`` points and normals spread over the surfaces by area, and ``(count,)`` part numbers.

    Args:
        noise: standard deviation along the normals.
    """
    areas = np.array([surface.area for surface, _ in pieces])
    shares = rng.multinomial(count, areas / areas.sum())
    sampled = [surface.sample(int(n), rng) for (surface, _), n in zip(pieces, shares, strict=True)]
    coord, normal = (np.concatenate([pair[i] for pair in sampled]) for i in (0, 1))
    part = np.repeat([number for _, number in pieces], shares)
    order = rng.permutation(count)
    coord = coord + noise * rng.standard_normal((count, 1)) * normal
    return coord[order], normal[order], part[order]
