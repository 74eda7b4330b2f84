"""``Waymo``: Waymo Open Dataset LiDAR segmentation, in the layout Pointcept prepares."""

from __future__ import annotations

from dataclasses import replace

from pc3d.data.dataset import Split
from pc3d.datasets.scenes import Scene, SceneDataset, read_prepared
from pc3d.points import Points

CLASSES = (
    "car", "truck", "bus", "other vehicle", "motorcyclist", "bicyclist", "pedestrian", "sign", "traffic light", "pole",
    "construction cone", "bicycle", "motorcycle", "building", "vegetation", "tree trunk", "curb", "road", "lane marker",
    "other ground", "walkable", "sidewalk",
)  # fmt: skip
_FOLDERS = {"train": "training", "val": "validation", "test": "testing"}


class Waymo(SceneDataset):
    """Labelled frames of five LiDARs, 22 classes (Sun et al., CVPR 2020, arXiv 1912.04838).

    Prepared layout only: ``{training,validation,testing}/<segment>/<timestamp>/*.npy`` with ``coord``, ``strength``
    and ``segment``.
    """

    writes = False
    layouts = "{training,validation,testing}/<segment>/<timestamp>/coord.npy"

    def __init__(self, root: str | None = None) -> None:
        super().__init__(root)
        self.class_names = list(CLASSES)

    def list_raw(self, split: Split) -> list[Scene] | None:
        assert self.root is not None
        scenes = self.prepared_scenes([_FOLDERS[split]])
        if scenes is None and self.prepared_scenes(_FOLDERS.values()) is not None:
            return []
        return scenes and [replace(scene, raw=self.root / scene.place) for scene in scenes]

    def list_prepared(self, split: Split) -> list[Scene] | None:
        return None

    def group(self, split: Split, index: int) -> str:
        return self.scenes(split)[index].place.split("/")[1]  # the segment: 20 seconds of a drive

    def load_raw(self, scene: Scene) -> Points:
        assert scene.raw is not None
        return read_prepared(scene.raw)
