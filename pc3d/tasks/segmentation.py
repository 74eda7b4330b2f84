"""``SemanticSegmentation``: one class per point."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from pc3d.data.prediction import Prediction
from pc3d.data.transforms import Transform
from pc3d.errors import InputError
from pc3d.losses import FeatureLoss, Loss
from pc3d.metrics import SegmentationMetrics, SegmentationScores, scores_from_confusion
from pc3d.nn.backbone import Backbone
from pc3d.peft import Adaptation
from pc3d.points import Points
from pc3d.tasks.augmentations import TestAugmentation, augmentation_passes
from pc3d.tasks.base import ADAMW, ONECYCLE, ClassTask
from pc3d.tasks.heads import SegmentationHead
from pc3d.tasks.inference import labels_of, original_rows, predict_cloud
from pc3d.tasks.optim import OptimizerConfig, ScheduleConfig
from pc3d.tasks.tables import score_table
from pc3d.tasks.tiles import in_tiles


class SemanticSegmentation(ClassTask):
    """Backbone, head, losses and scores for one class per point; knows no model.

    Training and validation batches are sampled points; validation scores count on the original points (through the
    inverse map, one pass). The test step follows the published protocol (voxel fragments, summed probabilities) on raw
    clouds.

    Args:
        backbone: ``points -> (N, C)`` features.
        class_names: name of class 0, 1, ...
        head: features to logits, default one linear layer.
        criteria: losses, summed (each holds its own ``loss_weight``), default cross-entropy.
        feature_criteria: losses of the backbone's features, added while training; no part of the exported model.
        optimizer: optimizer and its parameter groups.
        schedule: learning rate over the optimizer steps.
        ema_decay: keep a moving average of the weights with this decay per step; it is what is validated, tested and
            exported.
        freeze: regular expressions; parameters whose name matches are not trained, modules frozen whole stay in eval
            mode.
        test_augmentations: lists of transforms, one pass each; or the published ``scannet`` (13), ``s3dis``
            (10), ``turns`` (12) or, for objects, ``scaling`` (10); default the plain cloud.
        fragments_per_pass: fragments in one forward pass of the test step.
        test_crop: cut what has more points into tiles before each pass, outside training, see
            :func:`~pc3d.tasks.tiles.in_tiles`; None never does.
        peft: adapter of the backbone, whose own weights are frozen then; see :mod:`pc3d.peft`.
    """

    monitor = ("val/mIoU", "max")

    def __init__(
        self,
        backbone: Backbone,
        class_names: list[str],
        head: SegmentationHead | None = None,
        criteria: list[Loss] | None = None,
        feature_criteria: list[FeatureLoss] | None = None,
        optimizer: OptimizerConfig = ADAMW,
        schedule: ScheduleConfig = ONECYCLE,
        ema_decay: float | None = None,
        freeze: list[str] | None = None,
        test_augmentations: list[list[Transform]] | TestAugmentation | None = None,
        fragments_per_pass: int = 1,
        test_crop: int | None = None,
        peft: Adaptation | None = None,
    ) -> None:
        if test_crop is not None and test_crop < 1:
            raise InputError(f"model.test_crop is {test_crop}: it must be at least 1 point, or null")
        super().__init__(backbone, class_names, criteria, optimizer, schedule, ema_decay, peft)
        self.head = self._fitting_head(head)
        self.feature_criteria = nn.ModuleList(feature_criteria or [])
        for criterion in feature_criteria or []:
            criterion.build(backbone.out_channels, len(class_names))
        self.augmentations = augmentation_passes(test_augmentations)
        self.fragments_per_pass = fragments_per_pass
        self.test_crop = test_crop
        self.freeze_matching(freeze)

    def forward(self, points: Points) -> Tensor:
        """``(N, K)`` logits of sampled points."""
        return self.head(self.backbone(points), points)

    def probabilities(self, points: Points) -> Tensor:
        """``(N, K)`` float32 class probabilities of sampled points."""
        return self.tiled_logits(points).float().softmax(1)

    def tiled_logits(self, points: Points) -> Tensor:
        """``(N, K)`` logits, tile by tile where ``test_crop`` asks for it."""
        return self(points) if self.test_crop is None else in_tiles(self, points, self.test_crop)

    # Training --------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Points, batch_idx: int) -> Tensor:
        self._reseed(self.current_epoch, batch_idx)
        features = self.backbone(batch)
        logits, target = self.head(features, batch), batch.get("segment")
        loss = self._loss(logits, target, "train", batch)
        for criterion in self.feature_criteria:
            value = criterion(features, target, logits.detach().argmax(1))
            self.log(f"train/loss_{type(criterion).__name__}", value, batch_size=len(batch))
            loss = loss + value
        self.train_metrics.update(logits.detach().argmax(1), batch.get("segment"))
        self.log_rates(len(batch))
        return loss

    def on_train_epoch_end(self) -> None:
        self._finish("train", self.train_metrics)

    # Evaluation ------------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Points, batch_idx: int) -> dict[str, Any]:
        self._reseed(-1, batch_idx)
        logits = self.tiled_logits(batch)
        self._loss(logits, batch.get("segment"), "val", batch)
        original, rows = original_rows(batch)
        prediction = self.classes_of(logits, batch)[rows]
        self.val_metrics.update(prediction, original.get("segment"))
        return {"points": original, "prediction": prediction}

    def classes_of(self, logits: Tensor, points: Points) -> Tensor:
        """``(N,)`` predicted classes of sampled points."""
        return logits.argmax(1)

    def on_validation_epoch_end(self) -> None:
        self._finish("val", self.val_metrics)

    def test_step(self, batch: Sequence[Points], batch_idx: int) -> dict[str, Any]:
        self._reseed(-1, batch_idx)
        (cloud,) = batch
        generator = torch.Generator().manual_seed(batch_idx)
        options: dict[str, Any] = {"fragments_per_pass": self.fragments_per_pass, "generator": generator}
        prediction = labels_of(predict_cloud(self, self.test_pipeline(), cloud, self.augmentations, **options))
        # What ``pipeline.prepare`` removes is not part of the task, as in validation.
        self.test_metrics.update(prediction, cloud.get("segment").where(prediction >= 0, -1))
        return {"points": cloud, "prediction": prediction}

    def on_test_epoch_end(self) -> None:
        self._finish("test", self.test_metrics)

    def _finish(self, stage: str, metrics: SegmentationMetrics) -> None:
        """Log the scores of a stage, keep them for the callbacks, start anew."""
        scores: SegmentationScores = metrics.compute()
        metrics.reset()
        self.scores[stage] = scores
        values = {
            "mIoU": scores.miou,
            "mAcc": scores.macc,
            "allAcc": scores.all_acc,
            "mIoU_present": scores.miou_present,
        }
        if stage != "train":
            values |= {f"IoU/{name}": iou for name, iou in zip(self.class_names, scores.iou.tolist(), strict=True)}
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, sync_dist=True)

    # Reports ---------------------------------------------------------------------------------------------------------

    def predictions(self, outputs: dict[str, Any]) -> Iterator[tuple[Points, Tensor]]:
        batch: Points = outputs["points"]
        for i, (begin, end) in enumerate(itertools.pairwise(batch.offsets.tolist())):
            yield batch[i], outputs["prediction"][begin:end]

    def saved_prediction(self, outputs: dict[str, Any], cloud: Points) -> Prediction:
        return Prediction(outputs["prediction"].cpu())

    def running_score(self, stage: str) -> tuple[str, float] | None:
        metrics = self.stage_metrics(stage)
        # From this process's own counts: computing the metric would synchronise all of them at every batch.
        return ("mIoU", scores_from_confusion(metrics.confusion).miou_present) if metrics.update_called else None

    def score_table(self, stage: str, title: str) -> Table:
        return score_table(self.scores[stage], self.class_names, title)

    def save_picture(self, path: Path, cloud: Points, prediction: Tensor) -> Path:
        from pc3d.viz.figures import save_triptych

        return save_triptych(path, cloud, cloud.get("segment"), prediction, self.palette, self.class_names)
