"""Accuracies under corruptions, summed up."""

from __future__ import annotations

import pytest

from pc3d.metrics import RobustnessScores
from pc3d.metrics.robustness import DGCNN, DGCNN_CLEAN


def test_error_rate_is_the_mean_of_means() -> None:
    scores = RobustnessScores(0.9, {"cutout": {1: 0.8, 5: 0.6}, "impulse": {1: 0.5}})
    assert scores.mean("cutout") == pytest.approx(0.7)
    assert scores.error_rate() == pytest.approx(0.4)
    assert scores.error_rate(["cutout"]) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="mCE is of scale"):
        scores.relative_errors()


def test_errors_relative_to_dgcnn() -> None:
    reference = RobustnessScores(DGCNN_CLEAN, {name: dict.fromkeys(range(5), value) for name, value in DGCNN.items()})
    assert reference.relative_errors() == pytest.approx((1, 1))
    alike = RobustnessScores(0.8, {name: {0: 0.6, 4: 0.8} for name in DGCNN})
    assert alike.relative_errors() == pytest.approx((1.471859, 1.199862), abs=1e-6)
