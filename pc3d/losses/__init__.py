"""Losses, one per file."""

from pc3d.losses.base import FeatureLoss, Loss, WeightedLoss
from pc3d.losses.cluster_contrast import ClusterContrast
from pc3d.losses.completion import Chamfer, CompletionLoss, DensityAwareChamfer
from pc3d.losses.cross_entropy import CrossEntropy
from pc3d.losses.dice import Dice
from pc3d.losses.focal import Focal
from pc3d.losses.lovasz import Lovasz
from pc3d.losses.occupancy import MarginOccupancy
from pc3d.losses.poly_focal import PolyFocal
from pc3d.losses.weighting import ClassWeighting

__all__ = [
    "Chamfer",
    "ClassWeighting",
    "ClusterContrast",
    "CompletionLoss",
    "CrossEntropy",
    "DensityAwareChamfer",
    "Dice",
    "FeatureLoss",
    "Focal",
    "Loss",
    "Lovasz",
    "MarginOccupancy",
    "PolyFocal",
    "WeightedLoss",
]
