"""SemanticKITTI ``.label`` files: a uint32 per point, semantic id in the low 16 bits, instance id in the high 16."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pc3d.errors import InputError
from pc3d.io.atomic import atomic_write


def read_labels(path: str | os.PathLike[str], count: int | None = None) -> tuple[Tensor, Tensor]:
    """Labels of one scan, with the raw ids of the file.

    Args:
        path: ``.label`` file.
        count: points of the scan, when the labels must match one.

    Returns:
        Semantic id ``(N,)`` int64 and instance id ``(N,)`` int64 (0: no instance).

    Raises:
        InputError: if the file is missing, is no whole number of labels or not one label per point.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) % 4:
        raise InputError(f"{path}: {len(data)} bytes are not a whole number of uint32 labels: the file is truncated")
    words = np.frombuffer(data, "<u4").astype(np.int64)
    if count is not None and len(words) != count:
        raise InputError(f"{path}: holds {len(words)} labels for a scan of {count} points")
    return torch.from_numpy(words & 0xFFFF), torch.from_numpy(words >> 16)


def write_labels(path: str | os.PathLike[str], semantic: Tensor, instance: Tensor | None = None) -> Path:
    """Write the labels of one scan; see :func:`read_labels`.

    Raises:
        InputError: if an id is not in 0..65535, the lengths differ or the file cannot be written.
    """
    path = Path(path)
    words = _half(path, "semantic", semantic)
    if instance is not None:
        if len(instance) != len(semantic):
            raise InputError(f"{path}: {len(instance)} instance ids for {len(semantic)} semantic ids")
        words = words | _half(path, "instance", instance) << 16
    with atomic_write(path) as temporary:
        temporary.write_bytes(words.astype("<u4").tobytes())
    return path


def _half(path: Path, name: str, ids: Tensor) -> np.ndarray:
    values = ids.detach().cpu().numpy().astype(np.int64).reshape(-1)
    outside = values[(values < 0) | (values > 0xFFFF)]
    if len(outside):
        raise InputError(f"{path}: {name} id {outside[0]} does not fit 0..65535 ({len(outside)} such points)")
    return values
