"""Losses, one per file."""

from pc3d.losses.base import FeatureLoss, Loss
from pc3d.losses.cluster_contrast import ClusterContrast
from pc3d.losses.cross_entropy import CrossEntropy
from pc3d.losses.focal import Focal
from pc3d.losses.lovasz import Lovasz

__all__ = ["ClusterContrast", "CrossEntropy", "FeatureLoss", "Focal", "Loss", "Lovasz"]
