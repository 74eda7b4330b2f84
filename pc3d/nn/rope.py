"""Rotary position embedding in three dimensions (PointROPE): attention sees differences of positions, no parameters.

Su et al. 2021, "RoFormer" (arXiv 2104.09864), one third of every head for each axis as in LitePT (arXiv 2512.13689)
and Utonia.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pc3d.errors import InputError


class Rotation(NamedTuple):
    """Cosine and sine of the angles of each row, ``(N, 3, F)`` float32 each: axes x, y, z and F frequencies."""

    cos: Tensor
    sin: Tensor


def rotary_frequencies(head_dim: int, base: float) -> Tensor:
    """``(F,)`` float32 radians per unit of position, ``base ** (-i / F)`` for ``F = head_dim / 6``.

    Raises:
        InputError: if ``head_dim`` is not a multiple of 6 (three axes, pairs of channels), or ``base`` not positive.
    """
    if head_dim < 6 or head_dim % 6:
        raise InputError(
            f"rotary embedding: heads of {head_dim} channels cannot be split into pairs for three axes; "
            "channels / heads must be a multiple of 6"
        )
    if base <= 0:
        raise InputError(f"rotary embedding: base must be positive, got {base}")
    count = head_dim // 6
    return base ** (-torch.arange(count, dtype=torch.float32) / count)


def rotation(position: Tensor, frequencies: Tensor) -> Rotation:
    """Angles of positions.

    Args:
        position: ``(N, 3)`` metres or cells, any real or integer type.
        frequencies: ``(F,)``, see :func:`rotary_frequencies`.
    """
    angles = position.float()[:, :, None] * frequencies.float()
    return Rotation(angles.cos(), angles.sin())


def rotate(values: Tensor, by: Rotation) -> Tensor:
    """Rotate the channel pairs of every head; rotating back is rotating by ``(cos, -sin)``.

    Args:
        values: ``(N, H, D)`` queries or keys. A head is ``[x part | y part | z part]``; channel ``i`` of the first half
            of a part and channel ``i`` of its second half are the pair of frequency ``i``.
        by: the rotation of each row, ``F = D / 6``.

    Returns:
        ``(N, H, D)`` in the dtype of ``values``; computed in float32 at least.
    """
    wide = values if values.dtype == torch.float64 else values.float()
    cos = torch.stack([by.cos, by.cos], 2).flatten(1)[:, None]
    sin = torch.stack([-by.sin, by.sin], 2).flatten(1)[:, None]
    partner = wide.unflatten(2, (3, 2, -1)).flip(3).flatten(2)
    return torch.addcmul(wide * cos, partner, sin).to(values.dtype)
