"""Layers and contracts shared by models."""

from pc3d.nn.attention import RelativePositionBias, Windows, group_windows, split_windows, window_attention
from pc3d.nn.backbone import Backbone, FeatureInfo, PointNetwork
from pc3d.nn.bev import BevBackbone, BevGrid
from pc3d.nn.rope import Rotation, rotary_frequencies, rotate, rotation

__all__ = [
    "Backbone",
    "BevBackbone",
    "BevGrid",
    "FeatureInfo",
    "PointNetwork",
    "RelativePositionBias",
    "Rotation",
    "Windows",
    "group_windows",
    "rotary_frequencies",
    "rotate",
    "rotation",
    "split_windows",
    "window_attention",
]
