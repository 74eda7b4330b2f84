"""Height maps patch by patch, from the samples of an :class:`~pc3d.data.overview.Overview`, as LidarScout makes them.

arXiv 2509.20198 and its released viewer: patches of 640 m, each from the samples of a window of 960 m
around its centre.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pc3d.data.overview import Overview, interpolate

PATCH_SIZE, WINDOW_SIZE, PIXEL = 640.0, 960.0, 10.0
"""Edges in metres of a patch, of the window it is made from, and of a pixel."""
MIN_SAMPLES = 25
"""A window with fewer has no height map."""

_WINDOW, _PATCH = round(WINDOW_SIZE / PIXEL), round(PATCH_SIZE / PIXEL)
_RADIUS = 2**0.5 / 2 * PIXEL * _WINDOW * 1.5
_XY_SCALE = 103 / 96 * (1 - 1 / 96)  # found by trial by the authors; the published weights were trained with it
_Z_SCALE = 10.0

Floats = NDArray[np.float64]
Network = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Patch:
    """The height map of one cell of the grid of patches.

    Attributes:
        column, row: the cell, counted from the lowest corner.
        height: ``(64, 64)`` float64 metres; row 0 is the lowest y.
    """

    column: int
    row: int
    height: Floats


def normalise(samples: Floats, centre: Floats) -> tuple[Floats, float]:
    """Samples as the network knows them, and their mean z.

    Args:
        samples: ``(n, 3)`` true coordinates in a window.
        centre: its ``(2,)`` centre.
    """
    mean = float(samples[:, 2].mean())
    xy = (samples[:, :2] - centre) / _RADIUS * _XY_SCALE
    z = _Z_SCALE * (samples[:, 2] - mean) / _RADIUS
    return np.concatenate([xy, z[:, None]], 1), mean


def denormalise(height: Floats, mean: float) -> Floats:
    """Metres of normalised heights."""
    return height * _RADIUS / _Z_SCALE + mean


def window_rasters(normalised: Floats) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """``(96, 96)`` heights of the nearest sample, and linear ones in the triangles; rows along y."""
    ticks = np.arange(_WINDOW) / _WINDOW - 0.5
    x, y = np.meshgrid(ticks, ticks)
    places = np.stack([x.ravel(), y.ravel()], 1)
    nearest, linear = interpolate(normalised[:, :2], normalised[:, 2], places)
    shape = (_WINDOW, _WINDOW)
    return nearest.reshape(shape).astype(np.float32), linear.reshape(shape).astype(np.float32)


def patch_weights(centres: Floats, view_projection: Floats) -> Floats:
    """How soon each patch is wanted by a camera: 1 over the distance for those in the middle of the picture, 0 behind.

    Args:
        centres: ``(P, 3)`` centres of patches.
        view_projection: ``(4, 4)`` matrix from true to clip coordinates.

    Returns:
        ``(P,)`` ``max(1 - r, 0) / w`` with the distance ``r`` from the middle in normalised device coordinates.
    """
    clip = np.concatenate([centres, np.ones((len(centres), 1))], 1) @ view_projection.T
    w = clip[:, 3]
    front = np.where(w > 0, w, 1.0)
    distance = np.linalg.norm(clip[:, :2] / front[:, None], axis=1)
    return np.where(w > 0, np.clip(1 - distance, 0, 1) / front, 0.0)


def view_from_above(low: Floats, high: Floats) -> Floats:
    """``(4, 4)`` parallel projection that shows everything between two ``(2,)`` corners."""
    middle, half = (low + high) / 2, float(np.maximum(high - low, 1).max()) / 2 * 2**0.5
    matrix = np.diag([1 / half, 1 / half, 1.0, 1.0])
    matrix[:2, 3] = -middle / half
    return matrix


@dataclass(frozen=True)
class HeightPatches:
    """The grid of patches over a scan, and their height maps.

    Attributes:
        overview: the samples.
        network: :class:`~pc3d.models.HeightMapNet` or None for the linear interpolation alone.
    """

    overview: Overview
    network: Network | None = None

    @property
    def low(self) -> Floats:
        """``(2,)`` lowest corner of the grid."""
        return self.overview.boxes[:, :2].min(0)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        extent = self.overview.boxes[:, 3:5].max(0) - self.low
        columns, rows = (np.floor(extent / PATCH_SIZE).astype(int) + 1).tolist()
        return rows, columns

    def maps(self, view_projection: Floats | None = None) -> Iterator[Patch]:
        """Patches with enough samples, those a camera (default: from above) looks at first."""
        rows, columns = self.shape
        row, column = (grid.ravel() for grid in np.mgrid[:rows, :columns])
        centres = self.low + (np.stack([column, row], 1) + 0.5) * PATCH_SIZE
        if view_projection is None:
            view_projection = view_from_above(self.low, self.low + np.array([columns, rows]) * PATCH_SIZE)
        level = np.full((len(centres), 1), self.overview.coord[:, 2].mean())
        weights = patch_weights(np.concatenate([centres, level], 1), view_projection)
        by_x = self.overview.coord[np.argsort(self.overview.coord[:, 0], kind="stable")]
        for number in np.argsort(-weights, kind="stable"):
            height = self._height(_window(by_x, centres[number]), centres[number])
            if height is not None:
                yield Patch(int(column[number]), int(row[number]), height)

    def mosaic(self) -> Floats:
        """``(64 * rows, 64 * columns)`` metres, pixels of 10 m; NaN where there are too few samples."""
        rows, columns = self.shape
        mosaic = np.full((rows * _PATCH, columns * _PATCH), np.nan)
        for patch in self.maps():
            y, x = patch.row * _PATCH, patch.column * _PATCH
            mosaic[y : y + _PATCH, x : x + _PATCH] = patch.height
        return mosaic

    def _height(self, samples: Floats, centre: Floats) -> Floats | None:
        if len(samples) < MIN_SAMPLES:
            return None
        normalised, mean = normalise(samples, centre)
        nearest, linear = window_rasters(normalised)
        if self.network is None:
            border = (_WINDOW - _PATCH) // 2
            inner = linear[border : border + _PATCH, border : border + _PATCH]
        else:
            with torch.no_grad():
                inputs = (torch.from_numpy(raster)[None, None] for raster in (nearest, linear))
                inner = self.network(*inputs)[0, 0].cpu().numpy()
        return denormalise(inner.astype(np.float64), mean)


def _window(by_x: Floats, centre: Floats) -> Floats:
    """Samples, sorted by x, in the window around a centre."""
    first, last = np.searchsorted(by_x[:, 0], [centre[0] - WINDOW_SIZE / 2, centre[0] + WINDOW_SIZE / 2])
    strip = by_x[first:last]
    return strip[np.abs(strip[:, 1] - centre[1]) <= WINDOW_SIZE / 2]
