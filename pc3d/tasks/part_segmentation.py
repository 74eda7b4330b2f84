"""``PartSegmentation``: one part per point, of a shape whose category is known."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from pc3d.data.transforms import Transform
from pc3d.errors import InputError
from pc3d.losses import FeatureLoss, Loss
from pc3d.metrics import SegmentationMetrics, ShapePartIoU, ShapePartScores
from pc3d.nn.backbone import Backbone
from pc3d.peft import Adaptation
from pc3d.points import Points
from pc3d.tasks.augmentations import TestAugmentation
from pc3d.tasks.base import ADAMW, ONECYCLE
from pc3d.tasks.heads import SegmentationHead
from pc3d.tasks.optim import OptimizerConfig, ScheduleConfig
from pc3d.tasks.segmentation import SemanticSegmentation
from pc3d.tasks.tables import value_table


class PartSegmentation(SemanticSegmentation):
    """A semantic task over the parts of all categories, which predicts only parts of the shape's own ``category``.

    Clouds carry their category as ``category`` (N,) int64 on every point. Scores are the instance mIoU (mean over
    shapes) and the class mIoU (mean over categories) of ShapeNetPart, on the original points, beside those of
    :class:`~pc3d.tasks.SemanticSegmentation`; ``test_augmentations: scaling`` votes.

    Args:
        categories: name of each category -> its parts; with a data set that has categories they come from it.
        backbone, class_names, head, criteria, feature_criteria, optimizer, schedule, ema_decay, freeze,
            test_augmentations, peft: see :class:`~pc3d.tasks.SemanticSegmentation`; classes are parts.
    """

    monitor = ("val/instance_mIoU", "max")

    def __init__(
        self,
        backbone: Backbone,
        class_names: list[str],
        categories: dict[str, list[int]],
        head: SegmentationHead | None = None,
        criteria: list[Loss] | None = None,
        feature_criteria: list[FeatureLoss] | None = None,
        optimizer: OptimizerConfig = ADAMW,
        schedule: ScheduleConfig = ONECYCLE,
        ema_decay: float | None = None,
        freeze: list[str] | None = None,
        test_augmentations: list[list[Transform]] | TestAugmentation | None = None,
        peft: Adaptation | None = None,
    ) -> None:
        parts = [part for own in categories.values() for part in own]
        if not all(categories.values()) or not parts or not set(parts) <= set(range(len(class_names))):
            raise InputError(f"model.categories: every category needs parts of 0..{len(class_names) - 1}: {categories}")
        super().__init__(
            backbone,
            class_names,
            head,
            criteria,
            feature_criteria,
            optimizer,
            schedule,
            ema_decay,
            freeze,
            test_augmentations,
            peft=peft,
        )
        self.categories = {name: list(own) for name, own in categories.items()}
        allowed = torch.zeros(len(categories), len(class_names), dtype=torch.bool)
        for row, own in zip(allowed, categories.values(), strict=True):
            row[own] = True
        self.register_buffer("allowed", allowed, persistent=False)
        self.val_shapes = ShapePartIoU(list(categories.values()))
        self.test_shapes = ShapePartIoU(list(categories.values()))

    def probabilities(self, points: Points) -> Tensor:
        return self._masked(self(points).float(), points).softmax(1)

    def classes_of(self, logits: Tensor, points: Points) -> Tensor:
        return self._masked(logits, points).argmax(1)

    def _masked(self, logits: Tensor, points: Points) -> Tensor:
        allowed: Any = self.allowed
        return logits.masked_fill(~allowed[self._category(points)], -torch.inf)

    def _category(self, points: Points) -> Tensor:
        """``(N,)`` int64."""
        category = points.get("category").reshape(-1).long()
        if (
            category.device.type == "cpu"
            and len(category)
            and not 0 <= category.amin() <= category.amax() < len(self.categories)
        ):
            raise InputError(
                f"{points.describe()}: field 'category' holds {category.amin()}..{category.amax()}, there are "
                f"{len(self.categories)} categories"
            )
        return category

    def validation_step(self, batch: Points, batch_idx: int) -> dict[str, Any]:
        outputs = super().validation_step(batch, batch_idx)
        self._count(self.val_shapes, outputs)
        return outputs

    def test_step(self, batch: Sequence[Points], batch_idx: int) -> dict[str, Any]:
        outputs = super().test_step(batch, batch_idx)
        self._count(self.test_shapes, outputs)
        return outputs

    def _count(self, metric: ShapePartIoU, outputs: dict[str, Any]) -> None:
        points: Points = outputs["points"]
        truth, category = points.get("segment"), self._category(points)
        for begin, end in itertools.pairwise(points.offsets.tolist()):
            if end > begin:
                prediction = outputs["prediction"][begin:end]
                metric.update(prediction, truth[begin:end].to(prediction.device), int(category[begin]))

    def _finish(self, stage: str, metrics: SegmentationMetrics) -> None:
        super()._finish(stage, metrics)
        if stage == "train":
            return
        metric = self.val_shapes if stage == "val" else self.test_shapes
        scores: ShapePartScores = metric.compute()
        metric.reset()
        self.scores[f"{stage}/shapes"] = scores
        values = {"instance_mIoU": scores.instance_miou, "class_mIoU": scores.class_miou}
        named = zip(self.categories, scores.category_iou.tolist(), scores.shapes.tolist(), strict=True)
        values |= {f"category_mIoU/{name}": iou for name, iou, shapes in named if shapes}
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, sync_dist=True)

    def score_table(self, stage: str, title: str) -> Table:
        scores: ShapePartScores = self.scores[f"{stage}/shapes"]
        title = f"{title}: instance mIoU {scores.instance_miou:.3f}"
        columns, means = {"mIoU": scores.category_iou}, {"mIoU": scores.class_miou}
        return value_table(title, list(self.categories), scores.shapes, columns, means)
