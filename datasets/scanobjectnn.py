"""``ScanObjectNN``: real scanned objects of 15 classes."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from pc3d.data.dataset import Split
from pc3d.datasets.meta import facts
from pc3d.datasets.objects import (
    ObjectDataset,
    check_share,
    h5_arrays,
    h5_label,
    h5_scenes,
    keep_for_validation,
    whole_cloud,
)
from pc3d.datasets.scenes import Scene
from pc3d.errors import InputError
from pc3d.points import Points

Variant = Literal["OBJ_ONLY", "OBJ_BG", "PB_T50_RS"]
_FILES = {
    "OBJ_ONLY": "main_split_nobg/{}_objectdataset.h5",
    "OBJ_BG": "main_split/{}_objectdataset.h5",
    "PB_T50_RS": "main_split/{}_objectdataset_augmentedrot_scale75.h5",
}


class ScanObjectNN(ObjectDataset):
    """Objects cut out of indoor scans, y up, 2,048 points (Uy et al., ICCV 2019).

    Attributes: ``segment``, the object's class on every point; ``instance``, 0 on the object, -1 on what is behind it.

    Args:
        root: folder with ``main_split`` and ``main_split_nobg``, or the one where they are in ``h5_files``.
        variant: ``OBJ_ONLY`` (2,309 / 581 clouds), ``OBJ_BG`` (the same with background) or ``PB_T50_RS`` (11,416 /
            2,882: moved, rotated and scaled boxes; the hardest).
        val: share of the training clouds kept for validation; with 0 the test clouds are validated on, as published.
            In PB_T50_RS several clouds show the same object, so a share of them is no independent sample.
    """

    layouts = "h5_files/main_split{,_nobg}/{training,test}_objectdataset*.h5"

    def __init__(self, root: str | None = None, variant: Variant = "PB_T50_RS", val: float = 0.0) -> None:
        super().__init__(root)
        if variant not in get_args(Variant):
            raise InputError(f"ScanObjectNN.variant: '{variant}' is not one of {', '.join(get_args(Variant))}")
        self.class_names = list(facts("objects")["scanobjectnn"])
        self.variant = variant
        self.val = check_share("ScanObjectNN.val", val)

    def list_raw(self, split: Split) -> list[Scene] | None:
        assert self.root is not None
        bases = (self.root / "h5_files", self.root)
        base = next((p for p in bases if (p / "main_split").is_dir() or (p / "main_split_nobg").is_dir()), None)
        if base is None:
            return None
        stored = "test" if split == "test" or (split == "val" and not self.val) else "training"
        scenes = h5_scenes([base / _FILES[self.variant].format(stored)])
        return scenes if stored == "test" else keep_for_validation(scenes, self.val)[split]

    def load_raw(self, scene: Scene) -> Points:
        path = scene.raw
        assert path is not None
        arrays = h5_arrays(path)
        label = h5_label(path, arrays, scene.row, self.num_classes)
        coord, attrs = arrays["data"][scene.row], {}
        if "mask" in arrays:
            if arrays["mask"].shape != arrays["data"].shape[:2]:
                raise InputError(f"{path}: 'mask' is {arrays['mask'].shape}, expected {arrays['data'].shape[:2]}")
            attrs["instance"] = np.where(arrays["mask"][scene.row] == -1, -1, 0)
        return whole_cloud(coord, label, path, scene.name, **attrs)
