"""What every transform is: a configurable map from points to points, random only through the generator it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from pc3d.config import Configurable
from pc3d.errors import InputError
from pc3d.points import Points


class Transform(Configurable, ABC):
    """Maps a packed batch of clouds to a packed batch; CPU and CUDA tensors alike, empty clouds allowed.

    A transform never writes into the tensors it is given. Random numbers come from ``generator`` (a CPU generator;
    None is torch's default one) and are drawn on the CPU, so one seed gives the same augmentation on every device.

    ``meta[i]["origin"]`` follows ``CenterShift`` only: a rotated, scaled or jittered cloud is no longer
    georeferenced.
    """

    @abstractmethod
    def __call__(self, points: Points, generator: torch.Generator | None = None) -> Points: ...


class CloudTransform(Transform):
    """A transform whose random parameters belong to one cloud: a batch is transformed cloud after cloud.

    One call on a batch therefore equals calls on its clouds, in order, with the same generator.
    """

    def __call__(self, points: Points, generator: torch.Generator | None = None) -> Points:
        if len(points) == 0:
            return points
        if len(points) == 1:
            return self.apply(points, generator)
        return Points.cat([self.apply(points[i], generator) for i in range(len(points))])

    @abstractmethod
    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        """Transform a batch of exactly one cloud."""


class Compose(Transform):
    """Transforms one after the other."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = list(transforms)

    def __call__(self, points: Points, generator: torch.Generator | None = None) -> Points:
        for transform in self.transforms:
            points = transform(points, generator)
        return points


def uniform(low: float, high: float, generator: torch.Generator | None) -> float:
    """One number from U(low, high)."""
    return low + (high - low) * torch.rand((), dtype=torch.float64, generator=generator).item()


def chance(p: float, generator: torch.Generator | None) -> bool:
    """True with probability ``p``; 0 is never, 1 always."""
    return uniform(0.0, 1.0, generator) < p


def normal_like(values: Tensor, generator: torch.Generator | None) -> Tensor:
    """N(0, 1) in the shape of ``values``, drawn on the CPU, on the device and in the dtype of ``values``."""
    return torch.randn(values.shape, generator=generator).to(values)


def check_range(point_range: Sequence[float]) -> tuple[float, ...]:
    """The six numbers of a box, lower corner first.

    Raises:
        InputError: if there are not six or a lower one exceeds its upper one.
    """
    values = tuple(float(v) for v in point_range)
    if len(values) != 6 or any(low > high for low, high in zip(values[:3], values[3:], strict=True)):
        raise InputError(
            f"point_range must be [xmin, ymin, zmin, xmax, ymax, zmax] with min <= max, got {list(point_range)}"
        )
    return values
