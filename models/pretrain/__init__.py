"""Methods that train a backbone on clouds without labels, one per file."""

from pc3d.models.pretrain.point_bert import DiscreteVAE, DiscreteVAETraining, PointBERT
from pc3d.models.pretrain.point_mae import PointMAE
from pc3d.models.pretrain.point_pqae import PointPQAE

__all__ = ["DiscreteVAE", "DiscreteVAETraining", "PointBERT", "PointMAE", "PointPQAE"]
