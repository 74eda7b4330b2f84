"""``Pretraining``: a backbone learns from clouds without labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from rich.table import Table
from torch import Tensor, nn

from pc3d.config import Configurable
from pc3d.errors import InputError
from pc3d.nn.backbone import Backbone
from pc3d.points import Points
from pc3d.tasks.base import ADAMW, ONECYCLE, PointTask
from pc3d.tasks.optim import OptimizerConfig, ScheduleConfig


@dataclass
class PretrainingOutput:
    """What a method makes of a batch.

    Attributes:
        losses: scalars, whose sum is minimised.
        panels: title -> ``(B, n, 3)`` points to be drawn beside each other.
    """

    losses: dict[str, Tensor]
    panels: dict[str, Tensor] = field(default_factory=dict)


Network = TypeVar("Network", bound=Backbone)


class PretrainingMethod(nn.Module, Configurable, ABC, Generic[Network]):
    """What is asked of the backbone: masks, decoders, momentum encoders and losses, nothing that is kept afterwards.

    A task calls :meth:`build` once, before anything else.
    """

    backbone_class: ClassVar[type[Backbone]] = Backbone  # type: ignore[type-abstract]

    def build(self, backbone: Network) -> None:
        """Check that the backbone fits, and make the layers that depend on it.

        Raises:
            InputError: if it does not.
        """

    @abstractmethod
    def forward(self, backbone: Network, points: Points, step: int = 0) -> PretrainingOutput:
        """Losses of a batch of sampled clouds; random draws from torch's global generator.

        Args:
            step: optimizer steps done, for what changes in the course of a training.
        """

    def start(self, backbone: Network) -> None:
        """Called once before the first step of a new training, after initial weights have been loaded."""

    def features(self, backbone: Network, points: Points) -> Tensor:
        """``(B, F)`` features of whole clouds that a linear probe looks at."""
        return backbone.latent(points)[0]

    def initial_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of another task's checkpoint under the names of this one (``backbone.``, ``method.``)."""
        return dict(state)


class Panels(dict[str, Tensor | Points]):
    """Point sets of one cloud by their titles."""

    def cpu(self) -> Panels:
        return Panels({title: points.cpu() for title, points in self.items()})


class Pretraining(PointTask):
    """Backbone and the method it is trained by. Fine-tuning loads the backbone from the checkpoint (``--init_from``).

    Args:
        backbone: what is trained, and kept.
        class_names: of the data; nothing looks at the labels.
        method: makes a task of clouds without labels.
        optimizer, schedule, ema_decay, freeze: see :class:`~pc3d.tasks.SemanticSegmentation`.
    """

    monitor = ("val/loss", "min")
    backbone: Backbone

    def __init__(
        self,
        backbone: Backbone,
        class_names: list[str],
        method: PretrainingMethod,
        optimizer: OptimizerConfig = ADAMW,
        schedule: ScheduleConfig = ONECYCLE,
        ema_decay: float | None = None,
        freeze: list[str] | None = None,
    ) -> None:
        super().__init__(backbone, class_names, optimizer, schedule, ema_decay)
        if not isinstance(backbone, method.backbone_class):
            raise InputError(
                f"model.method: {type(method).__name__} trains a {method.backbone_class.__name__}, "
                f"{type(backbone).__name__} is none"
            )
        self.method = method
        method.build(backbone)
        self.freeze_matching(freeze)

    def forward(self, points: Points) -> Tensor:
        """``(B, F)`` features of sampled clouds, for a linear probe."""
        return self.method.features(self.backbone, points)

    def initial_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.method.initial_state(state)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.is_new_fit():
            self.method.start(self.backbone)

    def training_step(self, batch: Points, batch_idx: int) -> Tensor:
        self._reseed(self.current_epoch, batch_idx)
        self.log_rates(len(batch))
        return self.log_losses(self.method(self.backbone, batch, self.global_step).losses, "train", len(batch))

    def validation_step(self, batch: Points, batch_idx: int) -> dict[str, Any]:
        return self._evaluate(batch, "val", batch_idx)

    def test_step(self, batch: Sequence[Points], batch_idx: int) -> dict[str, Any]:
        (cloud,) = batch
        generator = torch.Generator().manual_seed(batch_idx)
        sampled = self.test_pipeline().evaluate(cloud, generator=generator)
        return self._evaluate(sampled.to(self.device), "test", batch_idx)

    def _evaluate(self, batch: Points, stage: str, batch_idx: int) -> dict[str, Any]:
        """Losses with the same draws in every epoch."""
        self._reseed(-1, batch_idx)
        batch = batch.replace(source=None)
        output: PretrainingOutput = self.method(self.backbone, batch, self.global_step)
        self.log_losses(output.losses, stage, len(batch))
        return {"points": batch, "prediction": output.panels}

    # Reports ---------------------------------------------------------------------------------------------------------

    def predictions(self, outputs: dict[str, Any]) -> Iterator[tuple[Points, Panels]]:
        for i, cloud in enumerate(outputs["points"]):
            yield cloud, Panels({title: points[i] for title, points in outputs["prediction"].items()})

    def score_table(self, stage: str, title: str) -> Table:
        table = Table("loss", "value", title=title, title_justify="left")
        for name, value in self.trainer.callback_metrics.items():
            if name.startswith(f"{stage}/"):
                table.add_row(name.removeprefix(f"{stage}/"), f"{float(value):.4g}")
        return table

    def save_picture(self, path: Path, cloud: Points, prediction: Panels) -> Path:
        from pc3d.viz.figures import save_point_sets

        return save_point_sets(path, prediction or {"input": cloud.coord}, cloud.describe())
