"""Transforms: ``Points`` in, ``Points`` out; augmentation, sampling and feature assembly."""

from pc3d.data.transforms.attributes import (
    AssembleFeatures,
    EstimateNormals,
    HeightAboveGround,
    LocalGeometry,
    ScaleAttribute,
)
from pc3d.data.transforms.base import CloudTransform, Compose, Transform
from pc3d.data.transforms.color import ChromaticAutoContrast, ChromaticJitter, ChromaticTranslation, NormalizeColor
from pc3d.data.transforms.geometric import (
    CenterShift,
    ElasticDistortion,
    PointClip,
    RandomFlip,
    RandomJitter,
    RandomRotate,
    RandomRotateTargetAngle,
    RandomScale,
)
from pc3d.data.transforms.presets import IndoorAugment, OutdoorAugment
from pc3d.data.transforms.sampling import CropBox, GridSample, RandomDropout, ShufflePoints, SphereCrop
from pc3d.data.transforms.segments import ChooseSegments, GraphSegments

__all__ = [
    "AssembleFeatures",
    "CenterShift",
    "ChooseSegments",
    "ChromaticAutoContrast",
    "ChromaticJitter",
    "ChromaticTranslation",
    "CloudTransform",
    "Compose",
    "CropBox",
    "ElasticDistortion",
    "EstimateNormals",
    "GraphSegments",
    "GridSample",
    "HeightAboveGround",
    "IndoorAugment",
    "LocalGeometry",
    "NormalizeColor",
    "OutdoorAugment",
    "PointClip",
    "RandomDropout",
    "RandomFlip",
    "RandomJitter",
    "RandomRotate",
    "RandomRotateTargetAngle",
    "RandomScale",
    "ScaleAttribute",
    "ShufflePoints",
    "SphereCrop",
    "Transform",
]
