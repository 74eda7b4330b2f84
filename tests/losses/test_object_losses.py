"""Dice, polynomial focal loss and the losses of completed clouds, against their formulas written out."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pc3d.config import instantiate
from pc3d.losses import Chamfer, CrossEntropy, DensityAwareChamfer, Dice, PolyFocal
from pc3d.ops.point_sets import chamfer_distance, earth_mover_distance


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(-1, 4, (30,), generator=generator)
    return torch.randn(30, 4, generator=generator), target, torch.tensor([0, 12, 30])


def test_dice_is_the_mean_over_clouds() -> None:
    logits, target, offsets = batch()
    expected = []
    for begin, end in itertools.pairwise(offsets.tolist()):
        rows = [i for i in range(begin, end) if target[i] >= 0]
        for k in range(4):
            p = [float(logits[i].double().softmax(0)[k]) for i in rows]
            y = [float(target[i] == k) for i in rows]
            shared, total = sum(a * b for a, b in zip(p, y, strict=True)), sum(a * a for a in p) + sum(y)
            expected.append(1 - 2 * shared / total)
    loss = Dice().of_clouds(logits, target, offsets)
    assert float(loss) == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    whole = Dice()(logits, target)
    assert float(whole) != pytest.approx(float(loss), rel=1e-4)
    plain = CrossEntropy().of_clouds(logits, target, offsets)
    assert torch.equal(plain, CrossEntropy()(logits, target))
    right = torch.nn.functional.one_hot(target.clamp(min=0), 4).float() * 60
    assert float(Dice()(right, target)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.25, None])
def test_poly_focal_by_hand(alpha: float | None) -> None:
    logits, target, _ = batch(1)
    total, count = 0.0, 0
    for row, truth in zip(logits.double().tolist(), target.tolist(), strict=True):
        if truth < 0:
            continue
        for k, value in enumerate(row):
            p = 1 / (1 + math.exp(-value))
            p_t = p if k == truth else 1 - p
            weight = 1.0 if alpha is None else (alpha if k == truth else 1 - alpha)
            total += weight * (1 - p_t) ** 2 * -math.log(p_t) + 0.7 * (1 - p_t) ** 3
            count += 1
    loss = PolyFocal(alpha=alpha, epsilon=0.7)(logits, target)
    assert float(loss) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("loss", [Dice(), PolyFocal()])
def test_ignored_points_have_no_gradient(loss: torch.nn.Module) -> None:
    logits = torch.randn(8, 3, requires_grad=True)
    loss(logits, torch.full((8,), -1)).backward()
    assert logits.grad is not None
    assert (logits.grad == 0).all()
    target = torch.tensor([0, -1, 1, 2, -1, 0, 1, 2])
    logits.grad = None
    loss(logits, target).backward()
    assert (logits.grad[target < 0] == 0).all()
    assert (logits.grad[target >= 0] != 0).any()


def test_completion_losses_are_means_over_clouds_with_their_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    made, wanted = torch.rand(24, 3, generator=generator), torch.rand(30, 3, generator=generator)
    borders = torch.tensor([0, 10, 24]), torch.tensor([0, 18, 30])
    expected = []
    for i in range(2):
        a, b = made[borders[0][i] : borders[0][i + 1]], wanted[borders[1][i] : borders[1][i + 1]]
        distance = torch.cdist(a.double(), b.double())
        expected.append(((distance.amin(1) ** 2).mean() + (distance.amin(0) ** 2).mean()) / 2)
    loss = Chamfer(loss_weight=3.0)(made, borders[0], wanted, borders[1])
    assert float(loss) == pytest.approx(3 * float(torch.stack(expected).mean()), rel=1e-5)
    assert float(DensityAwareChamfer()(made, borders[0], made, borders[0])) == pytest.approx(0, abs=1e-4)
    for config in (DensityAwareChamfer(0.5, alpha=20.0).to_config(), Chamfer(squared=False).to_config()):
        assert instantiate(config).to_config() == config


def test_earth_mover_is_the_best_assignment() -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        a, b = torch.rand(6, 3, generator=generator), torch.rand(6, 3, generator=generator)
        best = min(
            sum(float((a[i] - b[j]).norm()) for i, j in enumerate(order)) for order in itertools.permutations(range(6))
        )
        assert float(earth_mover_distance(a, b)) == pytest.approx(best / 6, rel=1e-5)
        offsets = torch.tensor([0, 6])
        assert float(chamfer_distance(a, offsets, b, offsets, squared=False)) <= best / 6 + 1e-6
    with pytest.raises(ValueError, match="one-to-one"):
        earth_mover_distance(torch.rand(3, 3), torch.rand(4, 3))
