"""Organs by procedure: smooth closed blobs, vessels and bones, alone or in their places in a body."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pc3d.datasets.synthetic.shapes import Array, Pieces, Rng, Surface, block, ellipsoid, lathe, ring, scan, tube


def blob(radii: tuple[float, float, float], rng: Rng, waves: float = 0.12, bend: float = 0.0) -> Surface:
    """An ellipsoid with random low waves on it, bent about y: the shape of most soft organs."""
    plain = ellipsoid((0, 0, 0), radii)
    direction, phase = rng.standard_normal((6, 3)) * 2, rng.uniform(0, 2 * np.pi, 6)
    amplitude = waves * rng.random(6)

    def sample(n: int, generator: Rng) -> tuple[Array, Array]:
        coord, normal = plain.sample(n, generator)
        wave = (amplitude * np.sin(coord / np.max(radii) @ direction.T + phase)).sum(1, keepdims=True)
        coord = coord * (1 + wave)
        coord[:, 0] += bend * coord[:, 2] ** 2 / radii[2]
        return coord, normal

    return Surface(plain.area, sample)


def vessel(rng: Rng, length: float, radius: float, wander: float) -> Surface:
    """A tube along a smooth random line, thinner at its end."""
    share = np.linspace(0, 1, 40)
    swing = sum(
        rng.normal(0, wander / k, 2) * np.sin(np.pi * k * share + rng.uniform(0, 2 * np.pi))[:, None] for k in (1, 2, 3)
    )
    path = np.concatenate([swing, (length * (share - 0.5))[:, None]], 1)
    return tube(path, radius * (1.1 - 0.4 * share))


def kidney(rng: Rng) -> Pieces:
    return [(blob((0.25, 0.18, 0.5), rng, 0.04, 0.6), 0)]


def liver(rng: Rng) -> Pieces:
    return [(blob((0.8, 0.5, 0.35), rng, 0.2, 0.2), 0)]


def lung(rng: Rng) -> Pieces:
    return [(blob((0.35, 0.45, 0.8), rng, 0.05, 0.25), 0)]


def heart(rng: Rng) -> Pieces:
    stem = lathe((0, 0, 0.35), (0.1, 0.05, 0.75), 0.12, 0.1, False)
    return [(blob((0.4, 0.4, 0.5), rng, 0.08, -0.2), 0), (stem, 0)]


def aorta(rng: Rng) -> Pieces:
    arch = ring((0.2, 0, 0.75), 0.2, 0.07, (0, 1, 0), 0.5)
    return [(vessel(rng, 1.5, 0.07, 0.04), 0), (arch, 0)]


def colon(rng: Rng) -> Pieces:
    corners = np.array(
        [[0.5, 0, -0.6], [0.55, 0, 0.3], [0, -0.15, 0.2], [-0.55, 0, 0.35], [-0.5, 0, -0.5], [0, 0, -0.7]]
    )
    share = np.linspace(0, len(corners) - 1, 60)
    path = np.stack(
        [np.interp(share, range(len(corners)), axis) for axis in (corners + rng.normal(0, 0.04, (6, 3))).T], 1
    )
    return [(tube(path, 0.09 * (1 + 0.2 * np.sin(4 * share))), 0)]


def femur(rng: Rng) -> Pieces:
    shaft = lathe((0, 0, -0.8), (0, 0, 0.7), rng.uniform(0.06, 0.08))
    knobs = [ellipsoid((x, 0, -0.82), (0.1, 0.13, 0.1)) for x in (-0.08, 0.08)]
    return [
        (piece, 0)
        for piece in (
            shaft,
            *knobs,
            ellipsoid((0.2, 0, 0.8), (0.12, 0.12, 0.12)),
            tube(np.array([[0, 0, 0.65], [0.2, 0, 0.8]]), 0.06),
        )
    ]


def rib(rng: Rng) -> Pieces:
    return [(ring((0, 0, 0), rng.uniform(0.7, 0.9), 0.04, (0, 0.2, 1), rng.uniform(0.4, 0.55)), 0)]


def vertebrae(rng: Rng) -> Pieces:
    body, arch = lathe((0, 0, -0.2), (0, 0, 0.2), 0.35), ring((0, 0.5, 0), 0.25, 0.08)
    spines = [
        block((0, 0.95, -0.05), (0.08, 0.4, 0.15)),
        *(block((s * 0.45, 0.55, 0), (0.4, 0.1, 0.1)) for s in (-1, 1)),
    ]
    return [(piece, 0) for piece in (body, arch, *spines)]


def spleen(rng: Rng) -> Pieces:
    return [(blob((0.2, 0.45, 0.6), rng, 0.05, 0.5), 0)]


ORGANS: dict[str, Callable[[Rng], Pieces]] = {
    "aorta": aorta,
    "colon": colon,
    "femur": femur,
    "heart": heart,
    "kidney": kidney,
    "liver": liver,
    "lung": lung,
    "rib": rib,
    "spleen": spleen,
    "vertebrae": vertebrae,
}

_PLACES: list[tuple[str, tuple[float, float, float], float]] = [  # organ, centre, size; z up, metres
    ("lung", (0.16, 0, 0.4), 0.2),
    ("lung", (-0.16, 0, 0.4), 0.2),
    ("heart", (0.03, -0.05, 0.33), 0.14),
    ("liver", (-0.1, 0, 0.12), 0.18),
    ("spleen", (0.17, 0.04, 0.12), 0.12),
    ("kidney", (0.1, 0.08, 0), 0.12),
    ("kidney", (-0.1, 0.08, -0.01), 0.12),
    ("colon", (0, 0, -0.14), 0.28),
    ("aorta", (0.02, 0.07, 0.2), 0.3),
    ("femur", (0.13, 0, -0.65), 0.3),
    ("femur", (-0.13, 0, -0.65), 0.3),
    *(("vertebrae", (0.0, 0.13, -0.2 + 0.08 * i), 0.06) for i in range(9)),
    *(("rib", (0.0, 0, 0.2 + 0.06 * i), 0.24) for i in range(6)),
]


def body(count: int, rng: Rng) -> tuple[Array, list[str]]:
    """``(count, 3)`` points of a body's organs, and the organ of each."""
    share = np.array([size**2 for _, _, size in _PLACES])
    counts = rng.multinomial(count, share / share.sum())
    parts, names = [], []
    for (organ, center, size), n in zip(_PLACES, counts, strict=True):
        coord, _, _ = scan(ORGANS[organ](rng), max(int(n), 1), rng, 0.005)
        parts.append(coord[:n] * size * rng.uniform(0.9, 1.1) + np.array(center) + rng.normal(0, 0.008, 3))
        names += [organ] * int(n)
    order = rng.permutation(count)
    return np.concatenate(parts)[order], [names[i] for i in order]
