"""Transforms: ``Points`` in, ``Points`` out; augmentation, sampling and feature assembly."""

from pc3d.data.transforms.attributes import AssembleFeatures, ScaleAttribute
from pc3d.data.transforms.base import CloudTransform, Compose, Transform
from pc3d.data.transforms.sampling import CropBox, GridSample, RandomDropout, ShufflePoints, SphereCrop

__all__ = [
    "AssembleFeatures",
    "CloudTransform",
    "Compose",
    "CropBox",
    "GridSample",
    "RandomDropout",
    "ScaleAttribute",
    "ShufflePoints",
    "SphereCrop",
    "Transform",
]
