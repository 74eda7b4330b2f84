"""What data sets of scenes share: a raw layout, as it is downloaded, and a prepared one, read by the same class.

The prepared layout is Pointcept's: one folder per scene with ``coord.npy``, ``color.npy``, ``segment.npy``, ...
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pc3d.data.dataset import IGNORE, PointDataset, Split, check_split
from pc3d.errors import InputError
from pc3d.io.numpy_arrays import load_npy
from pc3d.points import Points

_DTYPES = {"coord": "<f4", "color": "u1", "normal": "<f4", "strength": "<f4", "instance": "<i4", "superpoint": "<i4"}
STATS = "stats.json"
SUMMARY = "summary.json"
"""Written into a prepared root when every scene is done."""


@dataclass(frozen=True)
class Scene:
    """One cloud on disk: its name, its path below a prepared root, and the raw file or folder (None: prepared).

    ``row`` is its place in a raw file of many clouds.
    """

    name: str
    place: str
    raw: Path | None
    row: int = 0


class SceneDataset(PointDataset):
    """Scenes in the published layout or prepared (``pc3d prepare``, or Pointcept's own preprocessing).

    Args:
        root: folder of the data set; which layout it has is found by looking.
    """

    layouts: str
    """What the root may hold, for messages."""
    label_assets: tuple[str, ...] = ("segment",)
    """Labels a raw scene has, by the names they are stored under; the first is the one in use."""
    writes: bool = True
    """Whether preparing writes clouds; False where the raw files are read as fast as prepared ones."""

    def __init__(self, root: str | None = None) -> None:
        self.root = None if root is None else Path(root)
        self._scenes: dict[Split, list[Scene]] = {}

    def relocate(self, root: str | Path) -> None:
        super().relocate(root)
        self._scenes = {}

    def size(self, split: Split) -> int:
        return len(self.scenes(split))

    def name(self, split: Split, index: int) -> str:
        return self.scenes(split)[index].name

    def fingerprint(self, split: Split, index: int) -> str:
        scene = self.scenes(split)[index]
        stamps = [(str(p), (s := p.stat()).st_size, s.st_mtime_ns) for p in self.files(scene) if p.exists()]
        arguments = {name: value for name, value in self._init_args.items() if name != "root"}
        return repr((type(self).__name__, 1, scene.name, stamps, arguments))

    def load(self, split: Split, index: int) -> Points:
        scene = self.scenes(split)[index]
        points = read_prepared(self.prepared_folder(scene)) if scene.raw is None else self.load_raw(scene)
        labels = points.get(self.label) if self.label in points else torch.full((points.num_points,), IGNORE)
        points = points.without_attrs(*(name for name in points.attrs if name.startswith("segment")))
        self._check_labels(labels, points)
        meta = [{**points.meta[0], "name": scene.name}]
        return Points(points.coord, attrs={**points.attrs, "segment": labels.long()}, meta=meta)

    @property
    def label(self) -> str:
        """Name of the labels in use."""
        return self.label_assets[0]

    def prepared_folder(self, scene: Scene) -> Path:
        assert self.root is not None
        return self.root / scene.place

    def scenes(self, split: Split) -> list[Scene]:
        """The scenes of a split, in a fixed order.

        Raises:
            InputError: if the root has neither layout.
        """
        check_split(split)
        if split not in self._scenes:
            if self.root is None:
                raise InputError(f"{type(self).__name__}.root: is not set: --data.root DIR; expected {self.layouts}")
            if not self.root.is_dir():
                raise InputError(f"{type(self).__name__}.root: {self.root} is not a folder; expected {self.layouts}")
            raw = self.list_raw(split)
            found = self.list_prepared(split) if raw is None else raw
            if found is None:
                raise InputError(
                    f"{self.root}: is neither a raw nor a prepared {type(self).__name__}; expected {self.layouts}"
                )
            self._scenes[split] = found
        return self._scenes[split]

    @abstractmethod
    def list_raw(self, split: Split) -> list[Scene] | None:
        """The scenes of a split in the raw layout; None if the root does not have it."""

    @abstractmethod
    def list_prepared(self, split: Split) -> list[Scene] | None:
        """The scenes of a split in the prepared layout; None if the root does not have it."""

    @abstractmethod
    def load_raw(self, scene: Scene) -> Points:
        """A raw scene with every label it has (:attr:`label_assets`), -1 = ignored.

        Raises:
            InputError: if a file is missing or damaged, or files do not fit each other.
        """

    def finish(self, out: Path) -> None:
        """What else preparation writes below ``out`` when every scene is done."""

    def files(self, scene: Scene) -> Iterable[Path]:
        """The files that a scene is made from."""
        folder = self.prepared_folder(scene) if scene.raw is None else scene.raw
        return sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else [folder]

    def _check_labels(self, labels: Tensor, points: Points) -> None:
        wrong = labels[(labels < IGNORE) | (labels >= self.num_classes)]
        if len(wrong):
            raise InputError(
                f"{points.describe()}: field '{self.label}' holds {int(wrong[0])} ({len(wrong)} points); the "
                f"{self.num_classes} classes are 0..{self.num_classes - 1}, -1 is ignored"
            )

    def prepared_scenes(self, folders: Iterable[str]) -> list[Scene] | None:
        """Scenes in sub-folders that hold ``coord.npy``; None if none of the folders exists."""
        assert self.root is not None
        present = [folder for folder in folders if (self.root / folder).is_dir()]
        if not present:
            return None
        clouds = [p.parent for folder in present for p in sorted((self.root / folder).glob("**/coord.npy"))]
        places = [cloud.relative_to(self.root).as_posix() for cloud in clouds]
        places = [place for place in places if "/." not in place]  # what a killed preparation left
        if not (self.root / SUMMARY).is_file() and any((self.root / place / STATS).is_file() for place in places):
            warnings.warn(
                f"{self.root}: is prepared in part ({SUMMARY} is missing): let pc3d prepare finish", stacklevel=2
            )
        return [Scene(place.split("/", 1)[-1].replace("/", "_"), place, None) for place in places]


def read_prepared(folder: Path) -> Points:
    """The cloud of a prepared folder; arrays are memory-mapped.

    Raises:
        InputError: if ``coord.npy`` is missing, a file is damaged, or lengths differ.
    """
    arrays = {path.stem: load_npy(path, "c") for path in sorted(folder.glob("*.npy"))}
    if "coord" not in arrays:
        raise InputError(f"{folder}: has no coord.npy")
    shape, dtype = arrays["coord"].shape, arrays["coord"].dtype
    if len(shape) != 2 or shape[1] != 3 or dtype.kind not in "fiu":
        raise InputError(f"{folder / 'coord.npy'}: is {shape} {dtype}, expected (N, 3) numbers")
    bad = ~np.isfinite(arrays["coord"]).all(1)
    if bad.any():
        raise InputError(f"{folder / 'coord.npy'}: {int(bad.sum())} points are not finite (first: {int(bad.argmax())})")
    count = shape[0]
    tensors = {}
    for name, array in arrays.items():
        path = folder / f"{name}.npy"
        if array.ndim == 0 or len(array) != count or array.dtype.kind not in "biuf":
            raise InputError(f"{path}: {array.shape} {array.dtype} does not fit coord.npy with {count} points")
        if name in ("color", "normal") and array.shape != (count, 3):
            raise InputError(f"{path}: is {array.shape}, expected ({count}, 3)")
        if name.startswith("segment") or name in ("instance", "superpoint"):
            tensors[name] = torch.from_numpy(array.reshape(-1).astype(np.int64))
        elif name == "strength":
            tensors[name] = torch.from_numpy(array.reshape(count, -1).astype(np.float32))
        else:
            tensors[name] = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    meta = {"name": folder.name, "path": str(folder), "origin": (0.0, 0.0, 0.0)}
    return Points(tensors.pop("coord"), attrs=tensors, meta=[meta])


def is_complete(folder: Path, arrays: bool) -> bool:
    """Whether an earlier run finished a scene: its counts are there, and ``arrays`` of as many points."""
    try:
        count = json.loads((folder / STATS).read_text())["points"]
        return not arrays or all(len(load_npy(path)) == count for path in [folder / "coord.npy", *folder.glob("*.npy")])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_prepared(folder: Path, points: Points | None, stats: dict[str, object]) -> None:
    """Write a cloud (None: its counts alone) as a prepared folder: complete, or not there at all.

    The same cloud gives the same bytes.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".writing-{folder.name}-*"):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".writing-{folder.name}-", dir=folder.parent))
    try:
        for name, tensor in ({} if points is None else {"coord": points.coord, **points.attrs}).items():
            array = tensor.detach().cpu().numpy()
            kind = _DTYPES.get(name, "<i2" if name.startswith("segment") else None)
            array = array.round().clip(0, 255) if name == "color" else array
            np.save(temporary / f"{name}.npy", np.ascontiguousarray(array, dtype=kind), allow_pickle=False)
        (temporary / STATS).write_text(json.dumps(stats, sort_keys=True) + "\n")
        temporary.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
