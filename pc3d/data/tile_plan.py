"""``TilePlan``: a scan larger than memory cut into square tiles, and which chunks each of them needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pc3d.errors import InputError
from pc3d.io.las_index import LasIndex

Floats = NDArray[np.float64]

_CURVE_DEPTH = 31  # of a code of 62 bits, which also seeds a generator
_MAX_LEVEL = 12
_SLACK = 1e-3  # metres; borders in metres are rounded, those in sides of a tile decide
_MOST_GUESSED = 1000  # tiles that a guess may reach; headers with wrong boxes make guesses without end
_MOST_COLUMNS = 2.0**40  # of either sign: beyond, float64 no longer tells neighbours apart


@dataclass(frozen=True, order=True)
class Tile:
    """A square of the plan: at level ``l`` the plan's side is halved ``l`` times."""

    level: int
    column: int
    row: int

    @property
    def children(self) -> tuple[Tile, Tile, Tile, Tile]:
        """Its four quarters."""
        level, column, row = self.level + 1, 2 * self.column, 2 * self.row
        return (
            Tile(level, column, row),
            Tile(level, column, row + 1),
            Tile(level, column + 1, row + 1),
            Tile(level, column + 1, row),
        )

    def __str__(self) -> str:
        return f"{self.level}_{self.column}_{self.row}"


class TilePlan:
    """Tiles with a halo, halved where there are too many points, and the chunks that reach into each.

    Where a chunk's points are is not stored in LAZ files. Until a chunk has been decoded (:meth:`learn`) its place is
    guessed from its first point, its neighbours in the file and a safety radius; the octree of COPC files is exact.
    There are tiles where a guess reaches and where points have been seen, not between points that lie far apart.

    Args:
        index: the scan.
        side: edge of the tiles of level 0, metres.
        halo: metres of context around each tile.
        max_points: estimated points of tile and halo above which a tile is halved.

    Attributes:
        low: ``(2,)`` corner of tile (0, 0).
        leaves: tiles that are not halved.
        bounds: ``(C, 4)`` lowest x, y and highest x, y of every chunk.
        known: ``(C,)`` whether these are exact, or at least certain.

    Raises:
        InputError: for a side or halo that is no usable length, or a scan without points.
    """

    def __init__(self, index: LasIndex, side: float, halo: float, max_points: int) -> None:
        if not (np.isfinite(side) and side > 0 and np.isfinite(halo) and halo >= 0):
            raise InputError(f"tiles of {side} m with a halo of {halo} m: give an edge above 0 and a halo of 0 or more")
        if not len(index.file):
            raise InputError("the scan has no points")
        self.side, self.halo, self.max_points = float(side), float(halo), max_points
        self.low = np.floor(index.boxes[:, :2].min(0))
        self._counts = index.counts
        self._file = index.file
        self._first = index.first_points()[:, :2]
        self.bounds, self.known = _guess(index, self._first)
        self.leaves: set[Tile] = set()
        self._halved: set[Tile] = set()
        self._roots: set[Tile] = set()
        self._cover(np.floor(self.place(self._first)))
        for bounds in self.bounds:
            first, last = np.floor(self.place(bounds.reshape(2, 2)))
            if (last - first + 1).prod() <= _MOST_GUESSED:
                self._cover(_cells(first, last))
        self._halve_dense()

    # Geometry --------------------------------------------------------------------------------------------------------

    def place(self, xy: Floats) -> Floats:
        """``(n, 2)`` true coordinates in sides of a tile; all borders are decided by these numbers."""
        return (xy - self.low) / self.side

    def box(self, tile: Tile) -> Floats:
        """``(4,)`` lowest x, y and highest x, y of a tile, metres."""
        edge = self.side / 2**tile.level
        corner = self.low + np.array([tile.column, tile.row]) * edge
        return np.concatenate([corner, corner + edge])

    def in_tile(self, place: Floats, tile: Tile) -> NDArray[np.bool_]:
        """Which points belong to a tile: each to exactly one leaf."""
        cell = np.floor(place * 2.0**tile.level)
        return (cell == (tile.column, tile.row)).all(1)

    def in_window(self, place: Floats, tile: Tile) -> NDArray[np.bool_]:
        """Which points lie in a tile or its halo."""
        margin = self.halo / self.side
        low = np.array([tile.column, tile.row]) / 2.0**tile.level
        around = ((place >= low - margin) & (place < low + 0.5**tile.level + margin)).all(axis=1)
        return np.asarray(around) | self.in_tile(place, tile)

    def blend_weight(self, place: Floats, tile: Tile) -> Floats:
        """``(n,)`` 1 in the tile, falling as a cosine to 0 at the end of its halo."""
        low = np.array([tile.column, tile.row]) / 2.0**tile.level
        outside = np.maximum(np.maximum(low - place, place - low - 0.5**tile.level), 0) * self.side
        return (0.5 * (1 + np.cos(np.pi * np.minimum(outside / max(self.halo, 1e-9), 1)))).prod(1)

    # Chunks ----------------------------------------------------------------------------------------------------------

    def chunks(self, tile: Tile) -> NDArray[np.int64]:
        """Numbers of the chunks that may reach into a tile or its halo, ascending."""
        x, y, x_end, y_end = self.box(tile) + np.array([-1, -1, 1, 1]) * (self.halo + _SLACK)
        b = self.bounds
        return np.flatnonzero((b[:, 0] <= x_end) & (b[:, 2] >= x) & (b[:, 1] <= y_end) & (b[:, 3] >= y))

    def outline(self, xy: Floats) -> Floats:
        """``(m, 2)`` a few of the points of a chunk, from which :meth:`learn` learns as much as from all of them."""
        _, one_per_tile = np.unique(np.floor(self.place(xy)) @ np.array([1, 1j]), return_index=True)
        return xy[np.union1d(one_per_tile, [*xy.argmin(0), *xy.argmax(0)])]

    def learn(self, number: int, xy: Floats) -> set[Tile]:
        """Take the true bounds of a decoded chunk, and make sure that there are tiles for all of its points.

        A file whose chunks reach further than guessed gets wider guesses for the chunks not seen yet.

        Returns:
            The tiles that are new.
        """
        true = np.concatenate([xy.min(0), xy.max(0)])
        before, was_known = self.bounds[number].copy(), bool(self.known[number])
        self.bounds[number], self.known[number] = true, True
        beyond = float(np.maximum(before[:2] - true[:2], true[2:] - before[2:]).max())
        if beyond > 0 and not was_known:
            guessed = (self._file == self._file[number]) & ~self.known
            self.bounds[guessed] += beyond * np.array([-1, -1, 1, 1])
        return self._cover(np.unique(np.floor(self.place(xy)), axis=0))

    def _cover(self, cells: Floats) -> set[Tile]:
        """Make sure that there are tiles of level 0 in ``(n, 2)`` columns and rows; those that are new."""
        if not (np.abs(cells) < _MOST_COLUMNS).all():
            raise InputError(
                f"tiles of {self.side:g} m, counted from {self.low.tolist()}: some points are more than 2^40 tiles "
                "away: give a larger edge, or leave out the file with a bounding box like that"
            )
        new = {Tile(0, column, row) for column, row in cells.astype(np.int64).tolist()} - self._roots
        self._roots |= new
        self.leaves |= new
        return new

    def leaves_at(self, bounds: Floats, margin: float) -> list[Tile]:
        """Leaves whose square, widened by a margin in metres, meets a box."""
        low, high = bounds[:2] - margin - _SLACK, bounds[2:] + margin + _SLACK
        first, last = np.floor(self.place(np.stack([low, high])))
        if (last - first + 1).prod() > len(self._roots):
            roots = self._roots
        else:
            roots = {Tile(0, column, row) for column, row in _cells(first, last).astype(np.int64).tolist()}
        return [leaf for root in roots for leaf in self._below(root, low, high)]

    def _below(self, tile: Tile, low: Floats, high: Floats) -> Iterator[Tile]:
        box = self.box(tile)
        if (box[:2] > high).any() or (box[2:] < low).any():
            return
        if tile in self._halved:
            for child in tile.children:
                yield from self._below(child, low, high)
        elif tile in self.leaves:
            yield tile

    # Tiles -----------------------------------------------------------------------------------------------------------

    def estimate(self, tile: Tile) -> int:
        """Points of a tile and its halo, by the first points of the chunks."""
        inside = self.in_window(self.place(self._first), tile)
        return int(self._counts[inside].sum())

    def can_halve(self, tile: Tile) -> bool:
        """Whether a tile is still large beside its halo."""
        return tile.level < _MAX_LEVEL and self.side / 2 ** (tile.level + 1) >= self.halo

    def halve(self, tile: Tile) -> tuple[Tile, ...]:
        """Put its four quarters in the place of a leaf."""
        self.leaves.remove(tile)
        self._halved.add(tile)
        self.leaves.update(tile.children)
        return tile.children

    def _halve_dense(self) -> None:
        waiting = list(self.leaves)
        while waiting:
            tile = waiting.pop()
            if self.estimate(tile) > 2 * self.max_points and self.can_halve(tile):
                waiting += self.halve(tile)

    def curve(self, tile: Tile) -> int:
        """Place of a tile along a Hilbert curve, on which neighbours are near: their chunks are still in memory."""
        shift = _MAX_LEVEL - tile.level
        offset = 1 << (_CURVE_DEPTH - 1)
        return hilbert((tile.column << shift) + offset, (tile.row << shift) + offset, _CURVE_DEPTH)


def _cells(first: Floats, last: Floats) -> Floats:
    """``(n, 2)`` all columns and rows from ``first`` to ``last``."""
    columns, rows = (np.arange(a, b + 1) for a, b in zip(first, last, strict=True))
    return np.stack(np.meshgrid(columns, rows), -1).reshape(-1, 2)


def hilbert(x: int, y: int, depth: int) -> int:
    """Place of a cell on the Hilbert curve through ``2**depth`` by ``2**depth`` cells."""
    place = 0
    for bit in reversed(range(depth)):
        right, up = x >> bit & 1, y >> bit & 1
        place = place << 2 | (3 * right ^ up)
        if not up:
            if right:
                x, y = ~x, ~y
            x, y = y, x
    return place


def _guess(index: LasIndex, first: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Where the points of each chunk may be, before any has been decoded."""
    bounds, known = np.empty((len(first), 4)), np.zeros(len(first), bool)
    start = 0
    for file in index.files:
        end = start + len(file)
        own, header = first[start:end], file.header
        octree = file.chunk_bounds[:, [0, 1, 3, 4]]
        if len(file):
            # The first point of the next chunk follows the last one of this chunk.
            following = np.concatenate([own[1:], own[-1:]])
            before = np.concatenate([own[:1], own[:-1]])
            steps = np.linalg.norm(own - before, axis=1)[1:]
            area = max(float((header.high - header.low)[:2].prod()), 1e-6)
            radius = max(float(np.median(steps)) if len(steps) else 0.0, (area / len(file)) ** 0.5)
            low = np.minimum(np.minimum(own, following), before) - radius
            high = np.maximum(np.maximum(own, following), before) + radius
            box_low, box_high = np.minimum(header.low[:2], own), np.maximum(header.high[:2], own)
            guess = np.concatenate([np.maximum(low, box_low), np.minimum(high, box_high)], 1)
            if len(file) == 1:
                guess = np.concatenate([box_low, box_high], 1)
            exact = np.isfinite(octree[:, 0])
            octree = np.concatenate([np.minimum(octree[:, :2], own), np.maximum(octree[:, 2:], own)], 1)
            bounds[start:end], known[start:end] = np.where(exact[:, None], octree, guess), exact
        start = end
    return bounds, known
