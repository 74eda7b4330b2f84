"""Losses, one per file."""

from pc3d.losses.base import Loss
from pc3d.losses.cross_entropy import CrossEntropy

__all__ = ["CrossEntropy", "Loss"]
