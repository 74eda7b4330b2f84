"""Colours: class palettes, labels to colours, attributes to colours."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pc3d.errors import InputError
from pc3d.points import Points

Color = tuple[int, int, int]
Palette = Sequence[Color]

UNLABELLED: Color = (188, 188, 188)
RIGHT: Color = (214, 218, 222)
WRONG: Color = (222, 32, 38)

# Where files keep the class of a point, the first that is there counts.
LABEL_FIELDS = ("segment", "label", "prediction", "classification", "labels", "class", "scalar_Label", "scalar_label")

# Neighbours differ in hue and in lightness, so that they stay apart in grey print and for colour-blind readers.
_DISTINCT: tuple[Color, ...] = (
    (86, 140, 200),
    (242, 155, 60),
    (96, 172, 92),
    (206, 84, 92),
    (148, 112, 190),
    (150, 104, 84),
    (232, 140, 196),
    (222, 206, 84),
    (60, 188, 196),
    (24, 88, 140),
    (178, 208, 124),
    (160, 32, 100),
    (250, 200, 160),
    (20, 110, 84),
    (196, 176, 228),
    (120, 116, 28),
    (250, 118, 102),
    (110, 210, 168),
    (72, 60, 130),
    (196, 130, 40),
)
# Dark blue -> teal -> yellow with rising lightness: readable in grey print.
_RAMP = np.array(
    [[52, 40, 110], [44, 92, 150], [36, 146, 146], [92, 194, 110], [190, 220, 70], [252, 236, 120]], np.float64
)


def distinct_palette(num_classes: int) -> list[Color]:
    """``num_classes`` colours that are easy to tell apart: a fixed list first, then evenly spread hues."""
    colors = list(_DISTINCT[:num_classes])
    for i in range(num_classes - len(colors)):
        hue, lightness = (i * 0.618034) % 1.0, (0.42, 0.62, 0.75)[i % 3]
        red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.62)
        colors.append((round(red * 255), round(green * 255), round(blue * 255)))
    return colors


def label_colors(labels: Tensor | NDArray, palette: Palette | None = None) -> NDArray[np.uint8]:
    """``(N, 3)`` uint8 colours of ``(N,)`` class ids; negative ids (unlabelled, ignored) are grey.

    Args:
        palette: one colour per class; by default, and beyond its end, :func:`distinct_palette`.
    """
    ids = np.asarray(labels).reshape(-1).astype(np.int64)
    highest = int(ids.max(initial=-1))
    colors = list(palette or [])
    colors += distinct_palette(max(highest + 1, len(colors)))[len(colors) :]
    table = np.array([*colors, UNLABELLED], np.uint8)
    return table[np.where(ids < 0, len(table) - 1, ids)]


def scalar_colors(values: Tensor | NDArray) -> NDArray[np.uint8]:
    """``(N, 3)`` uint8 colours of ``(N,)`` numbers: a ramp from the 2nd to the 98th percentile; not finite: grey."""
    numbers = np.asarray(values, np.float64).reshape(-1)
    finite = np.isfinite(numbers)
    colors = np.full((len(numbers), 3), UNLABELLED, np.uint8)
    if not finite.any():
        return colors
    low, high = np.percentile(numbers[finite], (2, 98))
    position = np.clip((numbers[finite] - low) / max(high - low, 1e-12), 0, 1) * (len(_RAMP) - 1)
    steps = np.arange(len(_RAMP))
    colors[finite] = np.stack([np.interp(position, steps, _RAMP[:, axis]) for axis in range(3)], 1).round()
    return colors


def label_field(points: Points) -> str | None:
    """Name of the attribute that holds the classes of a cloud, None if there is none."""
    return next((name for name in LABEL_FIELDS if name in points), None)


def color_modes(points: Points) -> list[str]:
    """What :func:`point_colors` can show of a cloud: ``label`` and ``rgb`` if present, ``height``, every attribute."""
    label = label_field(points)
    first = [*(["label"] if label else []), *(["rgb"] if "color" in points else [])]
    return [*first, "height", *(name for name in points.attrs if name not in (label, "color"))]


def _has_colors(points: Points) -> bool:
    """Whether the colours tell anything: many LAS files have the fields, filled with zeros."""
    return "color" in points and bool((points.attrs["color"] != points.attrs["color"][:1]).any())


def point_colors(points: Points, mode: str = "auto", palette: Palette | None = None) -> NDArray[np.uint8]:
    """``(N, 3)`` uint8 colours of a cloud.

    Args:
        mode: ``label`` (see :func:`label_field`), ``rgb`` (attribute ``color``), ``height``, the name of any attribute,
            or ``auto``: the first of colour, label, strength or intensity, height that the cloud has. Vectors of three
            are shown as colours, other attributes of several columns by their first.

    Raises:
        InputError: if the cloud does not have what ``mode`` asks for.
    """
    label = label_field(points)
    if mode == "auto":
        present = ["rgb"] if _has_colors(points) else ["label"] if label else []
        present += [name for name in ("strength", "intensity") if name in points]
        mode = (present or ["height"])[0]
    if mode == "height":
        return scalar_colors(points.coord[:, 2])
    name = {"label": label or "label", "rgb": "color"}.get(mode, mode)
    if name not in points:
        raise InputError(
            f"{points.describe()}: no '{name}' to colour by (choose from: {', '.join(color_modes(points))})"
        )
    values = points.get(name).detach().cpu().numpy()
    if name == "color":
        return np.clip(values.round(), 0, 255).astype(np.uint8)
    if name in (*LABEL_FIELDS, "instance"):
        return label_colors(values, palette if name != "instance" else None)
    if values.ndim == 2 and values.shape[1] == 3:
        low, high = values.min(0), values.max(0)
        return ((values - low) / np.maximum(high - low, 1e-12) * 255).round().astype(np.uint8)
    return scalar_colors(values.reshape(len(values), -1)[:, 0])
