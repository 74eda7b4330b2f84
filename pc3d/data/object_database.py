"""Objects cut out of labelled frames, to be pasted into others while training (Yan et al., "SECOND", section 3.2)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pc3d.data.boxes import box_tensor
from pc3d.errors import InputError
from pc3d.io.atomic import atomic_write
from pc3d.io.numpy_arrays import load_npy
from pc3d.ops.boxes import points_in_boxes
from pc3d.points import Points

_LIST = "objects.json"
_ARRAYS = ("coord", "strength", "borders", "boxes")


class ObjectDatabase:
    """A folder of objects: ``coord.npy``, ``strength.npy``, ``borders.npy``, ``boxes.npy`` and ``objects.json``.

    Args:
        folder: written by :func:`write_objects_of`; arrays are memory-mapped.

    Raises:
        InputError: if it is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            content = json.loads((self.folder / _LIST).read_text())
            self.names: list[str] = content["names"]
            self.levels: list[int] = content["levels"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.folder}: is no database of objects: pc3d prepare kitti --raw DIR --out OUT makes one, it is "
                "OUT/objects"
            ) from error
        coord, strength, borders, boxes = (load_npy(self.folder / f"{name}.npy", "r") for name in _ARRAYS)
        fits = len(self.names) == len(self.levels) == len(boxes) == len(borders) - 1 and len(strength) == len(coord)
        if not fits or int(borders[-1]) != len(coord):
            raise InputError(f"{self.folder}: is damaged: its arrays are of different lengths; make it anew")
        self._coord, self._strength = coord, strength
        self.borders, self.boxes = np.asarray(borders), torch.from_numpy(np.array(boxes, np.float64))

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Points of every object."""
        return np.diff(self.borders)

    def of_class(self, name: str, min_points: int) -> Tensor:
        """``(M,)`` int64 objects of a kind with enough points, and not too far, hidden or cut off (level -1)."""
        kept = (
            np.array([own == name for own in self.names]) & (np.array(self.levels) >= 0) & (self.counts >= min_points)
        )
        return torch.from_numpy(np.flatnonzero(kept))

    def points(self, number: int) -> tuple[Tensor, Tensor]:
        """``coord (N, 3)`` and ``strength (N, 1)`` of an object, where it stood."""
        own = slice(*self.borders[number : number + 2])
        return torch.from_numpy(np.array(self._coord[own])), torch.from_numpy(np.array(self._strength[own]))


def is_database(folder: Path) -> bool:
    """Whether a folder holds a complete database."""
    return (folder / _LIST).is_file()


def write_objects_of(folder: Path, clouds: Iterable[tuple[Points, list[int]]]) -> int:
    """Write the objects of labelled clouds, each with the level of difficulty of its boxes; the number of them.

    ``objects.json`` is written last: a folder without it is not complete.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("coord", "strength", "boxes")}
    names: list[str] = []
    levels: list[int] = []
    counts: list[int] = []
    for cloud, own_levels in clouds:
        boxes = box_tensor(cloud.meta[0])[:, :7]
        inside = points_in_boxes(cloud.coord, boxes)
        for i, name in enumerate(cloud.meta[0]["box_names"]):
            rows = inside[:, i].nonzero()[:, 0]
            if len(rows):
                parts["coord"].append(cloud.coord[rows].numpy())
                parts["strength"].append(cloud.get("strength")[rows].numpy())
                parts["boxes"].append(boxes[i].numpy())
                names.append(name)
                levels.append(own_levels[i])
                counts.append(len(rows))
    arrays = {
        "coord": np.concatenate([np.zeros((0, 3), np.float32), *parts["coord"]]),
        "strength": np.concatenate([np.zeros((0, 1), np.float32), *parts["strength"]]),
        "borders": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "boxes": np.array(parts["boxes"]).reshape(-1, 7),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        with atomic_write(folder / f"{name}.npy") as temporary, temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)
    with atomic_write(folder / _LIST) as temporary:
        temporary.write_text(json.dumps({"names": names, "levels": levels}) + "\n")
    return len(names)
