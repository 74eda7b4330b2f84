"""Transforms: ``Points`` in, ``Points`` out; augmentation, sampling and feature assembly."""

from pc3d.data.transforms.attributes import (
    AssembleFeatures,
    DropAttribute,
    EstimateNormals,
    HeightAboveGround,
    HeightAboveLowest,
    LocalGeometry,
    ScaleAttribute,
)
from pc3d.data.transforms.base import CloudTransform, Compose, Transform
from pc3d.data.transforms.color import ChromaticAutoContrast, ChromaticJitter, ChromaticTranslation, NormalizeColor
from pc3d.data.transforms.corruptions import Corrupt
from pc3d.data.transforms.geometric import (
    CenterShift,
    ElasticDistortion,
    LevelPlane,
    PointClip,
    PositiveShift,
    RandomFlip,
    RandomJitter,
    RandomRotate,
    RandomRotateTargetAngle,
    RandomScale,
    RandomShift,
    UnitShape,
)
from pc3d.data.transforms.occupancy import MarkBoundary, ScanAndQueries
from pc3d.data.transforms.paste import PasteObjects
from pc3d.data.transforms.presets import IndoorAugment, OutdoorAugment
from pc3d.data.transforms.sampling import (
    ColumnCrop,
    CropBox,
    FixedPoints,
    GridSample,
    RandomDropout,
    ShufflePoints,
    SphereCrop,
)
from pc3d.data.transforms.segments import ChooseSegments, GraphSegments

__all__ = [
    "AssembleFeatures",
    "CenterShift",
    "ChooseSegments",
    "ChromaticAutoContrast",
    "ChromaticJitter",
    "ChromaticTranslation",
    "CloudTransform",
    "ColumnCrop",
    "Compose",
    "Corrupt",
    "CropBox",
    "DropAttribute",
    "ElasticDistortion",
    "EstimateNormals",
    "FixedPoints",
    "GraphSegments",
    "GridSample",
    "HeightAboveGround",
    "HeightAboveLowest",
    "IndoorAugment",
    "LevelPlane",
    "LocalGeometry",
    "MarkBoundary",
    "NormalizeColor",
    "OutdoorAugment",
    "PasteObjects",
    "PointClip",
    "PositiveShift",
    "RandomDropout",
    "RandomFlip",
    "RandomJitter",
    "RandomRotate",
    "RandomRotateTargetAngle",
    "RandomScale",
    "RandomShift",
    "ScaleAttribute",
    "ScanAndQueries",
    "ShufflePoints",
    "SphereCrop",
    "Transform",
    "UnitShape",
]
