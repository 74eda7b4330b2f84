"""``NuScenes``: LiDAR keyframes with lidarseg labels, in the layout Pointcept uses."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pc3d.data.dataset import Split, map_labels
from pc3d.datasets.pickles import read_pickle
from pc3d.datasets.scenes import Scene, SceneDataset
from pc3d.errors import InputError
from pc3d.points import Points

CLASSES = (
    "barrier", "bicycle", "bus", "car", "construction vehicle", "motorcycle", "pedestrian", "traffic cone", "trailer",
    "truck", "driveable surface", "other flat", "sidewalk", "terrain", "manmade", "vegetation",
)  # fmt: skip
_TRAINED = {9: 0, 14: 1, 15: 2, 16: 2, 17: 3, 18: 4, 21: 5, 2: 6, 3: 6, 4: 6, 6: 6, 12: 7, 22: 8, 23: 9, 24: 10, 25: 11}
LABEL_MAP = {code: _TRAINED.get(code, {26: 12, 27: 13, 28: 14, 30: 15}.get(code, -1)) for code in range(32)}


class NuScenes(SceneDataset):
    """40,000 keyframes of a 32-beam LiDAR, 16 classes (Caesar et al., CVPR 2020; Fong et al., "Panoptic nuScenes",
    2021).

    ``info/nuscenes_infos_*_{train,val,test}.pkl`` beside ``raw/`` (``samples``, ``lidarseg``), as Pointcept lays it
    out. The pickles are read without running anything in them: plain values and numpy arrays only. Attributes:
    ``strength`` (0..1), ``segment``.
    """

    layouts = "info/nuscenes_infos_*_train.pkl beside raw/samples and raw/lidarseg"
    writes = False

    def __init__(self, root: str | None = None) -> None:
        super().__init__(root)
        self.class_names = list(CLASSES)
        self.label_map = dict(LABEL_MAP)
        self._labels: dict[str, str] = {}  # of each scan, in the terms of the info files

    def list_raw(self, split: Split) -> list[Scene] | None:
        assert self.root is not None
        infos = sorted((self.root / "info").glob("nuscenes_infos_*.pkl"))
        if not infos:
            return None
        path = next((p for p in infos if p.stem.endswith(split)), None)
        if path is None:
            return []
        return [self._scene(path, number, entry) for number, entry in enumerate(_entries(path))]

    def _scene(self, path: Path, number: int, entry: Any) -> Scene:
        assert self.root is not None
        try:
            scan, labels = str(entry["lidar_path"]), str(entry.get("gt_segment_path", ""))
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: entry {number} has no field 'lidar_path'") from error
        self._labels[scan] = labels
        return Scene(Path(scan).stem.removesuffix(".pcd"), scan, self.root / "raw" / scan)

    def list_prepared(self, split: Split) -> list[Scene] | None:
        return None

    def files(self, scene: Scene) -> Iterable[Path]:
        assert self.root is not None
        assert scene.raw is not None
        labels = self._labels[scene.place]
        return [scene.raw, *([self.root / "raw" / labels] if labels else [])]

    def load_raw(self, scene: Scene) -> Points:
        scan, *labels = self.files(scene)
        rows = _read(scan, "<f4")
        if len(rows) % 5:
            raise InputError(f"{scan}: {len(rows)} float32 numbers are not rows of 5: the file is truncated")
        rows = rows.reshape(-1, 5)
        attrs = {"strength": torch.from_numpy(rows[:, 3:4] / np.float32(255))}
        if labels:
            codes = _read(labels[0], "u1")
            if len(codes) != len(rows):
                raise InputError(f"{labels[0]}: holds {len(codes)} labels for a scan of {len(rows)} points")
            attrs["segment"] = map_labels(torch.from_numpy(codes.astype(np.int64)), LABEL_MAP, str(labels[0]), "label")
        meta = {"path": str(scan), "origin": (0.0, 0.0, 0.0)}
        return Points(torch.from_numpy(rows[:, :3].copy()), attrs=attrs, meta=[meta])


def _read(path: Path, dtype: str) -> np.ndarray:
    try:
        return np.fromfile(path, dtype)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


@cache
def _entries(path: Path) -> list[Any]:
    content = read_pickle(path)
    entries = content.get("infos") if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise InputError(f"{path}: holds no list of keyframes")
    return entries
