"""Reconstruction under the real trainer, its two stages, and the surfaces of raw clouds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from tiny import trainer

from pc3d import InputError, Points
from pc3d.data.module import PointDataModule
from pc3d.data.pipeline import Pipeline
from pc3d.data.transforms import MarkBoundary, ScanAndQueries, UnitShape
from pc3d.datasets import SyntheticSolids
from pc3d.losses import MarginOccupancy
from pc3d.metrics import ReconstructionMetrics, SurfaceScores, mesh_scores, point_scores
from pc3d.models import GridFormer, GridFormerDecoder
from pc3d.ops.mesh import Mesh, contains
from pc3d.tasks import OptimizerConfig, Reconstruction, load_task, reconstruct
from pc3d.tasks.callbacks import SavePictures, ScoreTable

pytest.importorskip("skimage")


def task(**options: Any) -> Reconstruction:
    pl.seed_everything(0, verbose=False)
    options = {"threshold": 0.5, "resolution": 8, "steps": 1, "mesh_points": 500, **options}
    optimizer = OptimizerConfig(lr=3e-3, weight_decay=0.0)
    names = ["sphere", "box", "torus", "union"]
    return Reconstruction(GridFormer(3, 8, 8), names, GridFormerDecoder(8), optimizer=optimizer, **options)


def data(boundary: bool = False, **sizes: int) -> PointDataModule:
    solids = SyntheticSolids(**{"train": 8, "val": 4, "test": 2, "surface": 500, "space": 1500, **sizes})
    pipeline = Pipeline(
        None,
        ["coord"],
        prepare=[UnitShape("box", radius=0.5), *([MarkBoundary()] if boundary else [])],
        crop=[ScanAndQueries(200, 200, boundary=boundary)],
        select=[ScanAndQueries(200, None)],
    )
    return PointDataModule(solids, pipeline, batch_size=4, val_batch_size=3, cache=False, seed=0)


def test_it_learns_is_tested_and_reconstructs_from_its_checkpoint(tmp_path: Path) -> None:
    module, solids = task(), data(train=16)
    run = trainer(tmp_path, max_epochs=12, check_val_every_n_epoch=12, callbacks=[ScoreTable(), SavePictures(clouds=1)])
    run.fit(module, datamodule=solids)
    assert run.callback_metrics["val/iou"] > 0.3
    assert {f"val/iou/{name}" for name in module.class_names} <= set(run.callback_metrics)
    run.test(module, datamodule=solids, verbose=False)
    figures = {name: float(value) for name, value in run.callback_metrics.items()}
    assert figures["test/iou"] > 0.3
    assert figures["test/chamfer_l1"] < 0.1
    assert figures["test/normal_consistency"] > 0.5
    assert list(tmp_path.rglob("test-*.png"))
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded, pipeline, _ = load_task(tmp_path / "a.ckpt")
    assert isinstance(loaded, Reconstruction)
    scan = sphere_scan(400)
    mesh = reconstruct(loaded, pipeline, scan, torch.Generator().manual_seed(0))
    again = reconstruct(module, module.test_pipeline(), scan, torch.Generator().manual_seed(0))
    torch.testing.assert_close(mesh.vertices, again.vertices)
    torch.testing.assert_close(mesh.vertices.mean(0), scan.coord.mean(0), atol=4, rtol=0)
    assert 0.5 < (np.ptp(mesh.vertices.numpy(), axis=0) / 40).min() < 1.5


def sphere_scan(count: int) -> Points:
    """A sphere of radius 20 far from the origin, with an attribute that training clouds use otherwise."""
    coord = torch.nn.functional.normalize(torch.randn(count, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    attrs = {"occupancy": torch.ones(count)}
    return Points(20 * coord + torch.tensor([300.0, -50, 7]), attrs=attrs, meta=[{"name": "ball"}])


def test_second_stage_trains_near_the_surface_with_a_margin(tmp_path: Path) -> None:
    module, solids = task(criterion=MarginOccupancy(2.0)), data(boundary=True, train=8, val=0)
    run = trainer(tmp_path, max_epochs=1)
    before = [p.clone() for p in module.parameters()]
    run.fit(module, datamodule=solids)
    changed = [not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]
    assert changed == [p.requires_grad for p in module.parameters()]
    batch = next(iter(data(boundary=True).train_dataloader()))
    assert batch.get("boundary")[batch.get("occupancy") >= 0].all()


def test_clouds_that_do_not_fit_the_box_are_fitted() -> None:
    module = task().eval()
    module.surface = lambda scan, on_level=None: Mesh(scan.coord, torch.zeros(0, 3, dtype=torch.int64))
    plain = Pipeline(None, ["coord"], select=[ScanAndQueries(50)])
    inside = Points(torch.rand(40, 3) - 0.5)
    assert torch.equal(reconstruct(module, plain, inside).vertices, inside.coord)
    outside = sphere_scan(40)
    torch.testing.assert_close(reconstruct(module, plain, outside).vertices, outside.coord, atol=1e-3, rtol=0)
    seen = []
    module.surface = lambda scan, on_level=None: seen.append(scan.coord) or Mesh(scan.coord, scan.coord.long())
    reconstruct(module, plain, outside)
    assert float(seen[0].abs().max()) == pytest.approx(0.5)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(InputError, match="threshold"):
        task(threshold=1.0)
    with pytest.raises(InputError, match="cells per axis"):
        task(steps=8)
    with pytest.raises(InputError, match="mesh_points is 0"):
        task(mesh_points=0)
    with pytest.raises(InputError, match="channels"):
        Reconstruction(GridFormer(3, 8, 8), ["a"], GridFormerDecoder(16))
    with pytest.raises(InputError, match="on the surface"):
        task()(Points(torch.zeros(2, 3), attrs={"occupancy": torch.tensor([0, 1]), "feat": torch.zeros(2, 3)}))


# Losses and scores ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logit", [-1.9, -0.5, 0.5, 1.9])
def test_a_margin_asks_more_of_right_answers(logit: float) -> None:
    logits, offsets = torch.tensor([logit]), torch.tensor([0, 1])
    occupancy = (logits > 0).long()
    losses = [float(MarginOccupancy(m)(logits, occupancy, offsets)) for m in (0.0, 0.4, 2.0)]
    assert losses == sorted(losses)
    assert losses[2] > 2 * losses[0]


def test_the_loss_is_a_sum_over_queries_and_a_mean_over_clouds() -> None:
    logits = torch.zeros(6, requires_grad=True)
    loss = MarginOccupancy(loss_weight=2.0)(logits, torch.tensor([0, 1, 1, 0, 1, 1]), torch.tensor([0, 2, 6]))
    assert float(loss) == pytest.approx(2 * 3 * np.log(2))
    loss.backward()
    assert logits.grad is not None
    with pytest.raises(InputError, match="margin"):
        MarginOccupancy(-1.0)


def plane(count: int, height: float) -> tuple[torch.Tensor, torch.Tensor]:
    points = torch.rand(count, 3, generator=torch.Generator().manual_seed(count))
    points[:, 2] = height
    return points, torch.tensor([0.0, 0, -2]).expand(count, 3)


def test_scores_of_parallel_planes() -> None:
    scores = point_scores(*plane(4000, 0.018), *plane(5000, 0.0))
    assert scores.accuracy == pytest.approx(0.019, abs=2e-3)
    assert scores.normal_consistency == pytest.approx(1)
    assert (scores.f_score, scores.f_score_15) == (0, 0)
    assert scores.f_score_20 > 0.5
    same = point_scores(*plane(1000, 0.0), *plane(1000, 0.0))
    assert (same.chamfer_l1, same.f_score) == (0, 1)
    nothing = point_scores(torch.zeros(0, 3), torch.zeros(0, 3), *plane(10, 0.0))
    assert (nothing.accuracy, nothing.completeness, nothing.iou) == (3**0.5, 3**0.5, 0)


def box(low: float, high: float) -> Mesh:
    vertices = torch.cartesian_prod(*[torch.tensor([low, high])] * 3)
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    return Mesh(vertices, torch.tensor([face for a, b, c, d in quads for face in ((a, b, c), (a, c, d))]))


def test_scores_of_meshes_and_their_means() -> None:
    generator = torch.Generator().manual_seed(0)
    true, normals = box(-0.4, 0.4).sample(5000, generator)
    space = torch.rand(4000, 3, generator=generator) - 0.5
    inside = contains(box(-0.4, 0.4), space)
    right = mesh_scores(box(-0.4, 0.4), true, normals, space, inside, 5000, generator=generator)
    small = mesh_scores(box(-0.3, 0.3), true, normals, space, inside, 5000, generator=generator)
    assert right.iou == 1
    assert right.chamfer_l1 < 0.02
    assert small.iou == pytest.approx(0.6**3 / 0.8**3, abs=0.05)
    metrics = ReconstructionMetrics(3)
    metrics.update(right, 0)
    metrics.update(small, 0)
    metrics.update(SurfaceScores(iou=0.5), 2)
    mean, classes, clouds = metrics.compute()
    assert clouds.tolist() == [2, 0, 1]
    assert mean.iou == pytest.approx((1 + small.iou + 0.5) / 3)
    assert np.isnan(mean.chamfer_l1)
    assert classes["iou"].tolist() == pytest.approx([(1 + small.iou) / 2, np.nan, 0.5], nan_ok=True)


def test_rooms_are_scored_without_the_outside_of_their_walls() -> None:
    """The prediction has a shell around the room, open above."""
    true, normals = box(-0.3, 0.3).sample(3000)
    shell = box(-0.4, 0.4)
    room = box(-0.3, 0.3)
    both = Mesh(torch.cat([room.vertices, shell.vertices]), torch.cat([room.faces, shell.faces + 8]))
    space, inside = torch.zeros(1, 3), torch.ones(1)
    with_walls = mesh_scores(both, true, normals, space, inside, 3000)
    without = mesh_scores(both, true, normals, space, inside, 3000, room=True)
    top = mesh_scores(
        Mesh(shell.vertices + torch.tensor([0, 0.6, 0]), shell.faces), true, normals, space, inside, 3000, room=True
    )
    assert with_walls.accuracy > 0.05
    assert without.accuracy < 0.03
    assert top.accuracy > 0.3  # y is not bounded above
