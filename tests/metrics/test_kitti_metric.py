"""KITTI AP: exact cases, and a slow evaluator written rule by rule."""

from __future__ import annotations

import numpy as np
import pytest

from pc3d.io.kitti_object import KittiObjects
from pc3d.metrics.kitti import _Frame, _match, _overlaps, _score_thresholds, kitti_ap

pytestmark = pytest.mark.filterwarnings("ignore:KITTI AP with few objects")


def objects(count: int, rng: np.random.Generator, name: str = "Car", scores: bool = False) -> KittiObjects:
    location = np.column_stack([np.arange(count) * 8.0, np.full(count, 1.6), rng.uniform(5, 40, count)])
    corner = np.column_stack([np.arange(count) * 50.0, np.full(count, 100.0)])
    return KittiObjects(
        [name] * count,
        truncated=np.zeros(count),
        occluded=np.zeros(count),
        alpha=rng.uniform(-3, 3, count),
        bbox=np.concatenate([corner, corner + np.array([40, 60])], 1),
        dimensions=np.tile([3.9, 1.5, 1.6], (count, 1)),
        location=location,
        rotation_y=rng.uniform(-3, 3, count),
        scores=rng.random(count) if scores else None,
    )


def detections(truth: KittiObjects, scores: np.ndarray) -> KittiObjects:
    return KittiObjects(**{**vars(truth), "scores": scores})


def test_a_perfect_detector_scores_100_with_many_objects() -> None:
    rng = np.random.default_rng(0)
    truth = [objects(10, rng) for _ in range(9)]
    found = [detections(frame, rng.random(10)) for frame in truth]
    scores = kitti_ap(truth, found, ["Car"])
    for metric in ("bbox", "bev", "3d", "aos"):
        np.testing.assert_allclose(scores.r40[metric], 100)
        np.testing.assert_allclose(scores.r11[metric], 100)


@pytest.mark.parametrize(("count", "expected"), [(1, 0.0), (10, 22.5), (40, 97.5)])
def test_few_objects_cannot_reach_100(count: int, expected: float) -> None:
    rng = np.random.default_rng(0)
    truth = [objects(count, rng)]
    with pytest.warns(UserWarning, match="few objects"):
        scores = kitti_ap(truth, [detections(truth[0], rng.random(count))], ["Car"])
    np.testing.assert_allclose(scores.r40["3d"], expected)


def test_duplicates_and_wrong_classes_cost() -> None:
    rng = np.random.default_rng(0)
    truth = [objects(10, rng) for _ in range(9)]
    twice = []
    for frame in truth:
        both = {k: np.concatenate([v, v]) for k, v in vars(frame).items() if isinstance(v, np.ndarray)}
        twice.append(KittiObjects(frame.names * 2, **{**both, "scores": np.full(20, 0.9)}))
    np.testing.assert_allclose(kitti_ap(truth, twice, ["Car"]).r40["3d"], 50)
    wrong = [detections(objects(10, rng, "Pedestrian"), rng.random(10)) for _ in truth]
    assert kitti_ap(truth, wrong, ["Car"]).r40["3d"].max() == 0
    vans = [KittiObjects(**{**vars(frame), "names": ["Van"] * 10}) for frame in truth]
    found = [detections(frame, np.full(10, 0.5)) for frame in truth]
    assert kitti_ap(vans, found, ["Car"]).counted.max() == 0  # neither right nor wrong


def test_dont_care_forgives_in_the_image_only() -> None:
    rng = np.random.default_rng(0)
    truth, found = [], []
    for _ in range(9):
        frame = objects(10, rng)
        extra = detections(objects(11, rng), np.full(11, 0.99))
        arrays = {k: v.copy() for k, v in vars(frame).items() if isinstance(v, np.ndarray)}
        care = {k: np.concatenate([v, np.full((1, *v.shape[1:]), -1.0)]) for k, v in arrays.items()}
        care["bbox"][-1] = [480, 80, 600, 200]  # around the eleventh detection
        truth.append(KittiObjects([*frame.names, "DontCare"], **care))
        own = {k: np.concatenate([v, getattr(extra, k)[10:]]) for k, v in arrays.items()}
        found.append(KittiObjects(["Car"] * 11, **own, scores=np.r_[np.full(10, 0.5), 0.99]))
    scores = kitti_ap(truth, found, ["Car"])
    np.testing.assert_allclose(scores.r40["bbox"], 100)
    assert scores.r40["3d"].max() < 100


def test_empty_frames() -> None:
    rng = np.random.default_rng(0)
    nothing, empty = objects(0, rng), objects(0, rng, scores=True)
    scores = kitti_ap([nothing, objects(3, rng)], [empty, empty])
    assert all(values.max() == 0 for values in scores.r40.values())
    assert kitti_ap([], []).counted.sum() == 0
    with pytest.raises(ValueError, match="frames"):
        kitti_ap([nothing], [])
    with pytest.raises(ValueError, match="scores"):
        kitti_ap([nothing], [nothing])


def random_frame(rng: np.random.Generator) -> tuple[KittiObjects, KittiObjects]:
    truth = objects(int(rng.integers(0, 7)), rng)
    n = len(truth)
    truth = KittiObjects(
        list(rng.choice(["Car", "Van", "DontCare"], n, p=[0.7, 0.15, 0.15])),
        **{
            **{k: v for k, v in vars(truth).items() if isinstance(v, np.ndarray)},
            "occluded": rng.integers(0, 3, n).astype(float),
        },
    )
    pick = rng.integers(0, n, rng.integers(0, 9)) if n else np.empty(0, int)
    arrays = {k: v[pick].copy() for k, v in vars(truth).items() if isinstance(v, np.ndarray)}
    arrays["location"] += rng.normal(0, 0.25, arrays["location"].shape)
    arrays["bbox"] += rng.normal(0, 3, arrays["bbox"].shape)
    arrays["bbox"][:, 3] -= rng.choice([0, 25], len(pick))
    scores = rng.random(len(pick)).round(1)
    return truth, KittiObjects(["Car"] * len(pick), **{**arrays, "scores": scores})


def slow_match(frame: _Frame, overlap: np.ndarray, limit: float, threshold: float, stuff: bool) -> tuple[int, int]:
    assigned = [False] * len(frame.scores)
    hits = 0
    for g, flag in enumerate(frame.gt_flags):
        if flag == -1:
            continue
        chosen, best, chosen_small = None, 0.0, False
        for d, kind in enumerate(frame.dt_flags):
            if kind == -1 or assigned[d] or frame.scores[d] < threshold or overlap[d, g] <= limit:
                continue
            if kind == 0 and (chosen is None or chosen_small or overlap[d, g] > best):
                chosen, best, chosen_small = d, overlap[d, g], False
            elif kind == 1 and chosen is None:
                chosen, chosen_small = d, True
        if chosen is not None:
            assigned[chosen] = True
            hits += flag == 0 and not chosen_small
    wrong = 0
    for d, kind in enumerate(frame.dt_flags):
        if kind == 0 and not assigned[d] and frame.scores[d] >= threshold:
            wrong += not (stuff and frame.stuffed[d] > limit)
    return hits, wrong


@pytest.mark.parametrize("seed", range(60))
def test_matching_equals_the_slow_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, found = random_frame(rng)
    for metric in ("bbox", "bev", "3d"):
        overlap = _overlaps(metric, truth, found)
        for difficulty in range(3):
            frame = _Frame.of(truth, found, "Car", difficulty)
            thresholds = np.array([0.0, 0.35, 0.5, 0.9])
            hits, wrong, _ = _match(frame, overlap, 0.5, thresholds, stuff=metric == "bbox")
            expected = [slow_match(frame, overlap, 0.5, t, metric == "bbox") for t in thresholds]
            assert list(zip(hits, wrong, strict=True)) == expected


def test_score_thresholds() -> None:
    assert _score_thresholds([], 5) == []
    assert len(_score_thresholds(list(np.linspace(0, 1, 400)), 400)) == 41
    assert _score_thresholds([0.2, 0.9], 2) == [0.9, 0.2]
