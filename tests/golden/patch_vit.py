"""What tests of transformers over patches share: clouds, networks and comparison of their golden files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from harness import Golden
from torch import Tensor

from pc3d.models import PointViT
from pc3d.points import Points


def points_of(golden: Golden) -> Points:
    """The batch ``in/pts`` (B, N, 3), with the categories that the file may have."""
    points = packed(golden.tensor("in/pts"))
    if "in/onehot" not in golden.arrays:
        return points
    category = golden.tensor("in/onehot")[:, 0].argmax(1).repeat_interleave(points.counts)
    return points.with_attrs(category=category)


def packed(batch: Tensor) -> Points:
    """``(B, N, 3)`` coordinates as clouds, coordinates as features."""
    coord = batch.contiguous().flatten(0, 1)
    return Points(coord, torch.arange(len(batch) + 1) * batch.shape[1], {"feat": coord})


def point_vit(sizes: Mapping[str, Any], groups: Mapping[str, Any] | None = None, **changes: Any) -> PointViT:
    """The network of a published configuration, and of that of its patches if it is another one, in eval mode."""
    groups = sizes if groups is None else groups
    encoder = sizes.get("encoder_dims", sizes["trans_dim"])
    settings = {
        "channels": sizes["trans_dim"],
        "depth": sizes["depth"],
        "num_heads": sizes["num_heads"],
        "patches": groups["num_group"],
        "patch_points": groups["group_size"],
        "encoder_channels": encoder if encoder != sizes["trans_dim"] else None,
        "stages": (sizes["depth"] - 1,),
        "ignore_origin": True,
    }
    return PointViT(**(settings | changes)).eval()


def close(actual: Tensor, expected: Tensor, slack: float = 0.0) -> None:
    """The tolerance of the golden files of transformers, wider by ``slack``."""
    bound = slack + 1e-5 + 3e-6 * float(expected.abs().max())
    torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=bound)
