"""Assignment, anchors, memory and centres of the clustering loss against their definitions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from pc3d import InputError
from pc3d.config import instantiate
from pc3d.losses import ClusterContrast
from pc3d.losses.cluster_contrast import balanced_assignment, select_anchors


def plain_assignment(share: np.ndarray, exponent: float = 25.0, tolerance: float = 0.1) -> np.ndarray:
    """Sinkhorn-Knopp on plain numbers."""
    matrix = share.T**exponent
    rows, columns = len(matrix), len(share)
    c, change, step = np.full(columns, 1 / columns), 1.0, 0
    while change > tolerance:
        r = 1 / rows / (matrix @ c)
        new = 1 / columns / (matrix.T @ r)
        if step % 10 == 0:
            change = np.abs(c / new - 1).sum()
        c, step = new, step + 1
    return (r[:, None] * matrix * c).argmax(0)


def log_share(points: int, clusters: int, seed: int) -> Tensor:
    return torch.randn(
        points, clusters, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).log_softmax(1)


@pytest.mark.parametrize("seed", range(20))
def test_assignment_equals_plain_sinkhorn(seed: int) -> None:
    shapes = [(20, 6), (7, 3), (40, 4)]
    problems = [log_share(*shape, seed) for shape in shapes]
    padded = torch.full((3, 40, 6), -torch.inf, dtype=torch.float64)
    for i, problem in enumerate(problems):
        padded[i, : len(problem), : problem.shape[1]] = problem
    sizes, clusters = torch.tensor(shapes).T
    labels = balanced_assignment(padded, sizes, clusters)
    for i, problem in enumerate(problems):
        assert labels[i, : len(problem)].tolist() == plain_assignment(problem.exp().numpy()).tolist()


def test_assignment_survives_a_sharp_exponent() -> None:
    share = torch.tensor([[[0.0, -50.0], [-1e-9, -40.0], [0.0, -60.0], [-0.1, -30.0]]], dtype=torch.float64)
    labels = balanced_assignment(share, torch.tensor([4]), torch.tensor([2]), exponent=100.0)
    assert labels[0].bincount().tolist() == [2, 2]  # plain numbers underflow to 0 / 0 here


def test_anchor_budget() -> None:
    target = torch.tensor([0] * 50 + [1] * 50 + [2] * 3 + [-1] * 20)
    prediction = target.clone()
    prediction[:4], prediction[50:90], prediction[100] = 5, 5, 5
    rows = select_anchors(target, prediction, budget=60, num_classes=6)
    chosen, right = target[rows], (target == prediction)[rows]
    assert rows.unique().numel() == len(rows)
    assert chosen.bincount().tolist() == [20, 20, 3]
    assert (~right)[chosen == 0].sum() == 4  # few wrong ones: all, then right ones
    assert (~right)[chosen == 1].sum() == 10  # enough of both: half and half
    assert chosen.tolist() == sorted(chosen.tolist())


def loss(**options: object) -> ClusterContrast:
    made = ClusterContrast(**{"clusters": 3, "projection": (8, 4), "memory": 5, "memory_step": 2, **options})
    torch.manual_seed(0)
    made.build(6, 4)
    return made


def batch(count: int = 200, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    feat = torch.randn(count, 6, generator=generator)
    return feat, *torch.randint(0, 4, (2, count), generator=generator)


def test_memory_holds_embeddings_of_its_subclass() -> None:
    contrast = loss(projection=())
    seen: dict[int, list[Tensor]] = {}
    for step in range(6):
        feat, target, prediction = batch(seed=step)
        state = torch.get_rng_state()
        rows = select_anchors(target, prediction, 100, 4)
        anchors = F.normalize(feat[rows], dim=1)
        for row, label in zip(anchors, contrast.assign(anchors, target[rows]).tolist(), strict=True):
            seen.setdefault(label, []).append(row)
        torch.set_rng_state(state)
        contrast(feat, target, prediction)
        assert bool((contrast.memory_count <= 5).all())
        for label, count in enumerate(contrast.memory_count.tolist()):
            for row in contrast.memory[label, :count]:
                assert (torch.stack(seen[label]) - row).abs().sum(1).min() < 1e-6
    assert contrast.memory_count.max() == 5  # rings went round: 2 rows a step into 5
    assert contrast.memory_next[contrast.memory_count == 5].tolist().count(2) > 0


def test_eval_mode_and_empty_targets_leave_the_state_alone() -> None:
    contrast = loss()
    before = {name: value.clone() for name, value in contrast.state_dict().items()}
    contrast.eval()(*batch())
    assert all(torch.equal(value, before[name]) for name, value in contrast.state_dict().items())
    contrast.train()
    feat, target, prediction = batch()
    value = contrast(feat.requires_grad_(), torch.full_like(target, -1), prediction)
    value.backward()
    assert value == 0
    assert feat.grad is not None
    assert not feat.grad.any()
    torch.testing.assert_close(contrast.centers, before["centers"])
    assert not contrast.memory_count.any()


def test_state_survives_a_checkpoint() -> None:
    contrast, again = loss(), loss()
    contrast(*batch())
    again.load_state_dict(contrast.state_dict())
    torch.manual_seed(3)
    first = contrast(*batch(seed=2))
    torch.manual_seed(3)
    assert torch.equal(again(*batch(seed=2)), first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features(dtype: torch.dtype) -> None:
    contrast = loss(projection=())
    feat, target, prediction = batch()
    feat = feat.to(dtype).requires_grad_()
    contrast(feat, target, prediction).backward()
    assert feat.grad is not None
    assert feat.grad.isfinite().all()
    assert feat.grad.any()


def test_one_point_and_one_cluster() -> None:
    contrast = loss(clusters=1, projection=())
    feat = torch.randn(1, 6, requires_grad=True)
    value = contrast(feat, torch.tensor([2]), torch.tensor([0]))
    value.backward()
    assert value.isfinite()
    assert feat.grad is not None
    assert feat.grad.isfinite().all()


def test_training_separates_subclasses() -> None:
    contrast = loss(projection=(), momentum=0.9, temperature=0.1)
    feat, target, prediction = batch(80)
    feat.requires_grad_()
    optimizer = torch.optim.SGD([feat], lr=10.0)
    first = None
    for _ in range(100):
        optimizer.zero_grad()
        value = contrast(feat, target, prediction)
        value.backward()
        optimizer.step()
        first = value.item() if first is None else first
    assert value.item() < 0.7 * first


def test_config_round_trip_and_bad_values() -> None:
    config = loss(class_clusters={1: 2}).to_config()
    again = instantiate(json.loads(json.dumps(config)))
    assert again.to_config() == config
    assert again.class_clusters == {1: 2}
    with pytest.raises(InputError, match="clusters is 0"):
        ClusterContrast(clusters=0)
    with pytest.raises(InputError, match="class_clusters"):
        loss(class_clusters={9: 2})


def _process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    contrast = loss(projection=(), anchors=1000)
    contrast(*batch(30 if rank else 50, seed=rank))
    torch.save(contrast.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_share_centers_and_memory(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.testing.assert_close(first["centers"], second["centers"])
    assert torch.equal(first["memory_count"], second["memory_count"])
    alone = loss(projection=(), anchors=1000)
    parts = [batch(50, seed=0), batch(30, seed=1)]
    anchors, subclass = zip(*(_assigned(alone, *part) for part in parts), strict=True)
    torch.testing.assert_close(first["centers"], alone.moved_centers(torch.cat(anchors), torch.cat(subclass)))


def _assigned(contrast: ClusterContrast, feat: Tensor, target: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
    rows = select_anchors(target, prediction, 1000, 4)
    anchors = F.normalize(feat[rows], dim=1)
    return anchors, contrast.assign(anchors, target[rows])
