"""The published augmentation sets, in their published order."""

from __future__ import annotations

from collections.abc import Sequence

from pc3d.data.transforms.base import Compose, Transform
from pc3d.data.transforms.color import ChromaticAutoContrast, ChromaticJitter, ChromaticTranslation
from pc3d.data.transforms.geometric import (
    CenterShift,
    ElasticDistortion,
    RandomFlip,
    RandomJitter,
    RandomRotate,
    RandomScale,
)
from pc3d.data.transforms.sampling import RandomDropout


class IndoorAugment(Compose):
    """Training augmentation of Point Transformer V3 and SparseUNet for ScanNet and S3DIS, up to grid sampling.

    Centre, drop points, rotate about z, tilt about x and y, scale, flip, jitter, bend, change colors.

    Args:
        dropout_p: probability of dropping 20 % of the points (Sonata: 1).
        elastic: bend the cloud (False for Point Transformer V3 on S3DIS).
        color: change colors (False for clouds without).
    """

    def __init__(self, dropout_p: float = 0.2, elastic: bool = True, color: bool = True) -> None:
        transforms: list[Transform] = [
            CenterShift(apply_z=True),
            RandomDropout(ratio=0.2, p=dropout_p),
            RandomRotate((-1, 1), "z", center=(0, 0, 0), p=0.5),
            RandomRotate((-1 / 64, 1 / 64), "x", p=0.5),
            RandomRotate((-1 / 64, 1 / 64), "y", p=0.5),
            RandomScale((0.9, 1.1)),
            RandomFlip(p=0.5),
            RandomJitter(sigma=0.005, clip=0.02),
        ]
        if elastic:
            transforms.append(ElasticDistortion(((0.2, 0.4), (0.8, 1.6))))
        if color:
            transforms += [
                ChromaticAutoContrast(p=0.2),
                ChromaticTranslation(p=0.95, ratio=0.05),
                ChromaticJitter(p=0.95, std=0.05),
            ]
        super().__init__(transforms)


class OutdoorAugment(Compose):
    """Training augmentation of Point Transformer V3 and SparseUNet for nuScenes, SemanticKITTI and Waymo.

    Rotate about z through the sensor, scale, flip, jitter.

    Args:
        scale: lowest and highest scale factor.
    """

    def __init__(self, scale: Sequence[float] = (0.9, 1.1)) -> None:
        super().__init__(
            [
                RandomRotate((-1, 1), "z", center=(0, 0, 0), p=0.5),
                RandomScale(scale),
                RandomFlip(p=0.5),
                RandomJitter(sigma=0.005, clip=0.02),
            ]
        )
