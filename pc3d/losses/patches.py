"""Distances between made and true patches, by the names that the literature gives them."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor
from torch.nn import functional as F

from pc3d.errors import InputError
from pc3d.ops.point_sets import nearest_in_sets

PatchDistance = Literal["cdl2", "cdl1", "cos"]


def patch_distance(made: Tensor, wanted: Tensor, kind: PatchDistance) -> Tensor:
    """Scalar distance of ``(P, S, 3)`` patches, in float32.

    - ``cdl2``: mean squared distance to the nearest point, both ways, summed.
    - ``cdl1``: mean distance to the nearest point, both ways, averaged.
    - ``cos``: negative cosine between flattened patches, which depends on the order of their points.
    """
    made, wanted = made.float(), wanted.float()
    if kind == "cos":
        return -F.cosine_similarity(made.flatten(1), wanted.flatten(1)).mean()
    there, back = nearest_in_sets(made, wanted), nearest_in_sets(wanted, made)
    if kind == "cdl2":
        return there.mean() + back.mean()
    # Bounded below: the root has no derivative at an exact hit.
    there, back = (squared.clamp(min=1e-12).sqrt() for squared in (there, back))
    return (there.mean() + back.mean()) / 2


def check_patch_distance(name: str, kind: str) -> None:
    """Raise an InputError that names the option if there is no such distance."""
    if kind not in get_args(PatchDistance):
        raise InputError(f"{name}: '{kind}' is not one of {', '.join(get_args(PatchDistance))}")
