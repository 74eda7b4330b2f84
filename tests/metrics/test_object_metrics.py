"""Scores of classification, part segmentation and completion against slow counts."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pc3d.metrics import ClassificationMetrics, CompletionMetrics, ShapePartIoU
from pc3d.ops.point_sets import earth_mover_distance

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method")
PARTS = [[0, 1, 2], [3], [4, 5], [6, 7]]


def compare_parts(seed: int) -> None:
    rng = random.Random(seed)
    metric, per_category = ShapePartIoU(PARTS), {}
    for _ in range(rng.randint(0, 6)):
        category, count = rng.randrange(4), rng.randint(1, 12)
        truth = [rng.choice([*PARTS[category], -1]) for _ in range(count)]
        guess = [rng.choice(PARTS[category]) for _ in range(count)]
        metric.update(torch.tensor(guess), torch.tensor(truth), category)
        if set(truth) == {-1}:
            continue
        ious = []
        for part in PARTS[category]:
            pairs = [(g == part, t == part) for g, t in zip(guess, truth, strict=True) if t >= 0]
            union = sum(g or t for g, t in pairs)
            ious.append(sum(g and t for g, t in pairs) / union if union else 1.0)
        per_category.setdefault(category, []).append(sum(ious) / len(ious))
    scores = metric.compute()
    shapes = [iou for own in per_category.values() for iou in own]
    means = [sum(own) / len(own) for own in per_category.values()]
    assert scores.instance_miou == pytest.approx(sum(shapes) / len(shapes) if shapes else 0)
    assert scores.class_miou == pytest.approx(sum(means) / len(means) if means else 0)
    assert scores.shapes.tolist() == [len(per_category.get(k, [])) for k in range(4)]
    assert [math.isnan(v) for v in scores.category_iou.tolist()] == [k not in per_category for k in range(4)]


@settings(max_examples=30)
@given(st.integers(0, 2**32))
def test_part_scores(seed: int) -> None:
    compare_parts(seed)


@pytest.mark.slow
@settings(max_examples=1000)
@given(st.integers(0, 2**32))
def test_part_scores_of_1000_cases(seed: int) -> None:
    compare_parts(seed)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 4)), max_size=40))
def test_accuracies(pairs: list[tuple[int, int]]) -> None:
    metric = ClassificationMetrics(5)
    for guess, truth in pairs:
        metric.update(torch.tensor([guess]), torch.tensor([truth]))
    scores = metric.compute()
    counted = [(g, t) for g, t in pairs if t >= 0]
    assert scores.oa == pytest.approx(sum(g == t for g, t in counted) / len(counted) if counted else 0)
    recalls = [
        sum(g == t for g, t in counted if t == k) / n for k in range(5) if (n := sum(t == k for _, t in counted))
    ]
    assert scores.macc == pytest.approx(sum(recalls) / len(recalls) if recalls else 0)


def test_completion_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    clouds = [
        (torch.rand(20, 3, generator=generator), torch.rand(20 + 5 * i, 3, generator=generator), i % 2)
        for i in range(3)
    ]
    metric, plain = CompletionMetrics(4, emd_points=64), CompletionMetrics(4)
    expected: dict[int, list[float]] = {}
    for made, wanted, label in clouds:
        metric.update(made, wanted, label)
        plain.update(made, wanted, label)
        distance = torch.cdist(made.double(), wanted.double())
        expected.setdefault(label, []).append(float((distance.amin(1).mean() + distance.amin(0).mean()) / 2))
    scores = metric.compute()
    everything = [value for own in expected.values() for value in own]
    assert scores.chamfer == pytest.approx(sum(everything) / 3, rel=1e-4)
    assert scores.clouds.tolist() == [2, 1, 0, 0]
    assert scores.class_chamfer[1] == pytest.approx(expected[1][0], rel=1e-4)
    assert math.isnan(scores.class_chamfer[2])
    assert scores.class_emd[0] * 2 + scores.class_emd[1] == pytest.approx(3 * scores.emd, rel=1e-6)
    whole = CompletionMetrics(1, emd_points=20)
    whole.update(*clouds[0][:2], 0)
    assert whole.compute().emd == pytest.approx(float(earth_mover_distance(*clouds[0][:2])), rel=1e-5)
    assert math.isnan(plain.compute().emd)
