"""Test-time augmentation as published: one list of transforms per pass over a cloud."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from pc3d.data.transforms import RandomFlip, RandomRotateTargetAngle, RandomScale, Transform

TestAugmentation = Literal["scannet", "s3dis", "turns", "scaling"]


def scannet_augmentations() -> list[list[Transform]]:
    """Thirteen passes: four quarter turns about z, each at scale 1, 0.95 and 1.05, and one flip of both axes.

    Source: Pointcept, PTv3 and SparseUNet test configuration on ScanNet.
    """
    return [*turns_augmentations(), _flip()]


def turns_augmentations() -> list[list[Transform]]:
    """Twelve passes: four quarter turns about z, each at scale 1, 0.95 and 1.05.

    Source: Point Transformer V2 and ConDaFormer test configuration on S3DIS.
    """
    return [[*_turn(quarter), *_scale(scale)] for scale in (1.0, 0.95, 1.05) for quarter in range(4)]


def s3dis_augmentations() -> list[list[Transform]]:
    """Ten passes: scales 0.9, 0.95, 1, 1.05 and 1.1, each with and without a flip of both axes.

    Source: Pointcept, PTv3 and SparseUNet test configuration on S3DIS and nuScenes.
    """
    return [[*_scale(scale), *flip] for flip in ([], _flip()) for scale in (0.9, 0.95, 1.0, 1.05, 1.1)]


def scaling_augmentations() -> list[list[Transform]]:
    """Ten passes, each scaled along every axis by a random factor of 0.8 to 1.2: the voting of object benchmarks.

    Source: Point Cloud Mamba and PointMLP, ShapeNetPart testing.
    """
    return [[RandomScale([0.8, 1.2], anisotropic=True)] for _ in range(10)]


def _turn(quarter: int) -> list[Transform]:
    return [RandomRotateTargetAngle(angle=[quarter / 2], axis="z", center=[0.0, 0.0, 0.0], p=1.0)] if quarter else []


def _scale(factor: float) -> list[Transform]:
    return [RandomScale([factor, factor])] if factor != 1 else []


def _flip() -> list[Transform]:
    return [RandomFlip(p=1.0)]


_PRESETS: dict[str, Callable[[], list[list[Transform]]]] = {
    "scannet": scannet_augmentations,
    "s3dis": s3dis_augmentations,
    "turns": turns_augmentations,
    "scaling": scaling_augmentations,
}


def augmentation_passes(choice: Sequence[Sequence[Transform]] | TestAugmentation | None) -> list[list[Transform]]:
    """The passes that a choice stands for; None is one pass over the plain cloud."""
    if choice is None:
        return [[]]
    if isinstance(choice, str):
        return _PRESETS[choice]()
    return [list(transforms) for transforms in choice]
