"""Robustness of a classifier: accuracies on corrupted clouds, summed up as two benchmarks do.

ModelNet40-C (Sun et al., arXiv 2201.12296): mean error rate. ModelNet-C (Ren et al., ICML 2022): errors relative to
those of DGCNN.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

DGCNN = {
    "scale": 0.906,
    "jitter": 0.684,
    "rotate": 0.785,
    "dropout_global": 0.752,
    "dropout_local": 0.793,
    "add_global": 0.705,
    "add_local": 0.725,
}
"""Published accuracy of the reference of ModelNet-C, mean over its levels."""
DGCNN_CLEAN = 0.926


@dataclass(frozen=True)
class RobustnessScores:
    """Accuracies, 0..1.

    Attributes:
        clean: without corruption.
        accuracy: of each corruption at each severity.
    """

    clean: float
    accuracy: Mapping[str, Mapping[int, float]]

    def mean(self, corruption: str) -> float:
        """Accuracy over the severities of a corruption."""
        return fmean(self.accuracy[corruption].values())

    def error_rate(self, corruptions: Iterable[str] | None = None) -> float:
        """Mean over corruptions, by default all, of the mean error over their severities."""
        return 1 - fmean(self.mean(name) for name in (self.accuracy if corruptions is None else corruptions))

    def relative_errors(self) -> tuple[float, float]:
        """Mean corruption error and its relative form, mCE and RmCE, of the seven corruptions of ModelNet-C.

        mCE divides the error under each corruption by DGCNN's, RmCE what a corruption costs by what it costs DGCNN.
        (The published code rounds accuracies to three digits first.)

        Raises:
            ValueError: unless the corruptions are those seven.
        """
        if set(self.accuracy) != set(DGCNN):
            raise ValueError(f"mCE is of {', '.join(DGCNN)}, these are {', '.join(self.accuracy)}")
        errors = fmean((1 - self.mean(name)) / (1 - reference) for name, reference in DGCNN.items())
        costs = fmean((self.clean - self.mean(name)) / (DGCNN_CLEAN - DGCNN[name]) for name in DGCNN)
        return errors, costs
