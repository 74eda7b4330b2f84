"""``S3DIS``: Stanford large-scale 3D indoor spaces, as downloaded or prepared."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from pc3d.data.dataset import Split
from pc3d.datasets.scenes import Scene, SceneDataset
from pc3d.errors import InputError
from pc3d.ops.graph import estimate_normals
from pc3d.points import Points

CLASSES = (
    "ceiling", "floor", "wall", "beam", "column", "window", "door",
    "table", "chair", "sofa", "bookcase", "board", "clutter",
)  # fmt: skip
_CONTROL = re.compile(rb"(?<=[0-9.])[\x00-\x08\x0b\x0c\x0e-\x1f](?=[0-9.])")


class S3DIS(SceneDataset):
    """272 rooms in six areas of three buildings (Armeni et al., CVPR 2016).

    Raw: ``Area_k/<room>/Annotations/<class>_<n>.txt`` with rows ``x y z r g b`` (v1.2, aligned or not). Prepared:
    ``Area_k/<room>/*.npy``. Objects of other names are clutter; the instance is the number of the file. The known
    damaged lines are repaired, others left out, each with a warning that names file and line.
    Attributes: ``color``, ``segment``, ``instance``, and ``normal``: from the files, else estimated from the 16
    nearest points, towards the middle of the room.

    Args:
        root: folder of the areas.
        test_area: validated and tested on (5 in the usual protocol; 6-fold takes each in turn).
        train_areas: by default all others.
    """

    layouts = "Area_1..6/<room>/Annotations/*.txt, or Area_1..6/<room>/coord.npy"

    def __init__(self, root: str | None = None, test_area: int = 5, train_areas: Sequence[int] | None = None) -> None:
        super().__init__(root)
        areas = [area for area in range(1, 7) if area != test_area] if train_areas is None else list(train_areas)
        if not set(areas) | {test_area} <= set(range(1, 7)) or test_area in areas:
            raise InputError(f"S3DIS: train_areas {areas} and test_area {test_area} must be different areas of 1..6")
        self.class_names = list(CLASSES)
        self.things = [True] * len(CLASSES)
        self._areas: dict[Split, list[int]] = {"train": areas, "val": [test_area], "test": [test_area]}

    def list_raw(self, split: Split) -> list[Scene] | None:
        assert self.root is not None
        if next(iter(self.root.glob("Area_*/*/Annotations")), None) is None:
            return None
        rooms = [
            room
            for area in self._areas[split]
            for room in sorted((self.root / f"Area_{area}").glob("*"))
            if (room / "Annotations").is_dir()
        ]
        return [Scene(f"{room.parent.name}_{room.name}", f"{room.parent.name}/{room.name}", room) for room in rooms]

    def list_prepared(self, split: Split) -> list[Scene] | None:
        scenes = self.prepared_scenes([f"Area_{area}" for area in self._areas[split]])
        if scenes is None:
            return None if self.prepared_scenes([f"Area_{area}" for area in range(1, 7)]) is None else []
        return [Scene(scene.place.replace("/", "_"), scene.place, None) for scene in scenes]

    def files(self, scene: Scene) -> Iterable[Path]:
        return super().files(scene) if scene.raw is None else sorted((scene.raw / "Annotations").glob("*.txt"))

    def load(self, split: Split, index: int) -> Points:
        points = super().load(split, index)
        if "normal" in points:
            return points
        return points.with_attrs(normal=estimate_normals(points.coord, points.offsets))

    def load_raw(self, scene: Scene) -> Points:
        assert scene.raw is not None
        paths = list(self.files(scene))
        if not paths:
            raise InputError(f"{scene.raw}: no .txt files in Annotations")
        tables = [read_annotation(path) for path in paths]
        sizes = torch.tensor([len(table) for table in tables])
        rows = torch.from_numpy(np.concatenate(tables))
        names = [path.stem.rsplit("_", 1)[0] for path in paths]
        labels = torch.tensor([CLASSES.index(name) if name in CLASSES else len(CLASSES) - 1 for name in names])
        attrs = {
            "color": rows[:, 3:].float(),
            "segment": labels.repeat_interleave(sizes),
            "instance": torch.arange(len(paths)).repeat_interleave(sizes),
        }
        meta = {"path": str(scene.raw), "origin": (0.0, 0.0, 0.0)}
        return Points(rows[:, :3].float(), attrs=attrs, meta=[meta])


def read_annotation(path: Path) -> np.ndarray:
    """``(N, 6)`` float64 rows ``x y z r g b`` of a text file; damaged lines are repaired or left out, with a warning.

    A control character between two digits stands for a lost character (then the row has six numbers without it) or
    for a lost space.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        rows = np.array(data.split(), dtype=np.float64)
        if len(rows) == 6 * data.count(b"\n") or len(rows) == 6 * (data.rstrip().count(b"\n") + 1):
            return _checked(rows.reshape(-1, 6), path)
    except ValueError:
        pass
    kept = []
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        row = _row(line)
        if row is None:
            for filler in (b"0", b" "):
                row = row if row is not None else _row(_CONTROL.sub(filler, line))
                row = None if row is not None and max(row[3:]) > 255 else row  # a digit too many
            verdict = "left out" if row is None else "repaired"
            warnings.warn(f"{path}: line {number} is damaged ({line[:60]!r}): {verdict}", stacklevel=2)
        if row is not None:
            kept.append(row)
    if not kept:
        raise InputError(f"{path}: no rows of six numbers x y z r g b")
    return _checked(np.array(kept), path)


def _row(line: bytes) -> list[float] | None:
    try:
        row = [float(word) for word in line.split()]
    except ValueError:
        return None
    return row if len(row) == 6 else None


def _checked(rows: np.ndarray, path: Path) -> np.ndarray:
    bad = ~np.isfinite(rows).all(1)
    if bad.any():
        raise InputError(f"{path}: {int(bad.sum())} rows are not finite (first: row {int(bad.argmax()) + 1})")
    outside = ((rows[:, 3:] < 0) | (rows[:, 3:] > 255)).any(1)
    if outside.any():
        row = int(outside.argmax())
        raise InputError(
            f"{path}: row {row + 1} has the colour {rows[row, 3:].tolist()} ({int(outside.sum())} such rows): colours "
            "are 0..255, columns x y z r g b"
        )
    return rows
