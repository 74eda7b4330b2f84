"""Transforms that move points.

Normals turn and mirror with them, boxes go where their points go; all other attributes stay with their point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pc3d.data.boxes import drop_boxes, mirror_boxes, scale_boxes, shift_boxes, turn_boxes
from pc3d.data.transforms.base import CloudTransform, Transform, chance, check_range, normal_like, uniform
from pc3d.errors import InputError
from pc3d.points import Points

Axis = Literal["x", "y", "z"]

MAX_NOISE_NODES = 1 << 26
"""Largest noise grid of :class:`ElasticDistortion`, in nodes (800 MB of noise)."""

_PLANE_SAMPLE = 4096  # points that choose the plane of LevelPlane


class CenterShift(CloudTransform):
    """Put the middle of a cloud's box at x = y = 0 and its lowest point at z = 0; ``origin`` in meta moves along.

    Args:
        apply_z: shift z too.
    """

    def __init__(self, apply_z: bool = True) -> None:
        self.apply_z = apply_z

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        if cloud.num_points == 0:
            return cloud
        low, high = cloud.coord.amin(0), cloud.coord.amax(0)
        shift = (low + high) / 2
        shift[2] = low[2] if self.apply_z else 0
        return lowered(cloud, shift)


class PositiveShift(CloudTransform):
    """Put the lowest corner of a cloud's box at x = y = z = 0; ``origin`` in meta moves along."""

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        if cloud.num_points == 0:
            return cloud
        shift = cloud.coord.amin(0)
        return lowered(cloud, shift)


def lowered(cloud: Points, shift: Tensor) -> Points:
    """A cloud whose origin has moved by ``shift`` (3,)."""
    moved = cloud.replace(coord=cloud.coord - shift, meta=[_moved_origin(cloud.meta[0], shift)])
    return shift_boxes(moved, -shift)


def _moved_origin(meta: dict[str, Any], shift: Tensor) -> dict[str, Any]:
    origin = meta.get("origin", (0.0, 0.0, 0.0))
    return {**meta, "origin": tuple(o + s for o, s in zip(origin, shift.tolist(), strict=True))}


class LevelPlane(CloudTransform):
    """Turn a cloud so that its largest plane, a table or a floor, lies at z = 0 and the sensor above it.

    Of planes through three random points the one near which most points lie is kept, and fitted to those points by
    least squares (RANSAC; Fischler and Bolles, CACM 1981). Draws are the same for every cloud and run. Fewer than three
    points, or points on one line, stay where they are.

    Args:
        distance: points this near to a plane lie on it, in metres.
        sensor: where the sensor stood, in the cloud's coordinates.
        tries: planes that are tried.
    """

    def __init__(self, distance: float = 0.01, sensor: Sequence[float] = (0.0, 0.0, 0.0), tries: int = 500) -> None:
        if not (distance > 0 and tries > 0 and len(sensor) == 3):
            raise InputError(
                f"LevelPlane: distance {distance} and tries {tries} must be above 0, sensor {list(sensor)} a point"
            )
        self.distance = distance
        self.sensor = sensor
        self.tries = tries

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        plane = _largest_plane(cloud.coord.detach().cpu().double(), self.distance, self.tries)
        if plane is None:
            return cloud
        point, up = plane
        if (torch.tensor(list(self.sensor), dtype=torch.float64) - point) @ up < 0:
            up = -up
        turn = _turn_up(up)
        level = rotate(cloud, turn, center=(0.0, 0.0, 0.0))
        return lowered(level, cloud.coord.new_tensor([0.0, 0.0, float(turn[2] @ point)]))


def _largest_plane(coord: Tensor, distance: float, tries: int) -> tuple[Tensor, Tensor] | None:
    """A point (3,) of the plane near which most points lie, and its unit normal (3,); None where there is none."""
    if len(coord) < 3:
        return None
    generator = torch.Generator().manual_seed(0)
    some = coord[torch.randperm(len(coord), generator=generator)[:_PLANE_SAMPLE]]
    first, second, third = some[torch.randint(len(some), (3, tries), generator=generator)]
    normals = torch.linalg.cross(second - first, third - first)
    sizes = normals.norm(dim=1)
    first, normals = first[sizes > 0], (normals / sizes[:, None])[sizes > 0]
    if not len(normals):
        return None
    near = (some @ normals.T - (first * normals).sum(1)).abs() <= distance
    best = int(near.sum(0).argmax())
    point, normal = first[best], normals[best]
    for _ in range(2):
        on_it = coord[((coord - point) @ normal).abs() <= distance]
        point = on_it.mean(0)
        normal = torch.linalg.eigh((on_it - point).T @ (on_it - point))[1][:, 0]
    return point, normal


def _turn_up(up: Tensor) -> Tensor:
    """``(3, 3)`` rotation that takes a unit vector to z on the shortest way."""
    x, y, z = up.tolist()
    if z < -1 + 1e-12:
        return torch.diag(up.new_tensor([1.0, -1.0, -1.0]))
    cross = up.new_tensor([[0.0, 0.0, -x], [0.0, 0.0, -y], [x, y, 0.0]])
    return torch.eye(3, dtype=up.dtype) + cross + cross @ cross / (1 + z)


class RandomRotate(CloudTransform):
    """With probability ``p`` rotate a cloud by an angle from U(angle) about one axis.

    Args:
        angle: lowest and highest angle in units of pi.
        axis: axis of rotation, counter-clockwise seen from its positive end.
        center: point on the axis in metres; None is the middle of the cloud's bounding box.
    """

    def __init__(
        self,
        angle: Sequence[float] = (-1.0, 1.0),
        axis: Axis = "z",
        center: Sequence[float] | None = None,
        p: float = 0.5,
    ) -> None:
        self.angle = angle
        self.axis: Axis = axis
        self.center = center
        self.p = p

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        if not chance(self.p, generator):
            return cloud
        angle = uniform(self.angle[0], self.angle[1], generator) * math.pi
        return rotate(cloud, rotation_matrix(angle, self.axis), self.center)


class RandomRotateTargetAngle(CloudTransform):
    """With probability ``p`` rotate a cloud by one of the given angles; for test-time augmentation, ``p=1``.

    Args:
        angle: the angles to choose from, in units of pi.
        axis: axis of rotation.
        center: point on the axis in metres; None is the middle of the cloud's bounding box.
    """

    def __init__(
        self,
        angle: Sequence[float] = (0.5, 1.0, 1.5),
        axis: Axis = "z",
        center: Sequence[float] | None = None,
        p: float = 0.75,
    ) -> None:
        self.angle = angle
        self.axis: Axis = axis
        self.center = center
        self.p = p

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        if not chance(self.p, generator):
            return cloud
        choice = int(torch.randint(len(self.angle), (1,), generator=generator))
        return rotate(cloud, rotation_matrix(self.angle[choice] * math.pi, self.axis), self.center)


def rotation_matrix(angle: float, axis: Axis) -> Tensor:
    """``(3, 3)`` float64 rotation by ``angle`` radians, counter-clockwise seen from the positive end of the axis."""
    cos, sin = math.cos(angle), math.sin(angle)
    first, second = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[first, first] = matrix[second, second] = cos
    matrix[first, second], matrix[second, first] = -sin, sin
    return matrix


def rotate(cloud: Points, matrix: Tensor, center: Sequence[float] | None = None) -> Points:
    """Turn the coordinates of a cloud about ``center`` (None: middle of its box), and its normals if there."""
    if cloud.num_points == 0:
        return cloud
    coord = cloud.coord
    pivot = (coord.amin(0) + coord.amax(0)) / 2 if center is None else coord.new_tensor(list(center))
    turned = turn_boxes(cloud.with_attrs(coord=(coord - pivot) @ matrix.to(coord).T + pivot), matrix, pivot)
    if "normal" not in cloud:
        return turned
    normal = cloud.get("normal")
    return turned.with_attrs(normal=normal @ matrix.to(normal).T)


class RandomScale(CloudTransform):
    """Scale a cloud about the coordinate origin by one factor from U(scale).

    Args:
        scale: lowest and highest factor.
        anisotropic: a factor of its own for each axis; normals stay as they are, as published, and boxes are dropped.
    """

    def __init__(self, scale: Sequence[float] = (0.9, 1.1), anisotropic: bool = False) -> None:
        self.scale = scale
        self.anisotropic = anisotropic

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        if not self.anisotropic:
            factor = uniform(self.scale[0], self.scale[1], generator)
            return scale_boxes(cloud.with_attrs(coord=cloud.coord * factor), factor)
        factors = [uniform(self.scale[0], self.scale[1], generator) for _ in range(3)]
        return drop_boxes(cloud.with_attrs(coord=cloud.coord * cloud.coord.new_tensor(factors)))


class RandomShift(CloudTransform):
    """Move a cloud along each axis by a distance from U(shift)."""

    def __init__(self, shift: Sequence[float] = (-0.2, 0.2)) -> None:
        self.shift = shift

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        distances = cloud.coord.new_tensor([uniform(self.shift[0], self.shift[1], generator) for _ in range(3)])
        return shift_boxes(cloud.with_attrs(coord=cloud.coord + distances), distances)


class UnitShape(CloudTransform):
    """Centre a cloud and scale it to size 1; ``meta["unit_frame"]`` (centre x, y, z and scale) leads back.

    Args:
        fit: ``sphere``: the centroid goes to the origin, the farthest point to distance 1; ``box``: the middle of the
            bounding box goes to the origin, the largest coordinate to 1.
        separate: of a cloud to complete (``target`` 0 and 1), fit either side by itself, as published; default both by
            what is there, the only side that a prediction knows.
        radius: what distance 1, or coordinate 1, is to be.

    Points in space (``occupancy`` 0 and 1) move with those on the surface (-1), which alone are fitted.
    """

    def __init__(self, fit: Literal["sphere", "box"] = "sphere", separate: bool = False, radius: float = 1.0) -> None:
        if fit not in ("sphere", "box"):
            raise InputError(f"UnitShape.fit: '{fit}' is neither sphere nor box")
        if radius <= 0:
            raise InputError(f"UnitShape.radius: {radius} is not positive")
        self.fit = fit
        self.separate = separate
        self.radius = radius

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        there = cloud.coord.new_ones(len(cloud.coord)).bool()
        for name, side in (("target", 0), ("occupancy", -1)):
            there = there & (cloud.get(name) == side) if name in cloud else there
        if not bool(there.any()):
            return cloud
        center, scale = unit_frame(cloud.coord[there], self.fit, self.radius)
        coord = (cloud.coord - center) / scale
        if self.separate and not bool(there.all()):
            wanted, size = unit_frame(cloud.coord[~there], self.fit, self.radius)
            coord = torch.where(there[:, None], coord, (cloud.coord - wanted) / size)
        x, y, z, before = cloud.meta[0].get("unit_frame", (0.0, 0.0, 0.0, 1.0))
        moved = [o + before * c for o, c in zip((x, y, z), center.tolist(), strict=True)]
        meta = {**cloud.meta[0], "unit_frame": [*moved, before * scale.item()]}
        return drop_boxes(cloud.with_attrs(coord=coord).replace(meta=[meta]))


def unit_frame(coord: Tensor, fit: Literal["sphere", "box"], radius: float = 1.0) -> tuple[Tensor, Tensor]:
    """Centre ``(3,)`` and scale of :class:`UnitShape`; a scale of 1 where all points coincide."""
    if fit == "sphere":
        center = coord.double().mean(0).to(coord)
        scale = (coord - center).norm(dim=1).amax()
    else:
        center = (coord.amin(0) + coord.amax(0)) / 2
        scale = (coord - center).abs().amax()
    return center, torch.where(scale > 0, scale / radius, 1)


def from_unit_frame(coord: Tensor, meta: dict[str, Any]) -> Tensor:
    """``(N, 3)`` coordinates before :class:`UnitShape`, from those of a cloud with this ``meta``."""
    *center, scale = meta.get("unit_frame", (0.0, 0.0, 0.0, 1.0))
    return coord * scale + coord.new_tensor(center)


class RandomFlip(CloudTransform):
    """With probability ``p`` each, mirror the coordinates ``axes``, one after the other, and the normals with them."""

    def __init__(self, p: float = 0.5, axes: Sequence[Literal["x", "y"]] = ("x", "y")) -> None:
        if not axes or not set(axes) <= {"x", "y"}:
            raise InputError(f"RandomFlip.axes {list(axes)}: must be x, y or both")
        self.p = p
        self.axes = list(axes)

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        factor = cloud.coord.new_ones(3)
        for axis in ("xy".index(name) for name in self.axes):
            if chance(self.p, generator):
                factor[axis] = -1
                cloud = mirror_boxes(cloud, axis)
        mirrored = {name: cloud.get(name) * factor for name in ("coord", "normal") if name in cloud}
        return cloud.with_attrs(**mirrored)


class RandomJitter(CloudTransform):
    """Add noise N(0, sigma) to every coordinate, clipped to +-``clip`` (metres)."""

    def __init__(self, sigma: float = 0.005, clip: float = 0.02) -> None:
        self.sigma = sigma
        self.clip = clip

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        noise = (normal_like(cloud.coord, generator) * self.sigma).clamp(-self.clip, self.clip)
        return cloud.with_attrs(coord=cloud.coord + noise)


class ElasticDistortion(CloudTransform):
    """With probability ``p`` bend a cloud by smooth random noise, once per (granularity, magnitude), in order.

    A grid of N(0, 1) vectors with nodes ``granularity`` metres apart covers the cloud; it is smoothed by two passes
    of a 3-box along each axis (zeros outside) and interpolated trilinearly at the points, which move by
    ``magnitude`` times the result.

    Args:
        distortion: (granularity in metres, magnitude in metres) pairs.

    Raises:
        InputError: when called, if a noise grid would be larger than ``MAX_NOISE_NODES``.
    """

    def __init__(self, distortion: Sequence[Sequence[float]] = ((0.2, 0.4), (0.8, 1.6)), p: float = 0.95) -> None:
        self.distortion = distortion
        self.p = p

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        if cloud.num_points == 0 or not chance(self.p, generator):
            return cloud
        coord = cloud.coord
        for granularity, magnitude in self.distortion:
            dims = self._noise_dims(cloud, coord, granularity)
            noise = torch.randn(3, *dims, generator=generator).to(coord)
            coord = coord + magnitude * interpolate(smooth(noise), (coord - coord.amin(0)) / granularity + 1)
        return drop_boxes(cloud.with_attrs(coord=coord))

    def _noise_dims(self, cloud: Points, coord: Tensor, granularity: float) -> list[int]:
        extent = coord.amax(0) - coord.amin(0)
        dims = [int(d) for d in (torch.floor(extent / granularity) + 3).tolist()]
        if math.prod(dims) > MAX_NOISE_NODES:
            raise InputError(
                f"{cloud.describe()}: elastic distortion with granularity {granularity} m needs a noise grid of "
                f"{' x '.join(map(str, dims))} nodes; use a larger granularity or remove stray points"
            )
        return dims


def smooth(noise: Tensor) -> Tensor:
    """Two passes of a separable 3-box blur with zeros outside, of ``(3, X, Y, Z)`` noise."""
    for _ in range(2):
        noise = F.avg_pool3d(noise, kernel_size=3, stride=1, padding=1, count_include_pad=True)
    return noise


def interpolate(noise: Tensor, position: Tensor) -> Tensor:
    """``(N, 3)``: ``(3, X, Y, Z)`` noise at ``(N, 3)`` positions counted in nodes, trilinear."""
    last_node = torch.tensor(noise.shape[1:], device=noise.device) - 1
    normalised = (2 * position / last_node - 1).flip(-1)  # grid_sample wants the last axis first
    sampled = F.grid_sample(noise[None], normalised.view(1, 1, 1, -1, 3), align_corners=True)
    return sampled.view(3, -1).T


class PointClip(Transform):
    """Clamp coordinates to a box: outliers are moved to its faces, as published (``CropBox`` removes them).

    Args:
        point_range: ``(xmin, ymin, zmin, xmax, ymax, zmax)`` in metres.
    """

    def __init__(self, point_range: Sequence[float] = (-80.0, -80.0, -3.0, 80.0, 80.0, 1.0)) -> None:
        self.point_range = check_range(point_range)

    def __call__(self, points: Points, generator: torch.Generator | None = None) -> Points:
        low, high = (points.coord.new_tensor(corner) for corner in (self.point_range[:3], self.point_range[3:]))
        return points.with_attrs(coord=points.coord.clamp(low, high))
