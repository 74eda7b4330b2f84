"""What data sets of single objects share: they are read as they are, from one file per object or HDF5 files of many."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pc3d.data.dataset import Split
from pc3d.datasets.scenes import Scene, SceneDataset
from pc3d.errors import InputError
from pc3d.points import Points

Array = np.ndarray[Any, np.dtype[Any]]
_FILES_IN_MEMORY = 8  # of HDF5; all of ModelNet40, 350 MB


class ObjectDataset(SceneDataset):
    """Clouds of single objects. Where a cloud has one class, all its points carry it as ``segment``."""

    writes = False

    def list_prepared(self, split: Split) -> list[Scene] | None:
        return None

    def cloud_class(self, split: Split, index: int) -> int:
        scene = self.scenes(split)[index]
        if scene.raw is not None and scene.raw.suffix == ".h5" and self.categories is None:
            return h5_label(scene.raw, h5_arrays(scene.raw), scene.row, self.num_classes)
        return super().cloud_class(split, index)

    def files(self, scene: Scene) -> Iterable[Path]:
        assert scene.raw is not None
        return [scene.raw]


def whole_cloud(coord: Array, label: int, where: Path | str, name: str, **attrs: Array) -> Points:
    """One cloud of ``(N, 3)`` coordinates, all of class ``label``.

    Raises:
        InputError: if the shape is another, there are no points, or a coordinate is not finite.
    """
    if coord.ndim != 2 or coord.shape[1] != 3 or coord.dtype.kind not in "fiu":
        raise InputError(f"{where}: coordinates are {coord.shape} {coord.dtype}, expected (N, 3) numbers")
    if len(coord) == 0:
        raise InputError(f"{where}: holds no points")
    bad = ~np.isfinite(coord).all(1)
    if bad.any():
        raise InputError(f"{where}: {int(bad.sum())} points are not finite (first: {int(bad.argmax())})")
    tensors = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in attrs.items()}
    tensors["segment"] = tensors.get("segment", torch.full((len(coord),), label))
    meta = {"name": name, "path": str(where), "origin": (0.0, 0.0, 0.0)}
    return Points(torch.from_numpy(np.ascontiguousarray(coord, np.float32)), attrs=tensors, meta=[meta])


def one_class(points: Points, label: int) -> Points:
    """The cloud with class ``label`` on every point."""
    return points.with_attrs(segment=torch.full((points.num_points,), label))


def check_share(name: str, share: float) -> float:
    """The share itself.

    Raises:
        InputError: unless 0 <= share < 1.
    """
    if not 0 <= share < 1:
        raise InputError(f"{name}: {share} is not a share below 1")
    return share


def keep_for_validation(scenes: Sequence[Scene], share: float) -> dict[Split, list[Scene]]:
    """Training clouds without, and validation clouds of, every n-th cloud: ``share`` of them, spread over the list."""
    places = {int((i + 0.5) / share) for i in range(round(share * len(scenes)))} if share else set()
    kept: dict[Split, list[Scene]] = {"train": [], "val": []}
    for i, scene in enumerate(scenes):
        kept["val" if i in places else "train"].append(scene)
    return kept


def read_list(path: Path) -> list[str]:
    """The words of a list file, one per line.

    Raises:
        InputError: if it is missing, not text, or empty.
    """
    try:
        names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or 'not a text file'}") from error
    if not names:
        raise InputError(f"{path}: names nothing")
    return names


# HDF5 ----------------------------------------------------------------------------------------------------------------


def h5_scenes(paths: Sequence[Path]) -> list[Scene]:
    """One scene for each row of ``data`` in the files."""
    scenes = []
    for path in paths:
        rows = len(h5_arrays(path)["data"])
        scenes += [Scene(f"{path.stem}_{row:05d}", f"{path.stem}/{row:05d}", path, row) for row in range(rows)]
    return scenes


def h5_arrays(path: Path) -> dict[str, Array]:
    """Every data set of an HDF5 file; ``data`` is ``(B, N, 3)``, the others have B rows.

    Raises:
        InputError: if h5py is missing, the file is missing or damaged, or has no ``data`` and ``label`` of such shapes.
    """
    if not path.is_file():
        raise InputError(f"{path}: is missing")
    status = path.stat()
    return _h5_arrays(path, status.st_size, status.st_mtime_ns)


@lru_cache(_FILES_IN_MEMORY)
def _h5_arrays(path: Path, size: int, changed: int) -> dict[str, Array]:
    try:
        import h5py
    except ImportError as error:
        raise InputError(f"{path}: HDF5 files need h5py: pip install pc3d[h5]") from error
    try:
        with h5py.File(path, "r") as file:
            arrays = {name: item[()] for name, item in file.items() if isinstance(item, h5py.Dataset)}
    except (OSError, RuntimeError, KeyError) as error:
        raise InputError(f"{path}: not a readable HDF5 file ({str(error).splitlines()[0]})") from error
    for name, dimensions in (("data", 3), ("label", 1)):
        if name not in arrays or arrays[name].dtype.kind not in "fiu":
            raise InputError(f"{path}: has no numbers '{name}' (it has: {', '.join(arrays) or 'nothing'})")
        if name == "label":
            arrays[name] = arrays[name].reshape(len(arrays[name]), -1)
        shape = arrays[name].shape
        if (name == "data" and (len(shape) != dimensions or shape[2] != 3)) or (name == "label" and shape[1] != 1):
            raise InputError(f"{path}: '{name}' is {shape}, expected {'(B, N, 3)' if name == 'data' else '(B,)'}")
    count = len(arrays["data"])
    short = [name for name, array in arrays.items() if array.ndim and len(array) != count]
    if short:
        raise InputError(f"{path}: '{short[0]}' has {len(arrays[short[0]])} rows, 'data' {count}")
    return arrays


def h5_label(path: Path, arrays: dict[str, Array], row: int, classes: int) -> int:
    """Class of a row.

    Raises:
        InputError: if it is none of ``0 .. classes - 1``.
    """
    label = int(arrays["label"][row, 0])
    if not 0 <= label < classes:
        raise InputError(f"{path}: 'label' of row {row} is {label}, classes are 0..{classes - 1}")
    return label
