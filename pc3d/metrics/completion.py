"""Scores of completed clouds: Chamfer and earth mover's distance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from pc3d.ops.point_sets import chamfer_distance, earth_mover_distance


@dataclass
class CompletionScores:
    """Scores of one evaluation, float64 on the CPU, in the units of the points.

    Attributes:
        chamfer: mean over clouds of :func:`~pc3d.ops.point_sets.chamfer_distance`, not squared.
        chamfer_squared: the same with squared distances.
        emd: mean over clouds of the earth mover's distance; NaN if it was not asked for.
        class_chamfer, class_emd: ``(K,)`` of the clouds of each class, NaN without any.
        clouds: ``(K,)`` int64 clouds of each class.
    """

    chamfer: float
    chamfer_squared: float
    emd: float
    class_chamfer: Tensor
    class_emd: Tensor
    clouds: Tensor


class CompletionMetrics(Metric):
    """Distances between completed and true clouds, averaged over all and over the clouds of each class.

    Args:
        num_classes: K.
        emd_points: points that the earth mover's distance is computed on, evenly spaced rows of each side (exact on
            these; the time grows with the cube); None leaves it out.
    """

    full_state_update = False
    total: Tensor
    clouds: Tensor

    def __init__(self, num_classes: int, emd_points: int | None = None) -> None:
        super().__init__()
        self.emd_points = emd_points
        self.add_state("total", torch.zeros(num_classes, 3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("clouds", torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, made: Tensor, wanted: Tensor, label: int) -> None:
        """Count one cloud of class ``label``: ``(N, 3)`` completed and ``(M, 3)`` true points."""
        first, second = (torch.tensor([0, len(side)], device=side.device) for side in (made, wanted))
        values = [chamfer_distance(made, first, wanted, second, squared).double() for squared in (False, True)]
        emd = torch.full((1,), torch.nan, dtype=torch.float64, device=made.device)
        if self.emd_points is not None:
            count = min(self.emd_points, len(made), len(wanted))
            emd[0] = earth_mover_distance(_spread(made, count), _spread(wanted, count))
        self.total[label] += torch.cat([*values, emd])
        self.clouds[label] += 1

    def compute(self) -> CompletionScores:
        total, clouds = self.total.cpu(), self.clouds.cpu()
        chamfer, squared, emd = (total.sum(0) / clouds.sum()).tolist()
        classes = total / clouds[:, None]
        return CompletionScores(chamfer, squared, emd, classes[:, 0], classes[:, 2], clouds)


def _spread(points: Tensor, count: int) -> Tensor:
    return points[torch.linspace(0, len(points) - 1, count, device=points.device).round().long()]
