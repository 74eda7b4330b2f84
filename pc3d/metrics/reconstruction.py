"""Scores of reconstructed surfaces, as Occupancy Networks define them (Mescheder et al. 2019, arXiv 1812.03828)."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from pc3d.ops.mesh import Mesh, contains
from pc3d.ops.neighbours import knn

_ROOM_MARGIN = 0.007  # published, in units of the box


@dataclass
class SurfaceScores:
    """Scores of one surface, or their means; distances in units of the box that shapes are fitted to, NaN: not scored.

    Attributes:
        accuracy: mean distance from made points to the nearest true one; ``completeness`` the other way round.
        chamfer_l1: mean of both; ``chamfer_l2`` with squared distances.
        normal_consistency: mean absolute cosine between the normals of such pairs, over both directions.
        f_score: harmonic mean of the shares of made and of true points that are nearer than 1 %; ``f_score_15``,
            ``f_score_20`` 1.5 and 2 %.
        iou: of the insides, on points in space.
    """

    accuracy: float = math.nan
    completeness: float = math.nan
    chamfer_l1: float = math.nan
    chamfer_l2: float = math.nan
    normal_consistency: float = math.nan
    f_score: float = math.nan
    f_score_15: float = math.nan
    f_score_20: float = math.nan
    iou: float = math.nan


EMPTY = SurfaceScores(3**0.5, 3**0.5, 3**0.5, 3.0, -1.0, 0.0, 0.0, 0.0, 0.0)
"""What a surface without points scores, as published."""


def point_scores(made: Tensor, made_normal: Tensor, true: Tensor, true_normal: Tensor) -> SurfaceScores:
    """Scores of points on a surface ``(N, 3)`` against points on the true one ``(M, 3)``, with normals; no IoU.

    The nearest points are found in float32, distances computed in float64. Normals of any length, on either side.
    """
    if not len(made) or not len(true):
        return EMPTY
    made_normal, true_normal = (F.normalize(normal.double(), dim=1) for normal in (made_normal, true_normal))
    accuracy, made_cosine = _one_way(made, made_normal, true, true_normal)
    completeness, true_cosine = _one_way(true, true_normal, made, made_normal)
    f_scores = [_f_score(accuracy, completeness, threshold) for threshold in (0.01, 0.015, 0.02)]
    return SurfaceScores(
        float(accuracy.mean()),
        float(completeness.mean()),
        float(accuracy.mean() + completeness.mean()) / 2,
        float(accuracy.square().mean() + completeness.square().mean()) / 2,
        float(made_cosine + true_cosine) / 2,
        *f_scores,
    )


def _one_way(points: Tensor, normal: Tensor, others: Tensor, other_normal: Tensor) -> tuple[Tensor, Tensor]:
    """``(N,)`` distances to the nearest of the others, and the mean absolute cosine."""
    borders = [torch.tensor([0, len(side)], device=side.device) for side in (points, others)]
    row = knn(points.float(), borders[0], others.float(), borders[1], 1)[0][:, 0]
    return (points.double() - others[row].double()).norm(dim=1), (normal * other_normal[row]).sum(1).abs().mean()


def _f_score(accuracy: Tensor, completeness: Tensor, threshold: float) -> float:
    precision, recall = (float((side <= threshold).double().mean()) for side in (accuracy, completeness))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def mesh_scores(
    mesh: Mesh,
    true: Tensor,
    true_normal: Tensor,
    space: Tensor,
    occupancy: Tensor,
    count: int = 100_000,
    room: bool = False,
    generator: torch.Generator | None = None,
) -> SurfaceScores:
    """Scores of a mesh.

    Args:
        mesh: in the frame of the points.
        true, true_normal: ``(M, 3)`` points of the true surface, and their normals.
        space, occupancy: ``(Q, 3)`` points of space, and ``(Q,)`` whether they are inside.
        count: points sampled on the mesh.
        room: leave out what is beyond the true points' box (0.007 wider) along x and z or below it along y: the outer
            sides of walls and floor, which no scan shows. As published; y is up.
    """
    if not len(mesh.faces):
        return EMPTY
    points, normals = mesh.sample(2 * count if room else count, generator)
    if room:
        low, high = true.amin(0) - _ROOM_MARGIN, true.amax(0) + _ROOM_MARGIN
        high[1] = math.inf
        rows = ((points >= low) & (points <= high)).all(1).nonzero()[:, 0]
        if len(rows):  # as many as without: drawn with repeats
            rows = rows[torch.randint(len(rows), (count,), generator=generator)]
        points, normals = points[rows], normals[rows]
    scores = point_scores(points, normals, true, true_normal)
    return replace(scores, iou=occupancy_iou(contains(mesh, space), occupancy))


def occupancy_iou(predicted: Tensor, occupancy: Tensor) -> float:
    """Intersection over union of two ``(Q,)`` sets of points; 1 if both are empty."""
    predicted, occupancy = predicted.bool(), occupancy.bool()
    union = int((predicted | occupancy).sum())
    return int((predicted & occupancy).sum()) / union if union else 1.0


class ReconstructionMetrics(Metric):
    """Means of :class:`SurfaceScores` over clouds, and over the clouds of each class.

    Args:
        num_classes: K.
    """

    full_state_update = False
    total: Tensor
    clouds: Tensor
    names: ClassVar[list[str]] = [field.name for field in fields(SurfaceScores)]

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        zeros = torch.zeros(num_classes, len(self.names), dtype=torch.float64)
        self.add_state("total", zeros, dist_reduce_fx="sum")
        self.add_state("clouds", torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores: SurfaceScores, label: int) -> None:
        """Count one surface of class ``label``."""
        self.total[label] += self.total.new_tensor([getattr(scores, name) for name in self.names])
        self.clouds[label] += 1

    def compute(self) -> tuple[SurfaceScores, dict[str, Tensor], Tensor]:
        """Means over all clouds; ``(K,)`` means of each class by name, NaN without clouds; ``(K,)`` their clouds."""
        total, clouds = self.total.cpu(), self.clouds.cpu()
        classes = (total / clouds[:, None]).T
        mean = SurfaceScores(*(total.sum(0) / clouds.sum()).tolist())
        return mean, dict(zip(self.names, classes, strict=True)), clouds
