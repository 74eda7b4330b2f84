"""``SemanticSegmentation``: one class per point."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from pc3d.config import Configurable
from pc3d.data.pipeline import Pipeline
from pc3d.data.transforms import Transform
from pc3d.errors import InputError
from pc3d.losses import CrossEntropy, FeatureLoss, Loss
from pc3d.metrics import SegmentationMetrics, SegmentationScores
from pc3d.nn.backbone import Backbone
from pc3d.points import Points
from pc3d.tasks.augmentations import TestAugmentation, augmentation_passes
from pc3d.tasks.checkpoint import CARD, check_card, check_weights, data_entries, make_card
from pc3d.tasks.heads import LinearHead, SegmentationHead
from pc3d.tasks.inference import labels_of, original_rows, predict_cloud
from pc3d.tasks.optim import OptimizerConfig, ScheduleConfig, build_optimizer, build_schedule, freeze_parameters

_ADAMW = OptimizerConfig()
_ONECYCLE = ScheduleConfig()


class SemanticSegmentation(pl.LightningModule, Configurable):
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
        test_augmentations: lists of transforms, one pass each; or the published ``scannet`` (13) or ``s3dis`` (10);
            default the plain cloud.
        fragments_per_pass: fragments in one forward pass of the test step.
    """

    def __init__(
        self,
        backbone: Backbone,
        class_names: list[str],
        head: SegmentationHead | None = None,
        criteria: list[Loss] | None = None,
        feature_criteria: list[FeatureLoss] | None = None,
        optimizer: OptimizerConfig = _ADAMW,
        schedule: ScheduleConfig = _ONECYCLE,
        ema_decay: float | None = None,
        freeze: list[str] | None = None,
        test_augmentations: list[list[Transform]] | TestAugmentation | None = None,
        fragments_per_pass: int = 1,
    ) -> None:
        super().__init__()
        for training_only in (
            "optimizer",
            "schedule",
        ):  # the config of a task describes a model; the card keeps these apart
            self._init_args.pop(training_only, None)
        if not class_names:
            raise InputError("model.class_names is empty: name at least one class")
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise InputError(f"model.ema_decay is {ema_decay}: it must lie between 0 and 1")
        self.backbone = backbone
        self.class_names = list(class_names)
        self.head = LinearHead(backbone.out_channels, len(class_names)) if head is None else head
        self.criteria = nn.ModuleList(criteria or [CrossEntropy()])
        self.feature_criteria = nn.ModuleList(feature_criteria or [])
        for criterion in feature_criteria or []:
            criterion.build(backbone.out_channels, len(class_names))
        self.train_metrics = SegmentationMetrics(len(class_names))
        self.val_metrics = SegmentationMetrics(len(class_names))
        self.test_metrics = SegmentationMetrics(len(class_names))
        self.optimizer_config = optimizer
        self.schedule_config = schedule
        self.ema_decay = ema_decay
        self.augmentations = augmentation_passes(test_augmentations)
        self.fragments_per_pass = fragments_per_pass
        self.frozen = freeze_parameters(self, freeze or [])
        self.scores: dict[str, SegmentationScores] = {}
        self.seed: int | None = None
        # What a checkpoint tells about its data; taken from the data module or from the checkpoint.
        self.pipeline: Pipeline | None = None
        self.palette: list[tuple[int, int, int]] | None = None
        self.label_map: dict[int, int] | None = None

    def forward(self, points: Points) -> Tensor:
        """``(N, K)`` logits of sampled points."""
        return self.head(self.backbone(points), points)

    # Set-up ----------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            self.pipeline, self.palette, self.label_map = data.pipeline, data.dataset.palette, data.dataset.label_map
            if list(data.class_names) != self.class_names:
                raise InputError(f"model.class_names {self.class_names} are not those of the data: {data.class_names}")
            if data.in_channels != self.backbone.in_channels:
                raise InputError(
                    f"model.backbone takes {self.backbone.in_channels} channels, "
                    f"data.pipeline.features {data.pipeline.features} make {data.in_channels}"
                )
        if self.seed is None:
            self.seed = int(os.environ.get("PL_GLOBAL_SEED") or torch.initial_seed())
        if stage == "fit":
            make_card(self)  # a model that cannot be described must fail before the training, not after it

    def configure_optimizers(self) -> OptimizerLRScheduler:
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise InputError("the schedule needs the length of the run: set trainer.max_epochs or trainer.max_steps")
        optimizer = build_optimizer(self.optimizer_config, self.named_parameters())
        schedule = build_schedule(self.schedule_config, optimizer, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_callbacks(self) -> list[pl.Callback]:
        if self.ema_decay is None or self.trainer.state.fn != "fit":
            return []
        from pc3d.tasks.ema import EmaWeights

        return [EmaWeights(self.ema_decay)]

    def train(self, mode: bool = True) -> SemanticSegmentation:
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    # Training --------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        self.train()  # the trainer leaves modes as it finds them: those of a loaded or partly frozen task are not right

    def training_step(self, batch: Points, batch_idx: int) -> Tensor:
        self._reseed(self.current_epoch, batch_idx)
        features = self.backbone(batch)
        logits, target = self.head(features, batch), batch.get("segment")
        loss = self._loss(logits, target, "train", len(batch))
        for criterion in self.feature_criteria:
            value = criterion(features, target, logits.detach().argmax(1))
            self.log(f"train/loss_{type(criterion).__name__}", value, batch_size=len(batch))
            loss = loss + value
        self.train_metrics.update(logits.detach().argmax(1), batch.get("segment"))
        for group in self.trainer.optimizers[0].param_groups:
            name = "lr" if group["name"] == "rest" else f"lr/{group['name']}"
            self.log(name, group["lr"], batch_size=len(batch))
        return loss

    def on_train_epoch_end(self) -> None:
        self._finish("train", self.train_metrics)

    def _loss(self, logits: Tensor, target: Tensor, stage: str, batch_size: int) -> Tensor:
        """Sum of the criteria; logs it and, where there are several, each of them."""
        losses = [criterion(logits, target) for criterion in self.criteria]
        loss = torch.stack(losses).sum()
        self.log(f"{stage}/loss", loss, prog_bar=stage == "train", batch_size=batch_size, sync_dist=stage != "train")
        if len(losses) > 1:
            names = [f"{stage}/loss_{i}_{type(criterion).__name__}" for i, criterion in enumerate(self.criteria)]
            values = dict(zip(names, losses, strict=True))
            self.log_dict(values, batch_size=batch_size, sync_dist=stage != "train")
        return loss

    # Evaluation ------------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Points, batch_idx: int) -> dict[str, Any]:
        self._reseed(-1, batch_idx)
        logits = self(batch)
        self._loss(logits, batch.get("segment"), "val", len(batch))
        original, rows = original_rows(batch)
        prediction = logits.argmax(1)[rows]
        self.val_metrics.update(prediction, original.get("segment"))
        return {"points": original, "prediction": prediction}

    def on_validation_epoch_end(self) -> None:
        self._finish("val", self.val_metrics)

    def test_step(self, batch: Sequence[Points], batch_idx: int) -> dict[str, Any]:
        self._reseed(-1, batch_idx)
        if self.pipeline is None:
            raise InputError("testing needs the data's pipeline: use a PointDataModule or a checkpoint with a card")
        (cloud,) = batch
        generator = torch.Generator().manual_seed(batch_idx)
        options: dict[str, Any] = {"fragments_per_pass": self.fragments_per_pass, "generator": generator}
        prediction = labels_of(predict_cloud(self, self.pipeline, cloud, self.augmentations, **options))
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

    # Exact restarts and checkpoints ----------------------------------------------------------------------------------

    def _reseed(self, epoch: int, batch_idx: int) -> None:
        """Make every draw of this step (dropout, ...) a function of (seed, epoch, step, rank), also after a resume."""
        key = np.random.SeedSequence([self.seed or 0, epoch + 1, batch_idx, self.global_rank])
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        figures = self.trainer.callback_metrics if self._trainer is not None else {}
        checkpoint[CARD] = make_card(self, {k: v for k, v in figures.items() if k.startswith(("val/", "test/"))})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        path = str(self.trainer.ckpt_path) if self._trainer is not None else "checkpoint"
        if CARD in checkpoint:
            check_card(checkpoint[CARD], path, class_names=self.class_names, **data_entries(self.pipeline))
            self.seed = checkpoint[CARD]["seed"]
        check_weights(checkpoint["state_dict"], self.state_dict(), path)
