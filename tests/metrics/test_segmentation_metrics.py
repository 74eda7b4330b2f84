from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pc3d import InputError
from pc3d.metrics import SegmentationMetrics

K = 4


def predictions(n: int = 1000, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pred = torch.randint(0, K, (n,), generator=generator)
    return pred, torch.randint(-1, K, (n,), generator=generator)


def test_scores_equal_their_definitions() -> None:
    pred, target = predictions()
    metrics = SegmentationMetrics(K)
    metrics.update(pred, target)
    scores = metrics.compute()
    keep = target >= 0
    pred, target = pred[keep], target[keep]
    iou, acc = [], []
    for c in range(K):
        hit = ((pred == c) & (target == c)).sum().item()
        iou.append(hit / ((pred == c) | (target == c)).sum().item())
        acc.append(hit / (target == c).sum().item())
    assert scores.iou.tolist() == pytest.approx(iou)
    assert scores.acc.tolist() == pytest.approx(acc)
    assert scores.miou == scores.miou_present == pytest.approx(sum(iou) / K)
    assert scores.macc == pytest.approx(sum(acc) / K)
    assert scores.all_acc == pytest.approx((pred == target).float().mean().item())
    for t in range(K):
        for p in range(K):
            assert scores.confusion[t, p] == ((target == t) & (pred == p)).sum()


def compare(pairs: list[tuple[int, int]]) -> None:
    """Point by point: a prediction of -1 misses its true class, a truth of -1 does not count."""
    metrics = SegmentationMetrics(K)
    for part in (pairs[::2], pairs[1::2]):
        metrics.update(*(torch.tensor([pair[i] for pair in part], dtype=torch.int64) for i in (0, 1)))
    scores = metrics.compute()
    counted = [(guess, truth) for guess, truth in pairs if truth >= 0]
    iou, acc = [], []
    for c in range(K):
        hits = sum(guess == truth == c for guess, truth in counted)
        union = sum(c in pair for pair in counted)
        true = sum(truth == c for _, truth in counted)
        iou.append(hits / union if union else 0.0)
        acc.append(hits / true if true else 0.0)
    present = [iou[c] for c in range(K) if any(truth == c for _, truth in counted)]
    assert scores.iou.tolist() == pytest.approx(iou, abs=1e-9)
    assert scores.acc.tolist() == pytest.approx(acc, abs=1e-9)
    assert scores.miou == pytest.approx(sum(iou) / K, abs=1e-9)
    assert scores.macc == pytest.approx(sum(acc) / K, abs=1e-9)
    assert scores.miou_present == pytest.approx(sum(present) / len(present) if present else 0, abs=1e-9)
    right = sum(guess == truth for guess, truth in counted)
    assert scores.all_acc == pytest.approx(right / len(counted) if counted else 0, abs=1e-9)


points = st.lists(st.tuples(st.integers(-1, K - 1), st.integers(-1, K - 1)), max_size=60)


@settings(max_examples=30)
@given(points)
def test_scores_equal_the_slow_count(pairs: list[tuple[int, int]]) -> None:
    compare(pairs)


@pytest.mark.slow
@settings(max_examples=1000)
@given(points)
def test_scores_equal_the_slow_count_on_1000_cases(pairs: list[tuple[int, int]]) -> None:
    compare(pairs)


def test_two_means_differ_when_a_class_has_no_points() -> None:
    target = torch.tensor([0, 0, 1, 1])
    pred = torch.tensor([0, 0, 1, 3])
    metrics = SegmentationMetrics(K)
    metrics.update(pred, target)
    scores = metrics.compute()
    assert scores.iou.tolist() == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert scores.miou == pytest.approx(1.5 / 4)
    assert scores.miou_present == pytest.approx(1.5 / 2)


def test_counts_are_summed_over_batches_and_processes() -> None:
    pred, target = predictions()
    whole = SegmentationMetrics(K)
    whole.update(pred, target)
    parts = [SegmentationMetrics(K), SegmentationMetrics(K)]
    for part, rows in zip(parts, (slice(0, 300), slice(300, None)), strict=True):
        part.update(pred[rows], target[rows])
    reduce = parts[0]._reductions["confusion"]  # what the processes apply to their gathered states
    gathered = reduce(torch.stack([part.confusion for part in parts]))
    assert torch.equal(gathered, whole.compute().confusion)
    parts[0].update(pred[300:], target[300:])
    assert torch.equal(parts[0].compute().confusion, whole.compute().confusion)


def test_reset_and_reuse() -> None:
    metrics = SegmentationMetrics(K)
    metrics.update(*predictions())
    metrics.reset()
    assert metrics.confusion.sum() == 0
    metrics.update(*predictions(10))
    assert metrics.compute().confusion.sum() == (predictions(10)[1] >= 0).sum()


def test_nothing_counted_is_zero() -> None:
    metrics = SegmentationMetrics(K)
    metrics.update(torch.zeros(5, dtype=torch.int64), torch.full((5,), -1))
    scores = metrics.compute()
    assert (scores.miou, scores.miou_present, scores.macc, scores.all_acc) == (0, 0, 0, 0)
    assert torch.isfinite(scores.iou).all()


def test_another_ignore_index_and_integer_types() -> None:
    pred, target = predictions()
    plain, other = SegmentationMetrics(K), SegmentationMetrics(K, ignore_index=255)
    plain.update(pred, target)
    other.update(pred.to(torch.int16), torch.where(target < 0, 255, target).to(torch.uint8))
    assert torch.equal(plain.confusion, other.confusion)


def test_predictions_of_ignored_points_may_be_anything() -> None:
    metrics = SegmentationMetrics(K)
    metrics.update(torch.tensor([-1, 99, 2]), torch.tensor([-1, -1, 2]))
    assert metrics.confusion.sum() == 1


@pytest.mark.parametrize(("pred", "target", "message"), [(7, 0, "predicted class 7"), (0, 9, "true class 9")])
def test_classes_out_of_range_are_named(pred: int, target: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SegmentationMetrics(K).update(torch.tensor([pred]), torch.tensor([target]))


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="both be"):
        SegmentationMetrics(K).update(torch.zeros(3), torch.zeros(4))


def test_predicting_nothing_is_a_miss() -> None:
    metrics = SegmentationMetrics(2)
    metrics.update(torch.tensor([0, -1, 1, -1]), torch.tensor([0, 0, 1, -1]))
    scores = metrics.compute()
    assert scores.iou.tolist() == pytest.approx([0.5, 1.0])
    assert scores.acc.tolist() == pytest.approx([0.5, 1.0])
    assert scores.all_acc == pytest.approx(2 / 3)
    assert int(scores.confusion.sum()) == 2
