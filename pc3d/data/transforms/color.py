"""Transforms of ``color`` (N, 3), float32 in 0..255."""

from __future__ import annotations

from typing import Literal

import torch

from pc3d.data.transforms.base import CloudTransform, Transform, chance, normal_like, uniform
from pc3d.points import Points


class ChromaticAutoContrast(CloudTransform):
    """With probability ``p`` blend the colors with their own version stretched to 0..255 channel by channel.

    A channel of one value stays as it is.

    Args:
        blend: share of the stretched version, 0..1; None draws it from U(0, 1).
    """

    def __init__(self, p: float = 0.2, blend: float | None = None) -> None:
        self.p = p
        self.blend = blend

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        color = cloud.get("color").float()
        if cloud.num_points == 0 or not chance(self.p, generator):
            return cloud
        blend = uniform(0, 1, generator) if self.blend is None else self.blend
        low, high = color.amin(0), color.amax(0)
        stretched = torch.where(high > low, (color - low) * (255 / (high - low).clamp(min=1e-6)), color)
        return cloud.with_attrs(color=(1 - blend) * color + blend * stretched)


class ChromaticTranslation(CloudTransform):
    """With probability ``p`` shift each channel of a cloud by U(-255 ratio, 255 ratio); clipped to 0..255."""

    def __init__(self, p: float = 0.95, ratio: float = 0.05) -> None:
        self.p = p
        self.ratio = ratio

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        color = cloud.get("color").float()
        if not chance(self.p, generator):
            return cloud
        shift = (torch.rand(3, generator=generator) * 2 - 1) * 255 * self.ratio
        return cloud.with_attrs(color=(color + shift.to(color)).clamp(0, 255))


class ChromaticJitter(CloudTransform):
    """With probability ``p`` add N(0, 255 std) to every color value; colors are clipped to 0..255."""

    def __init__(self, p: float = 0.95, std: float = 0.05) -> None:
        self.p = p
        self.std = std

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        color = cloud.get("color").float()
        if not chance(self.p, generator):
            return cloud
        return cloud.with_attrs(color=(color + normal_like(color, generator) * (255 * self.std)).clamp(0, 255))


class NormalizeColor(Transform):
    """Bring colors from 0..255 to model input.

    Args:
        target: ``"unit"`` is ``color / 255``; ``"signed"`` is ``color / 127.5 - 1``, which checkpoints of Pointcept
            before 1.6.0 expect.
    """

    def __init__(self, target: Literal["unit", "signed"] = "unit") -> None:
        self.target = target

    def __call__(self, points: Points, generator: torch.Generator | None = None) -> Points:
        color = points.get("color").float()
        return points.with_attrs(color=color / 255 if self.target == "unit" else color / 127.5 - 1)
