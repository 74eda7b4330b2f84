"""``SemanticKITTI``: LiDAR scans of KITTI odometry with point labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pc3d.data.dataset import IGNORE, Split, map_labels
from pc3d.data.prediction import Prediction
from pc3d.datasets.meta import facts
from pc3d.datasets.scenes import Scene, SceneDataset
from pc3d.errors import InputError
from pc3d.io import read, read_labels, write_labels
from pc3d.metrics import Instances
from pc3d.points import Points


class SemanticKITTI(SceneDataset):
    """Scans of a turning LiDAR on a car, sequences 00-10 labelled (Behley et al., ICCV 2019, arXiv 1904.01416).

    ``sequences/<nn>/velodyne/*.bin`` with ``labels/*.label``, below the root or its folder ``dataset``; read as they
    are, like Pointcept does. Attributes: ``strength``, ``segment``, ``instance`` (unique in a sequence, -1 none); with
    ``scans`` > 1 also ``time`` (N, 1), scans back. Sequences without labels give ignored points.

    Args:
        root: folder with ``sequences`` or ``dataset/sequences``.
        classes: 19 (single scan), or 25 (multiple scans: moving classes apart).
        scans: this many consecutive scans in one cloud, earlier ones moved into the last one's frame by ``poses.txt``
            and ``calib.txt``; in validation and test only the last one's points count.
        train, val, test: sequences of the splits, by default the official ones; or single scans, ``00/000123`` (a
            pattern, ``00/0001*``, takes several).
    """

    layouts = "sequences/<nn>/velodyne/<nnnnnn>.bin"
    writes = False

    def __init__(
        self,
        root: str | None = None,
        classes: Literal[19, 25] = 19,
        scans: int = 1,
        train: Sequence[int | str] | None = None,
        val: Sequence[int | str] | None = None,
        test: Sequence[int | str] | None = None,
    ) -> None:
        super().__init__(root)
        if classes not in (19, 25) or scans < 1:
            raise InputError(f"SemanticKITTI: classes {classes} must be 19 or 25, scans {scans} at least 1")
        known = facts("semantickitti")
        table = known["single_scan" if classes == 19 else "multi_scan"]
        self.label_map = {int(raw): number - 1 for raw, number in table["train"].items()}
        self.codes = [table["raw"][str(i + 1)] for i in range(classes)]
        self.things = [i < 8 or i >= 19 for i in range(classes)]
        self.class_names = [known["names"][str(code)] for code in self.codes]
        self._palette = [tuple(reversed(known["bgr"][str(code)])) for code in self.codes]
        for entry in (*(train or ()), *(val or ()), *(test or ())):
            if isinstance(entry, str) and entry.count("/") != 1:
                raise InputError(f"SemanticKITTI: '{entry}' is neither a sequence number nor <sequence>/<scan>")
        self.scans = scans
        official = known["split"]
        self._sequences: dict[Split, list[int | str]] = {
            "train": list(official["train"] if train is None else train),
            "val": list(official["valid"] if val is None else val),
            "test": list(official["test"] if test is None else test),
        }

    @property
    def palette(self) -> list[tuple[int, int, int]]:
        return self._palette

    def list_raw(self, split: Split) -> list[Scene] | None:
        assert self.root is not None
        base = next((p for p in (self.root / "sequences", self.root / "dataset" / "sequences") if p.is_dir()), None)
        if base is None:
            return None
        chosen = [(f"{s:02d}", "*") if isinstance(s, int) else s.split("/", 1) for s in self._sequences[split]]
        scans = [p for folder, stem in chosen for p in sorted((base / folder / "velodyne").glob(f"{stem}.bin"))]
        return [Scene(f"{p.parts[-3]}_{p.stem}", f"sequences/{p.parts[-3]}/{p.stem}", p) for p in scans]

    def list_prepared(self, split: Split) -> list[Scene] | None:
        return None

    def group(self, split: Split, index: int) -> str:
        return self.name(split, index).split("_")[0]  # the sequence

    def files(self, scene: Scene) -> Iterable[Path]:
        assert scene.raw is not None
        files = [part for scan in self._history(scene.raw) for part in (scan, _label_path(scan))]
        sequence = scene.raw.parent.parent
        return files if self.scans == 1 else [*files, sequence / "poses.txt", sequence / "calib.txt"]

    def _history(self, scan: Path) -> list[Path]:
        """The scan and those before it that exist, the newest first."""
        numbers = range(int(scan.stem), int(scan.stem) - self.scans, -1)
        paths = [scan.with_name(f"{number:0{len(scan.stem)}d}.bin") for number in numbers if number >= 0]
        return [path for path in paths if path.is_file()]

    def load_raw(self, scene: Scene) -> Points:
        assert scene.raw is not None
        clouds = [self._scan(path) for path in self._history(scene.raw)]
        if self.scans == 1:
            return clouds[0]
        poses = _poses(scene.raw.parent.parent)
        now = _pose(poses, scene.raw)
        moved = []
        for back, (cloud, path) in enumerate(zip(clouds, self._history(scene.raw), strict=True)):
            turn = np.linalg.inv(now) @ _pose(poses, path)
            coord = cloud.coord.double() @ torch.from_numpy(turn[:3, :3].T) + torch.from_numpy(turn[:3, 3])
            attrs = {**cloud.attrs, "time": torch.full((cloud.num_points, 1), float(back))}
            moved.append(cloud.replace(coord=coord.float(), attrs=attrs))
        names = {name: torch.cat([cloud.get(name) for cloud in moved]) for name in moved[0].attrs}
        return Points(torch.cat([cloud.coord for cloud in moved]), attrs=names, meta=clouds[0].meta)

    def load(self, split: Split, index: int) -> Points:
        points = super().load(split, index)
        if self.scans == 1 or split == "train":
            return points
        old = points.get("time")[:, 0] > 0
        return points.with_attrs(segment=points.get("segment").masked_fill(old, IGNORE))

    def _scan(self, path: Path) -> Points:
        points = read(path, columns=4)
        labels = _label_path(path)
        if not labels.is_file():
            if (path.parent.parent / "labels").is_dir():
                raise InputError(f"{labels}: is missing, its scan {path.name} is there")
            nothing = torch.full((points.num_points,), IGNORE)
            return points.with_attrs(segment=nothing, instance=nothing.clone())
        codes, instance = read_labels(labels, points.num_points)
        assert self.label_map is not None
        segment = map_labels(codes, self.label_map, str(labels), "label")
        return points.with_attrs(segment=segment, instance=torch.where(instance > 0, instance, -1))

    def save_prediction(self, folder: Path, cloud: Points, prediction: Prediction) -> Path:
        """As the benchmark takes it: ``sequences/<nn>/predictions/<nnnnnn>.label``, for the newest scan of a cloud.

        With instances a point has the class of the instance it is in, whose number goes into the upper half.
        """
        now, segment, number = self._newest(cloud), prediction.segment.cpu(), None
        if (found := prediction.instances) is not None:
            instance = found.labels(len(segment)).cpu()
            segment = torch.where(instance >= 0, found.classes.cpu()[instance], segment)
            number = instance[now] + 1
        return write_labels(_prediction_path(folder, cloud), self.raw_labels(segment[now]), number)

    def load_prediction(self, folder: Path, cloud: Points) -> Prediction:
        path, now = _prediction_path(folder, cloud), self._newest(cloud)
        assert self.label_map is not None
        codes, number = read_labels(path, int(now.sum()))
        segment, instance = torch.full((2, cloud.num_points), IGNORE)
        segment[now] = map_labels(codes, self.label_map, str(path), "label", unknown="ignore")
        keys, inverse = torch.stack([segment[now], number], 1).unique(dim=0, return_inverse=True)
        kept = (keys[:, 0] >= 0) & (keys[:, 1] > 0)
        if not bool(kept.any()):
            return Prediction(segment)
        instance[now] = torch.where(kept, kept.cumsum(0) - 1, -1)[inverse]
        return Prediction(segment, Instances.of(instance, keys[kept, 0], torch.ones(int(kept.sum()))))

    @staticmethod
    def _newest(cloud: Points) -> Tensor:
        """``(N,)`` bool, the points of the scan itself, not of those before it."""
        return cloud.get("time")[:, 0] == 0 if "time" in cloud else torch.ones(cloud.num_points, dtype=torch.bool)

    def raw_labels(self, classes: Tensor) -> Tensor:
        """``(N,)`` int64 official ids of class numbers, for ``.label`` files; 0 where there is no class."""
        codes = torch.tensor([*self.codes, 0])
        return codes[torch.where(classes >= 0, classes, len(self.codes)).cpu()]


def _prediction_path(folder: Path, cloud: Points) -> Path:
    sequence, _, scan = cloud.meta[0]["name"].partition("_")
    return folder / "sequences" / sequence / "predictions" / f"{scan}.label"


def _label_path(scan: Path) -> Path:
    return scan.parent.parent / "labels" / f"{scan.stem}.label"


def _poses(sequence: Path) -> np.ndarray:
    """``(S, 4, 4)`` float64 poses of the LiDAR, from those of the left camera.

    Raises:
        InputError: if ``poses.txt`` or ``calib.txt`` is missing or damaged.
    """
    rows = _numbers(sequence / "poses.txt")
    calibration = {}
    path = sequence / "calib.txt"
    for line in _lines(path):
        name, _, values = line.partition(":")
        calibration[name.strip()] = values.split()
    try:
        camera = _homogeneous(np.array([calibration["Tr"]], dtype=np.float64))[0]
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: field 'Tr' is missing or not 12 numbers") from error
    return np.linalg.inv(camera) @ _homogeneous(rows) @ camera


def _pose(poses: np.ndarray, scan: Path) -> np.ndarray:
    number = int(scan.stem)
    if number >= len(poses):
        raise InputError(f"{scan.parent.parent / 'poses.txt'}: has {len(poses)} poses, none for scan {scan.name}")
    return poses[number]


def _numbers(path: Path) -> np.ndarray:
    try:
        rows = np.array([line.split() for line in _lines(path)], dtype=np.float64)
    except ValueError as error:
        raise InputError(f"{path}: not rows of 12 numbers ({error})") from error
    if rows.ndim != 2 or rows.shape[1] != 12:
        raise InputError(f"{path}: not rows of 12 numbers")
    return rows


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise InputError(f"{path}: {reason}: several scans in one cloud need it") from error


def _homogeneous(rows: np.ndarray) -> np.ndarray:
    matrices = np.tile(np.eye(4), (len(rows), 1, 1))
    matrices[:, :3] = rows.reshape(-1, 3, 4)
    return matrices
