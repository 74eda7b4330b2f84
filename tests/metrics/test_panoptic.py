"""Panoptic quality against a slow count, and few-shot sums."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pc3d.metrics import PanopticQuality, few_shot_score

THINGS = [True, False, True]


def slow(scans: list[list[np.ndarray]], least: int) -> list[list[float]]:
    table = []
    for label, thing in enumerate(THINGS):
        total, hits, wrong, missed = 0.0, 0, 0, 0
        intersection = union = 0
        for segment, instance, true_segment, true_instance in scans:
            counted = true_segment != -1
            own, real = (segment == label) & counted, (true_segment == label) & counted
            intersection, union = intersection + (own & real).sum(), union + (own | real).sum()
            parts = [own & (instance == i) for i in set(instance[own])] if thing else [own] if own.any() else []
            truths = (
                [real & (true_instance == i) for i in set(true_instance[real])]
                if thing
                else [real]
                if real.any()
                else []
            )
            matched = set()
            for t in truths:
                best = [(p & t).sum() / (p | t).sum() for p in parts]
                over = [i for i, value in enumerate(best) if value > 0.5]
                if over:
                    matched.add(over[0])
                    total, hits = total + best[over[0]], hits + 1
                else:
                    missed += t.sum() >= least
            wrong += sum(p.sum() >= least for i, p in enumerate(parts) if i not in matched)
        sq = total / max(hits, 1)
        rq = hits / max(hits + (wrong + missed) / 2, 1e-15)
        table.append([sq * rq, sq, rq, intersection / max(union, 1e-15)])
    return table


def compare(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scans = []
    for _ in range(rng.integers(1, 4)):
        points = int(rng.choice([0, 80], p=[0.05, 0.95]))
        blocks = rng.integers(0, 8, points)
        classes = 3 if rng.random() > 0.1 else 0  # a tenth of the scans all ignored
        true_segment, true_instance = rng.integers(-1, classes, 8)[blocks], rng.integers(0, 3, 8)[blocks]
        noise = rng.random(points) < rng.choice([0.0, 0.3, 1.0])
        segment = np.where(noise, rng.integers(-1, 3, points), true_segment)
        segment = segment if rng.random() > 0.1 else np.full(points, -1)  # or nothing predicted
        instance = np.where(rng.random(points) < 0.2, rng.integers(0, 4, points), true_instance)
        scans.append([segment, instance, true_segment, true_instance])
    metric = PanopticQuality(THINGS, min_points=4)
    for scan in scans:
        metric.update(*(torch.from_numpy(part) for part in scan))
    scores = metric.compute()
    expected = np.array(slow(scans, 4))
    np.testing.assert_allclose(scores.table.numpy(), expected, atol=1e-12)
    assert scores.pq == pytest.approx(expected[:, 0].mean())
    dagger = [expected[i, 0] if thing else expected[i, 3] for i, thing in enumerate(THINGS)]
    assert scores.pq_dagger == pytest.approx(np.mean(dagger))
    assert scores.miou == pytest.approx(expected[:, 3].mean())


@settings(max_examples=30)
@given(st.integers(0, 2**32))
def test_equals_the_slow_count(seed: int) -> None:
    compare(seed)


@pytest.mark.slow
@settings(max_examples=1000)
@given(st.integers(0, 2**32))
def test_equals_the_slow_count_on_1000_cases(seed: int) -> None:
    compare(seed)


def test_perfect_and_empty_scans() -> None:
    segment, instance = torch.tensor([0] * 60 + [1] * 60 + [2] * 60), torch.arange(180) // 30
    metric = PanopticQuality(THINGS, min_points=10)
    metric.update(segment, instance, segment, instance)
    empty = torch.zeros(0, dtype=torch.int64)
    metric.update(empty, empty, empty, empty)
    ignored = torch.full((180,), -1)
    metric.update(segment, instance, ignored, instance)
    scores = metric.compute()
    assert scores.pq == scores.sq == scores.rq == scores.pq_dagger == scores.miou == 1
    with pytest.raises(ValueError, match="must all be"):
        metric.update(segment, instance[:5], segment, instance)


def compare_few_shot(accuracies: list[float]) -> None:
    score = few_shot_score(accuracies, 5, 10, folds=len(accuracies))
    mean = sum(accuracies) / len(accuracies)
    spread = (sum((value - mean) ** 2 for value in accuracies) / len(accuracies)) ** 0.5
    assert score.mean == pytest.approx(100 * mean, abs=1e-9)
    assert score.deviation == pytest.approx(100 * spread, abs=1e-6)
    assert score.folds == len(accuracies)


shares = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@settings(max_examples=30)
@given(shares)
def test_few_shot_sums(accuracies: list[float]) -> None:
    compare_few_shot(accuracies)


@pytest.mark.slow
@settings(max_examples=1000)
@given(shares)
def test_few_shot_sums_of_1000_cases(accuracies: list[float]) -> None:
    compare_few_shot(accuracies)


def test_few_shot() -> None:
    values = [0.9, 0.95, 1.0, 0.85, 0.9, 0.9, 0.95, 1.0, 0.9, 0.95]
    score = few_shot_score(values, 5, 10)
    assert score.mean == pytest.approx(93.0)
    assert score.deviation == pytest.approx(statistics.pstdev([100 * v for v in values]))
    assert str(score) == "5-way 10-shot: 93.0 ± 4.6 (10 folds)"
    with pytest.raises(ValueError, match="9 accuracies"):
        few_shot_score(values[1:], 5, 10)
    with pytest.raises(ValueError, match=r"0\.\.1"):
        few_shot_score([*values[1:], 93.0], 5, 10)
