"""Heads: from features to logits or points."""

from pc3d.models.heads.folding import FoldingDecoder
from pc3d.models.heads.pooled import GlobalContextHead, MLPHead

__all__ = ["FoldingDecoder", "GlobalContextHead", "MLPHead"]
