"""``Reconstruction``: the surface that a cloud was scanned from, as the border of an occupancy field."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from pc3d.data.pipeline import Pipeline
from pc3d.data.transforms import Compose, UnitShape
from pc3d.data.transforms.geometric import from_unit_frame
from pc3d.data.transforms.occupancy import SURFACE
from pc3d.errors import InputError
from pc3d.losses import MarginOccupancy
from pc3d.metrics import ReconstructionMetrics, SurfaceScores, mesh_scores, occupancy_iou
from pc3d.nn.point_grid import GridBackbone
from pc3d.ops.isosurface import extract_surface
from pc3d.ops.mesh import Mesh
from pc3d.peft import Adaptation
from pc3d.points import Points
from pc3d.tasks.base import ADAMW, ONECYCLE, PointTask
from pc3d.tasks.heads import OccupancyHead
from pc3d.tasks.inference import check_cloud
from pc3d.tasks.optim import OptimizerConfig, ScheduleConfig
from pc3d.tasks.pretraining import Panels
from pc3d.tasks.tables import value_table

_QUERIES = 65_536  # read from the grids at a time while a surface is extracted
_FINEST = 1024  # cells per axis: 12 GB
_COLUMNS = {"IoU": "iou", "Chamfer-L1": "chamfer_l1", "normals": "normal_consistency", "F 1 %": "f_score"}
_DRAWN = 100_000  # points of a surface in a picture


class Reconstruction(PointTask):
    """Backbone, occupancy decoder, loss and scores for the reconstruction of surfaces.

    A cloud holds a scan and points in space, told apart by ``occupancy``: -1 on the surface, 1 inside, 0 outside
    (:class:`~pc3d.data.transforms.ScanAndQueries` draws both). Validation scores the occupancy of the points in space
    (IoU, mean over the clouds); the test extracts surfaces, in the frame that the pipeline prepares, and scores these.

    Args:
        backbone: cloud to grids.
        class_names: of ``segment``, the class of a cloud: test scores are given for each.
        decoder: grids to occupancy logits.
        criterion: default without margin, the first stage of GridFormer.
        threshold: probability from which a point is inside.
        resolution, steps: of surfaces, see :func:`~pc3d.ops.isosurface.extract_surface`.
        mesh_points: sampled on a tested surface.
        room: score without the outer sides of walls and floor, see :func:`~pc3d.metrics.reconstruction.mesh_scores`.
        optimizer, schedule, ema_decay, freeze, peft: see :class:`~pc3d.tasks.SemanticSegmentation`.

    Raises:
        InputError: if the decoder does not fit the backbone, the threshold is no probability, or no points are sampled.
    """

    monitor = ("val/iou", "max")
    backbone: GridBackbone
    threshold: float
    resolution: int
    steps: int

    def __init__(
        self,
        backbone: GridBackbone,
        class_names: list[str],
        decoder: OccupancyHead,
        criterion: MarginOccupancy | None = None,
        threshold: float = 0.2,
        resolution: int = 32,
        steps: int = 3,
        mesh_points: int = 100_000,
        room: bool = False,
        optimizer: OptimizerConfig = ADAMW,
        schedule: ScheduleConfig = ONECYCLE,
        ema_decay: float | None = None,
        freeze: list[str] | None = None,
        peft: Adaptation | None = None,
    ) -> None:
        super().__init__(backbone, class_names, optimizer, schedule, ema_decay, peft)
        if decoder.in_channels != backbone.grid_channels:
            raise InputError(
                f"model.decoder takes grids of {decoder.in_channels} channels, the backbone gives "
                f"{backbone.grid_channels}"
            )
        if mesh_points < 1:
            raise InputError(f"model.mesh_points is {mesh_points}: it must be at least 1")
        self.frame = backbone.frame
        self.decoder = decoder
        self.criterion = criterion or MarginOccupancy()
        self.set_surface(threshold, resolution, steps)
        self.mesh_points, self.room = mesh_points, room
        self.val_metrics = ReconstructionMetrics(len(class_names))
        self.test_metrics = ReconstructionMetrics(len(class_names))
        self.freeze_matching(freeze)

    def set_surface(
        self, threshold: float | None = None, resolution: int | None = None, steps: int | None = None
    ) -> None:
        """Change how surfaces are extracted; None keeps what is set.

        Raises:
            InputError: for a threshold that is no probability, no cells, or more of them than memory is made for.
        """
        self.threshold = self.threshold if threshold is None else threshold
        self.resolution = self.resolution if resolution is None else resolution
        self.steps = self.steps if steps is None else steps
        if not 0 < self.threshold < 1:
            raise InputError(f"threshold: {self.threshold} is not a probability between 0 and 1")
        if self.resolution < 1 or self.steps < 0 or self.resolution << self.steps > _FINEST:
            raise InputError(
                f"resolution {self.resolution} doubled {self.steps} times: must be 1 to {_FINEST} cells per axis"
            )

    @property
    def level(self) -> float:
        """The threshold as a logit."""
        return math.log(self.threshold / (1 - self.threshold))

    def forward(self, points: Points) -> Tensor:
        """``(Q,)`` logits of the points in space of sampled clouds."""
        return self._logits(*halves(points))

    def _logits(self, scan: Points, queries: Points) -> Tensor:
        return self.decoder(self.backbone.encode(scan), queries.coord, queries.offsets)

    def training_step(self, batch: Points, batch_idx: int) -> Tensor:
        self._reseed(self.current_epoch, batch_idx)
        self.log_rates(len(batch))
        scan, queries = halves(batch)
        return self._loss(self._logits(scan, queries), queries, "train")

    def validation_step(self, batch: Points, batch_idx: int) -> dict[str, Any]:
        self._reseed(-1, batch_idx)
        scan, queries = halves(batch)
        logits = self._logits(scan, queries)
        self._loss(logits, queries, "val")
        panels = []
        for cloud, query, own in zip(scan, queries, logits.split(queries.counts.tolist()), strict=True):
            inside, truth = own > self.level, query.get("occupancy") == 1
            self._count(self.val_metrics, SurfaceScores(iou=occupancy_iou(inside, truth)), cloud)
            panels.append(Panels(scan=cloud.coord, prediction=query.coord[inside], truth=query.coord[truth]))
        return {"points": scan, "prediction": panels}

    def test_step(self, batch: Sequence[Points], batch_idx: int) -> dict[str, Any]:
        self._reseed(-1, batch_idx)
        (cloud,) = batch
        generator = torch.Generator().manual_seed(batch_idx)
        prepared, rest = _prepared(self.test_pipeline(), cloud, generator)
        scan, _ = halves(rest.evaluate(prepared, generator=generator).to(self.device))
        mesh = self.surface(scan)
        true, space = halves(prepared.cpu())
        occupancy = space.get("occupancy") == 1
        scores = mesh_scores(
            mesh, true.coord, true.get("normal"), space.coord, occupancy, self.mesh_points, self.room, generator
        )
        self._count(self.test_metrics, scores, true)
        made, normal = mesh.sample(_DRAWN, generator)
        panels = Panels(scan=scan.coord, reconstruction=Points(made, attrs={"normal": normal}), truth=true)
        return {"points": scan, "prediction": [panels]}

    def _loss(self, logits: Tensor, queries: Points, stage: str) -> Tensor:
        loss = self.criterion(logits, queries.get("occupancy"), queries.offsets)
        return self.log_losses({type(self.criterion).__name__: loss}, stage, len(queries))

    def _count(self, metrics: ReconstructionMetrics, scores: SurfaceScores, cloud: Points) -> None:
        label = int(cloud.get("segment")[0])
        if label >= 0:  # otherwise it only fills up a batch
            metrics.update(scores, label)

    def surface(self, scan: Points, on_level: Callable[[int], None] | None = None) -> Mesh:
        """The surface of one sampled scan, in its frame, on the CPU; without gradients.

        Args:
            on_level: called with the resolution of every grid of values, see
                :func:`~pc3d.ops.isosurface.extract_surface`.
        """
        with torch.no_grad():
            pyramid = self.backbone.encode(scan)

            def field(query: Tensor) -> Tensor:
                parts = query.split(_QUERIES)
                borders = [torch.tensor([0, len(part)], device=query.device) for part in parts]
                return torch.cat([self.decoder(pyramid, *pair) for pair in zip(parts, borders, strict=True)])

            half = (1 + pyramid.frame.padding) / 2
            return extract_surface(field, self.level, half, self.resolution, self.steps, scan.device, on_level)

    def on_validation_epoch_end(self) -> None:
        self._finish("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        self._finish("test", self.test_metrics)

    def _finish(self, stage: str, metrics: ReconstructionMetrics) -> None:
        scores, classes, clouds = metrics.compute()
        metrics.reset()
        values = {name: value for name, value in vars(scores).items() if not math.isnan(value)}
        classes = {name: classes[name] for name in values}
        self.scores[stage] = scores, classes, clouds
        for i, name in enumerate(self.class_names):
            if clouds[i]:
                values[f"iou/{name}"] = float(classes["iou"][i])
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, sync_dist=True)

    # Reports ---------------------------------------------------------------------------------------------------------

    def score_table(self, stage: str, title: str) -> Table:
        scores, classes, clouds = self.scores[stage]
        shown = {title: name for title, name in _COLUMNS.items() if name in classes}
        columns = {title: classes[name] for title, name in shown.items()}
        means = {title: getattr(scores, name) for title, name in shown.items()}
        return value_table(f"{title}: IoU {scores.iou:.4g}", self.class_names, clouds, columns, means)

    def save_picture(self, path: Path, cloud: Points, prediction: Panels) -> Path:
        from pc3d.viz.figures import save_point_sets

        return save_point_sets(path, prediction, cloud.describe())


def halves(points: Points) -> tuple[Points, Points]:
    """The scan, and the points in space, of a batch with ``occupancy``.

    Raises:
        InputError: if a cloud lacks one of the two.
    """
    surface = points.get("occupancy").reshape(-1) == SURFACE
    points = points.replace(source=None)
    both = points.select(surface), points.select(~surface)
    for half, name in zip(both, ("on the surface", "in space"), strict=True):
        if bool((half.counts == 0).any()):
            raise InputError(f"{points.describe()}: field 'occupancy': a cloud has no points {name}")
    return both


def _prepared(pipeline: Pipeline, cloud: Points, generator: torch.Generator | None) -> tuple[Points, Pipeline]:
    """A raw cloud after the deterministic steps of a pipeline, and the pipeline without them."""
    return Compose(pipeline.prepare)(cloud, generator), replace(pipeline, prepare=[])


def reconstruct(
    task: Reconstruction,
    pipeline: Pipeline,
    points: Points,
    generator: torch.Generator | None = None,
    on_level: Callable[[int], None] | None = None,
) -> Mesh:
    """The surface of one raw cloud, in the cloud's own coordinates; in eval mode.

    A cloud that leaves the box of the network's grids, after the pipeline's ``prepare``, is fitted to it first.

    Args:
        on_level: see :meth:`Reconstruction.surface`.

    Raises:
        InputError: for an empty cloud, coordinates that are not finite, or missing fields.
    """
    check_cloud(points)
    prepared, rest = _prepared(pipeline, points.without_attrs("occupancy"), generator)
    if float(prepared.coord.abs().max()) > (1 + task.frame.padding) / 2:
        prepared = UnitShape("box", radius=0.5)(prepared)
    training = task.training
    task.eval()
    try:
        sampled = rest.evaluate(prepared, generator=generator)
        mesh = task.surface(sampled.replace(source=None).to(task.device), on_level)
    finally:
        task.train(training)
    return Mesh(from_unit_frame(mesh.vertices, sampled.meta[0]), mesh.faces)
