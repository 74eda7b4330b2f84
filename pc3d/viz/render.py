"""A software renderer for point clouds: numpy only, no display, no graphics driver.

Points are drawn as round splats whose size follows the local point spacing, through a z-buffer, at twice the picture's
resolution; eye-dome lighting (Boucheny 2009) and, where there are normals, a head light make the shapes readable.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import ConvexHull, QhullError, cKDTree
from torch import Tensor

from pc3d.io.atomic import atomic_write
from pc3d.points import Points
from pc3d.viz.colors import Color

_SUPERSAMPLING = 2
_MOST_POINTS = 1_500_000  # more cannot be told apart on a picture
_SPACING_SAMPLE = 200_000
_LARGEST_SPLAT = 14  # pixels of the supersampled picture; of a sparse cloud twice as many
_SPARSE = 30_000  # points


@dataclass
class View:
    """A perspective camera, and which points to leave out so that it can look inside.

    Attributes:
        eye: position of the camera, metres.
        target: the point in the middle of the picture.
        up: direction that points up in the picture.
        fov: vertical opening angle in degrees.
        visible: ``(N,)`` bool, points to draw (a room's ceiling and near walls are left out); None draws all.
    """

    eye: NDArray[np.float64]
    target: NDArray[np.float64]
    up: NDArray[np.float64] = field(default_factory=lambda: np.array([0.0, 0.0, 1.0]))
    fov: float = 35.0
    visible: NDArray[np.bool_] | None = None


# Choosing a view ----------------------------------------------------------------------------------------------------


def choose_view(points: Points | Tensor | NDArray, aspect: float = 4 / 3) -> View:
    """A camera that shows the whole cloud, z up.

    A room (a few metres high, closed above) is seen from above like a doll's house: ceiling and the walls on the
    viewer's side are left out. A sweep of a scanner on the ground is framed on its inner part. Everything else is seen
    obliquely. Of eight directions the one with the fewest hidden points is taken.

    Args:
        aspect: width over height of the picture.
    """
    coord = _coord(points)
    if len(coord) == 0:
        return View(np.array([1.0, -1.0, 1.0]), np.zeros(3))
    room = _ceiling_height(coord)
    low, high = np.percentile(coord, 0.5, axis=0), np.percentile(coord, 99.5, axis=0)
    extent = np.maximum(high - low, 1e-6)
    keep = np.ones(len(coord), bool) if room is None else coord[:, 2] < room
    if max(extent[:2]) > 60 and extent[2] < 0.4 * max(extent[:2]):
        center = np.median(coord[:, :2], axis=0)
        reach = np.percentile(np.linalg.norm(coord[:, :2] - center, axis=1), 92)
        if np.linalg.norm(high[:2] - low[:2]) / 2 > 1.6 * reach:  # a sweep: dense around the scanner, thin far away
            keep &= np.linalg.norm(coord[:, :2] - center, axis=1) < reach
    flat = extent[2] < 0.5 * max(extent[:2])
    elevation = np.radians(52 if room is not None else 38 if flat else 22)
    rng = np.random.default_rng(0)
    sample = rng.choice(len(coord), min(len(coord), 8000), replace=False)
    best: tuple[int, View] | None = None
    for azimuth in np.radians(np.arange(8) * 45 - 60.0):
        direction = np.array(
            [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)]
        )
        visible = keep if room is None else keep & ~_near_walls(coord, direction, low[2])
        if not visible.any():
            visible = keep
        view = _frame(coord[visible], direction, aspect, visible)
        rows = sample[visible[sample]]
        seen = _count_seen(coord[rows], view, aspect)
        if best is None or seen > best[0]:
            best = seen, view
    assert best is not None
    return best[1]


def _ceiling_height(coord: NDArray) -> float | None:
    """Height above which points belong to the ceiling of a room; None if the cloud is not a room or is open above."""
    bottom, top = np.percentile(coord[:, 2], (0.5, 99.5))
    side = np.ptp(coord[:, :2], axis=0).max()
    if not (1.8 < top - bottom < 8 and 1.5 < side < 60):
        return None
    cells = np.floor(coord[:, :2] / max(side / 24, 0.2)).astype(np.int64)
    band = coord[:, 2] > top - 0.12 * (top - bottom)
    covered = len(np.unique(cells[band], axis=0)) / max(len(np.unique(cells, axis=0)), 1)
    return float(top - 0.12 * (top - bottom)) if covered > 0.6 else None


def _near_walls(coord: NDArray, direction: NDArray, floor: float, thickness: float = 0.25) -> NDArray[np.bool_]:
    """Points along those sides of the footprint's hull that face the camera, floor excepted."""
    try:
        hull = ConvexHull(np.unique(np.round(coord[:, :2], 1), axis=0))
    except (QhullError, ValueError):
        return np.zeros(len(coord), bool)
    near = np.zeros(len(coord), bool)
    for normal_x, normal_y, offset in hull.equations:  # n . p + offset <= 0 inside, n points out
        if normal_x * direction[0] + normal_y * direction[1] > 0.15:
            near |= coord[:, 0] * normal_x + coord[:, 1] * normal_y + offset > -thickness
    return near & (coord[:, 2] > floor + 0.15)


def _frame(coord: NDArray, direction: NDArray, aspect: float, visible: NDArray[np.bool_], fov: float = 35.0) -> View:
    """The camera in ``direction`` at the distance from which the points just fill the picture."""
    low, high = np.percentile(coord, 0.3, axis=0), np.percentile(coord, 99.7, axis=0)
    right, up, forward = _axes(-direction, np.array([0.0, 0.0, 1.0]))
    box = coord[np.all((coord >= low) & (coord <= high), axis=1)]
    box = box if len(box) else coord
    center = (box @ right, box @ up, box @ forward)
    middle = sum(
        (axis.min() + axis.max()) / 2 * vector for axis, vector in zip(center, (right, up, forward), strict=True)
    )
    tangent = np.tan(np.radians(fov) / 2) * 0.94
    local = (box - middle) @ np.stack([right, up, forward], 1)
    distance = np.maximum(np.abs(local[:, 0]) / (tangent * aspect), np.abs(local[:, 1]) / tangent) - local[:, 2]
    return View(middle + direction * max(float(distance.max()), 1e-3), middle, fov=fov, visible=visible)


def _count_seen(coord: NDArray, view: View, aspect: float) -> int:
    """How many of a sample of points are in front, on a coarse grid: a measure of how little a view hides."""
    height = 90
    pixels, depth = _project(coord, view, int(height * aspect), height)
    column, row = np.floor(pixels).astype(np.int64).T
    inside = (depth > 0) & (column >= 0) & (column < int(height * aspect)) & (row >= 0) & (row < height)
    return len(np.unique(row[inside] * 10_000 + column[inside]))


def _axes(forward: NDArray, up: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    forward = forward / max(np.linalg.norm(forward), 1e-12)
    right = np.cross(forward, up)
    if np.linalg.norm(right) < 1e-6:  # looking straight down
        right = np.array([1.0, 0.0, 0.0])
    right = right / np.linalg.norm(right)
    return right, np.cross(right, forward), forward


# Drawing ------------------------------------------------------------------------------------------------------------


@dataclass
class Raster:
    """What a camera sees of a cloud, ready to be painted in any colours.

    Attributes:
        row: ``(h, w)`` int64, the point in front at each pixel (twice the picture's resolution), -1 where none is.
        shade: ``(h, w)`` float32 in 0..1.
    """

    row: NDArray[np.int64]
    shade: NDArray[np.float32]

    def paint(self, colors: Tensor | NDArray, background: Color = (255, 255, 255)) -> NDArray[np.uint8]:
        """``(height, width, 3)`` uint8 picture; ``colors`` are ``(N, 3)`` in 0..255, one per point of the cloud."""
        color = np.asarray(colors, np.float32).reshape(-1, 3)
        hit = self.row >= 0
        image = np.empty((*self.row.shape, 3), np.float32)
        image[:] = background
        image[hit] = color[self.row[hit]] * self.shade[hit][:, None]
        height, width = (side // _SUPERSAMPLING for side in self.row.shape)
        small = image.reshape(height, _SUPERSAMPLING, width, _SUPERSAMPLING, 3).mean((1, 3))
        return np.clip(small.round(), 0, 255).astype(np.uint8)


def render(
    points: Points | Tensor | NDArray,
    colors: Tensor | NDArray,
    size: tuple[int, int] = (960, 720),
    view: View | None = None,
    background: Color = (255, 255, 255),
) -> NDArray[np.uint8]:
    """Draw a cloud.

    Args:
        points: the cloud, or its ``(N, 3)`` coordinates in metres. Normals of a cloud are used for shading.
        colors: ``(N, 3)``, 0..255.
        size: width and height of the picture in pixels.
        view: camera; :func:`choose_view` by default.

    Returns:
        ``(height, width, 3)`` uint8. The same input gives the same picture.
    """
    num_points = len(points.coord if isinstance(points, Points) else points)
    if len(colors) != num_points:
        raise ValueError(f"{len(colors)} colours for {num_points} points")
    return rasterize(points, size, view).paint(colors, background)


def rasterize(
    points: Points | Tensor | NDArray, size: tuple[int, int] = (960, 720), view: View | None = None
) -> Raster:
    """Project, splat and shade a cloud once, to be painted several times; arguments as for :func:`render`."""
    width, height = (side * _SUPERSAMPLING for side in size)
    coord = _coord(points)
    view = choose_view(coord, width / height) if view is None else view
    rows = np.arange(len(coord)) if view.visible is None else np.flatnonzero(view.visible)
    if len(rows) > _MOST_POINTS:
        rows = np.sort(np.random.default_rng(0).choice(rows, _MOST_POINTS, replace=False))
    pixels, depth = _project(coord[rows], view, width, height)
    in_front = depth > 1e-6
    rows, pixels, depth = rows[in_front], pixels[in_front], depth[in_front]
    focal = height / (2 * np.tan(np.radians(view.fov) / 2))
    radius = np.clip(0.78 * _spacing(coord[rows]) * focal / depth, 0.8, _LARGEST_SPLAT * (1 + (len(rows) < _SPARSE)))
    winner = _splat(pixels, depth, radius, width, height)
    hit = winner >= 0
    depth_map = np.full((height, width), np.inf, np.float32)
    depth_map[hit] = depth[winner[hit]]
    shade = _eye_dome(depth_map)
    row = np.full((height, width), -1, np.int64)
    row[hit] = rows[winner[hit]]
    if isinstance(points, Points) and "normal" in points:
        shade[hit] *= _head_light(coord, points.attrs["normal"].cpu().numpy(), view)[row[hit]]
    return Raster(row, shade)


def _head_light(coord: NDArray, normal: NDArray, view: View) -> NDArray[np.float32]:
    """``(N,)`` brightness of surfaces lit from the camera; either side of a surface counts."""
    toward = view.eye - coord
    toward /= np.maximum(np.linalg.norm(toward, axis=1, keepdims=True), 1e-9)
    facing = np.abs((normal * toward).sum(1))
    return (0.72 + 0.28 * np.clip(facing, 0, 1)).astype(np.float32)


def _coord(points: Points | Tensor | NDArray) -> NDArray[np.float64]:
    coord = points.coord if isinstance(points, Points) else points
    return (coord.detach().cpu().numpy() if isinstance(coord, Tensor) else np.asarray(coord)).astype(np.float64)


def _project(coord: NDArray, view: View, width: int, height: int) -> tuple[NDArray, NDArray]:
    """Pixel coordinates ``(N, 2)`` (column, line) and depth along the viewing direction ``(N,)`` in metres."""
    right, up, forward = _axes(view.target - view.eye, view.up)
    local = (coord - view.eye) @ np.stack([right, up, forward], 1)
    depth = local[:, 2]
    focal = height / (2 * np.tan(np.radians(view.fov) / 2))
    scale = focal / np.where(np.abs(depth) < 1e-9, 1e-9, depth)
    return np.stack([width / 2 + local[:, 0] * scale, height / 2 - local[:, 1] * scale], 1), depth


def _spacing(coord: NDArray) -> NDArray[np.float64]:
    """Distance to the fourth neighbour, metres, within a factor of the cloud's median so that outliers stay small."""
    if len(coord) < 6:
        return np.full(len(coord), 0.02 * max(float(np.ptp(coord, axis=0).max()), 1e-3) if len(coord) else 0.0)
    rng = np.random.default_rng(0)
    sample = np.arange(len(coord))
    if len(coord) > _SPACING_SAMPLE:
        sample = rng.choice(len(coord), _SPACING_SAMPLE, replace=False)
    tree = cKDTree(coord)
    distance = tree.query(coord[sample], k=5)[0][:, 4]
    typical = float(np.median(distance[distance > 0])) if (distance > 0).any() else 1e-3
    distance = np.clip(distance, 0.6 * typical, 2.5 * typical)
    if len(sample) == len(coord):
        return distance
    nearest = cKDTree(coord[sample]).query(coord, k=1)[1]
    return distance[nearest]


def _splat(pixels: NDArray, depth: NDArray, radius: NDArray, width: int, height: int) -> NDArray[np.int64]:
    """``(height, width)`` row of the nearest point whose disc covers a pixel, -1 where there is none."""
    far_first = np.argsort(-depth, kind="stable")
    center = np.floor(pixels[far_first]).astype(np.int64)
    reach = radius[far_first]
    rank = np.arange(len(far_first))
    best = np.full(height * width, -1, np.int64)
    largest = int(np.ceil(reach.max(initial=0)))
    for dy in range(-largest, largest + 1):
        for dx in range(-largest, largest + 1):
            covers = dx * dx + dy * dy < reach * reach
            column, line = center[covers, 0] + dx, center[covers, 1] + dy
            inside = (column >= 0) & (column < width) & (line >= 0) & (line < height)
            target, order = line[inside] * width + column[inside], rank[covers][inside]
            nearer = order > best[target]
            best[target[nearer]] = order[
                nearer
            ]  # in rising order: of several points on a pixel the nearest is written last
    result = np.full(height * width, -1, np.int64)
    hit = best >= 0
    result[hit] = far_first[best[hit]]
    return result.reshape(height, width)


def _eye_dome(depth: NDArray) -> NDArray[np.float32]:
    """Shade in 0..1 of each pixel: darker where its surroundings are nearer to the eye (in the way of the light)."""
    log_depth = np.log2(np.where(np.isfinite(depth), depth, 1e9))  # the background is far: it shades nothing
    shade = np.zeros_like(depth)
    for reach, weight in ((2, 0.6), (5, 0.4)):
        for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)):
            neighbour = np.roll(log_depth, (dy * reach, dx * reach), (0, 1))
            shade += weight * np.clip(log_depth - neighbour, 0, 0.06) / 8
    return np.exp(-42 * shade).astype(np.float32)


def save_png(path: str | Path, image: NDArray[np.uint8]) -> Path:
    """Write ``(H, W, 3)`` uint8 as PNG; needs no imaging library.

    Raises:
        InputError: if the file cannot be written.
    """
    path = Path(path)
    height, width, _ = image.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, width * 3)], 1).tobytes()
    parts = [b"\x89PNG\r\n\x1a\n"]
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 6)), (b"IEND", b"")):
        parts.append(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)))
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"".join(parts))
    return path
