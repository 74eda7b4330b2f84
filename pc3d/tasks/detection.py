"""``Detection``: boxes around objects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from pc3d.data.boxes import Boxes, box_tensor, kitti_results, labelled_boxes
from pc3d.data.pipeline import Pipeline
from pc3d.data.prediction import Prediction
from pc3d.errors import InputError
from pc3d.io.kitti_object import KittiFrame
from pc3d.metrics.kitti import DIFFICULTIES, KittiMetrics, KittiScores
from pc3d.nn.bev import BevBackbone
from pc3d.ops.boxes import points_in_boxes
from pc3d.points import Points
from pc3d.tasks.base import ADAMW, ONECYCLE, PointTask
from pc3d.tasks.heads import DetectionHead, ProposalHead, RefinementHead, Suppression
from pc3d.tasks.inference import check_cloud
from pc3d.tasks.optim import OptimizerConfig, ScheduleConfig
from pc3d.voxels import Voxels

_MODERATE = DIFFICULTIES.index("moderate")
_POSITIONS = ("r40", "r11")
_NONE = np.zeros(0, np.int64)


class Detection(PointTask):
    """A backbone that gives maps seen from above, and a head that finds boxes on them; knows no model.

    True boxes are those of ``meta["boxes"]`` whose kind is a class and whose centre lies in the backbone's range.
    Validation and test give the official average precision of KITTI on whole frames: ``AP`` is the mean over classes of
    3D, moderate, 40 recall positions, at overlap 0.7 for cars and 0.5 for others.

    Args:
        backbone: ``points -> (B, C, H, W)`` maps.
        class_names: name of class 0, 1, ...
        head: maps to boxes.
        refine: a second stage that corrects these boxes; validation losses are those of the first stage.
        optimizer, schedule, ema_decay, freeze: see :class:`~pc3d.tasks.SemanticSegmentation`.
    """

    monitor = ("val/AP", "max")
    backbone: BevBackbone

    def __init__(
        self,
        backbone: BevBackbone,
        class_names: list[str],
        head: DetectionHead,
        refine: RefinementHead | None = None,
        optimizer: OptimizerConfig = ADAMW,
        schedule: ScheduleConfig = ONECYCLE,
        ema_decay: float | None = None,
        freeze: list[str] | None = None,
    ) -> None:
        super().__init__(backbone, class_names, optimizer, schedule, ema_decay)
        head.build(backbone.out_channels, self.class_names, backbone.grid, backbone.stride)
        self.head = head
        if refine is not None:
            if not isinstance(head, ProposalHead):
                raise InputError(f"model.refine: {type(head).__name__} proposes nothing to refine; use AnchorHead")
            refine.build(backbone.grid, backbone.feature_info)
        self.refine = refine
        self.val_metrics = KittiMetrics(class_names)
        self.test_metrics = KittiMetrics(class_names)
        self.freeze_matching(freeze)

    def forward(self, points: Points) -> list[Boxes]:
        """Boxes of every cloud of sampled points, best first."""
        return self._found(*self._outputs(points))

    def _outputs(self, points: Points) -> tuple[Any, dict[str, Voxels]]:
        """What the head says of every cloud, and the levels of voxels below it."""
        features, levels = self.backbone.forward_levels(points)
        return self.head(features), levels

    def _found(self, output: Any, levels: dict[str, Voxels]) -> list[Boxes]:
        if self.refine is None:
            return self.head.detections(output)
        return self.refine.detections(levels, self._proposals(output, self.refine.suppression))

    def _proposals(self, output: Any, rule: Suppression) -> list[Boxes]:
        assert isinstance(self.head, ProposalHead)
        return self.head.proposals(output, rule)

    def truth(self, points: Points) -> list[Boxes]:
        """The boxes to be found in every cloud."""
        low, high = torch.tensor(list(self.backbone.grid.point_range), device=points.device).view(2, 3)
        boxes = labelled_boxes(points, self.class_names)
        return [own.take(((own.boxes[:, :3] >= low) & (own.boxes[:, :3] <= high)).all(1)) for own in boxes]

    # Training --------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Points, batch_idx: int) -> Tensor:
        self._reseed(self.current_epoch, batch_idx)
        output, levels = self._outputs(batch)
        truth = self.truth(batch)
        losses = self.head.losses(output, truth)
        if self.refine is not None:
            proposals = self._proposals(output, self.refine.training_suppression)
            losses |= self.refine.losses(levels, proposals, truth)
        self.log_rates(len(batch))
        return self.log_losses(losses, "train", len(batch))

    # Evaluation ------------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Points, batch_idx: int) -> dict[str, Any]:
        self._reseed(-1, batch_idx)
        output, levels = self._outputs(batch)
        self.log_losses(self.head.losses(output, self.truth(batch)), "val", len(batch))
        return self._score(batch, self._found(output, levels), self.val_metrics)

    def test_step(self, batch: Sequence[Points], batch_idx: int) -> dict[str, Any]:
        self._reseed(-1, batch_idx)
        (cloud,) = batch
        return self._score(cloud, [detect(self, self.test_pipeline(), cloud)], self.test_metrics)

    def _score(self, clouds: Points, found: list[Boxes], metrics: KittiMetrics) -> dict[str, Any]:
        for meta, boxes in zip(clouds.meta, found, strict=True):
            frame = KittiFrame.of(meta)
            if frame.labels is not None:
                both = frame.labels, kitti_results(boxes, frame, self.class_names)
                if meta.get("padding"):  # it counts for nothing, but every process must have a frame to gather
                    both = both[0].take(_NONE), both[1].take(_NONE)
                metrics.update(*both)
        return {"points": clouds.replace(source=None), "prediction": found}

    def on_validation_epoch_end(self) -> None:
        self._finish("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        self._finish("test", self.test_metrics)

    def _finish(self, stage: str, metrics: KittiMetrics) -> None:
        if not metrics.update_called:  # frames without labels: their results are saved, not scored
            self.scores[stage] = None
            return
        if self.trainer.sanity_checking:  # two frames make no curve
            metrics.reset()
            return
        scores: KittiScores = metrics.compute()
        metrics.reset()
        self.scores[stage] = scores
        moderate = {
            (metric, r): getattr(scores, r)[metric][:, _MODERATE, 0] for metric in ("3d", "bev") for r in _POSITIONS
        }
        values = {"AP": moderate["3d", "r40"].mean(), "AP_R11": moderate["3d", "r11"].mean()}
        values |= {"AP_bev": moderate["bev", "r40"].mean(), "AP_bev_R11": moderate["bev", "r11"].mean()}
        values |= {f"AP/{name}": ap for name, ap in zip(self.class_names, moderate["3d", "r40"], strict=True)}
        self.log_dict({f"{stage}/{name}": float(value) for name, value in values.items()}, sync_dist=True)

    # Reports ---------------------------------------------------------------------------------------------------------

    def saved_prediction(self, outputs: dict[str, Any], cloud: Points) -> Prediction:
        boxes: Boxes = outputs["prediction"][0].cpu()
        return Prediction(label_points(cloud, boxes)[0], boxes=boxes)

    def score_table(self, stage: str, title: str) -> Table:
        scores: KittiScores | None = self.scores[stage]
        if scores is None:
            return Table(title=f"{title}: no frame has labels", title_justify="left")
        mean = scores.r40["3d"][:, _MODERATE, 0].mean()
        table = Table(title=f"{title}: AP {mean:.2f} % (3D, moderate, R40)", title_justify="left")
        for heading in (
            "class",
            "objects",
            *(f"3D {level}" for level in DIFFICULTIES),
            "3D R11",
            "BEV",
            "BEV 0.5/0.25",
        ):
            table.add_column(heading, justify="left" if heading == "class" else "right")
        for i, name in enumerate(scores.classes):
            row = [*scores.r40["3d"][i, :, 0], scores.r11["3d"][i, _MODERATE, 0], *scores.r40["bev"][i, _MODERATE]]
            table.add_row(escape(name), f"{scores.counted[i, _MODERATE]:,}", *(f"{value:.2f}" for value in row))
        return table

    def save_picture(self, path: Path, cloud: Points, prediction: Boxes) -> Path:
        from pc3d.viz.figures import save_bird_eye_view

        names = [self.class_names[label] for label in prediction.labels.tolist()]
        assert prediction.scores is not None
        captions = [f"{name} {score:.2f}" for name, score in zip(names, prediction.scores.tolist(), strict=True)]
        truth = box_tensor(cloud.meta[0])[:, :7]
        rows = [i for i, name in enumerate(cloud.meta[0].get("box_names", [])) if name in self.class_names]
        return save_bird_eye_view(path, cloud, prediction.boxes[:, :7].tolist(), captions, truth[rows].tolist())


def label_points(points: Points, boxes: Boxes) -> tuple[Tensor, Tensor]:
    """``(N,)`` int64 class, and ``(N,)`` row, of the best box around each point of a cloud; -1 outside."""
    inside = F.pad(points_in_boxes(points.coord, boxes.boxes[:, :7]), (0, 1), value=True)
    row = inside.int().argmax(1)  # of boxes, which come best first; behind them stands the outside
    return F.pad(boxes.labels, (0, 1), value=-1)[row], torch.where(row < len(boxes), row, -1)


@torch.no_grad()
def detect(task: Detection, pipeline: Pipeline, points: Points) -> Boxes:
    """The boxes of one raw cloud, best first, in its own coordinates; in eval mode.

    Raises:
        InputError: for an empty cloud, coordinates that are not finite, missing fields, or a pipeline that moves the
            cloud.
    """
    check_cloud(points)
    training = task.training
    task.eval()
    try:
        sampled = pipeline.evaluate(points).replace(source=None).to(task.device)
        if sampled.meta[0].get("origin") != points.meta[0].get("origin"):
            raise InputError("pipeline.prepare moves the cloud: boxes would lie beside their objects")
        return task(sampled)[0]
    finally:
        task.train(training)
