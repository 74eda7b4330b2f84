"""Boxes of objects in pictures and windows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pc3d.errors import InputError
from pc3d.ops.boxes import box_corners
from pc3d.points import Points

EDGES = np.array([[0, 1], [1, 2], [2, 3], [3, 0], [4, 5], [5, 6], [6, 7], [7, 4], [0, 4], [1, 5], [2, 6], [3, 7]])
"""``(12, 2)`` corners at the ends of every edge; 0, 1, 4 and 5 are in front."""
EDGE_COLOR = (230, 30, 30)
_STEP = 0.03  # metres between the points of an edge


def read_boxes(path: str | Path) -> NDArray[np.float64]:
    """``(M, 7)`` boxes of a file that ``pc3d predict`` wrote.

    Raises:
        InputError: if it cannot be read or holds something else.
    """
    try:
        entries = json.loads(Path(path).read_text())["boxes"]
        boxes = [[*entry["center"], *entry["size"], entry["heading"]] for entry in entries]
        return np.array(boxes, np.float64).reshape(len(boxes), 7)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is no file of boxes as pc3d predict writes them ({error})") from error


def with_edges(
    points: Points, colors: NDArray[np.uint8], boxes: NDArray[np.float64]
) -> tuple[Points, NDArray[np.uint8]]:
    """The points and their colours with the edges of boxes, as rows of points; other attributes are left out."""
    corners = box_corners(torch.from_numpy(boxes)).numpy()
    rows = [points.coord.cpu().numpy()]
    for start, end in (corners[box, edge] for box in range(len(boxes)) for edge in EDGES):
        steps = np.linspace(0, 1, max(int(np.linalg.norm(end - start) / _STEP), 2))[:, None]
        rows.append((start + steps * (end - start)).astype(np.float32))
    coord = np.concatenate(rows)
    drawn = np.tile(np.array(EDGE_COLOR, np.uint8), (len(coord) - len(colors), 1))
    return Points(torch.from_numpy(coord), meta=points.meta), np.concatenate([colors, drawn])
