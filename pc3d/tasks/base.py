"""``PointTask``: what all tasks share, from set-up to checkpoints."""

from __future__ import annotations

import os
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from rich.table import Table
from torch import Tensor, nn

from pc3d.config import Configurable
from pc3d.data.module import PointDataModule
from pc3d.data.pipeline import Pipeline
from pc3d.data.prediction import Prediction
from pc3d.errors import InputError
from pc3d.losses import CrossEntropy, Loss, WeightedLoss
from pc3d.metrics import SegmentationMetrics
from pc3d.nn.backbone import Backbone, PointNetwork
from pc3d.peft import Adaptation, attach, attached, prepare
from pc3d.points import Points
from pc3d.tasks.checkpoint import CARD, check_card, check_weights, data_entries, make_card
from pc3d.tasks.heads import LinearHead, SegmentationHead
from pc3d.tasks.optim import OptimizerConfig, ScheduleConfig, build_optimizer, build_schedule, freeze_parameters

ADAMW = OptimizerConfig()
ONECYCLE = ScheduleConfig()

_MOST_OF_FIRST_STATISTICS = 0.05  # that batch norms may keep when a training ends


class PointTask(pl.LightningModule, Configurable):
    """A backbone with everything around it that does not depend on what it is trained for; knows no model.

    A subclass calls :meth:`freeze_matching` at the end of its ``__init__``, and has steps, scores and reports.

    Args:
        backbone: ``points -> features``.
        class_names: name of class 0, 1, ...
        optimizer: optimizer and its parameter groups.
        schedule: learning rate over the optimizer steps.
        ema_decay: keep a moving average of the weights with this decay per step; it is what is validated, tested and
            exported.
        peft: adapter of the backbone, whose own weights are frozen then; see :mod:`pc3d.peft`.
    """

    monitor: ClassVar[tuple[str, str]]
    """Figure that chooses the best checkpoint, and ``max`` or ``min``."""

    def __init__(
        self,
        backbone: PointNetwork,
        class_names: list[str],
        optimizer: OptimizerConfig = ADAMW,
        schedule: ScheduleConfig = ONECYCLE,
        ema_decay: float | None = None,
        peft: Adaptation | None = None,
    ) -> None:
        super().__init__()
        for training_only in ("optimizer", "schedule"):  # a task's config describes a model; the card has these apart
            self._init_args.pop(training_only, None)
        if not class_names:
            raise InputError("model.class_names is empty: name at least one class")
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise InputError(f"model.ema_decay is {ema_decay}: it must lie between 0 and 1")
        self.backbone = backbone
        if peft is not None:
            assert isinstance(backbone, Backbone)  # tasks of maps have no adapters
            attach(backbone, peft)
        self.class_names = list(class_names)
        self.optimizer_config = optimizer
        self.schedule_config = schedule
        self.ema_decay = ema_decay
        self.frozen: list[nn.Module] = []
        self.scores: dict[str, Any] = {}
        self.seed: int | None = None
        # What a checkpoint tells about its data; taken from the data module or from the checkpoint.
        self.pipeline: Pipeline | None = None
        self.palette: list[tuple[int, int, int]] | None = None
        self.label_map: dict[int, int] | None = None

    # Reports ---------------------------------------------------------------------------------------------------------

    @abstractmethod
    def score_table(self, stage: str, title: str) -> Table:
        """The scores of a stage, to be printed."""

    @abstractmethod
    def save_picture(self, path: Path, cloud: Points, prediction: Any) -> Path:
        """Draw one cloud of a step's ``points`` with its entry of ``prediction``."""

    def predictions(self, outputs: dict[str, Any]) -> Iterator[tuple[Points, Any]]:
        """Each cloud of a step's outputs (``points`` and ``prediction``, one entry per cloud), with its own entry."""
        yield from zip(outputs["points"], outputs["prediction"], strict=True)

    def confusion(self, stage: str) -> Tensor | None:
        """``(K, K)`` counts of a stage, rows truth; None if the task has no classes to confuse."""
        return None

    def running_score(self, stage: str) -> tuple[str, float] | None:
        """Name and value of a score of the epoch so far, of this process; None before the first batch."""
        return None

    def saved_prediction(self, outputs: dict[str, Any], cloud: Points) -> Prediction:
        """What a test step made of a raw cloud, on its points.

        Raises:
            InputError: if the task predicts something else.
        """
        raise InputError(f"{type(self).__name__} predicts no classes of points that could be saved")

    # Set-up ----------------------------------------------------------------------------------------------------------

    def freeze_matching(self, patterns: Sequence[str] | None) -> None:
        """Do not train the parameters whose names match; modules frozen whole stay in eval mode."""
        self.frozen = freeze_parameters(self, patterns or [])

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

    def initial_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of another task's checkpoint under the names of this one."""
        return dict(state)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise InputError("the schedule needs the length of the run: set trainer.max_epochs or trainer.max_steps")
        optimizer = build_optimizer(self.optimizer_config, self.named_parameters())
        schedule = build_schedule(self.schedule_config, optimizer, int(steps), self.trainer.max_epochs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_callbacks(self) -> list[pl.Callback]:
        if self.ema_decay is None or self.trainer.state.fn != "fit":
            return []
        from pc3d.tasks.ema import EmaWeights

        return [EmaWeights(self.ema_decay)]

    def train(self, mode: bool = True) -> PointTask:
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def test_pipeline(self) -> Pipeline:
        """The pipeline for raw clouds.

        Raises:
            InputError: if neither data module nor checkpoint brought one.
        """
        if self.pipeline is None:
            raise InputError("testing needs the data's pipeline: use a PointDataModule or a checkpoint with a card")
        return self.pipeline

    # Training --------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        self.train()  # the trainer leaves modes as it finds them: those of a loaded or partly frozen task are not right
        if self.is_new_fit():
            prepare(self.backbone, self._training_clouds)
            if not getattr(self.trainer, "fast_dev_run", False):
                self._warn_of_slow_norms()

    def _warn_of_slow_norms(self) -> None:
        """Say so if batch norms will be judged by statistics that are still those of their first weights."""
        steps = self.trainer.estimated_stepping_batches * self.trainer.accumulate_grad_batches
        for name, module in self.named_modules():
            if not isinstance(module, nn.modules.batchnorm._BatchNorm) or not module.training or not module.momentum:
                continue
            seen = steps + int(module.num_batches_tracked or 0)
            left = (1 - module.momentum) ** seen
            if left > _MOST_OF_FIRST_STATISTICS:
                warnings.warn(
                    f"after {seen:.0f} steps {left:.0%} of the running statistics of {name} (momentum "
                    f"{module.momentum:g}) will be what they began with, and scores too low: train longer, or raise "
                    "bn_momentum where the backbone has it",
                    stacklevel=2,
                )
                return

    def _training_clouds(self, count: int) -> Iterator[Points]:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, PointDataModule):
            raise InputError("model.peft looks at training clouds first: train with a PointDataModule")
        return data.some_training_clouds(count)

    def is_new_fit(self) -> bool:
        """Whether a training begins, and none is resumed (its step count is restored later than its weights)."""
        return self.trainer.ckpt_path is None and self.global_step == 0

    def log_rates(self, batch_size: int) -> None:
        """Log the learning rate of every parameter group."""
        for group in self.trainer.optimizers[0].param_groups:
            name = "lr" if group["name"] == "rest" else f"lr/{group['name']}"
            self.log(name, group["lr"], batch_size=batch_size)

    def log_losses(self, losses: dict[str, Tensor], stage: str, batch_size: int) -> Tensor:
        """Their sum; logs it and, where there are several, each of them."""
        loss = torch.stack(list(losses.values())).sum()
        self.log(f"{stage}/loss", loss, prog_bar=stage == "train", batch_size=batch_size, sync_dist=stage != "train")
        if len(losses) > 1:
            values = {f"{stage}/loss_{name}": value for name, value in losses.items()}
            self.log_dict(values, batch_size=batch_size, sync_dist=stage != "train")
        return loss

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


class ClassTask(PointTask):
    """A task whose result is a class, of a point or of a cloud: losses of logits, and scores from a confusion matrix.

    Args:
        criteria: losses, summed (each holds its own ``loss_weight``), default cross-entropy.
        backbone, class_names, optimizer, schedule, ema_decay, peft: see :class:`PointTask`.
    """

    metrics_class: ClassVar[type[SegmentationMetrics]] = SegmentationMetrics

    def __init__(
        self,
        backbone: Backbone,
        class_names: list[str],
        criteria: list[Loss] | None = None,
        optimizer: OptimizerConfig = ADAMW,
        schedule: ScheduleConfig = ONECYCLE,
        ema_decay: float | None = None,
        peft: Adaptation | None = None,
    ) -> None:
        super().__init__(backbone, class_names, optimizer, schedule, ema_decay, peft)
        self.criteria = nn.ModuleList(criteria or [CrossEntropy()])
        self.train_metrics = self.metrics_class(len(class_names))
        self.val_metrics = self.metrics_class(len(class_names))
        self.test_metrics = self.metrics_class(len(class_names))

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        for criterion in self.criteria:
            if stage in ("fit", "validate") and isinstance(criterion, WeightedLoss) and criterion.weighting:
                if data is None:
                    raise InputError("class weights made of the training clouds need a PointDataModule")
                criterion.weight = criterion.weighting.weights(data.class_counts(criterion.weighting.unit))

    def _fitting_head(self, head: SegmentationHead | None) -> SegmentationHead:
        """The head that is asked for, or one linear layer.

        Raises:
            InputError: if it takes other features than the backbone gives, or has other classes.
        """
        backbone, classes = type(self.backbone).__name__, len(self.class_names)
        channels = self.backbone.out_channels
        if head is None:
            return LinearHead(channels, classes)
        if head.in_channels not in (None, channels):
            adapter = " with its adapter" if attached(self.backbone) else ""
            raise InputError(f"model.head.in_channels: {head.in_channels}, but {backbone}{adapter} gives {channels}")
        if head.num_classes not in (None, classes):
            raise InputError(f"model.head.num_classes: {head.num_classes}, but there are {classes} classes")
        return head

    def _loss(self, logits: Tensor, target: Tensor, stage: str, points: Points) -> Tensor:
        """Sum of the criteria, logged."""
        values = {}
        for i, criterion in enumerate(self.criteria):
            assert isinstance(criterion, Loss)
            values[f"{i}_{type(criterion).__name__}"] = criterion.of_clouds(logits, target, points.offsets)
        return self.log_losses(values, stage, len(points))

    def confusion(self, stage: str) -> Tensor | None:
        return self.scores[stage].confusion

    def stage_metrics(self, stage: str) -> SegmentationMetrics:
        return {"train": self.train_metrics, "val": self.val_metrics, "test": self.test_metrics}[stage]
