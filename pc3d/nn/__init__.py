"""Layers and contracts shared by models."""

from pc3d.nn.backbone import Backbone, FeatureInfo

__all__ = ["Backbone", "FeatureInfo"]
