"""``ShapeNetOccupancy`` and ``OccupancyRooms``: surfaces and points in space, to reconstruct shapes and rooms."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pc3d.data.dataset import Split
from pc3d.datasets.meta import facts
from pc3d.datasets.objects import ObjectDataset, read_list
from pc3d.datasets.scenes import Scene
from pc3d.errors import InputError
from pc3d.io.numpy_arrays import load_npz
from pc3d.points import Points

Array = np.ndarray[Any, np.dtype[Any]]


def occupancy_cloud(
    surface: Array, normal: Array, space: Array, inside: Array, label: int, name: str, path: Path | str
) -> Points:
    """One cloud of ``(N, 3)`` points on a surface, with normals, and ``(M, 3)`` points in space, with their occupancy.

    Raises:
        InputError: if shapes differ, there is no point of a kind, or a coordinate is not finite.
    """
    for what, array, shape in (
        ("surface points", surface, (len(surface), 3)),
        ("normals", normal, (len(surface), 3)),
        ("points in space", space, (len(space), 3)),
        ("occupancies", inside, (len(space),)),
    ):
        if array.shape != shape or not len(array):
            raise InputError(f"{path}: {what} are {array.shape}, expected {shape} and at least one")
        if not np.isfinite(array).all():
            raise InputError(f"{path}: {what} are not all finite")
    coord = np.concatenate([surface, space]).astype(np.float32)
    normals = np.concatenate([normal, np.zeros_like(space)]).astype(np.float32)
    occupancy = np.concatenate([np.full(len(surface), -1), inside.astype(np.int64)])
    return Points(
        torch.from_numpy(coord),
        attrs={
            "normal": torch.from_numpy(normals),
            "occupancy": torch.from_numpy(occupancy),
            "segment": torch.full((len(coord),), label),
        },
        meta=[{"name": name, "path": str(path), "origin": (0.0, 0.0, 0.0)}],
    )


class OccupancyDataset(ObjectDataset):
    """Folders of shapes in folders of categories, with lists of the splits ``{train,val,test}.lst``.

    Attributes: ``occupancy`` -1 on the surface, 1 inside, 0 outside; ``normal``, zeros off the surface; ``segment``.
    """

    categories_on_disk: list[str]

    def list_raw(self, split: Split) -> list[Scene] | None:
        assert self.root is not None
        present = [name for name in self.categories_on_disk if (self.root / name).is_dir()]
        if not present:
            return None
        scenes = []
        for category in present:
            for model in read_list(self.root / category / f"{split}.lst"):
                scenes += self.shape_scenes(category, model, self.root / category / model, split)
        return scenes

    def shape_scenes(self, category: str, model: str, folder: Path, split: Split) -> list[Scene]:
        """The clouds that are made of one shape."""
        return [Scene(f"{category}_{model}", f"{category}/{model}", folder)]

    def pair(self, scene: Scene) -> tuple[Path, Path]:
        """Files of the surface and of the points in space."""
        assert scene.raw is not None
        return scene.raw / "pointcloud.npz", scene.raw / "points.npz"

    def files(self, scene: Scene) -> Iterable[Path]:
        return self.pair(scene)

    def cloud_class(self, split: Split, index: int) -> int:
        return self._class(self.scenes(split)[index])

    def _class(self, scene: Scene) -> int:
        return self.categories_on_disk.index(scene.place.partition("/")[0])

    def load_raw(self, scene: Scene) -> Points:
        on_surface, in_space = self.pair(scene)
        surface, space = (
            _arrays(path, names)
            for path, names in ((on_surface, ("points", "normals")), (in_space, ("points", "occupancies")))
        )
        inside = space["occupancies"]
        if inside.dtype == np.uint8 and inside.size == -(-len(space["points"]) // 8):
            inside = np.unpackbits(inside)[: len(space["points"])]
        if not np.isin(inside, (0, 1)).all():
            raise InputError(f"{in_space}: 'occupancies' must be 0 or 1")
        points, normals, around = (
            array.astype(np.float32) for array in (surface["points"], surface["normals"], space["points"])
        )
        return occupancy_cloud(points, normals, around, inside, self._class(scene), scene.name, in_space)


def _arrays(path: Path, names: tuple[str, ...]) -> dict[str, Array]:
    arrays = load_npz(path)
    missing = [name for name in names if name not in arrays]
    if missing:
        raise InputError(f"{path}: has no '{missing[0]}' (it has: {', '.join(arrays) or 'nothing'})")
    return {name: arrays[name] for name in names}


class ShapeNetOccupancy(OccupancyDataset):
    """ShapeNet objects of 13 categories as Occupancy Networks prepared them (Mescheder et al. 2019, arXiv 1812.03828).

    Args:
        root: folder ``ShapeNet`` of the categories' synsets.
    """

    layouts = "<synset>/{train,val,test}.lst and <synset>/<model>/{pointcloud,points}.npz"

    def __init__(self, root: str | None = None) -> None:
        super().__init__(root)
        names = facts("objects")["shapenet_synsets"]
        self.categories_on_disk = list(_SHAPENET13)
        self.class_names = [names[synset] for synset in _SHAPENET13]


_SHAPENET13 = (
    "02691156", "02828884", "02933112", "02958343", "03001627", "03211117", "03636649", "03691459", "04090263",
    "04256520", "04379243", "04401088", "04530566",
)  # fmt: skip


class OccupancyRooms(OccupancyDataset):
    """Synthetic rooms with 4 to 8 objects (Peng et al. 2020, arXiv 2003.04618), y up, ten pairs of files per room.

    Training takes each pair for a cloud of its own: an epoch is ten published ones. Validation and test take the
    first (published: a random one).

    Args:
        root: folder ``synthetic_room_dataset``.
    """

    layouts = "rooms_0<4..8>/{train,val,test}.lst and rooms_*/<room>/{pointcloud,points_iou}/*_0<0..9>.npz"

    def __init__(self, root: str | None = None) -> None:
        super().__init__(root)
        self.categories_on_disk = [f"rooms_0{objects}" for objects in range(4, 9)]
        self.class_names = [f"{objects} objects" for objects in range(4, 9)]

    def shape_scenes(self, category: str, model: str, folder: Path, split: Split) -> list[Scene]:
        found = sorted(folder.glob("points_iou/points_iou_*.npz"))
        if not found:
            raise InputError(f"{folder}: has no points_iou/points_iou_*.npz")
        rows = [int(path.stem.rpartition("_")[2]) for path in (found if split == "train" else found[:1])]
        return [Scene(f"{category}_{model}_{row:02d}", f"{category}/{model}/{row:02d}", folder, row) for row in rows]

    def group(self, split: Split, index: int) -> str:
        return self.name(split, index).rpartition("_")[0]

    def pair(self, scene: Scene) -> tuple[Path, Path]:
        assert scene.raw is not None
        kinds = (("pointcloud", "pointcloud"), ("points_iou", "points_iou"))
        surface, space = (scene.raw / folder / f"{name}_{scene.row:02d}.npz" for folder, name in kinds)
        return surface, space
