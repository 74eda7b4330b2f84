"""``ShapeNet55``: CAD objects of 55 categories, sampled for pre-training and completion."""

from __future__ import annotations

from typing import Literal

from pc3d.data.dataset import Split
from pc3d.datasets.meta import facts
from pc3d.datasets.objects import ObjectDataset, check_share, keep_for_validation, read_list, whole_cloud
from pc3d.datasets.scenes import Scene
from pc3d.errors import InputError
from pc3d.io.numpy_arrays import load_npy
from pc3d.points import Points


class ShapeNet55(ObjectDataset):
    """ShapeNet-55 (41,952 / 10,518 clouds) or its subset of 34 categories, 8,192 points (Yu et al., ICCV 2021).

    Attributes: ``segment``, the object's category on every point.

    Args:
        root: folder with ``shapenet_pc``, or the one where it is in ``ShapeNet55-34``.
        subset: 55 or 34: lists ``ShapeNet-<subset>/{train,test}.txt``.
        whole: train on train and test together, as for pre-training.
        val: share of the training clouds kept for validation; with 0 the test clouds are validated on.
    """

    layouts = "shapenet_pc/<synset>-<model>.npy and ShapeNet-{55,34}/{train,test}.txt"

    def __init__(
        self, root: str | None = None, subset: Literal[55, 34] = 55, whole: bool = False, val: float = 0.0
    ) -> None:
        super().__init__(root)
        if subset not in (55, 34):
            raise InputError(f"ShapeNet55.subset: {subset} must be 55 or 34")
        self._synsets = {synset: number for number, synset in enumerate(facts("objects")["shapenet_synsets"])}
        self.class_names = list(facts("objects")["shapenet_synsets"].values())
        self.subset, self.whole, self.val = subset, whole, check_share("ShapeNet55.val", val)

    def list_raw(self, split: Split) -> list[Scene] | None:
        assert self.root is not None
        base = next((p for p in (self.root / "ShapeNet55-34", self.root) if (p / "shapenet_pc").is_dir()), None)
        if base is None:
            return None
        lists = base / f"ShapeNet-{self.subset}"
        stored = "test" if split == "test" or (split == "val" and not self.val) else "train"
        names = read_list(lists / f"{stored}.txt")
        if stored == "train" and self.whole:
            names += read_list(lists / "test.txt")
        stems = [name.removesuffix(".npy") for name in names]
        scenes = [Scene(stem, stem, base / "shapenet_pc" / f"{stem}.npy") for stem in stems]
        return scenes if stored == "test" else keep_for_validation(scenes, self.val)[split]

    def load_raw(self, scene: Scene) -> Points:
        path = scene.raw
        assert path is not None
        synset = path.name.partition("-")[0]
        if synset not in self._synsets:
            raise InputError(f"{path}: '{synset}' is none of the 55 synsets")
        if not path.is_file():
            raise InputError(f"{path}: is missing")
        coord = load_npy(path)
        return whole_cloud(coord, self._synsets[synset], path, scene.name)
