"""Attributes made from other attributes, and the model's input features."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pc3d.data.transforms.base import Transform
from pc3d.errors import InputError
from pc3d.points import Points

_WIDTHS = {"coord": 3, "color": 3, "normal": 3}


class AssembleFeatures(Transform):
    """Concatenate named attributes into ``feat`` (N, channels) float32, in the order given.

    Args:
        features: attribute names; ``coord`` is one too. ``coord``, ``color`` and ``normal`` count 3 channels, others 1.

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
            value = points.get(name).float()
            column = value[:, None] if value.ndim == 1 else value
            width = _WIDTHS.get(name, 1)
            if column.ndim != 2 or column.shape[1] != width:
                raise InputError(
                    f"{points.describe()}: field '{name}' has shape {tuple(value.shape)}, a feature needs (N, {width})"
                )
            columns.append(column)
        return points.with_attrs(feat=torch.cat(columns, dim=1))


class ScaleAttribute(Transform):
    """``value * scale + offset`` of an attribute as float32.

    Args:
        name: the attribute (``coord`` included).
        output: where the result goes; None replaces the attribute.
    """

    def __init__(self, name: str, scale: float = 1.0, offset: float = 0.0, output: str | None = None) -> None:
        self.name = name
        self.scale = scale
        self.offset = offset
        self.output = output

    def __call__(self, points: Points, generator: torch.Generator | None = None) -> Points:
        scaled = points.get(self.name).float() * self.scale + self.offset
        return points.with_attrs(**{self.output or self.name: scaled})
