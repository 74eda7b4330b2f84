"""Average precision of the KITTI object benchmark: image boxes, bird's eye view, 3D, and orientation."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torchmetrics
from numpy.typing import NDArray
from torch import Tensor

from pc3d.io.kitti_object import KittiObjects
from pc3d.ops.boxes import rectangle_intersection

Metric = Literal["bbox", "bev", "3d"]
METRICS: tuple[Metric, ...] = ("bbox", "bev", "3d")
DIFFICULTIES = ("easy", "moderate", "hard")
_MIN_HEIGHT, _MAX_OCCLUSION, _MAX_TRUNCATION = (40, 25, 25), (0, 1, 2), (0.15, 0.3, 0.5)
_NEIGHBOUR = {"car": "van", "pedestrian": "person_sitting"}  # neither right nor wrong
_STRICT = {"car": 0.7, "van": 0.7, "truck": 0.7}  # others 0.5
_SLOTS = 41
Floats = NDArray[np.float64]


@dataclass
class KittiScores:
    """Percentages, indexed ``[class, difficulty, set]`` with sets strict (0.7 for cars, else 0.5) and loose.

    Attributes:
        classes: names along the first axis.
        r40, r11: metric (``bbox``, ``bev``, ``3d``, ``aos``) -> ``(C, 3, 2)``; ``aos`` only with orientations.
        curves: metric -> ``(C, 3, 2, 41)`` interpolated precision.
        counted: ``(C, 3)`` int64 true objects that count.
    """

    classes: list[str]
    r40: dict[str, Floats]
    r11: dict[str, Floats]
    curves: dict[str, Floats]
    counted: NDArray[np.int64]


def kitti_ap(
    truth: Sequence[KittiObjects],
    found: Sequence[KittiObjects],
    classes: Sequence[str] = ("Car", "Pedestrian", "Cyclist"),
) -> KittiScores:
    """The official evaluation (Geiger et al., "Are we ready for autonomous driving?", CVPR 2012; R40 since 2019).

    Papers report 3D, strict, moderate first. Up to 40 counted objects a perfect detector cannot reach 100 in R40 (the
    curve has at most one slot per object): a warning says so.

    Args:
        truth: labels of every frame.
        found: results of the same frames, with scores.
        classes: to evaluate; compared without case.

    Raises:
        ValueError: if the numbers of frames differ, or results have no scores.
    """
    if len(truth) != len(found):
        raise ValueError(f"{len(truth)} frames of labels, {len(found)} of results")
    if any(frame.scores is None for frame in found):
        raise ValueError("results need scores")
    overlaps = {metric: [_overlaps(metric, gt, dt) for gt, dt in zip(truth, found, strict=True)] for metric in METRICS}
    oriented = next((frame.alpha[0] != -10 for frame in found if len(frame)), False)
    shape = len(classes), len(DIFFICULTIES), 2
    curves = {name: np.zeros((*shape, _SLOTS)) for name in (*METRICS, "aos")}
    counted = np.zeros(shape[:2], np.int64)
    for c, name in enumerate(classes):
        for d in range(len(DIFFICULTIES)):
            frames = [_Frame.of(gt, dt, name, d) for gt, dt in zip(truth, found, strict=True)]
            counted[c, d] = sum(int((frame.gt_flags == 0).sum()) for frame in frames)
            rows = [i for i, frame in enumerate(frames) if frame.matters]
            frames = [frames[i] for i in rows]
            for metric in METRICS:
                own = [overlaps[metric][i] for i in rows]
                made: dict[float, tuple[Floats, Floats]] = {}
                for s in range(2):
                    limit = min_overlap(name, metric, loose=s == 1)
                    if limit not in made:
                        made[limit] = _curve(frames, own, metric, limit, int(counted[c, d]))
                    precision, similarity = made[limit]
                    curves[metric][c, d, s] = precision
                    if metric == "bbox":
                        curves["aos"][c, d, s] = similarity
    if not oriented:
        del curves["aos"]
    few = [(name, n) for name, n in zip(classes, counted.max(1).tolist(), strict=True) if 0 < n <= 40]
    if few:
        warnings.warn(f"KITTI AP with few objects ({few}): R40 cannot reach 100 % with 40 or fewer", stacklevel=2)
    r11 = {name: curve[..., ::4].sum(-1) / 11 * 100 for name, curve in curves.items()}
    r40 = {name: curve[..., 1:].sum(-1) / 40 * 100 for name, curve in curves.items()}
    return KittiScores(list(classes), r40, r11, curves, counted)


def min_overlap(name: str, metric: Metric, loose: bool) -> float:
    """Overlap that a detection of a class must exceed."""
    strict = _STRICT.get(name.lower(), 0.5)
    if not loose:
        return strict
    if metric == "bbox":
        return 0.5 if name.lower() == "truck" else strict
    return 0.5 if strict == 0.7 else 0.25


@dataclass
class _Frame:
    """One frame, one class, one difficulty: flags 0 counts, 1 neither right nor wrong, -1 another class."""

    gt_flags: NDArray[np.int64]
    dt_flags: NDArray[np.int64]
    scores: Floats
    gt_alpha: Floats
    dt_alpha: Floats
    stuffed: Floats  # (D,) largest share of each detection's image box inside one DontCare box

    @property
    def matters(self) -> bool:
        """Whether anything can be hit, missed or wrong."""
        return bool((self.gt_flags != -1).any() or (self.dt_flags == 0).any())

    @staticmethod
    def of(gt: KittiObjects, dt: KittiObjects, name: str, difficulty: int) -> _Frame:
        name = name.lower()
        names = np.array([n.lower() for n in gt.names])
        height = gt.bbox[:, 3] - gt.bbox[:, 1]
        seen = (gt.occluded <= _MAX_OCCLUSION[difficulty]) & (gt.truncated <= _MAX_TRUNCATION[difficulty])
        seen &= height > _MIN_HEIGHT[difficulty]
        same = names == name
        near = same | (names == _NEIGHBOUR.get(name, name))
        gt_flags = np.where(same & seen, 0, np.where(near, 1, -1))
        small = np.abs(dt.bbox[:, 3] - dt.bbox[:, 1]) < _MIN_HEIGHT[difficulty]
        right = np.array([n.lower() == name for n in dt.names], dtype=bool)
        dt_flags = np.where(small, 1, np.where(right, 0, -1))
        care = np.array([n != "DontCare" for n in gt.names], dtype=bool)
        inside, area, _ = _image_intersection(dt.bbox, gt.bbox[~care])
        share = inside / np.maximum(area, 1e-12)
        assert dt.scores is not None
        return _Frame(gt_flags, dt_flags, dt.scores, gt.alpha, dt.alpha, share.max(1, initial=0))


def _curve(
    frames: list[_Frame], overlaps: list[Floats], metric: Metric, limit: float, counted: int
) -> tuple[Floats, Floats]:
    """41 slots of interpolated precision and of orientation similarity."""
    recorded = [
        score for frame, overlap in zip(frames, overlaps, strict=True) for score in _scores(frame, overlap, limit)
    ]
    thresholds = np.array(_score_thresholds(recorded, counted))
    sums = np.zeros((3, len(thresholds)))  # hits, false alarms, similarity
    for frame, overlap in zip(frames, overlaps, strict=True):
        sums += _match(frame, overlap, limit, thresholds, stuff=metric == "bbox")
    hits, wrong, similarity = sums
    total = np.maximum(hits + wrong, 1e-12)
    slots = np.zeros((2, _SLOTS))
    slots[:, : len(thresholds)] = hits / total, similarity / total
    precision, oriented = np.maximum.accumulate(slots[:, ::-1], axis=1)[:, ::-1]
    return precision, oriented


def _scores(frame: _Frame, overlap: Floats, limit: float) -> list[float]:
    """Scores of the detections matched to objects that count, best score first come."""
    free = frame.dt_flags != -1
    found = []
    for g in np.flatnonzero(frame.gt_flags != -1):
        usable = free & (overlap[:, g] > limit)
        if not usable.any():
            continue
        best = int(np.argmax(np.where(usable, frame.scores, -np.inf)))
        free[best] = False
        if frame.gt_flags[g] == 0 and frame.dt_flags[best] == 0:
            found.append(float(frame.scores[best]))
    return found


def _score_thresholds(scores: list[float], counted: int) -> list[float]:
    """Scores at which recall passes the next of 41 steps."""
    ordered, current, thresholds = sorted(scores, reverse=True), 0.0, []
    for i, score in enumerate(ordered):
        last = i == len(ordered) - 1
        left = (i + 1) / counted
        right = left if last else (i + 2) / counted
        if right - current < current - left and not last:
            continue
        thresholds.append(score)
        current += 1 / (_SLOTS - 1)
    return thresholds


def _match(frame: _Frame, overlap: Floats, limit: float, thresholds: Floats, stuff: bool) -> Floats:
    """``(3, T)`` hits, false alarms and similarity of a frame at all score thresholds at once."""
    rows = np.arange(len(thresholds))
    alive = frame.scores >= thresholds[:, None]  # (T, D)
    free = alive & (frame.dt_flags != -1)
    hits, similarity = np.zeros(len(rows)), np.zeros(len(rows))
    for g in np.flatnonzero(frame.gt_flags != -1):
        if not len(frame.scores):
            break
        usable = free & (overlap[:, g] > limit)
        counting = usable & (frame.dt_flags == 0)
        best = np.argmax(np.where(counting, overlap[:, g], -1.0), axis=1)
        other = np.argmax(usable & (frame.dt_flags == 1), axis=1)
        chosen = np.where(counting.any(1), best, other)
        matched = usable.any(1)
        free[rows[matched], chosen[matched]] = False
        if frame.gt_flags[g] == 0:
            hit = matched & (frame.dt_flags[chosen] == 0)
            hits += hit
            similarity += hit * (1 + np.cos(frame.gt_alpha[g] - frame.dt_alpha[chosen])) / 2
    left = free & (frame.dt_flags == 0)
    if stuff:
        left &= frame.stuffed <= limit
    return np.stack([hits, left.sum(1), similarity])


def _overlaps(metric: Metric, gt: KittiObjects, dt: KittiObjects) -> Floats:
    """``(D, G)`` intersection over union."""
    if metric == "bbox":
        shared, area_dt, area_gt = _image_intersection(dt.bbox, gt.bbox)
        return np.where(shared > 0, shared / np.maximum(area_dt + area_gt - shared, 1e-12), 0.0)
    areas = rectangle_intersection(_plane(dt), _plane(gt)).numpy()
    size_dt, size_gt = (o.dimensions[:, 0] * o.dimensions[:, 2] for o in (dt, gt))
    if metric == "3d":
        bottom = np.minimum(dt.location[:, None, 1], gt.location[None, :, 1])
        top = np.maximum((dt.location[:, 1] - dt.dimensions[:, 1])[:, None], gt.location[:, 1] - gt.dimensions[:, 1])
        areas = areas * np.maximum(bottom - top, 0)
        size_dt, size_gt = size_dt * dt.dimensions[:, 1], size_gt * gt.dimensions[:, 1]
    union = size_dt[:, None] + size_gt - areas
    return np.where(areas > 0, areas / np.where(union == 0, 1, union), 0.0)


def _plane(objects: KittiObjects) -> torch.Tensor:
    """``(N, 5)`` rectangles in the camera's x-z plane."""
    place, size = objects.location[:, [0, 2]], objects.dimensions[:, [0, 2]]
    return torch.from_numpy(np.column_stack([place, size, -objects.rotation_y]))


def _image_intersection(a: Floats, b: Floats) -> tuple[Floats, Floats, Floats]:
    """``(N, M)`` shared area, and the areas ``(N, 1)`` and ``(M,)``."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.prod(np.maximum(high - low, 0), axis=2)
    return shared, np.prod(a[:, 2:] - a[:, :2], axis=1)[:, None], np.prod(b[:, 2:] - b[:, :2], axis=1)


_OTHER, _DONT_CARE = "other", "DontCare"
_COLUMNS = ("truncated", "occluded", "alpha", "bbox", "dimensions", "location", "rotation_y")


class KittiMetrics(torchmetrics.Metric):
    """:func:`kitti_ap` over the frames of an epoch, gathered from all processes.

    Args:
        class_names: to evaluate.
    """

    full_state_update = False
    truth: list[Tensor]
    found: list[Tensor]

    def __init__(self, class_names: Sequence[str]) -> None:
        super().__init__()
        self.class_names = list(class_names)
        self.names = [*class_names, "Van", "Person_sitting", _DONT_CARE, _OTHER]  # all that the evaluation tells apart
        self.add_state("truth", [], dist_reduce_fx="cat")
        self.add_state("found", [], dist_reduce_fx="cat")

    def update(self, truth: KittiObjects, found: KittiObjects) -> None:
        """Add a frame. Of several processes each must add one, if need be one without objects."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
        frame = len(self.truth) * world + rank
        self.truth.append(self._rows(truth, frame))
        self.found.append(self._rows(found, frame))

    def _rows(self, objects: KittiObjects, frame: int) -> Tensor:
        """``(N, 17)`` float64: frame, name, the columns of a label file, score."""
        names = [self.names.index(name if name in self.names else _OTHER) for name in objects.names]
        scores = np.zeros(len(objects)) if objects.scores is None else objects.scores
        values = [getattr(objects, name) for name in _COLUMNS]
        rows = np.column_stack([np.full(len(names), float(frame)), np.array(names, np.float64), *values, scores])
        return torch.from_numpy(rows).to(self.device)

    def compute(self) -> KittiScores:
        """Raises ValueError if there were no frames."""
        truth, found = (self._table(rows) for rows in (self.truth, self.found))
        frames = np.unique(np.concatenate([truth[:, 0], found[:, 0]]))
        ours, theirs = ([self._objects(rows[rows[:, 0] == frame]) for frame in frames] for rows in (truth, found))
        return kitti_ap(ours, theirs, self.class_names)

    def _table(self, rows: Tensor | list[Tensor]) -> Floats:
        joined = torch.cat(rows) if isinstance(rows, list) else rows  # gathered states are joined already
        return joined.cpu().numpy()

    def _objects(self, rows: Floats) -> KittiObjects:
        columns = np.split(rows, [1, 2, 3, 4, 5, 9, 12, 15, 16], axis=1)[2:]
        shaped = [column if column.shape[1] > 1 else column[:, 0] for column in columns]
        return KittiObjects([self.names[int(number)] for number in rows[:, 1]], *shaped)
