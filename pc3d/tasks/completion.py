"""``Completion``: the whole shape from a part of its points."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from pc3d.data.pipeline import Pipeline
from pc3d.data.transforms.geometric import from_unit_frame
from pc3d.errors import InputError
from pc3d.losses import Chamfer, CompletionLoss
from pc3d.metrics import CompletionMetrics, CompletionScores
from pc3d.nn.backbone import Backbone
from pc3d.peft import Adaptation
from pc3d.points import Points
from pc3d.tasks.base import ADAMW, ONECYCLE, PointTask
from pc3d.tasks.heads import CompletionHead
from pc3d.tasks.inference import check_cloud
from pc3d.tasks.optim import OptimizerConfig, ScheduleConfig
from pc3d.tasks.tables import value_table


class Completion(PointTask):
    """Backbone, decoder, losses and scores for the completion of shapes.

    A cloud holds both sides, told apart by ``target`` (N,) int64: 0 is what is there, 1 what is wanted. Transforms and
    samplers treat them together, the model sees the first only. Scores are Chamfer distance (CD, CD_squared) and, in
    the test, earth mover's distance (EMD), in the units of the pipeline's output.

    Args:
        backbone: features of whole clouds.
        class_names: of ``segment``, the class of a cloud: scores are given for each.
        decoder: features to points.
        criteria: losses, summed, default the squared Chamfer distance.
        emd_points: points that the test's earth mover's distance is computed on, see
            :class:`~pc3d.metrics.CompletionMetrics`; None leaves it out.
        optimizer, schedule, ema_decay, freeze, peft: see :class:`~pc3d.tasks.SemanticSegmentation`.
    """

    monitor = ("val/CD", "min")
    backbone: Backbone

    def __init__(
        self,
        backbone: Backbone,
        class_names: list[str],
        decoder: CompletionHead,
        criteria: list[CompletionLoss] | None = None,
        emd_points: int | None = 1024,
        optimizer: OptimizerConfig = ADAMW,
        schedule: ScheduleConfig = ONECYCLE,
        ema_decay: float | None = None,
        freeze: list[str] | None = None,
        peft: Adaptation | None = None,
    ) -> None:
        super().__init__(backbone, class_names, optimizer, schedule, ema_decay, peft)
        if decoder.in_channels != backbone.out_channels:
            raise InputError(
                f"model.decoder.in_channels is {decoder.in_channels}, the backbone gives {backbone.out_channels}"
            )
        self.decoder = decoder
        self.criteria = nn.ModuleList(criteria or [Chamfer()])
        self.val_metrics = CompletionMetrics(len(class_names))
        self.test_metrics = CompletionMetrics(len(class_names), emd_points)
        self.freeze_matching(freeze)

    def forward(self, points: Points) -> Tensor:
        """``(B, M, 3)`` completed points of sampled clouds (without their targets)."""
        return self.decoder(*self.backbone.latent(points))

    def training_step(self, batch: Points, batch_idx: int) -> Tensor:
        self._reseed(self.current_epoch, batch_idx)
        there, wanted = sides(batch)
        self.log_rates(len(batch))
        return self._loss(self(there), wanted, "train")

    def validation_step(self, batch: Points, batch_idx: int) -> dict[str, Any]:
        self._reseed(-1, batch_idx)
        there, wanted = sides(batch)
        made = self(there)
        self._loss(made, wanted, "val")
        self._count(self.val_metrics, made, wanted)
        return {"points": batch.replace(source=None), "prediction": made}

    def test_step(self, batch: Sequence[Points], batch_idx: int) -> dict[str, Any]:
        self._reseed(-1, batch_idx)
        (cloud,) = batch
        generator = torch.Generator().manual_seed(batch_idx)
        sampled = self.test_pipeline().evaluate(cloud, generator=generator).replace(source=None).to(self.device)
        there, wanted = sides(sampled)
        made = self(there)
        self._count(self.test_metrics, made, wanted)
        return {"points": sampled, "prediction": made}

    def _loss(self, made: Tensor, wanted: Points, stage: str) -> Tensor:
        borders = torch.arange(len(made) + 1, device=made.device) * made.shape[1]
        arguments = made.flatten(0, 1), borders, wanted.coord, wanted.offsets
        losses = {f"{i}_{type(loss).__name__}": loss(*arguments) for i, loss in enumerate(self.criteria)}
        return self.log_losses(losses, stage, len(made))

    def _count(self, metrics: CompletionMetrics, made: Tensor, wanted: Points) -> None:
        for points, cloud in zip(made, wanted, strict=True):
            label = int(cloud.get("segment")[0])
            if label >= 0:  # otherwise it only fills up a batch
                metrics.update(points.float(), cloud.coord, label)

    def on_validation_epoch_end(self) -> None:
        self._finish("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        self._finish("test", self.test_metrics)

    def _finish(self, stage: str, metrics: CompletionMetrics) -> None:
        scores: CompletionScores = metrics.compute()
        metrics.reset()
        self.scores[stage] = scores
        values = {"CD": scores.chamfer, "CD_squared": scores.chamfer_squared}
        if metrics.emd_points is not None:
            values["EMD"] = scores.emd
        named = zip(self.class_names, scores.class_chamfer.tolist(), scores.clouds.tolist(), strict=True)
        values |= {f"CD/{name}": value for name, value, clouds in named if clouds}
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, sync_dist=True)

    # Reports ---------------------------------------------------------------------------------------------------------

    def score_table(self, stage: str, title: str) -> Table:
        scores: CompletionScores = self.scores[stage]
        columns, means = {"CD": scores.class_chamfer}, {"CD": scores.chamfer}
        if stage == "test" and self.test_metrics.emd_points is not None:
            columns, means = {**columns, "EMD": scores.class_emd}, {**means, "EMD": scores.emd}
        return value_table(f"{title}: CD {scores.chamfer:.4g}", self.class_names, scores.clouds, columns, means)

    def save_picture(self, path: Path, cloud: Points, prediction: Tensor) -> Path:
        from pc3d.viz.figures import save_point_sets

        there, wanted = sides(cloud)
        return save_point_sets(
            path, {"input": there.coord, "truth": wanted.coord, "prediction": prediction}, cloud.describe()
        )


def sides(points: Points) -> tuple[Points, Points]:
    """What is there and what is wanted, of a batch with ``target``.

    Raises:
        InputError: if a cloud lacks one of the two.
    """
    wanted = points.get("target").reshape(-1) == 1
    halves = points.replace(source=None).select(~wanted), points.replace(source=None).select(wanted)
    for half, name in zip(halves, ("there", "wanted"), strict=True):
        if bool((half.counts == 0).any()):
            raise InputError(f"{points.describe()}: field 'target': a cloud has no points that are {name}")
    return halves


@torch.no_grad()
def complete(task: Completion, pipeline: Pipeline, points: Points, generator: torch.Generator | None = None) -> Tensor:
    """``(M, 3)`` float32 points of one raw cloud's whole shape, in its own coordinates; in eval mode.

    Raises:
        InputError: for an empty cloud, coordinates that are not finite, or missing fields.
    """
    check_cloud(points)
    training = task.training
    task.eval()
    try:
        sampled = pipeline.evaluate(points.without_attrs("target"), generator=generator)
        made = task(sampled.replace(source=None).to(task.device))[0].float()
    finally:
        task.train(training)
    return from_unit_frame(made, sampled.meta[0])
