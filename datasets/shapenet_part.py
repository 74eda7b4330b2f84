"""``ShapeNetPart``: objects of 16 categories with labelled parts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from pc3d.data.dataset import Split, integer_codes
from pc3d.datasets.meta import facts
from pc3d.datasets.objects import ObjectDataset, h5_arrays, h5_label, h5_scenes, whole_cloud
from pc3d.datasets.scenes import Scene
from pc3d.errors import InputError
from pc3d.io import read
from pc3d.points import Points

_TEXT = "shapenetcore_partanno_segmentation_benchmark_v0_normal"
_H5 = "shapenet_part_seg_hdf5_data"
_COLUMNS = ["x", "y", "z", "nx", "ny", "nz", "part"]


class ShapeNetPart(ObjectDataset):
    """Objects of 16 categories, 50 parts in all (Yi et al., SIGGRAPH Asia 2016).

    Text (12,137 / 1,870 / 2,874 shapes, about 2,600 points with normals) or HDF5 (2,048 points). Attributes:
    ``segment``, part 0..49; ``category`` (N,) int64, 0..15, the same on every point; ``normal`` (text).

    Args:
        root: folder of the release, or the one it lies in.
        trainval: train on train and val together and validate on test, as most published figures do.

    Attributes:
        categories: name of each category -> its parts.
    """

    categories: dict[str, list[int]]
    layouts = f"{_TEXT}/<synset>/<id>.txt or {_H5}/ply_data_*.h5"

    def __init__(self, root: str | None = None, trainval: bool = False) -> None:
        super().__init__(root)
        known = facts("objects")["shapenetpart"]
        self.categories = {name: list(entry["parts"]) for name, entry in known.items()}
        self.class_names = [f"{name} {i}" for name, parts in self.categories.items() for i in range(len(parts))]
        self._synsets = {entry["synset"]: number for number, entry in enumerate(known.values())}
        self.trainval = trainval

    def list_raw(self, split: Split) -> list[Scene] | None:
        lists: tuple[str, ...] = (split,)
        if self.trainval:
            lists = ("train", "val") if split == "train" else ("test",)
        assert self.root is not None
        text = next((p for p in (self.root / _TEXT, self.root) if (p / "train_test_split").is_dir()), None)
        if text is not None:
            return [scene for name in lists for scene in _listed(text, name)]
        h5 = next((p for p in (self.root / _H5, self.root) if any(p.glob("ply_data_train*.h5"))), None)
        if h5 is None:
            return None
        return h5_scenes([path for name in lists for path in sorted(h5.glob(f"ply_data_{name}*.h5"))])

    def load_raw(self, scene: Scene) -> Points:
        assert scene.raw is not None
        points, category = self._h5(scene) if scene.raw.suffix == ".h5" else self._text(scene.raw)
        parts = list(self.categories.values())[category]
        foreign = ~torch.isin(points.get("segment"), torch.tensor(parts))
        if bool(foreign.any()):
            found = int(points.get("segment")[foreign][0])
            name = list(self.categories)[category]
            raise InputError(f"{points.describe()}: part {found} on {int(foreign.sum())} points; a {name} has {parts}")
        return points.with_attrs(category=torch.full((points.num_points,), category))

    def _text(self, path: Path) -> tuple[Points, int]:
        if path.parent.name not in self._synsets:
            raise InputError(f"{path}: '{path.parent.name}' is none of the 16 synsets")
        points = read(path, columns=_COLUMNS)
        part = integer_codes(points.get("part"), str(path), "part")
        return points.without_attrs("part").with_attrs(segment=part), self._synsets[path.parent.name]

    def _h5(self, scene: Scene) -> tuple[Points, int]:
        assert scene.raw is not None
        arrays = h5_arrays(scene.raw)
        if "pid" not in arrays or arrays["pid"].shape != arrays["data"].shape[:2]:
            raise InputError(f"{scene.raw}: has no parts 'pid' of shape {arrays['data'].shape[:2]}")
        category = h5_label(scene.raw, arrays, scene.row, len(self.categories))
        part = arrays["pid"][scene.row].astype("int64")
        return whole_cloud(arrays["data"][scene.row], -1, scene.raw, scene.name, segment=part), category


def _listed(base: Path, split: str) -> Iterable[Scene]:
    path = base / "train_test_split" / f"shuffled_{split}_file_list.json"
    try:
        entries = json.loads(path.read_text())
        shapes = [entry.split("/")[-2:] for entry in entries]
        return [Scene(f"{s}_{i}", f"{s}/{i}", base / s / f"{i}.txt") for s, i in shapes]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: is not a JSON list of 'shape_data/<synset>/<id>'") from error
