"""KITTI object files: labels and results, calibration, and the way between LiDAR and camera."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pc3d.errors import InputError
from pc3d.io.atomic import atomic_write

Array = NDArray[np.float64]


@dataclass(frozen=True)
class KittiObjects:
    """Objects of one frame, as labels or results have them.

    Attributes:
        names: type of each object.
        truncated, occluded, alpha, rotation_y: ``(N,)``.
        bbox: ``(N, 4)`` x1 y1 x2 y2 in pixels.
        dimensions: ``(N, 3)`` length, height, width in metres.
        location: ``(N, 3)`` bottom centre in the rectified camera frame.
        scores: ``(N,)`` of results; None for labels.
    """

    names: list[str]
    truncated: Array
    occluded: Array
    alpha: Array
    bbox: Array
    dimensions: Array
    location: Array
    rotation_y: Array
    scores: Array | None = None

    def __len__(self) -> int:
        return len(self.names)

    def take(self, kept: NDArray[np.bool_] | NDArray[np.int64]) -> KittiObjects:
        """The objects of a boolean mask or an index."""
        arrays: dict[str, Any] = {k: v[kept] for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        names = [self.names[i] for i in np.arange(len(self))[kept]]
        return KittiObjects(names, **arrays)

    def to_plain(self) -> dict[str, Any]:
        """Lists of numbers and names, as :meth:`from_plain` takes them."""
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(self).items()}

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> KittiObjects:
        widths = {"bbox": 4, "dimensions": 3, "location": 3}
        arrays = {
            name: np.array(values, np.float64).reshape(len(plain["names"]), *([widths[name]] if name in widths else []))
            for name, values in plain.items()
            if name != "names" and values is not None
        }
        return KittiObjects(list(plain["names"]), **arrays)


def read_objects(path: str | Path) -> KittiObjects:
    """A label file (15 columns) or a result file (16, with scores).

    Raises:
        InputError: if it cannot be read, or a line has another number of columns or one that is no finite number.
    """
    path = Path(path)
    rows = [line.split() for line in _text(path).splitlines() if line.strip()]
    widths = {len(row) for row in rows}
    if not widths <= {15} and not widths <= {16}:
        bad = next(i for i, row in enumerate(rows, 1) if len(row) not in (15, 16) or len(row) != len(rows[0]))
        raise InputError(f"{path}: line {bad} has {len(rows[bad - 1])} columns; a label has 15, a result 16")
    try:
        values = np.array([row[1:] for row in rows], dtype=np.float64)
    except ValueError as error:
        raise InputError(f"{path}: not numbers behind the type ({error})") from error
    values = values if len(rows) else np.empty((0, 14))
    if not np.isfinite(values).all():
        raise InputError(
            f"{path}: object {int(np.isfinite(values).all(1).argmin()) + 1} has a value that is not finite"
        )
    return KittiObjects(
        [row[0] for row in rows],
        truncated=values[:, 0],
        occluded=values[:, 1],
        alpha=values[:, 2],
        bbox=values[:, 3:7],
        dimensions=values[:, [9, 7, 8]],  # stored as height, width, length
        location=values[:, 10:13],
        rotation_y=values[:, 13],
        scores=values[:, 14] if values.shape[1] == 15 else None,
    )


def write_objects(path: str | Path, objects: KittiObjects) -> Path:
    """Write labels or results in the official format."""
    lines = []
    for i, name in enumerate(objects.names):
        length, height, width = objects.dimensions[i]
        numbers = [
            objects.alpha[i],
            *objects.bbox[i],
            height,
            width,
            length,
            *objects.location[i],
            objects.rotation_y[i],
        ]
        score = [] if objects.scores is None else [f"{objects.scores[i]:.6f}"]
        head = [name, f"{objects.truncated[i]:.2f}", f"{objects.occluded[i]:.0f}"]
        lines.append(" ".join([*head, *(f"{value:.4f}" for value in numbers), *score]))
    with atomic_write(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines))
    return Path(path)


def difficulty_levels(objects: KittiObjects) -> NDArray[np.int64]:
    """``(N,)`` 0 easy, 1 moderate, 2 hard, -1 harder, as chosen objects to paste.

    Heights count the last row of pixels and limits belong to a level, other than in the evaluation.
    """
    height = objects.bbox[:, 3] - objects.bbox[:, 1] + 1
    levels = np.full(len(objects), -1)
    for level, (least, truncated, occluded) in reversed(list(enumerate(((40, 0.15, 0), (25, 0.3, 1), (25, 0.5, 2))))):
        fits = (height >= least) & (objects.truncated <= truncated) & (objects.occluded <= occluded)
        levels[fits] = level
    return levels


@dataclass(frozen=True)
class Calibration:
    """Camera 2 of a frame: ``p2`` (3, 4) projection, ``r0`` (3, 3) rectification, ``velo_to_cam`` (3, 4)."""

    p2: Array
    r0: Array
    velo_to_cam: Array

    @staticmethod
    def read(path: str | Path) -> Calibration:
        """From a calib file, by name.

        Raises:
            InputError: if it cannot be read or an entry is missing or has not its numbers.
        """
        path = Path(path)
        entries = dict(line.split(":", 1) for line in _text(path).splitlines() if ":" in line)
        matrices = []
        for name, shape in (("P2", (3, 4)), ("R0_rect", (3, 3)), ("Tr_velo_to_cam", (3, 4))):
            try:
                matrices.append(np.array(entries[name].split(), dtype=np.float64).reshape(shape))
            except (KeyError, ValueError) as error:
                raise InputError(f"{path}: field '{name}' is missing or not {math.prod(shape)} numbers") from error
        return Calibration(*matrices)

    def to_plain(self) -> dict[str, Any]:
        """Lists of numbers, as :meth:`from_plain` takes them."""
        return {name: matrix.tolist() for name, matrix in vars(self).items()}

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> Calibration:
        return Calibration(**{name: np.array(matrix, np.float64) for name, matrix in plain.items()})

    def _rectified(self) -> Array:
        """``(4, 4)`` from LiDAR to rectified camera coordinates."""
        velo, r0 = np.eye(4), np.eye(4)
        velo[:3], r0[:3, :3] = self.velo_to_cam, self.r0
        return r0 @ velo

    def to_camera(self, coord: Array) -> Array:
        """``(N, 3)`` LiDAR points in the rectified camera frame."""
        return _transform(self._rectified(), coord)

    def to_lidar(self, coord: Array) -> Array:
        """``(N, 3)`` points of the rectified camera frame in the LiDAR's."""
        inverse = np.linalg.inv(self._rectified()).astype(np.float64)
        return _transform(inverse, coord)

    def to_image(self, camera: Array) -> tuple[Array, Array]:
        """Pixels ``(N, 2)`` and depths ``(N,)`` of camera points; divided by their z, as published."""
        projected = np.concatenate([camera, np.ones((len(camera), 1))], 1) @ self.p2.T
        return projected[:, :2] / camera[:, 2:3], projected[:, 2] - self.p2[2, 3]

    def in_view(self, lidar: Array, height: int, width: int) -> NDArray[np.bool_]:
        """``(N,)`` which LiDAR points the image shows."""
        pixel, depth = self.to_image(self.to_camera(lidar))
        u, v = pixel.T
        return (u >= 0) & (u < width) & (v >= 0) & (v < height) & (depth >= 0)

    def ground_height(self, coord: Array, plane: Sequence[float]) -> Array:
        """``(N,)`` z in the LiDAR frame of the ground ``a x + b y + c z + d = 0`` (camera frame) below LiDAR points."""
        a, b, c, d = plane
        camera = self.to_camera(coord)
        camera[:, 1] = (-d - a * camera[:, 0] - c * camera[:, 2]) / b
        return self.to_lidar(camera)[:, 2]

    def boxes_to_lidar(self, objects: KittiObjects) -> Array:
        """``(N, 7)`` LiDAR boxes ``x y z`` (centre) ``dx dy dz heading`` of camera objects."""
        center = self.to_lidar(objects.location)
        length, height, width = objects.dimensions.T
        center[:, 2] += height / 2
        heading = -(objects.rotation_y + np.pi / 2)
        return np.column_stack([center, length, width, height, heading])

    def boxes_to_camera(self, boxes: Array) -> tuple[Array, Array, Array]:
        """Locations, dimensions (length, height, width) and ``rotation_y`` of LiDAR boxes ``(N, 7)``."""
        bottom = boxes[:, :3].copy()
        bottom[:, 2] -= boxes[:, 5] / 2
        return self.to_camera(bottom), boxes[:, [3, 5, 4]], -boxes[:, 6] - np.pi / 2

    def results(self, boxes: Array, names: Sequence[str], scores: Array, height: int, width: int) -> KittiObjects:
        """Predicted LiDAR boxes as objects of a result file; image boxes are clipped to the image."""
        location, dimensions, rotation = self.boxes_to_camera(boxes)
        unknown = np.full(len(boxes), -1.0)
        alpha = -np.arctan2(-boxes[:, 1], boxes[:, 0]) + rotation
        bbox = self.image_boxes(location, dimensions, rotation)
        bbox = bbox.clip(0, [width - 1, height - 1, width - 1, height - 1])
        return KittiObjects(list(names), unknown, unknown, alpha, bbox, dimensions, location, rotation, scores)

    def image_boxes(self, location: Array, dimensions: Array, rotation_y: Array) -> Array:
        """``(N, 4)`` pixels around the projected corners of camera boxes."""
        corners = camera_corners(location, dimensions, rotation_y)
        pixel, _ = self.to_image(corners.reshape(-1, 3))
        pixel = pixel.reshape(-1, 8, 2)
        return np.concatenate([pixel.min(1), pixel.max(1)], 1)


@dataclass(frozen=True)
class KittiFrame:
    """What the files of a frame say besides its points; travels in ``meta["kitti"]`` of its cloud.

    Attributes:
        calibration: between LiDAR and camera.
        image_size: height and width in pixels.
        labels: None of test frames.
    """

    calibration: Calibration
    image_size: tuple[int, int]
    labels: KittiObjects | None

    def to_plain(self) -> dict[str, Any]:
        """What :meth:`of` finds in ``meta["kitti"]``."""
        labels = None if self.labels is None else self.labels.to_plain()
        return {"calibration": self.calibration.to_plain(), "image_size": list(self.image_size), "labels": labels}

    @staticmethod
    def of(meta: Mapping[str, Any]) -> KittiFrame:
        """From the ``meta`` of a cloud.

        Raises:
            InputError: if the cloud is no frame of KITTI's.
        """
        plain = meta.get("kitti")
        if plain is None:
            name = meta.get("path") or meta.get("name") or "point cloud"
            raise InputError(f"{name}: has no calibration: results of KITTI need frames of KITTIObject")
        labels = None if plain["labels"] is None else KittiObjects.from_plain(plain["labels"])
        height, width = plain["image_size"]
        return KittiFrame(Calibration.from_plain(plain["calibration"]), (height, width), labels)


def camera_corners(location: Array, dimensions: Array, rotation_y: Array) -> Array:
    """``(N, 8, 3)`` corners of camera boxes, the lower four first; ``dimensions`` are length, height, width."""
    length, height, width = (dimensions[:, i, None] for i in range(3))
    x = length / 2 * np.array([1, 1, -1, -1, 1, 1, -1, -1])
    y = -height * np.array([0, 0, 0, 0, 1, 1, 1, 1])
    z = width / 2 * np.array([1, -1, -1, 1, 1, -1, -1, 1])
    cos, sin = np.cos(rotation_y)[:, None], np.sin(rotation_y)[:, None]
    return np.stack([cos * x + sin * z, y, -sin * x + cos * z], 2) + location[:, None]


def _transform(matrix: Array, coord: Array) -> Array:
    return np.asarray(coord, np.float64) @ matrix[:3, :3].T + matrix[:3, 3]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not a text file") from error
