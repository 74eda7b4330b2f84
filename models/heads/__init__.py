"""Heads: from features to logits, points, instances or boxes."""

from pc3d.models.heads.anchor_head import Anchor, AnchorHead
from pc3d.models.heads.center_head import CenterHead
from pc3d.models.heads.class_embedding import ClassEmbeddingHead
from pc3d.models.heads.folding import FoldingDecoder
from pc3d.models.heads.offset_clustering import OffsetClustering
from pc3d.models.heads.pooled import GlobalContextHead, KeepLogits, MLPHead
from pc3d.models.heads.segment_fusion import SegmentFusion
from pc3d.models.heads.voxel_rcnn_head import PooledLevel, VoxelRCNNHead

__all__ = [
    "Anchor",
    "AnchorHead",
    "CenterHead",
    "ClassEmbeddingHead",
    "FoldingDecoder",
    "GlobalContextHead",
    "KeepLogits",
    "MLPHead",
    "OffsetClustering",
    "PooledLevel",
    "SegmentFusion",
    "VoxelRCNNHead",
]
