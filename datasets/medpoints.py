"""``MedPointS``: organs and bodies as point clouds, to classify, to segment and to complete."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from pc3d.data.dataset import Split
from pc3d.datasets.meta import facts
from pc3d.datasets.objects import ObjectDataset, one_class
from pc3d.datasets.scenes import Scene
from pc3d.errors import InputError
from pc3d.io import read
from pc3d.points import Points

Task = Literal["classification", "segmentation", "completion"]
_LABELS = {"coarse": 46, "fine": 145}


class MedPointS(ObjectDataset):
    """Anatomical structures of MedShapeNet in five folds (arXiv 2504.13015).

    ``classification/fold*/<organ>/<id>.ply`` (46 classes); ``segmentation/fold*/{pcd,coarse_label,fine_label}`` (bodies
    of 65,536 points); ``completion/fold*/{partial,target}/<organ>/<id>.ply``, or the older ``completion/<organ>/
    {partial,target}/<id>.ply``, which has no folds: its clouds are dealt to five folds in turn.

    Attributes: ``segment``, class of the point, or of the cloud it is in. A completion cloud holds what is there and
    then what is wanted, told apart by ``target`` (N,) int64, 0 and 1, and has ``category``, its organ, too.

    Args:
        root: folder with the three tasks' folders.
        task: which of them.
        labels: classes of a segmentation: 46 coarse or 145 fine ones.
        train, val, test: folds of the splits.
    """

    layouts = "{classification,segmentation,completion}/fold<1..5>/..."

    def __init__(
        self,
        root: str | None = None,
        task: Task = "classification",
        labels: Literal["coarse", "fine"] = "coarse",
        train: Sequence[int] = (1, 2, 3),
        val: Sequence[int] = (4,),
        test: Sequence[int] = (5,),
    ) -> None:
        super().__init__(root)
        if task not in get_args(Task) or labels not in _LABELS:
            raise InputError(f"MedPointS: task '{task}' ({', '.join(get_args(Task))}) or labels '{labels}' unknown")
        if labels != "coarse" and task != "segmentation":
            raise InputError(f"MedPointS.labels: '{labels}' is for task segmentation, not {task}")
        self._folds: dict[Split, list[int]] = {"train": list(train), "val": list(val), "test": list(test)}
        shared = {a for a in train if a in [*val, *test]}
        if shared or not {*train, *val, *test} <= set(range(1, 6)):
            raise InputError(f"MedPointS: folds are 1 to 5, and those of train in no other split: {self._folds}")
        known = facts("objects")
        self._codes = {_plain(name): code - 1 for name, code in known["medpoints_raw_to_coarse"].items()}
        coarse = {int(code) - 1: name for code, name in known["medpoints_coarse"].items()}
        self._codes |= {_plain(name): code for code, name in coarse.items()}
        self.class_names = [coarse[i] for i in range(len(coarse))]
        if labels == "fine":
            fine = {code: name for name, code in reversed(known["medpoints_raw_to_fine"].items())}
            self.class_names = [fine.get(i + 1, f"structure {i + 1}") for i in range(_LABELS["fine"])]
        self.task, self.labels = task, labels

    def list_raw(self, split: Split) -> list[Scene] | None:
        assert self.root is not None
        base = next((p for p in (self.root / self.task, self.root) if any(p.glob("fold[1-5]"))), None)
        if base is not None:
            folders = [base / f"fold{fold}" for fold in self._folds[split]]
            return [_scene(base, path) for folder in folders for path in sorted(folder.glob(self._pattern))]
        base = self.root / self.task if (self.root / self.task).is_dir() else self.root
        if self.task != "completion" or not any(base.glob("*/partial")):
            return None
        everything = sorted(base.glob("*/partial/*.ply"))
        return [_scene(base, path) for i, path in enumerate(everything) if i % 5 + 1 in self._folds[split]]

    @property
    def _pattern(self) -> str:
        return {"classification": "*/*.ply", "segmentation": "pcd/*.ply", "completion": "partial/*/*.ply"}[self.task]

    def files(self, scene: Scene) -> Iterable[Path]:
        assert scene.raw is not None
        if self.task == "classification":
            return [scene.raw]
        return [scene.raw, self._target(scene.raw) if self.task == "completion" else self._label_file(scene.raw)]

    def load_raw(self, scene: Scene) -> Points:
        path = scene.raw
        assert path is not None
        points = Points((cloud := read(path)).coord, meta=cloud.meta)
        if self.task == "classification":
            return one_class(points, self._organ(path, path.parent.name))
        if self.task == "segmentation":
            return points.with_attrs(segment=self._segment(self._label_file(path), points.num_points))
        return self._pair(path, points)

    def _pair(self, path: Path, partial: Points) -> Points:
        target = self._target(path)
        if not target.is_file():
            raise InputError(f"{target}: is missing, its partial cloud {path} is there")
        whole = read(target)
        origins = [torch.tensor(cloud.meta[0].get("origin", (0.0, 0.0, 0.0))) for cloud in (partial, whole)]
        coord = torch.cat([partial.coord, whole.coord + (origins[1] - origins[0])])
        flag = (torch.arange(len(coord)) >= partial.num_points).long()
        old = path.parent.name == "partial"
        organ = torch.full((len(coord),), self._organ(path, (path.parent.parent if old else path.parent).name))
        return Points(coord, attrs={"target": flag, "category": organ, "segment": organ.clone()}, meta=partial.meta)

    def _target(self, path: Path) -> Path:
        if path.parent.name == "partial":
            return path.parent.parent / "target" / path.name
        return path.parent.parent.parent / "target" / path.parent.name / path.name

    def _label_file(self, path: Path) -> Path:
        return path.parent.parent / f"{self.labels}_label" / f"{path.stem}.seg"

    def _organ(self, path: Path, name: str) -> int:
        if _plain(name) not in self._codes:
            raise InputError(f"{path}: '{name}' is none of the organs ({', '.join(self.class_names[:4])}, ...)")
        return self._codes[_plain(name)]

    def _segment(self, path: Path, count: int) -> Tensor:
        """``(N,)`` classes from a file of one 1-based number per line, written as floats."""
        try:
            codes = np.loadtxt(path, dtype=np.float64, ndmin=1)
        except FileNotFoundError as error:
            raise InputError(f"{path}: is missing, its cloud is there") from error
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not one number per line ({str(error).splitlines()[0]})") from error
        if codes.shape != (count,):
            raise InputError(f"{path}: {codes.shape} labels for a cloud of {count} points")
        wrong = (codes != codes.round()) | ~((codes >= 1) & (codes <= _LABELS[self.labels]))
        if wrong.any():
            row = int(wrong.argmax())
            raise InputError(f"{path}: line {row + 1} is {codes[row]:g}, labels are 1..{_LABELS[self.labels]}")
        return torch.from_numpy(codes.astype(np.int64) - 1)


def _plain(name: str) -> str:
    """A name as the label map writes it: letters and digits."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _scene(base: Path, path: Path) -> Scene:
    place = path.relative_to(base).with_suffix("").as_posix()
    return Scene(place.replace("/", "_"), place, path)
