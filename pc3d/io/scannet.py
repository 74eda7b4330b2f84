"""Files of the ScanNet benchmark: what its server takes, one set of text files per scene."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pc3d.errors import InputError
from pc3d.io.atomic import atomic_write

MASKS = "predicted_masks"


def write_semantic(path: Path, ids: Tensor) -> Path:
    """Write ``<scene>.txt``: one label id per vertex and line, in the order of the mesh file.

    Args:
        ids: ``(N,)`` NYU40 (or ScanNet200) ids, 0 for none.
    """
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(map(str, ids.tolist())) + "\n")
    return path


def read_semantic(path: Path, count: int) -> Tensor:
    """``(count,)`` int64 label ids of a file of :func:`write_semantic`.

    Raises:
        InputError: if it is missing, holds anything but whole numbers, or has another number of lines.
    """
    return torch.from_numpy(_integers(path, count))


def write_instances(
    path: Path, masks: Sequence[Tensor], ids: Sequence[int], scores: Sequence[float], count: int
) -> Path:
    """Write ``<scene>.txt`` with a line ``predicted_masks/<scene>_<nnn>.txt <label id> <confidence>`` per instance, and
    beside it the masks: 0 or 1 per vertex and line.

    Args:
        masks: rows of each instance in a mesh of ``count`` vertices.
        ids: NYU40 (or ScanNet200) id of each.
        scores: confidence of each.
    """
    lines = []
    for number, (rows, label, score) in enumerate(zip(masks, ids, scores, strict=True)):
        mask = np.zeros(count, np.int64)
        mask[rows.cpu().numpy()] = 1
        place = f"{MASKS}/{path.stem}_{number:03d}.txt"
        with atomic_write(path.parent / place) as temporary:
            temporary.write_text("\n".join(map(str, mask.tolist())) + "\n")
        lines.append(f"{place} {label} {score:.9g}\n")
    with atomic_write(path) as temporary:  # last: a scene is listed when its masks are there
        temporary.write_text("".join(lines))
    return path


def read_instances(path: Path, count: int) -> tuple[list[Tensor], list[int], list[float]]:
    """Masks (rows), label ids and confidences of a file of :func:`write_instances`.

    Raises:
        InputError: if it or a mask is missing or damaged, or a mask lies outside the file's folder.
    """
    masks, ids, scores = [], [], []
    for number, line in enumerate(_text(path).splitlines(), 1):
        try:
            place, label, score = line.split()
            ids.append(int(label))
            scores.append(float(score))
        except ValueError as error:
            raise InputError(
                f"{path}: line {number} is not 'mask file, label id, confidence': {line[:80]!r}"
            ) from error
        mask = path.parent / place
        if path.parent.resolve() not in mask.resolve().parents:
            raise InputError(f"{path}: line {number}: the mask '{place}' lies outside {path.parent}")
        masks.append(torch.from_numpy(np.flatnonzero(_integers(mask, count))))
    return masks, ids, scores


def _integers(path: Path, count: int) -> np.ndarray:
    words = _text(path).split()
    try:
        values = np.array(words, dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise InputError(f"{path}: not one whole number per line ({error})") from error
    if len(values) != count:
        raise InputError(f"{path}: holds {len(values)} lines for a mesh of {count} vertices")
    return values


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or 'not a text file'}") from error
