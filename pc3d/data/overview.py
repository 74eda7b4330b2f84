"""``Overview``: a sketch of a huge aerial scan from one point per chunk, as LidarScout makes it (arXiv 2509.20198)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import LinearNDInterpolator, NearestNDInterpolator
from scipy.ndimage import gaussian_filter
from scipy.spatial import Delaunay, QhullError

from pc3d.errors import InputError
from pc3d.io.las_header import LasHeader, colors, coordinates
from pc3d.io.las_index import LasFile, LasIndex, in_threads

_SAMPLES = 2000  # points kept of a decoded chunk
_NODE_POINTS = 50_000  # points read of the upper nodes of an octree
_MOST_TRIANGULATED = 300_000
_MOST_CELLS, _FEWEST_CELLS = 2048, 64
_SMOOTHED_SAMPLES = 8

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Rasters:
    """Maps of a scan; row 0 is the lowest y. NaN where no file is.

    Attributes:
        low: x and y of the corner of cell (0, 0).
        cell: edge of a cell, metres.
        height: ``(H, W)`` metres, linear between samples, of the nearest one outside their hull.
        density: ``(H, W)`` points per square metre, smoothed over a few samples.
        estimate: ``(H, W)`` estimated points per cell; their sum is the number of points of the scan.
    """

    low: tuple[float, float]
    cell: float
    height: Floats
    density: Floats
    estimate: Floats


@dataclass(frozen=True)
class Overview:
    """Samples of a scan.

    Attributes:
        coord: ``(P, 3)`` float64 true coordinates.
        color: ``(P, 3)`` uint8, white for files without; None if no file has colours.
        weight: ``(P,)`` float64, the points that each sample stands for.
        boxes: ``(F, 6)`` lowest and highest x, y, z of the files with points, as their headers have them.
    """

    coord: Floats
    color: NDArray[np.uint8] | None
    weight: Floats
    boxes: Floats

    @staticmethod
    def of(index: LasIndex, decode: int = 0) -> Overview:
        """Sample a scan: the first point of every chunk, and of COPC files the upper nodes of the octree.

        The first point of a chunk is stored as it is, so that nothing is decompressed (but the octree's nodes, and
        these only if lazrs is installed).

        Args:
            index: the files.
            decode: chunks of other files to read whole for more samples, spread evenly over the scan.

        Raises:
            InputError: if a file is damaged, or ``decode`` needs lazrs and it is missing.
        """
        wanted = set(np.linspace(0, len(index.file) - 1, min(decode, len(index.file))).round().astype(int).tolist())
        starts = np.searchsorted(index.file, np.arange(len(index.files) + 1))
        jobs = []
        for number, file in enumerate(index.files):
            own = {chunk - int(starts[number]) for chunk in wanted if starts[number] <= chunk < starts[number + 1]}
            jobs.append((file, sorted(own | _upper_nodes(file))))
        parts = in_threads(lambda job: _sample(*job), jobs)
        coord = np.concatenate([np.zeros((0, 3)), *(part[0] for part in parts)])
        weight = np.concatenate([np.zeros(0), *(part[2] for part in parts)])
        color = None
        if any(part[1] is not None for part in parts):
            color = np.concatenate(
                [np.full(part[0].shape, 255, np.uint8) if part[1] is None else part[1] for part in parts]
            )
        return Overview(coord, color, weight, index.boxes)

    def rasters(self, cell: float | None = None) -> Rasters:
        """Height, density and estimated points on a grid.

        Args:
            cell: edge of a cell in metres; default half the distance between samples.

        Raises:
            InputError: if there are no points, or the cell is no positive number or makes too large a grid.
        """
        if len(self.coord) == 0:
            raise InputError("no points to make a map of")
        low, high = self.boxes[:, :2].min(0), self.boxes[:, 3:5].max(0)
        extent = float((high - low).max())
        if cell is None:
            area = float(np.maximum(self.boxes[:, 3:5] - self.boxes[:, :2], 1e-3).prod(1).sum())
            cell = float(np.clip((area / len(self.coord)) ** 0.5 / 2, extent / _MOST_CELLS, extent / _FEWEST_CELLS))
            cell = max(cell, 1e-3)
        if not (np.isfinite(cell) and cell > 0) or extent / cell > 8 * _MOST_CELLS:
            raise InputError(f"cells of {cell} m for a scan of {extent:.0f} m: give an edge of a few metres")
        width, height = (np.floor((high - low) / cell).astype(int) + 1).tolist()
        inside = _inside(self.boxes, low, cell, (height, width))
        rows, columns = np.nonzero(inside)
        centres = low + (np.stack([columns, rows], 1) + 0.5) * cell
        map_height = np.full((height, width), np.nan)
        map_height[inside] = interpolate(self.coord[:, :2], self.coord[:, 2], centres)[1]
        place = np.floor((self.coord[:, :2] - low) / cell).astype(int).clip(0, [width - 1, height - 1])
        estimate = np.zeros((height, width))
        np.add.at(estimate, (place[:, 1], place[:, 0]), self.weight)
        density = np.full((height, width), np.nan)
        density[inside] = _smoothed(estimate, inside, len(self.coord))[inside] / cell**2
        return Rasters((float(low[0]), float(low[1])), cell, map_height, density, estimate)


def _upper_nodes(file: LasFile) -> set[int]:
    """Chunks of the upper levels of an octree, whole levels as long as there are few points."""
    if file.octree is None or file.node_chunks is None or not len(file.node_chunks) or not _has_lazrs():
        return set()
    levels = file.octree.key[:, 0]
    totals = np.cumsum(np.bincount(levels, file.octree.count))
    deepest = int((totals <= _NODE_POINTS).sum()) - 1
    return set(file.node_chunks[levels <= max(deepest, int(levels.min()))].tolist())


def _has_lazrs() -> bool:
    try:
        import lazrs  # noqa: F401
    except ImportError:
        return False
    return True


def _sample(file: LasFile, decoded: list[int]) -> tuple[Floats, NDArray[np.uint8] | None, Floats]:
    """Coordinates, colours and weights of the samples of one file."""
    single = np.setdiff1d(np.arange(len(file)), decoded)
    records, weights = [file.first_records[single]], [file.chunks.counts[single].astype(np.float64)]
    for chunk in decoded:
        whole = file.records(chunk)
        kept = whole[:: max(len(whole) // _SAMPLES, 1)]
        records.append(kept)
        weights.append(np.full(len(kept), len(whole) / len(kept)))
    rows = np.concatenate(records)
    return coordinates(file.header, rows), _eight_bits(file.header, rows), np.concatenate(weights)


def _eight_bits(header: LasHeader, records: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    stored = colors(header, records)
    if stored is None:
        return None
    return (stored // 256 if stored.max(initial=0) > 255 else stored).astype(np.uint8)


def _inside(boxes: Floats, low: Floats, cell: float, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Cells that touch the box of a file."""
    inside = np.zeros(shape, bool)
    first = np.floor((boxes[:, :2] - low) / cell).astype(int)
    last = np.floor((boxes[:, 3:5] - low) / cell).astype(int)
    for (x, y), (x_end, y_end) in zip(first, last, strict=True):
        inside[y : y_end + 1, x : x_end + 1] = True
    return inside


def _smoothed(estimate: Floats, inside: NDArray[np.bool_], samples: int) -> Floats:
    """Points per cell, spread so that a few samples reach every cell; nothing is lost at the border of the scan."""
    area = inside.sum() / samples  # cells per sample
    sigma = (_SMOOTHED_SAMPLES * area / (4 * np.pi)) ** 0.5
    share = gaussian_filter(inside.astype(np.float64), sigma, mode="constant")
    spread = gaussian_filter(estimate, sigma, mode="constant")
    return spread / np.maximum(share, 1e-9)


def interpolate(xy: Floats, values: Floats, places: Floats) -> tuple[Floats, Floats]:
    """Values between scattered samples.

    Args:
        xy: ``(P, 2)`` places of the samples, at least one.
        values: ``(P,)`` or ``(P, K)``.
        places: ``(Q, 2)``.

    Returns:
        Values of the nearest sample, and linear ones in the triangles of the samples (Delaunay), nearest outside their
        hull; ``(Q,)`` or ``(Q, K)`` each.
    """
    middle = xy.mean(0)  # true coordinates are large numbers; triangles are decided by small differences
    xy, places = xy - middle, places - middle
    nearest = NearestNDInterpolator(xy, values)(places)
    few = slice(None, None, max(len(xy) // _MOST_TRIANGULATED, 1))
    try:
        linear = LinearNDInterpolator(Delaunay(xy[few]), values[few])(places)
    except (QhullError, ValueError):  # fewer than three samples, or all on one line
        return nearest, nearest
    return nearest, np.where(np.isnan(linear), nearest, linear)
