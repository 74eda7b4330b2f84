"""Parameter groups, schedules against their formulas and torch's own, and options that do not belong."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from pc3d import InputError
from pc3d.tasks.optim import (
    OptimizerConfig,
    ParameterGroup,
    ScheduleConfig,
    build_optimizer,
    build_schedule,
    freeze_parameters,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(2, 3)
        self.block0 = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.block1 = nn.Linear(3, 3)


def names_of(optimizer: torch.optim.Optimizer, net: nn.Module) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def rates(
    config: ScheduleConfig, steps: int, optimizer_config: OptimizerConfig | None = None, epochs: int | None = None
) -> list[list[float]]:
    """Rates of all groups at each of the optimizer steps."""
    optimizer = build_optimizer(optimizer_config or OptimizerConfig(lr=1.0), Net().named_parameters())
    schedule = build_schedule(config, optimizer, steps, epochs)
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return seen


def test_first_matching_group_takes_a_parameter() -> None:
    net = Net()
    groups = [ParameterGroup("block1", lr=1e-4), ParameterGroup("block", lr=1e-5, weight_decay=0.0)]
    optimizer = build_optimizer(OptimizerConfig(lr=1e-3, weight_decay=0.05, groups=groups), net.named_parameters())
    assert names_of(optimizer, net) == [
        ["stem.weight", "stem.bias"],
        ["block1.weight", "block1.bias"],
        ["block0.0.weight", "block0.0.bias", "block0.1.weight", "block0.1.bias"],
    ]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-4, 1e-5]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.05, 0.0]


def test_adam_decays_by_the_gradient() -> None:
    config = OptimizerConfig("adam", lr=0.1, weight_decay=0.5, betas=(0.8, 0.9))
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = build_optimizer(config, [("weight", parameter)])
    parameter.grad = torch.tensor([-1.0])
    optimizer.step()  # gradient -1 + 0.5 * 2 = 0: decoupled decay would shrink the weight
    assert parameter.item() == 2.0
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


def test_sgd_has_nesterov_momentum() -> None:
    optimizer = build_optimizer(OptimizerConfig("sgd", lr=0.05, weight_decay=1e-4), Net().named_parameters())
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["nesterov"] is True
    assert optimizer.defaults["momentum"] == 0.9
    plain = build_optimizer(OptimizerConfig("sgd", lr=0.05, momentum=0.0), Net().named_parameters())
    assert plain.defaults["nesterov"] is False


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizerConfig("adamw", momentum=0.9), "'adamw' has no option 'momentum' .it has: betas"),
        (lambda: OptimizerConfig("sgd", betas=(0.9, 0.99)), "'sgd' has no option 'betas'"),
        (lambda: OptimizerConfig("rmsprop"), "'rmsprop' is unknown .known: adamw, adam, sgd"),
        (lambda: OptimizerConfig(lr=-1), "optimizer.lr is -1"),
        (lambda: OptimizerConfig(groups=[ParameterGroup("a", weight_decay=-2)]), r"groups\[a\].weight_decay is -2"),
        (lambda: ScheduleConfig("poly", pct_start=0.1), "'poly' has no option 'pct_start' .it has: power, warmup"),
        (lambda: ScheduleConfig("onecycle", warmup=0.1), "'onecycle' has no option 'warmup'"),
        (lambda: ScheduleConfig("cosine", min_lr=1e-6), "'cosine' has no option 'min_lr'"),
        (lambda: ScheduleConfig("epoch_cosine", min_lr=-1), r"schedule\.min_lr is -1"),
        (lambda: ScheduleConfig("cosine", warmup=3), "schedule.warmup is 3: it is a fraction"),
        (lambda: ScheduleConfig("multistep", milestones=[0.8, 0.2]), "must rise"),
    ],
)
def test_options_that_do_not_belong_are_refused(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_group_pattern_without_a_parameter_is_an_error() -> None:
    with pytest.raises(InputError, match=r"no parameter name contains 'blok' \(names: stem.weight"):
        build_optimizer(OptimizerConfig(groups=[ParameterGroup("blok")]), Net().named_parameters())


def test_poly_matches_the_formula() -> None:
    seen = rates(ScheduleConfig("poly", power=0.9), 20)
    assert [r[0] for r in seen] == pytest.approx([(1 - t / 21) ** 0.9 for t in range(20)])


def test_onecycle_is_torchs_with_one_peak_per_group() -> None:
    groups = OptimizerConfig(lr=6e-3, groups=[ParameterGroup("block", lr=6e-4)])
    seen = rates(ScheduleConfig("onecycle", pct_start=0.3, div_factor=10, final_div_factor=100), 20, groups)
    parameter = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    reference_optimizer = torch.optim.AdamW([{"params": [p]} for p in parameter], lr=1.0)
    reference = OneCycleLR(
        reference_optimizer, [6e-3, 6e-4], 20, pct_start=0.3, anneal_strategy="cos", div_factor=10, final_div_factor=100
    )
    for values in seen:
        assert values == pytest.approx([group["lr"] for group in reference_optimizer.param_groups])
        reference_optimizer.step()
        reference.step()
    assert seen[0] == pytest.approx([6e-4, 6e-5])
    assert max(values[0] for values in seen) == pytest.approx(6e-3, rel=0.02)
    assert seen[-1] == pytest.approx([6e-6, 6e-7])


def test_onecycle_max_lr_list_must_fit_the_groups() -> None:
    groups = OptimizerConfig(groups=[ParameterGroup("block")])
    assert max(r[1] for r in rates(ScheduleConfig(max_lr=[1.0, 0.5]), 50, groups)) == pytest.approx(0.5, rel=0.02)
    with pytest.raises(InputError, match=r"max_lr has 1 values for 2 groups \(rest, block\)"):
        rates(ScheduleConfig(max_lr=[1.0]), 50, groups)


def test_cosine_with_warmup() -> None:
    seen = [r[0] for r in rates(ScheduleConfig("cosine", warmup=0.2, min_factor=0.1), 50)]
    assert seen[:10] == pytest.approx([(t + 1) / 11 for t in range(10)])
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * t / 40)) for t in range(40)]
    assert seen[10:] == pytest.approx(expected)


def test_epoch_cosine_has_the_published_rates() -> None:
    """Of Point-BERT, Point-MAE and Point-PQAE; 300 epochs of 3 steps."""
    groups = OptimizerConfig(lr=5e-4, groups=[ParameterGroup("block", lr=5e-3)])
    seen = rates(ScheduleConfig("epoch_cosine", warmup=0.0333, min_lr=1e-6), 900, groups, epochs=300)
    assert all(seen[3 * e] == seen[3 * e + 1] == seen[3 * e + 2] for e in range(300))
    cosines = {11: 0.9972609476841367, 151: 0.5, 299: 1.0965804991562e-4}  # of 10, 150 and 298 epochs
    for epoch, rise in {0: 0.0, 1: 0.0, 2: 0.1, 10: 0.9, **cosines}.items():
        expected = [1e-6 + (lr - 1e-6) * rise for lr in (5e-4, 5e-3)]
        assert seen[3 * epoch] == pytest.approx(expected, rel=1e-6), epoch
    with pytest.raises(InputError, match=r"needs the number of epochs: set trainer\.max_epochs"):
        rates(ScheduleConfig("epoch_cosine"), 5)
    assert [r[0] for r in rates(ScheduleConfig("epoch_cosine"), 1, epochs=1)] == [1.0]


def test_multistep_drops_at_fractions_of_the_run() -> None:
    seen = [r[0] for r in rates(ScheduleConfig("multistep", milestones=[0.5, 0.9], gamma=0.1), 20)]
    assert seen == pytest.approx([1.0] * 10 + [0.1] * 8 + [0.01] * 2)


def test_constant() -> None:
    assert [r[0] for r in rates(ScheduleConfig("constant"), 5)] == [1.0] * 5


@pytest.mark.parametrize("name", ["onecycle", "poly", "cosine", "multistep", "constant"])
def test_a_run_of_one_step(name) -> None:
    assert math.isfinite(rates(ScheduleConfig(name), 1)[0][0])


def test_frozen_modules_and_their_parameters_are_left_out() -> None:
    net = Net()
    frozen = freeze_parameters(net, ["block0", r"^stem\.bias"])
    assert net.block0 in frozen
    assert net.stem not in frozen
    optimizer = build_optimizer(OptimizerConfig(), net.named_parameters())
    assert names_of(optimizer, net) == [["stem.weight", "block1.weight", "block1.bias"]]
    with pytest.raises(InputError, match="freeze: no parameter name contains 'encoder'"):
        freeze_parameters(net, ["encoder"])
    freeze_parameters(net, ["."])
    with pytest.raises(InputError, match="every parameter is frozen"):
        build_optimizer(OptimizerConfig(), net.named_parameters())
