"""``InstanceSegmentation``: classes and instances of points."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pc3d.data.pipeline import Pipeline
from pc3d.data.prediction import Prediction
from pc3d.errors import InputError
from pc3d.losses import FeatureLoss, Loss
from pc3d.metrics import (
    InstanceAveragePrecision,
    InstanceCoverage,
    Instances,
    PartMisclassification,
    SegmentationMetrics,
)
from pc3d.nn.backbone import Backbone
from pc3d.peft import Adaptation
from pc3d.points import Points
from pc3d.tasks.heads import InstanceHead, InstanceOutput, SegmentationHead
from pc3d.tasks.inference import original_rows
from pc3d.tasks.optim import OptimizerConfig, ScheduleConfig
from pc3d.tasks.segmentation import SemanticSegmentation


class InstanceSegmentation(SemanticSegmentation):
    """A semantic task with an instance head on its features and logits.

    Validation and test alike run once over each cloud and score its original points: semantics, instances (AP of
    ScanNet, precision, recall and coverage of S3DIS) and part misclassification. Freeze ``^backbone`` and ``^head`` and
    start with ``--init_from`` to train the head alone on a trained semantic model.

    Args:
        instance_head: makes the instances, and perhaps better logits.
        stuff: names of classes without instances.
        min_instance_points: smaller true and predicted instances do not count in AP.
        backbone, class_names, head, criteria, feature_criteria, optimizer, schedule, ema_decay, freeze, peft: see
            :class:`SemanticSegmentation`.
    """

    def __init__(
        self,
        backbone: Backbone,
        class_names: list[str],
        instance_head: InstanceHead,
        stuff: list[str] | None = None,
        min_instance_points: int = 100,
        head: SegmentationHead | None = None,
        criteria: list[Loss] | None = None,
        feature_criteria: list[FeatureLoss] | None = None,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen)
        schedule: ScheduleConfig = ScheduleConfig(),  # noqa: B008 (frozen)
        ema_decay: float | None = None,
        freeze: list[str] | None = None,
        peft: Adaptation | None = None,
    ) -> None:
        unknown = sorted(set(stuff or ()) - set(class_names))
        if unknown:
            raise InputError(f"model.stuff: {', '.join(unknown)} unknown; the classes are {', '.join(class_names)}")
        super().__init__(
            backbone, class_names, head, criteria, feature_criteria, optimizer, schedule, ema_decay, peft=peft
        )
        things = [name not in (stuff or ()) for name in class_names]
        instance_head.build(backbone.out_channels, len(class_names), things)
        self.instance_head = instance_head
        self.precision = InstanceAveragePrecision(things, min_instance_points)
        self.baseline_precision = InstanceAveragePrecision(things, min_instance_points)
        self.coverage = InstanceCoverage(things)
        self.part_errors = PartMisclassification(len(class_names))
        self.variant_metrics = nn.ModuleDict()
        self.freeze_matching(freeze)

    def forward(self, points: Points) -> Tensor:
        """``(N, K)`` logits of sampled points, those of the instance head."""
        return self.outputs(points).logits

    def outputs(self, points: Points) -> InstanceOutput:
        """All that the instance head makes of sampled points."""
        features = self.backbone(points)
        return self.instance_head(features, self.head(features, points), points)

    def predict_instances(self, sampled: Points) -> tuple[Tensor, list[Instances]]:
        """Classes ``(N,)`` and instances of the original points of a batch from ``Pipeline.evaluate``."""
        output = self.outputs(sampled)
        source, rows = original_rows(sampled)
        found = self.instance_head.instances(output, sampled)
        return output.logits.argmax(1)[rows], _on_source(found, sampled, source, rows)

    def cloud_instances(self, pipeline: Pipeline, points: Points) -> Tensor:
        """``(N,)`` int64 instance of every point of one raw cloud, -1 for none (or removed by ``pipeline.prepare``)."""
        rows = torch.arange(points.num_points, device=points.device)
        sampled = pipeline.evaluate(points.with_attrs(index=rows))
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                _, (found,) = self.predict_instances(sampled.to(self.device))
        finally:
            self.train(training)
        source, _ = original_rows(sampled)
        instance = torch.full((points.num_points,), -1)
        instance[source.get("index").cpu()] = found.labels(source.num_points).cpu()
        return instance

    def training_step(self, batch: Points, batch_idx: int) -> Tensor:
        self._reseed(self.current_epoch, batch_idx)
        features = self.backbone(batch)
        logits, target = self.head(features, batch), batch.get("segment")
        output = self.instance_head(features, logits, batch)
        loss = self.instance_loss(output, batch, "train")
        if logits.requires_grad:
            loss = loss + self._loss(logits, target, "train", batch)
        for criterion in self.feature_criteria:
            loss = loss + criterion(features, target, logits.detach().argmax(1))
        self.train_metrics.update(output.logits.detach().argmax(1), target)
        return loss

    def instance_loss(self, output: InstanceOutput, points: Points, stage: str) -> Tensor:
        losses = self.instance_head.losses(output, points)
        values = {f"{stage}/loss_{name}": value for name, value in losses.items()}
        self.log_dict(values, prog_bar=stage == "train", batch_size=len(points), sync_dist=stage != "train")
        return torch.stack(list(losses.values())).sum()

    def validation_step(self, batch: Points, batch_idx: int) -> dict[str, Any]:
        self._reseed(-1, batch_idx)
        return self._evaluate(batch, self.val_metrics, "val")

    def test_step(self, batch: Sequence[Points], batch_idx: int) -> dict[str, Any]:
        self._reseed(-1, batch_idx)
        cloud = batch[0].with_attrs(index=torch.arange(batch[0].num_points))
        return self._evaluate(self.test_pipeline().evaluate(cloud).to(self.device), self.test_metrics, "test")

    def _evaluate(self, batch: Points, metrics: SegmentationMetrics, stage: str) -> dict[str, Any]:
        output = self.outputs(batch)
        source, rows = original_rows(batch)
        segment, prediction = source.get("segment"), output.logits.argmax(1)[rows]
        if stage == "val":
            self.log("val/loss", self.instance_loss(output, batch, "val"), batch_size=len(batch), sync_dist=True)
        metrics.update(prediction, segment)
        for name, logits in output.variants.items():
            if name not in self.variant_metrics:
                self.variant_metrics[name] = SegmentationMetrics(len(self.class_names)).to(self.device)
            variant: Any = self.variant_metrics[name]
            variant.update(logits.argmax(1)[rows], segment)
        found = _on_source(self.instance_head.instances(output, batch), batch, source, rows)
        plain = self.instance_head.baseline(output, batch)
        if "instance" in source:
            instance = source.get("instance").reshape(-1)
            compared = found if plain is None else _on_source(plain, batch, source, rows)
            for i, (begin, end) in enumerate(itertools.pairwise(source.offsets.tolist())):
                truth = segment[begin:end], instance[begin:end]
                self.precision.update(found[i], *truth)
                self.baseline_precision.update(compared[i], *truth)
                self.coverage.update(found[i], *truth)
                self.part_errors.update(prediction[begin:end], *truth)
        return {"points": source, "prediction": prediction, "instances": found}

    def predictions(self, outputs: dict[str, Any]) -> Iterator[tuple[Points, Tensor]]:
        """Each cloud with ``(N, 2)`` classes and instances of its points."""
        for (cloud, classes), found in zip(super().predictions(outputs), outputs["instances"], strict=True):
            yield cloud, torch.stack([classes, found.labels(cloud.num_points).to(classes)], 1)

    def save_picture(self, path: Path, cloud: Points, prediction: Tensor) -> Path:
        from pc3d.viz.figures import save_triptych

        segment, (classes, labels), panels = cloud.get("segment"), prediction.unbind(1), {}
        if "instance" in cloud:
            truth = torch.where(segment < 0, -1, cloud.get("instance").reshape(-1).long())
            truth[truth >= 0] = truth[truth >= 0].unique(return_inverse=True)[1]  # some data sets count in 2^16
            labels, panels = _named_after(truth, labels), {"true instances": truth}
        panels["instances"] = labels
        return save_triptych(path, cloud, segment, classes, self.palette, self.class_names, instances=panels)

    def saved_prediction(self, outputs: dict[str, Any], cloud: Points) -> Prediction:
        rows, (found,) = outputs["points"].get("index").cpu(), outputs["instances"]
        segment = torch.full((cloud.num_points,), -1)
        segment[rows] = outputs["prediction"].cpu()
        parts = (part.cpu() for part in (found.borders, found.classes, found.scores))
        return Prediction(segment, Instances(rows[found.rows.cpu()], *parts))

    def _finish(self, stage: str, metrics: SegmentationMetrics) -> None:
        super()._finish(stage, metrics)
        if stage == "train":
            return
        ap, coverage, parts = self.precision.compute(), self.coverage.compute(), self.part_errors.compute()
        plain = self.baseline_precision.compute()
        values = {"AP": ap.ap, "AP50": ap.ap50, "AP25": ap.ap25, "AP_baseline": plain.ap, "AP50_baseline": plain.ap50}
        values |= {"mPrec": coverage.precision, "mRec": coverage.recall}
        values |= {"mCov": coverage.coverage, "mWCov": coverage.weighted_coverage}
        values |= {"part_errors": parts.points, "broken_instances": parts.instances}
        variants: dict[str, Any] = dict(self.variant_metrics.items())
        values |= {f"mIoU_{name}": variant.compute().miou for name, variant in variants.items()}
        for metric in (self.precision, self.baseline_precision, self.coverage, self.part_errors, *variants.values()):
            metric.reset()
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, sync_dist=True)


def _named_after(truth: Tensor, labels: Tensor) -> Tensor:
    """Predicted instances under the numbers of the true ones with which they share most, others under new numbers."""
    both = (truth >= 0) & (labels >= 0)
    pairs, counts = torch.stack([labels[both], truth[both]], 1).unique(dim=0, return_counts=True)
    names: dict[int, int] = {}
    for label, true in pairs[counts.argsort(descending=True, stable=True)].tolist():
        if label not in names and true not in names.values():
            names[label] = true
    used = {*names.values(), *truth.unique().tolist()}
    free = (number for number in itertools.count() if number not in used)
    named = labels.clone()
    for label in labels[labels >= 0].unique().tolist():
        named[labels == label] = names[label] if label in names else next(free)
    return named


def _on_source(found: list[Instances], sampled: Points, source: Points, rows: Tensor) -> list[Instances]:
    """The instances of sampled clouds, on the points they stand for."""
    clouds = zip(
        found, itertools.pairwise(sampled.offsets.tolist()), itertools.pairwise(source.offsets.tolist()), strict=True
    )
    return [
        Instances.of(instances.labels(end - begin)[rows[first:last] - begin], instances.classes, instances.scores)
        for instances, (begin, end), (first, last) in clouds
    ]
