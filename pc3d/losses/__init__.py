"""Losses, one per file."""

from pc3d.losses.base import Loss
from pc3d.losses.cross_entropy import CrossEntropy
from pc3d.losses.focal import Focal
from pc3d.losses.lovasz import Lovasz

__all__ = ["CrossEntropy", "Focal", "Loss", "Lovasz"]
