"""Heads: from features to logits, points or instances."""

from pc3d.models.heads.class_embedding import ClassEmbeddingHead
from pc3d.models.heads.folding import FoldingDecoder
from pc3d.models.heads.offset_clustering import OffsetClustering
from pc3d.models.heads.pooled import GlobalContextHead, KeepLogits, MLPHead
from pc3d.models.heads.segment_fusion import SegmentFusion

__all__ = [
    "ClassEmbeddingHead",
    "FoldingDecoder",
    "GlobalContextHead",
    "KeepLogits",
    "MLPHead",
    "OffsetClustering",
    "SegmentFusion",
]
