"""What holds for every loss, and each one against its definition."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch.nn import functional as F

from pc3d import InputError
from pc3d.config import instantiate
from pc3d.losses import CrossEntropy, Focal, Loss, Lovasz
from pc3d.losses import lovasz as lovasz_module

K = 5
WEIGHTS = [1.0, 2.0, 0.5, 3.0, 0.25]
LOSSES = [
    CrossEntropy(),
    CrossEntropy(loss_weight=0.5, weight=WEIGHTS, label_smoothing=0.1),
    Lovasz(loss_weight=2.0),
    Focal(),
    Focal(gamma=0.5, weight=WEIGHTS),
]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda x: type(x).__name__)


def problem(n: int = 200, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, K, generator=generator) * 2
    return logits.requires_grad_(), torch.randint(-1, K, (n,), generator=generator)


@every_loss
def test_config_round_trip(loss: Loss) -> None:
    again = instantiate(json.loads(json.dumps(loss.to_config())))
    logits, target = problem()
    assert again(logits, target) == loss(logits, target)
    assert not again.state_dict()  # class weights come from the config, not from the checkpoint


@every_loss
@pytest.mark.parametrize("n", [0, 7])
def test_all_ignored_is_zero_with_zero_gradient(loss: Loss, n: int) -> None:
    logits, _ = problem(n)
    result = loss(logits, torch.full((n,), -1))
    result.backward()
    assert result.item() == 0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@every_loss
def test_ignored_points_do_not_count(loss: Loss) -> None:
    logits, target = problem()
    kept = target >= 0
    torch.testing.assert_close(loss(logits, target), loss(logits[kept], target[kept]))
    loss(logits, target).backward()
    assert torch.equal(logits.grad[~kept], torch.zeros_like(logits[~kept]))


@every_loss
def test_another_ignore_index(loss: Loss) -> None:
    logits, target = problem()
    config = loss.to_config()
    config["init_args"]["ignore_index"] = 255
    other = instantiate(config)
    assert other(logits, torch.where(target < 0, 255, target)) == loss(logits, target)


@every_loss
def test_loss_weight_is_a_factor(loss: Loss) -> None:
    logits, target = problem()
    config = loss.to_config()
    config["init_args"]["loss_weight"] = 3 * loss.loss_weight
    torch.testing.assert_close(instantiate(config)(logits, target), 3 * loss(logits, target))


@every_loss
def test_perfect_prediction_is_cheap_and_finite(loss: Loss) -> None:
    target = torch.arange(K).repeat(10)
    logits = (F.one_hot(target, K) * 200.0).requires_grad_()
    result = loss(logits, target)
    result.backward()
    if not getattr(loss, "label_smoothing", 0):
        assert result.item() < 1e-5
    assert torch.isfinite(logits.grad).all()


@every_loss
def test_half_precision_logits_are_computed_in_float32(loss: Loss) -> None:
    logits, target = problem()
    half = logits.detach().bfloat16()
    result = loss(half, target)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, loss(half.float(), target))


@every_loss
def test_gradient(loss: Loss) -> None:
    logits, target = problem(30)
    loss(logits, target).backward()
    step = 1e-2
    for row, column in itertools.product((0, 7, 21), range(2)):
        up, down = logits.detach().clone(), logits.detach().clone()
        up[row, column] += step
        down[row, column] -= step
        slope = (loss(up, target) - loss(down, target)) / (2 * step)
        assert logits.grad[row, column].item() == pytest.approx(slope.item(), abs=2e-4)


@every_loss
def test_classes_out_of_range_are_named(loss: Loss) -> None:
    logits, target = problem()
    target[3] = 41
    with pytest.raises(InputError, match=r"target holds class 41 \(1 points outside 0..4"):
        loss(logits, target)


@every_loss
def test_shapes_are_checked(loss: Loss) -> None:
    logits, target = problem()
    with pytest.raises(ValueError, match="logits must be"):
        loss(logits, target[:-1])


@pytest.mark.parametrize("make", [CrossEntropy, Focal])
def test_number_of_class_weights_is_checked(make: type[CrossEntropy] | type[Focal]) -> None:
    with pytest.raises(InputError, match="2 class weights for 5 classes"):
        make(weight=[1.0, 2.0])(*problem())


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [None, WEIGHTS])
def test_cross_entropy_is_the_mean_of_torch(label_smoothing: float, weight: list[float] | None) -> None:
    logits, target = problem()
    factors = None if weight is None else torch.tensor(weight)
    expected = F.cross_entropy(logits, target, factors, ignore_index=-1, label_smoothing=label_smoothing)
    torch.testing.assert_close(CrossEntropy(weight=weight, label_smoothing=label_smoothing)(logits, target), expected)


def jaccard_loss(wrong: set[int], truth: set[int]) -> float:
    """1 - IoU of the prediction that differs from ``truth`` in the points ``wrong``."""
    return 1 - len(truth - wrong) / len(truth | wrong) if truth | wrong else 0.0


def lovasz_by_definition(logits: torch.Tensor, target: torch.Tensor) -> float:
    keep = target >= 0
    p, y = logits[keep].double().softmax(1), target[keep]
    losses = []
    for c in y.unique().tolist():
        truth = set((y == c).nonzero()[:, 0].tolist())
        errors = torch.where(y == c, 1 - p[:, c], p[:, c])
        order = errors.argsort(descending=True).tolist()
        sets = [set(order[:i]) for i in range(len(order) + 1)]
        growth = [
            jaccard_loss(after, truth) - jaccard_loss(before, truth) for before, after in itertools.pairwise(sets)
        ]
        losses.append(sum(errors[i].item() * g for i, g in zip(order, growth, strict=True)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("n", [1, 2, 40])
def test_lovasz_equals_its_definition(n: int) -> None:
    for seed in range(5):
        logits, target = problem(n, seed)
        target[0] = 2
        assert Lovasz()(logits, target).item() == pytest.approx(lovasz_by_definition(logits, target), abs=1e-5)


def test_lovasz_of_hard_predictions_is_one_minus_iou() -> None:
    _, target = problem()
    _, wrong = problem(seed=9)
    pred = torch.where(torch.arange(200) % 3 == 0, wrong.clamp(min=0), target.clamp(min=0))
    ious = []
    for c in range(K):
        hit = ((pred == c) & (target == c)).sum()
        ious.append(hit / (((pred == c) & (target >= 0)) | (target == c)).sum())
    expected = 1 - sum(ious) / K
    result = Lovasz()(F.one_hot(pred, K) * 200.0, target)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


def test_lovasz_averages_over_present_classes() -> None:
    logits, target = problem()
    target[target >= 2] = 0
    absent_last = torch.cat([logits, torch.full((200, 3), -1e4)], 1)
    torch.testing.assert_close(Lovasz()(absent_last, target), Lovasz()(logits, target))


def test_lovasz_sorts_in_blocks_of_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = problem()
    whole = Lovasz()(logits, target)
    monkeypatch.setattr(lovasz_module, "_SORTED_AT_ONCE", 2 * 200)
    torch.testing.assert_close(Lovasz()(logits, target), whole, rtol=0, atol=0)


def test_lovasz_growth_keeps_its_precision_on_large_clouds() -> None:
    n = 1_000_000
    truth = torch.rand(1, n, generator=torch.Generator().manual_seed(0)) < 0.3
    growth = lovasz_module.jaccard_growth(torch.linspace(1, 0, n)[None], truth).double()
    assert growth.sum().item() == pytest.approx(1, abs=1e-4)
    positives = truth.sum().double()
    found = truth.double().cumsum(1)
    jaccard = 1 - (positives - found) / (positives + torch.arange(1, n + 1, dtype=torch.float64) - found)
    torch.testing.assert_close(growth[:, 1:], jaccard.diff(), rtol=1e-4, atol=0)


def test_focal_equals_its_definition() -> None:
    logits, target = problem()
    keep = target >= 0
    p = logits[keep].softmax(1).gather(1, target[keep, None])[:, 0]
    weights = torch.tensor(WEIGHTS)[target[keep]]
    expected = (-weights * (1 - p) ** 3 * p.log()).mean()
    torch.testing.assert_close(Focal(gamma=3.0, weight=WEIGHTS)(logits, target), expected)


def test_focal_without_focus_is_cross_entropy() -> None:
    logits, target = problem()
    torch.testing.assert_close(Focal(gamma=0.0)(logits, target), CrossEntropy()(logits, target))


@pytest.mark.gpu
@every_loss
def test_cuda_gives_the_cpu_result(loss: Loss) -> None:
    logits, target = problem()
    torch.testing.assert_close(loss.to("cuda")(logits.cuda(), target.cuda()).cpu(), loss.to("cpu")(logits, target))
