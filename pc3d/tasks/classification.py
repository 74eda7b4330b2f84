"""``Classification``: one class per cloud."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from pc3d.data.pipeline import Pipeline
from pc3d.data.prediction import Prediction
from pc3d.data.transforms import Transform
from pc3d.errors import InputError
from pc3d.losses import Loss
from pc3d.metrics import ClassificationMetrics, ClassificationScores
from pc3d.metrics.classification import overall_accuracy
from pc3d.nn.backbone import Backbone
from pc3d.peft import Adaptation
from pc3d.points import Points
from pc3d.tasks.augmentations import TestAugmentation, augmentation_passes
from pc3d.tasks.base import ADAMW, ONECYCLE, ClassTask
from pc3d.tasks.heads import SegmentationHead
from pc3d.tasks.inference import check_cloud
from pc3d.tasks.optim import OptimizerConfig, ScheduleConfig
from pc3d.tasks.tables import value_table


class Classification(ClassTask):
    """Backbone, head, losses and scores for one class per cloud, which all its points carry as ``segment``.

    Scores are overall accuracy (OA) and the mean accuracy of the classes. The test step gives them for one plain pass
    and, with ``test_augmentations``, for the vote of all passes too, as ``OA_vote`` and ``mAcc_vote``.

    Args:
        backbone: features of whole clouds, ``(B, C)``, or of points, of which the largest in a cloud are taken.
        class_names: name of class 0, 1, ...
        head: features to logits, default one linear layer.
        criteria: losses, summed (each holds its own ``loss_weight``), default cross-entropy.
        test_augmentations: lists of transforms, one pass each, whose probabilities are summed; or ``scaling`` (10).
        optimizer, schedule, ema_decay, freeze, peft: see :class:`~pc3d.tasks.SemanticSegmentation`.
    """

    monitor = ("val/OA", "max")
    backbone: Backbone
    metrics_class = ClassificationMetrics

    def __init__(
        self,
        backbone: Backbone,
        class_names: list[str],
        head: SegmentationHead | None = None,
        criteria: list[Loss] | None = None,
        optimizer: OptimizerConfig = ADAMW,
        schedule: ScheduleConfig = ONECYCLE,
        ema_decay: float | None = None,
        freeze: list[str] | None = None,
        test_augmentations: list[list[Transform]] | TestAugmentation | None = None,
        peft: Adaptation | None = None,
    ) -> None:
        super().__init__(backbone, class_names, criteria, optimizer, schedule, ema_decay, peft)
        self.head = self._fitting_head(head)
        self.augmentations = [] if test_augmentations is None else augmentation_passes(test_augmentations)
        self.vote_metrics = ClassificationMetrics(len(class_names))
        self.freeze_matching(freeze)

    def forward(self, points: Points) -> Tensor:
        """``(B, K)`` logits of sampled clouds."""
        return self.head(self.backbone.latent(points)[0], points)

    def training_step(self, batch: Points, batch_idx: int) -> Tensor:
        self._reseed(self.current_epoch, batch_idx)
        logits, target = self(batch), cloud_labels(batch)
        self.train_metrics.update(logits.detach().argmax(1), target)
        self.log_rates(len(batch))
        return self._loss(logits, target, "train", batch)

    def validation_step(self, batch: Points, batch_idx: int) -> dict[str, Any]:
        self._reseed(-1, batch_idx)
        logits, target = self(batch), cloud_labels(batch)
        self._loss(logits, target, "val", batch)
        self.val_metrics.update(logits.argmax(1), target)
        return {"points": batch.replace(source=None), "prediction": logits.argmax(1)}

    def test_step(self, batch: Sequence[Points], batch_idx: int) -> dict[str, Any]:
        self._reseed(-1, batch_idx)
        (cloud,) = batch
        generator = torch.Generator().manual_seed(batch_idx)
        target = cloud_labels(cloud)
        plain = classify(self, self.test_pipeline(), cloud, generator=generator)
        self.test_metrics.update(plain.argmax()[None], target.to(plain.device))
        if not self.augmentations:
            return {"points": cloud, "prediction": plain.argmax()[None]}
        vote = classify(self, self.test_pipeline(), cloud, self.augmentations, generator)
        self.vote_metrics.update(vote.argmax()[None], target.to(vote.device))
        return {"points": cloud, "prediction": vote.argmax()[None]}

    def on_train_epoch_end(self) -> None:
        self._finish("train")

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        self._finish("test")

    def _finish(self, stage: str) -> None:
        metrics = self.stage_metrics(stage)
        scores: ClassificationScores = metrics.compute()  # type: ignore[assignment]
        metrics.reset()
        self.scores[stage] = scores
        values = {"OA": scores.oa, "mAcc": scores.macc}
        if stage == "test" and self.augmentations:
            vote = self.vote_metrics.compute()
            self.vote_metrics.reset()
            values |= {"OA_vote": vote.oa, "mAcc_vote": vote.macc}
        if stage != "train":
            values |= {f"acc/{name}": acc for name, acc in zip(self.class_names, scores.acc.tolist(), strict=True)}
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, sync_dist=True)

    # Reports ---------------------------------------------------------------------------------------------------------

    def saved_prediction(self, outputs: dict[str, Any], cloud: Points) -> Prediction:
        """The class of the cloud on all its points."""
        return Prediction(outputs["prediction"].cpu().expand(cloud.num_points))

    def running_score(self, stage: str) -> tuple[str, float] | None:
        metrics = self.stage_metrics(stage)
        return ("OA", overall_accuracy(metrics.confusion)) if metrics.update_called else None

    def score_table(self, stage: str, title: str) -> Table:
        scores: ClassificationScores = self.scores[stage]
        predicted = scores.confusion.sum(0)
        columns, means = {"accuracy": scores.acc, "predicted": predicted}, {"accuracy": scores.macc}
        return value_table(
            f"{title}: OA {scores.oa:.3f}",
            self.class_names,
            scores.confusion.sum(1),
            columns,
            means | {"predicted": float(predicted.sum())},
        )

    def save_picture(self, path: Path, cloud: Points, prediction: Tensor) -> Path:
        from pc3d.viz.figures import save_titled_cloud

        truth = int(cloud.get("segment")[0])
        names = [self.class_names[i] if i >= 0 else "not labelled" for i in (truth, int(prediction))]
        return save_titled_cloud(path, cloud, f"{names[1]} (true: {names[0]})", right=names[0] == names[1])


def cloud_labels(points: Points) -> Tensor:
    """``(B,)`` int64 class of every cloud, -1 where it has none.

    Raises:
        InputError: if a cloud is empty or, checked on the CPU only, its points are of several classes.
    """
    segment = points.get("segment")
    if bool((points.counts == 0).any()):
        raise InputError(f"{points.describe()}: a cloud without points has no class")
    labels = segment[points.offsets[:-1]]
    if segment.device.type == "cpu" and not torch.equal(labels[points.batch], segment):
        raise InputError(
            f"{points.describe()}: field 'segment' has several classes in a cloud; classification wants one"
        )
    return labels


@torch.no_grad()
def classify(
    task: Classification,
    pipeline: Pipeline,
    points: Points,
    augmentations: Sequence[Sequence[Transform]] = ((),),
    generator: torch.Generator | None = None,
) -> Tensor:
    """``(K,)`` float32 class probabilities of one raw cloud, the mean over the passes; in eval mode.

    Args:
        augmentations: transforms of each pass, default one pass without any.
        generator: source of random numbers.

    Raises:
        InputError: for an empty cloud, coordinates that are not finite, or missing fields.
    """
    check_cloud(points)
    training = task.training
    task.eval()
    try:
        passes = [pipeline.evaluate(points, transforms, generator) for transforms in augmentations]
        logits = [task(sampled.replace(source=None).to(task.device))[0].float() for sampled in passes]
    finally:
        task.train(training)
    return torch.stack(logits).softmax(1).mean(0)
