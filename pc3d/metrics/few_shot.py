"""Few-shot classification: the mean over the folds of an n-way k-shot protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

FOLDS = 10


@dataclass(frozen=True)
class FewShotScore:
    """Accuracy in percent over the folds: mean and population standard deviation, as usually reported."""

    way: int
    shot: int
    mean: float
    deviation: float
    folds: int

    def __str__(self) -> str:
        return f"{self.way}-way {self.shot}-shot: {self.mean:.1f} ± {self.deviation:.1f} ({self.folds} folds)"


def few_shot_score(accuracies: Sequence[float], way: int, shot: int, folds: int = FOLDS) -> FewShotScore:
    """Sum up the accuracies (0..1) of all folds of one setting, without voting.

    Raises:
        ValueError: if a fold is missing, or an accuracy is not a share.
    """
    if len(accuracies) != folds:
        raise ValueError(f"{len(accuracies)} accuracies for {folds} folds")
    if any(not 0 <= value <= 1 for value in accuracies):
        raise ValueError(f"accuracies must lie in 0..1, got {[v for v in accuracies if not 0 <= v <= 1][:3]}")
    percent = [100 * value for value in accuracies]
    return FewShotScore(way, shot, fmean(percent), pstdev(percent), folds)
