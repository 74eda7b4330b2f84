"""Attributes made from other attributes, and the model's input features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from pc3d.data.transforms.base import CloudTransform, Transform, chance
from pc3d.data.transforms.geometric import Axis
from pc3d.errors import InputError
from pc3d.points import Points

GeometryFeature = Literal["normal", "linearity", "planarity", "sphericity", "verticality"]

MAX_GROUND_CELLS = 1 << 26
"""Largest ground grid of :class:`HeightAboveGround` (8 x 8 km at 1 m)."""

_EIGEN_CHUNK = 1 << 17  # points whose neighbourhoods are decomposed at once: about 100 MB of scratch memory
_WIDTHS = {"coord": 3, "color": 3, "normal": 3}


class AssembleFeatures(Transform):
    """Concatenate named attributes into ``feat`` (N, channels) float32, in the order given.

    Args:
        features: attribute names; ``coord`` is one too, ``x``, ``y`` and ``z`` are its columns. ``coord``, ``color``
            and ``normal`` have 3 channels, others 1.

    Raises:
        InputError: if an attribute is missing or has another width.
    """

    def __init__(self, features: Sequence[str]) -> None:
        if not features:
            raise InputError("AssembleFeatures needs at least one attribute name, e.g. [coord]")
        self.features = list(features)

    @property
    def channels(self) -> int:
        """Width of ``feat``."""
        return sum(_WIDTHS.get(name, 1) for name in self.features)

    def __call__(self, points: Points, generator: torch.Generator | None = None) -> Points:
        columns = []
        for name in self.features:
            value = _feature(points, name).float()
            column = value[:, None] if value.ndim == 1 else value
            width = _WIDTHS.get(name, 1)
            if column.ndim != 2 or column.shape[1] != width:
                shape = tuple(value.shape)
                raise InputError(f"{points.describe()}: field '{name}' has shape {shape}, a feature needs (N, {width})")
            columns.append(column)
        return points.with_attrs(feat=torch.cat(columns, dim=1))


def _feature(points: Points, name: str) -> Tensor:
    """An attribute, or a column of the coordinates where no attribute has that name."""
    return points.coord[:, "xyz".index(name)] if name in ("x", "y", "z") and name not in points else points.get(name)


class ScaleAttribute(Transform):
    """``value * scale + offset`` of an attribute as float32, limited to ``minimum`` and ``maximum``.

    Args:
        name: the attribute (``coord`` included; ``x``, ``y`` and ``z`` are its columns).
        scale: factor.
        offset: added after scaling.
        minimum: smaller results become this; None sets no limit.
        maximum: larger results become this; None sets no limit.
        output: where the result goes; None replaces the attribute.
    """

    def __init__(
        self,
        name: str,
        scale: float = 1.0,
        offset: float = 0.0,
        minimum: float | None = None,
        maximum: float | None = None,
        output: str | None = None,
    ) -> None:
        if minimum is not None and maximum is not None and minimum > maximum:
            raise InputError(f"ScaleAttribute '{name}': minimum {minimum} is above maximum {maximum}")
        self.name = name
        self.scale = scale
        self.offset = offset
        self.minimum = minimum
        self.maximum = maximum
        self.output = output

    def __call__(self, points: Points, generator: torch.Generator | None = None) -> Points:
        scaled = _feature(points, self.name).float() * self.scale + self.offset
        if self.minimum is not None or self.maximum is not None:
            scaled = scaled.clamp(self.minimum, self.maximum)
        return points.with_attrs(**{self.output or self.name: scaled})


class HeightAboveGround(CloudTransform):
    """Height over the terrain in metres, ``output`` (N,) float32, >= 0: for laser scans from the air or the ground.

    The lowest point of every ``cell`` x ``cell`` column is opened with a square of ``window`` metres (erosion, then
    dilation): whatever is narrower than the window stands on the ground, and sloping ground keeps its slope. Within
    half a window of the cloud's border a slope lifts the ground's own points by up to slope * window / 2. Zhang et al.,
    "A progressive morphological filter for removing nonground measurements from airborne LIDAR data", TGRS 2003, with
    one window.

    Args:
        cell: edge of a ground cell in metres; on a slope heights are off by up to slope * cell.
        window: widest object that is not ground, in metres: wider than the buildings, narrower than the hills.
        output: name of the attribute.

    Raises:
        InputError: when called, if the ground grid would have more than ``MAX_GROUND_CELLS`` cells.
    """

    def __init__(self, cell: float = 1.0, window: float = 30.0, output: str = "height") -> None:
        if not (cell > 0 and window > 0):
            raise InputError(f"HeightAboveGround needs positive cell and window, got cell={cell}, window={window}")
        self.cell = cell
        self.window = window
        self.output = output

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        z = cloud.coord[:, 2].float()
        if cloud.num_points == 0:
            return cloud.with_attrs(**{self.output: z})
        column = torch.floor((cloud.coord[:, :2] - cloud.coord[:, :2].amin(0)) / self.cell).long()
        nx, ny = (column.amax(0) + 1).tolist()
        if nx * ny > MAX_GROUND_CELLS:
            raise InputError(
                f"{cloud.describe()}: HeightAboveGround with cell {self.cell} m needs {nx} x {ny} ground cells, "
                f"the limit is {MAX_GROUND_CELLS}; use a larger cell or remove stray points"
            )
        cells = column[:, 0] * ny + column[:, 1]
        lowest = torch.full((nx * ny,), math.inf, device=z.device).scatter_reduce(0, cells, z, "amin")
        ground = _open(lowest.view(nx, ny), radius=max(1, round(self.window / self.cell / 2)))
        return cloud.with_attrs(**{self.output: z - ground.view(-1)[cells]})


def _open(heights: Tensor, radius: int) -> Tensor:
    """Morphological opening of an ``(X, Y)`` grid with a square of ``2 radius + 1`` cells; +inf is an empty cell."""
    eroded = -_window_max(-heights, radius)
    return _window_max(torch.where(eroded.isinf(), -math.inf, eroded), radius)


def _window_max(heights: Tensor, radius: int) -> Tensor:
    size = 2 * radius + 1
    rows = F.max_pool2d(heights[None, None], (size, 1), stride=1, padding=(radius, 0))
    return F.max_pool2d(rows, (1, size), stride=1, padding=(0, radius))[0, 0]


class HeightAboveLowest(CloudTransform):
    """Distance from the lowest point of the cloud along an axis, ``output`` (N,) float32: for objects that stand."""

    def __init__(self, axis: Axis = "z", output: str = "height") -> None:
        self.axis = axis
        self.output = output

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        values = cloud.coord[:, "xyz".index(self.axis)]
        lowest = values.amin() if len(values) else 0.0
        return cloud.with_attrs(**{self.output: values - lowest})


class DropAttribute(CloudTransform):
    """With probability ``p`` set an attribute of a whole cloud to ``value``: a model shall not rely on it alone.

    Some recipes drop colors after scaling them to -1..1: before scaling, their 0 is ``value=127.5``.
    """

    def __init__(self, name: str, p: float = 0.2, value: float = 0.0) -> None:
        self.name = name
        self.p = p
        self.value = value

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        values = cloud.get(self.name)
        dropped = torch.full_like(values, self.value)
        return cloud.with_attrs(**{self.name: dropped}) if chance(self.p, generator) else cloud


class EstimateNormals(CloudTransform):
    """``normal`` (N, 3): direction of least spread of each point's ``k`` nearest neighbours.

    The neighbour search runs on the CPU whatever the device of the points.

    Args:
        k: neighbours, the point itself included.
        toward: where the sensor stood, in the cloud's coordinates: normals turn to it. None turns them up (z >= 0).
    """

    def __init__(self, k: int = 16, toward: Sequence[float] | None = None) -> None:
        self.k = _check_neighbours(k)
        if toward is not None and len(toward) != 3:
            raise InputError(f"EstimateNormals.toward: {list(toward)} are not the three coordinates of a point")
        self.toward = toward

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        normal = local_geometry(cloud.coord, self.k)["normal"]
        if self.toward is not None:
            away = ((cloud.coord - cloud.coord.new_tensor(list(self.toward))) * normal).sum(1, keepdim=True) > 0
            normal = torch.where(away, -normal, normal)
        return cloud.with_attrs(normal=normal)


class LocalGeometry(CloudTransform):
    """Shape of the ``k`` nearest neighbours of each point, by the eigenvalues l1 >= l2 >= l3 of their covariance.

    ``linearity`` (l1 - l2) / l1, ``planarity`` (l2 - l3) / l1, ``sphericity`` l3 / l1 and ``verticality`` 1 -
    |normal z|, each (N,) float32 in 0..1; ``normal`` as :class:`EstimateNormals`. Where all neighbours coincide all
    shapes are 0. Weinmann et al., "Semantic point cloud interpretation based on optimal neighborhoods, relevant
    features and efficient classifiers", ISPRS 2015. The neighbour search runs on the CPU whatever the device of the
    points.

    Args:
        k: neighbours, the point itself included.
        features: which attributes to add.
    """

    def __init__(
        self,
        k: int = 16,
        features: Sequence[GeometryFeature] = ("linearity", "planarity", "sphericity", "verticality"),
    ) -> None:
        self.k = _check_neighbours(k)
        self.features = list(features)
        unknown = set(self.features) - set(get_args(GeometryFeature))
        if unknown:
            raise InputError(
                f"LocalGeometry has no feature {sorted(unknown)}; it has {list(get_args(GeometryFeature))}"
            )

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        geometry = local_geometry(cloud.coord, self.k)
        return cloud.with_attrs(**{name: geometry[name] for name in self.features})


def _check_neighbours(k: int) -> int:
    if k < 3:
        raise InputError(f"k is {k}: a normal needs at least 3 neighbours, the point itself included")
    return k


def local_geometry(coord: Tensor, k: int) -> dict[str, Tensor]:
    """All features of :class:`LocalGeometry` of ``(N, 3)`` coordinates, float32 on the device of ``coord``."""
    values, vectors = _neighbourhood_eigen(coord.detach().cpu().double(), k)
    smallest, middle, largest = values.clamp(min=0).unbind(1)
    scale = torch.where(largest > 0, largest, 1)
    normal = vectors * torch.where(vectors[:, 2:] < 0, -1, 1)
    features = {
        "normal": normal,
        "linearity": (largest - middle) / scale,
        "planarity": (middle - smallest) / scale,
        "sphericity": smallest / scale,
        "verticality": 1 - normal[:, 2].clamp(max=1),
    }
    return {name: value.float().to(coord.device) for name, value in features.items()}


def _neighbourhood_eigen(coord: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues (N, 3), and eigenvector of the smallest (N, 3), of the covariance of ``k`` neighbours."""
    from scipy.spatial import cKDTree

    values, vectors = torch.empty_like(coord), torch.empty_like(coord)
    if len(coord) == 0:
        return values, vectors
    tree = cKDTree(coord.numpy())
    for rows in torch.from_numpy(tree.indices).split(_EIGEN_CHUNK):  # the tree's order keeps its branches in the cache
        _, neighbours = tree.query(coord[rows].numpy(), k=min(k, len(coord)))
        around = coord[torch.from_numpy(neighbours).view(len(rows), -1)]
        around = around - around.mean(1, keepdim=True)
        eigen = torch.linalg.eigh(around.mT @ around / around.shape[1])
        values[rows], vectors[rows] = eigen.eigenvalues, eigen.eigenvectors[:, :, 0]
    return values, vectors
