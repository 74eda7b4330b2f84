"""``ModelNet40``: CAD objects of 40 classes."""

from __future__ import annotations

from pathlib import Path

from pc3d.data.dataset import Split
from pc3d.datasets.meta import facts
from pc3d.datasets.objects import (
    ObjectDataset,
    check_share,
    h5_arrays,
    h5_label,
    h5_scenes,
    keep_for_validation,
    one_class,
    read_list,
    whole_cloud,
)
from pc3d.datasets.scenes import Scene
from pc3d.errors import InputError
from pc3d.io import read
from pc3d.points import Points

_TEXT, _H5 = "modelnet40_normal_resampled", "modelnet40_ply_hdf5_2048"


class ModelNet40(ObjectDataset):
    """CAD objects, y up (Wu et al., CVPR 2015): resampled text (9,843 / 2,468 clouds of 10,000 points) or HDF5 (2,048).

    Attributes: ``segment``, the object's class on every point; ``normal``, if the files have it.

    Args:
        root: folder of a release, or the one it lies in; of two releases the text is taken.
        val: share of the training clouds kept for validation; with 0 the test clouds are validated on, as published.
    """

    layouts = f"{_TEXT}/<class>/<class>_<nnnn>.txt or {_H5}/ply_data_*.h5"

    def __init__(self, root: str | None = None, val: float = 0.0) -> None:
        super().__init__(root)
        self.class_names = list(facts("objects")["modelnet40"])
        self.val = check_share("ModelNet40.val", val)

    def list_raw(self, split: Split) -> list[Scene] | None:
        stored: Split = "test" if split == "test" or (split == "val" and not self.val) else "train"
        scenes = self._stored(stored)
        return scenes if scenes is None or stored == "test" else keep_for_validation(scenes, self.val)[split]

    def _stored(self, split: Split) -> list[Scene] | None:
        assert self.root is not None
        text = next((p for p in (self.root / _TEXT, self.root) if (p / "modelnet40_train.txt").is_file()), None)
        if text is not None:
            ids = read_list(text / f"modelnet40_{split}.txt")
            return [Scene(i, i, text / i.rpartition("_")[0] / f"{i}.txt") for i in ids]
        h5 = next((p for p in (self.root / _H5, self.root) if any(p.glob("ply_data_train*.h5"))), None)
        return None if h5 is None else h5_scenes(sorted(h5.glob(f"ply_data_{split}*.h5")))

    def cloud_class(self, split: Split, index: int) -> int:
        path = self.scenes(split)[index].raw
        assert path is not None
        return self._named_class(path) if path.suffix == ".txt" else super().cloud_class(split, index)

    def _named_class(self, path: Path) -> int:
        if path.parent.name not in self.class_names:
            raise InputError(f"{path}: '{path.parent.name}' is none of the 40 classes")
        return self.class_names.index(path.parent.name)

    def load_raw(self, scene: Scene) -> Points:
        path = scene.raw
        assert path is not None
        if path.suffix == ".h5":
            arrays = h5_arrays(path)
            label = h5_label(path, arrays, scene.row, self.num_classes)
            normal = {"normal": arrays["normal"][scene.row].astype("f4")} if "normal" in arrays else {}
            return whole_cloud(arrays["data"][scene.row], label, path, scene.name, **normal)
        label = self._named_class(path)
        return one_class(read(path, columns=["x", "y", "z", "nx", "ny", "nz"]), label)
