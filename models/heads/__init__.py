"""Heads: from features to logits."""

from pc3d.models.heads.pooled import GlobalContextHead, MLPHead

__all__ = ["GlobalContextHead", "MLPHead"]
