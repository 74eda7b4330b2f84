"""Consistent Traverse Serialization: line after line, plane after plane (Point Cloud Mamba, arXiv 2403.00762, 3.2)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Traverse = Literal["xyz", "xzy", "yxz", "yzx", "zxy", "zyx"]
TRAVERSES: tuple[Traverse, ...] = ("xyz", "xzy", "yxz", "yzx", "zxy", "zyx")


def snake_codes(cells: Tensor, offsets: Tensor, traverse: Traverse) -> Tensor:
    """Places along a snake through the box of each cloud: every step of a full grid goes to a neighbouring cell.

    Args:
        cells: ``(N, 3)`` int64, not negative.
        offsets: ``(B + 1,)`` int64 cloud borders.
        traverse: the fastest axis first.

    Returns:
        ``(N,)`` int64, comparable within a cloud.
    """
    first, second, third = _axes(cells, traverse)
    width, height = (_per_cloud_maximum(axis, offsets) + 1 for axis in (first, second))
    along = second * width + torch.where(second % 2 == 0, first, width - 1 - first)
    plane = width * height
    return third * plane + torch.where(third % 2 == 0, along, plane - 1 - along)


def released_codes(cells: Tensor, offsets: Tensor, traverse: Traverse) -> Tensor:
    """The codes of the released implementation, which its weights were trained with.

    They use the largest cell of the whole batch where the second and third axis should stand, so that only the first
    axis decides and all else is a tie; and where a cloud is flat, they no longer tell clouds apart.

    Returns:
        ``(N,)`` int64, comparable across the batch; to be sorted stably.
    """
    axes = _axes(cells, traverse)
    if not len(cells):
        return axes[0]
    m1, m2, m3 = (int(axis.max()) for axis in axes)
    line = _start(m2) * m1 + _sign(m2) * axes[0]
    plane = _start(m3) * m1 * m2 + _sign(m3) * line
    return _cloud(offsets, len(cells)) * (m1 * m2 * m3) + plane


def snake_order(cells: Tensor, offsets: Tensor, traverse: Traverse) -> Tensor:
    """``(N,)`` int64 rows along :func:`snake_codes`, cloud after cloud; equal cells keep the order of their rows."""
    rows = snake_codes(cells, offsets, traverse).argsort(stable=True)
    return rows[_cloud(offsets, len(cells))[rows].argsort(stable=True)]


def _axes(cells: Tensor, traverse: str) -> list[Tensor]:
    if traverse not in TRAVERSES:
        raise ValueError(f"traverse must be one of {', '.join(TRAVERSES)}, got {traverse!r}")
    return [cells[:, "xyz".index(axis)].long() for axis in traverse]


def _cloud(offsets: Tensor, rows: int) -> Tensor:
    return torch.repeat_interleave(offsets.diff(), output_size=rows)


def _per_cloud_maximum(values: Tensor, offsets: Tensor) -> Tensor:
    """``(N,)``: the largest value of each row's cloud."""
    cloud = _cloud(offsets, len(values))
    largest = values.new_zeros(len(offsets) - 1).scatter_reduce_(0, cloud, values, "amax")
    return largest[cloud]


def _sign(largest: int) -> int:
    return 1 if largest % 2 == 0 else -1


def _start(largest: int) -> int:
    return largest if largest % 2 == 0 else largest + 1
