"""KITTI AP: exact cases, and a slow evaluator written rule by rule."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_kitti import slow_ap

from pc3d.io.kitti_object import KittiObjects
from pc3d.metrics.kitti import _score_thresholds, kitti_ap, min_overlap

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
    """Objects of all kinds, or none; detections near them (some of them twice, small, or of another class)."""
    truth = objects(int(rng.integers(0, 7)), rng)
    n = len(truth)
    kinds = ["Car", "Van", "Pedestrian", "Person_sitting", "Truck", "DontCare"]
    arrays = {k: v for k, v in vars(truth).items() if isinstance(v, np.ndarray)}
    arrays |= {"occluded": rng.integers(0, 3, n).astype(float), "truncated": rng.choice([0, 0.2, 0.4], n)}
    arrays["bbox"][:, 3] -= rng.choice([0, 0, 30], n)
    truth = KittiObjects([str(k) for k in rng.choice(kinds, n, p=[0.45, 0.1, 0.2, 0.05, 0.05, 0.15])], **arrays)
    pick = rng.integers(0, n, rng.integers(0, 9)) if n else np.empty(0, int)
    arrays = {k: v[pick].copy() for k, v in vars(truth).items() if isinstance(v, np.ndarray)}
    arrays["location"] += rng.normal(0, 0.25, arrays["location"].shape) * rng.integers(0, 2)
    arrays["bbox"] += rng.normal(0, 3, arrays["bbox"].shape)
    arrays["bbox"][:, 3] -= rng.choice([0, 25], len(pick))
    arrays["alpha"] += rng.normal(0, 0.5, len(pick))
    names = [str(k) for k in rng.choice(["Car", "Pedestrian", "Cyclist"], len(pick), p=[0.6, 0.3, 0.1])]
    return truth, KittiObjects(names, **{**arrays, "scores": rng.random(len(pick)).round(1)})


def compare(seed: int) -> None:
    """Everything that ``kitti_ap`` gives against the slow evaluator, on a few random frames."""
    rng = np.random.default_rng(seed)
    frames = [random_frame(rng) for _ in range(rng.integers(1, 4))]
    truth, found = [gt for gt, _ in frames], [dt for _, dt in frames]
    name = str(rng.choice(["Car", "Pedestrian"]))
    scores = kitti_ap(truth, found, [name])
    for level in range(3):
        for metric in ("bbox", "bev", "3d"):
            for place, loose in enumerate((False, True)):
                limit = min_overlap(name, metric, loose)
                slow = slow_ap(truth, found, name, level, metric, limit)
                assert scores.r40[metric][0, level, place] == pytest.approx(slow["r40"], abs=1e-9)
                assert scores.r11[metric][0, level, place] == pytest.approx(slow["r11"], abs=1e-9)
                if metric == "bbox" and "aos" in scores.r40:
                    assert scores.r40["aos"][0, level, place] == pytest.approx(slow["aos40"], abs=1e-9)


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_ap_equals_the_slow_one(seed: int) -> None:
    compare(seed)


@pytest.mark.slow
@settings(max_examples=1000)
@given(st.integers(0, 2**32))
def test_ap_equals_the_slow_one_on_1000_cases(seed: int) -> None:
    compare(seed)


def test_score_thresholds() -> None:
    assert _score_thresholds([], 5) == []
    assert len(_score_thresholds(list(np.linspace(0, 1, 400)), 400)) == 41
    assert _score_thresholds([0.2, 0.9], 2) == [0.9, 0.2]
