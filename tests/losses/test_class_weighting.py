"""Class weights from counts: their formulas, and how training puts them into a loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pc3d import InputError
from pc3d.cli.experiment import Experiment
from pc3d.cli.runs import Run
from pc3d.config import instantiate
from pc3d.losses import ClassWeighting, CrossEntropy, Focal

TINY = Path(__file__).parents[1] / "cli" / "tiny.yaml"
COUNTS = torch.tensor([1000, 10, 0, 250])


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999, 1 - 1e-7])
def test_effective_number(beta: float) -> None:
    weights = ClassWeighting("effective", beta).weights(COUNTS).tolist()
    raw = [(1 - beta) / (1 - beta**n) for n in (1000, 10, 250)]
    mean = sum(raw) / 3
    assert weights == pytest.approx([raw[0] / mean, raw[1] / mean, 0, raw[2] / mean], rel=1e-5)


@pytest.mark.parametrize(("scheme", "power"), [("inverse", 1), ("inverse_sqrt", 0.5), ("inverse_cbrt", 1 / 3)])
def test_powers(scheme: str, power: float) -> None:
    weights = ClassWeighting(scheme).weights(COUNTS)
    assert float(weights[1] / weights[0]) == pytest.approx(100**power)
    assert float(weights[3] / weights[0]) == pytest.approx(4**power)
    assert weights[2] == 0
    assert float(weights.sum()) == pytest.approx(3)


def test_limits_of_beta() -> None:
    inverse = ClassWeighting("inverse").weights(COUNTS)
    torch.testing.assert_close(ClassWeighting("effective", 1 - 1e-12).weights(COUNTS), inverse, rtol=1e-4, atol=0)
    assert ClassWeighting("effective", 0.0).weights(COUNTS).tolist() == [1, 1, 0, 1]
    assert ClassWeighting("inverse").weights(torch.zeros(3).long()).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "options", [{"scheme": "sqrt"}, {"scheme": "effective", "beta": 1.0}, {"scheme": "inverse", "unit": "cells"}]
)
def test_options_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match="class weights"):
        ClassWeighting(**options)


@pytest.mark.parametrize("make", [CrossEntropy, Focal])
def test_a_loss_without_its_weights_says_so(make: type[CrossEntropy] | type[Focal]) -> None:
    loss = instantiate(json.loads(json.dumps(make(weight=ClassWeighting("inverse")).to_config())))
    assert loss.weighting == ClassWeighting("inverse")
    with pytest.raises(InputError, match="need training clouds"):
        loss(torch.zeros(3, 4), torch.zeros(3).long())
    loss.weight = loss.weighting.weights(COUNTS)
    assert torch.isfinite(loss(torch.zeros(3, 4), torch.tensor([0, 1, -1])))


def test_training_computes_the_weights(tmp_path: Path) -> None:
    weight = "{scheme: effective, beta: 0.99, unit: clouds}"
    criteria = f"[{{class_path: pc3d.losses.CrossEntropy, init_args: {{weight: {weight}}}}}]"
    arguments = ["--config", str(TINY), "--model.criteria", criteria, "--trainer.fast_dev_run", "true"]
    arguments += ["--data.balance", "classes"]
    experiment = Experiment(arguments, lambda _: Run(tmp_path / "run"))
    model, data = experiment.model, experiment.datamodule
    experiment.trainer.fit(model, datamodule=data)
    (loss,) = model.criteria
    expected = ClassWeighting("effective", 0.99, "clouds").weights(data.class_counts("clouds"))
    torch.testing.assert_close(loss.weight.cpu(), expected)
    assert experiment.saved_config()["model"]["criteria"][0]["init_args"]["weight"]["init_args"]["beta"] == 0.99
