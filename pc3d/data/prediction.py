"""What a model says about the points of one cloud, as it is kept on disk to be scored later."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pc3d.data.boxes import Boxes
from pc3d.errors import InputError
from pc3d.io.atomic import atomic_write
from pc3d.io.numpy_arrays import load_npz
from pc3d.metrics.instances import Instances

_INSTANCES = ("rows", "borders", "classes", "scores")


@dataclass(frozen=True)
class Prediction:
    """Predicted classes of the points of a raw cloud, in its order.

    Attributes:
        segment: ``(N,)`` int64 class, -1 for none.
        instances: of the same points, if the model finds instances.
        boxes: of the cloud, if the model finds boxes.
    """

    segment: Tensor
    instances: Instances | None = None
    boxes: Boxes | None = None


def write_prediction(path: Path, prediction: Prediction) -> Path:
    """Write an ``.npz`` file with ``segment`` and, for instances, ``rows``, ``borders``, ``classes`` and ``scores``."""
    arrays: dict[str, Any] = {"segment": prediction.segment.cpu().numpy().astype(np.int16)}
    if prediction.instances is not None:
        arrays |= {name: getattr(prediction.instances, name).cpu().numpy() for name in _INSTANCES}
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    return path


def read_prediction(path: Path, count: int) -> Prediction:
    """Read what :func:`write_prediction` wrote for a cloud of ``count`` points.

    Raises:
        InputError: if the file is missing or damaged, or is of another cloud.
    """
    if not path.is_file():
        raise InputError(f"{path}: is missing: no prediction was saved for this cloud")
    arrays = load_npz(path)
    segment = arrays.get("segment")
    if segment is None or segment.shape != (count,) or segment.dtype.kind not in "iu":
        found = "missing" if segment is None else f"{segment.shape} {segment.dtype}"
        raise InputError(f"{path}: field 'segment' is {found}, expected ({count},) integers")
    return Prediction(torch.from_numpy(segment.astype(np.int64)), _instances(path, arrays, count))


def _instances(path: Path, arrays: dict[str, np.ndarray], count: int) -> Instances | None:
    if "rows" not in arrays:
        return None
    try:
        rows, borders, classes = (torch.from_numpy(arrays[name].astype(np.int64)) for name in _INSTANCES[:3])
        instances = Instances(rows, borders, classes, torch.from_numpy(arrays["scores"].astype(np.float32)))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: its instances need the fields {', '.join(_INSTANCES)} of fitting lengths") from error
    sorted_borders = len(borders) > 0 and int(borders[0]) == 0 and bool((borders.diff() >= 0).all())
    if not sorted_borders or int(borders[-1]) != len(rows) or (len(rows) and not 0 <= rows.min() <= rows.max() < count):
        raise InputError(f"{path}: field 'rows' or 'borders' does not fit a cloud of {count} points")
    return instances
