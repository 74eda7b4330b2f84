"""The surface where a function of space passes a level, from coarse to fine."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pc3d.errors import InputError
from pc3d.ops.mesh import Mesh

Array = np.ndarray[Any, np.dtype[Any]]
_OUTSIDE = 1e6  # how far below the level the world beyond the cube is: surfaces end on the cube


def extract_surface(
    field: Callable[[Tensor], Tensor],
    level: float = 0.0,
    half_size: float = 0.5,
    resolution: int = 32,
    steps: int = 3,
    device: torch.device | str = "cpu",
    on_level: Callable[[int], None] | None = None,
) -> Mesh:
    """Closed mesh of ``field > level`` in the cube ``[-half_size, half_size]^3``, by marching cubes.

    Values are computed at all corners of a coarse grid, then ``steps`` times on twice as fine a grid, there only at
    cells that the surface passes, wherever it leads (after the multi-resolution extraction of Mescheder et al. 2019,
    arXiv 1812.03828); elsewhere they are interpolated. Details that no coarse cell shows are missed.

    Args:
        field: ``(Q, 3)`` float32 points on ``device`` to ``(Q,)`` values; it may split them as it likes.
        on_level: called with the cells per axis of every grid whose values are there.
        resolution: cells per axis of the coarse grid; the fine one has ``resolution * 2 ** steps``.

    Returns:
        The mesh on the CPU, faces counter-clockwise from outside; empty where nothing is above the level.

    Raises:
        InputError: if scikit-image is missing, or sizes are not positive.
    """
    if resolution < 1 or steps < 0 or half_size <= 0:
        raise InputError(f"extract_surface: resolution {resolution}, steps {steps} or size {half_size} is too small")

    on_level = on_level or (lambda cells: None)

    def evaluate(values: Tensor, where: Tensor) -> None:
        """Fill in the corners ``where`` of a grid."""
        place = where.nonzero()
        if len(place):
            coord = (place.float() / (len(values) - 1) * 2 - 1) * half_size
            values[tuple(place.T)] = field(coord).to(values)

    known = torch.ones([resolution + 1] * 3, dtype=torch.bool, device=device)
    values = torch.zeros_like(known, dtype=torch.float32)
    evaluate(values, known)
    on_level(resolution)
    for _ in range(steps):
        cells = _doubled(_mixed(values > level))
        finer = [2 * len(values) - 1] * 3
        values = F.interpolate(values[None, None], finer, mode="trilinear", align_corners=True)[0, 0]
        coarse, known = known, torch.zeros(finer, dtype=torch.bool, device=device)
        known[::2, ::2, ::2] = coarse
        while bool((new := _corners(cells) & ~known).any()):
            evaluate(values, new)
            known |= new
            cells = _mixed(values > level)
        on_level(len(values) - 1)
    return _march(values.cpu().numpy(), level, half_size)


_SIDES = list(itertools.product((slice(None, -1), slice(1, None)), repeat=3))


def _mixed(above: Tensor) -> Tensor:
    """``(R, R, R)`` cells with corners, of ``(R + 1, ...)``, on both sides."""
    corners = [above[side] for side in _SIDES]
    return functools.reduce(torch.logical_or, corners) & ~functools.reduce(torch.logical_and, corners)


def _corners(cells: Tensor) -> Tensor:
    """``(R + 1, ...)`` corners of the marked cells."""
    marked = cells.new_zeros([len(cells) + 1] * 3)
    for side in _SIDES:
        marked[side] |= cells
    return marked


def _doubled(cells: Tensor) -> Tensor:
    """The same cells on a grid twice as fine."""
    for axis in range(3):
        cells = cells.repeat_interleave(2, axis)
    return cells


def _march(values: Array, level: float, half_size: float) -> Mesh:
    try:
        from skimage.measure import marching_cubes
    except ImportError as error:
        raise InputError("surfaces need scikit-image: pip install pc3d[mesh]") from error
    if not (values > level).any():
        return Mesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64))
    closed = np.pad(values, 1, constant_values=level - _OUTSIDE)
    vertices, faces, _, _ = marching_cubes(closed, level, gradient_direction="ascent", allow_degenerate=False)
    coord = ((vertices - 1) / (len(values) - 1) * 2 - 1) * half_size
    return Mesh(torch.from_numpy(coord.astype(np.float32)), torch.from_numpy(faces.astype(np.int64)))
