"""Part segmentation of shapes: instance and class mIoU of ShapeNetPart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric


@dataclass
class ShapePartScores:
    """Scores of one evaluation, 0..1, float64 on the CPU.

    Attributes:
        instance_miou: mean over shapes of the mean IoU over the parts of the shape's category.
        class_miou: mean over the categories that have shapes of their shapes' mean.
        category_iou: ``(C,)`` mean of each category, NaN without shapes.
        shapes: ``(C,)`` int64 shapes of each category.
    """

    instance_miou: float
    class_miou: float
    category_iou: Tensor
    shapes: Tensor


class ShapePartIoU(Metric):
    """IoU of parts, shape by shape (Yi et al., SIGGRAPH Asia 2016): a part absent in truth and prediction counts 1.

    Args:
        parts: the part classes of each category.
    """

    full_state_update = False
    total: Tensor
    shapes: Tensor

    def __init__(self, parts: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.parts = [list(own) for own in parts]
        self.add_state("total", torch.zeros(len(parts), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("shapes", torch.zeros(len(parts), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, pred: Tensor, target: Tensor, category: int) -> None:
        """Count one shape: ``(N,)`` predicted and true parts; points without truth (-1) do not count."""
        known = target >= 0
        if not bool(known.any()):
            return
        own = torch.tensor(self.parts[category], device=pred.device)[:, None]
        is_pred, is_true = pred[known] == own, target[known] == own
        union = (is_pred | is_true).sum(1).double()
        iou = torch.where(union > 0, (is_pred & is_true).sum(1) / union.clamp(min=1), 1.0)
        self.total[category] += iou.mean()
        self.shapes[category] += 1

    def compute(self) -> ShapePartScores:
        total, shapes = self.total.cpu(), self.shapes.cpu()
        category = total / shapes  # NaN where there are none
        present = shapes > 0
        class_miou = category[present].mean().item() if bool(present.any()) else 0.0
        return ShapePartScores((total.sum() / shapes.sum().clamp(min=1)).item(), class_miou, category, shapes)
