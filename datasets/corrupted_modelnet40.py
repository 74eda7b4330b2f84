"""``CorruptedModelNet40``: the files of two robustness benchmarks, ModelNet40-C and ModelNet-C."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pc3d.data.dataset import Split
from pc3d.data.transforms.corruptions import CLEAN, MODELNET_C, check_corruption
from pc3d.datasets.meta import facts
from pc3d.datasets.objects import Array, ObjectDataset, h5_arrays, h5_label, h5_scenes, whole_cloud
from pc3d.datasets.scenes import Scene
from pc3d.errors import InputError
from pc3d.io.numpy_arrays import load_npy
from pc3d.points import Points

_FOLDERS = ("", "modelnet40_c", "modelnet_c", "pointcloud_c")


class CorruptedModelNet40(ObjectDataset):
    """The test clouds of ModelNet40 under one corruption, as published: all points of a file, in its order.

    ModelNet40-C (Sun et al., arXiv 2201.12296) or ModelNet-C, of PointCloud-C (Ren et al., ICML 2022), y up. They are
    the test clouds and the validation clouds; there are none to train on. ``pc3d robustness`` goes through all files.

    Attributes: ``segment``, the object's class on every point.

    Args:
        root: folder of the files, or the one it lies in.
        corruption: a name of either benchmark, or ``clean``.
        severity: 1 to 5 of ModelNet40-C, 0 to 4 of ModelNet-C; of clean clouds it means nothing.
    """

    layouts = (
        "data_<corruption>_<1..5>.npy, data_original.npy and label.npy (ModelNet40-C), or <corruption>_<0..4>.h5 and "
        "clean.h5 (ModelNet-C)"
    )

    def __init__(self, root: str | None = None, corruption: str = CLEAN, severity: int = 1) -> None:
        super().__init__(root)
        check_corruption("CorruptedModelNet40", corruption, severity)
        self.class_names = list(facts("objects")["modelnet40"])
        self.corruption, self.severity = corruption, severity

    @property
    def folder(self) -> Path | None:
        """Where the files are; None if neither benchmark is found."""
        assert self.root is not None
        places = [self.root / name for name in _FOLDERS]
        return next(
            (p for p in places if (p / "label.npy").is_file() or any(map(_is_modelnet_c, p.glob("*.h5")))), None
        )

    @property
    def is_modelnet_c(self) -> bool:
        """Whether the files are those of ModelNet-C, not of ModelNet40-C."""
        return self.folder is not None and not (self.folder / "label.npy").is_file()

    def list_raw(self, split: Split) -> list[Scene] | None:
        if (folder := self.folder) is None:
            return None
        if split == "train":
            return []
        if self.corruption != CLEAN and (self.corruption in MODELNET_C) != self.is_modelnet_c:
            has, other = ("ModelNet-C", "ModelNet40-C") if self.is_modelnet_c else ("ModelNet40-C", "ModelNet-C")
            raise InputError(f"{folder}: holds {has}; '{self.corruption}' is a corruption of {other}")
        clean = self.corruption == CLEAN
        if self.is_modelnet_c:
            return h5_scenes([folder / (f"{CLEAN}.h5" if clean else f"{self.corruption}_{self.severity}.h5")])
        path = folder / ("data_original.npy" if clean else f"data_{self.corruption}_{self.severity}.npy")
        return [Scene(f"{path.stem}_{i:05d}", f"{path.stem}/{i:05d}", path, i) for i in range(len(_clouds(path)[0]))]

    def files(self, scene: Scene) -> Iterable[Path]:
        path, *_ = super().files(scene)
        return [path] if path.suffix == ".h5" else [path, path.with_name("label.npy")]

    def cloud_class(self, split: Split, index: int) -> int:
        scene = self.scenes(split)[index]
        assert scene.raw is not None
        return self._label(scene.raw, scene.row)

    def load_raw(self, scene: Scene) -> Points:
        path = scene.raw
        assert path is not None
        clouds = h5_arrays(path)["data"] if path.suffix == ".h5" else _clouds(path)[0]
        return whole_cloud(clouds[scene.row], self._label(path, scene.row), path, scene.name)

    def _label(self, path: Path, row: int) -> int:
        arrays = h5_arrays(path) if path.suffix == ".h5" else {"label": _clouds(path)[1]}
        return h5_label(path, arrays, row, self.num_classes)


def _is_modelnet_c(path: Path) -> bool:
    return path.stem == CLEAN or path.stem.rpartition("_")[0] in MODELNET_C


def _clouds(path: Path) -> tuple[Array, Array]:
    """``(B, N, 3)`` coordinates of a file of ModelNet40-C, memory-mapped, and the ``(B, 1)`` labels beside it.

    Raises:
        InputError: if either is missing or damaged, or they do not fit each other.
    """
    coord, where = load_npy(path, "c"), path.with_name("label.npy")
    label = load_npy(where)
    if coord.ndim != 3 or coord.shape[2] != 3 or coord.dtype.kind not in "fiu":
        raise InputError(f"{path}: is {coord.shape} {coord.dtype}, expected (B, N, 3) numbers")
    if label.size != len(coord) or label.dtype.kind not in "fiu":
        raise InputError(f"{where}: is {label.shape} {label.dtype}, expected a number for each of {len(coord)} clouds")
    return coord, label.reshape(-1, 1)
