"""Airborne scans of a made-up country: hills, houses and trees without an end, written as LAS or LAZ tiles of any size.

The ground at a place is a function of the place alone, so that tiles fit together at their borders.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pc3d.io.atomic import atomic_write
from pc3d.io.las_header import RECORD_SIZES
from pc3d.io.las_write import LasWriter, new_head

GROUND, TREE, HOUSE = 2, 5, 6
"""ASPRS codes of the points."""

_BLOCK = 50.0  # metres; points are written block by block
_HOUSE_PLOT, _TREE_PLOT = 40.0, 12.0
_COLORS = {GROUND: (150, 140, 110), TREE: (60, 110, 50), HOUSE: (170, 80, 70)}
_COLOR_START = {2: 20, 3: 28, 5: 28, 7: 30, 8: 30, 10: 30}


def ground_height(xy: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(N,)`` metres above zero of the bare ground at ``(N, 2)`` places."""
    x, y = xy.T
    return 100 + 30 * np.sin(x / 310) + 20 * np.cos(y / 270) + 5 * np.sin((x + y) / 60)


def aerial_points(
    xy: NDArray[np.float64], heights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """What a scanner meets above each place.

    Args:
        xy: ``(N, 2)`` metres.
        heights: ``(N,)`` from 0 to 1, how deep a beam goes into a tree.

    Returns:
        ``(N, 3)`` coordinates and ``(N,)`` codes.
    """
    z, codes = ground_height(xy), np.full(len(xy), GROUND, np.uint8)
    there, inside, height = _plots(xy, _TREE_PLOT, share=0.3, size=(0.2, 0.35), round_plan=True)
    tree = there & inside
    z[tree] += ((0.4 + 0.6 * heights) * (4 + 9 * height))[tree]
    codes[tree] = TREE
    there, inside, height = _plots(xy, _HOUSE_PLOT, share=0.5, size=(0.15, 0.35), round_plan=False)
    house = there & inside
    middle = (np.floor(xy / _HOUSE_PLOT) + 0.5) * _HOUSE_PLOT
    z[house] = (ground_height(middle) + 4 + 10 * height)[house]
    codes[house] = HOUSE
    return np.concatenate([xy, z[:, None]], 1), codes


def _plots(
    xy: NDArray[np.float64], edge: float, share: float, size: tuple[float, float], round_plan: bool
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.float64]]:
    """Whether a plot is built on, whether a place is inside of what stands there, and its height from 0 to 1."""
    plot = np.floor(xy / edge)
    place = np.abs(xy / edge - plot - 0.5)
    half = size[0] + (size[1] - size[0]) * _noise(plot, edge)
    inside = np.hypot(*place.T) < half if round_plan else place.max(1) < half
    return _noise(plot, edge + 1) < share, inside, _noise(plot, edge + 2)


def _noise(plot: NDArray[np.float64], salt: float) -> NDArray[np.float64]:
    value = np.sin(plot[:, 0] * 12.9898 + plot[:, 1] * 78.233 + salt) * 43758.5453
    return value - np.floor(value)


def write_aerial(
    path: str | Path,
    low: Sequence[float],
    side: float,
    density: float,
    point_format: int = 6,
    seed: int = 0,
    chunk_size: int | None = 50_000,
    scale: float = 0.01,
) -> Path:
    """Write one square tile.

    Args:
        path: ``.las`` or ``.laz``.
        low: its lowest x and y, metres.
        side: its edge, metres.
        density: points per square metre.
        point_format: 0 to 3 or 6 to 8.
        seed: of the places that the beams hit.
        chunk_size: points per LAZ chunk; None makes a chunk of every 50 m block.
        scale: metres per stored unit.
    """
    path = Path(path)
    offset = (float(np.floor(low[0])), float(np.floor(low[1])), 0.0)
    head = new_head(point_format, (scale,) * 3, offset)
    blocks = max(int(np.ceil(side / _BLOCK)), 1)
    with atomic_write(path) as temporary:
        compressed = path.suffix.lower() == ".laz"
        with LasWriter(temporary, head, compressed, chunk_size) as writer:
            for block in range(blocks * blocks):
                row, column = divmod(block, blocks)
                column = blocks - 1 - column if row % 2 else column
                generator = np.random.default_rng([seed, row, column])
                edge = side / blocks
                xy = generator.random((round(density * edge * edge), 2)) * edge + [column * edge, row * edge]
                coord, codes = aerial_points(xy + np.asarray(low, np.float64), generator.random(len(xy)))
                writer.write(_records(coord, codes, point_format, scale, offset, generator))
    return path


def _records(
    coord: NDArray[np.float64],
    codes: NDArray[np.uint8],
    point_format: int,
    scale: float,
    offset: Sequence[float],
    generator: np.random.Generator,
) -> NDArray[np.uint8]:
    records = np.zeros((len(coord), RECORD_SIZES[point_format]), np.uint8)
    stored = np.floor((coord - np.asarray(offset)) / scale)  # points of a tile stay below its upper border
    records[:, :12] = stored.astype("<i4").view(np.uint8).reshape(-1, 12)
    intensity = (codes * 100 + generator.integers(0, 100, len(codes))).astype("<u2")
    records[:, 12:14] = intensity[:, None].view(np.uint8)
    records[:, 14] = 0x11 if point_format >= 6 else 0x09  # first return of one
    records[:, 16 if point_format >= 6 else 15] = codes
    if point_format in _COLOR_START:
        start = _COLOR_START[point_format]
        table = np.zeros((256, 3), "<u2")
        for code, color in _COLORS.items():
            table[code] = np.array(color) * 257
        records[:, start : start + 6] = table[codes].view(np.uint8)
    return records
