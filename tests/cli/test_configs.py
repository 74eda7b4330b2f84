"""Every config of the repository parses and builds its model; no data is needed for that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pc3d.cli.experiment import Experiment
from pc3d.cli.runs import plan_run
from pc3d.tasks.base import PointTask
from pc3d.tasks.optim import build_optimizer

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_config_builds_its_model(config: Path, tmp_path: Path) -> None:
    arguments = ["--config", str(config), "--run_dir", str(tmp_path / "run")]
    if not config.parent.name.startswith("synthetic"):  # made by procedure: it has no folder
        arguments += ["--data.root", str(tmp_path)]
    with torch.device("meta"):  # nothing is computed: the weights need no memory and no start values
        experiment = Experiment(arguments, lambda parsed: plan_run(config, parsed["run_dir"], None))
    assert sum(weight.numel() for weight in experiment.model.parameters() if weight.requires_grad) > 10_000
    if experiment.model.schedule_config.name == "epoch_cosine":  # the recipe of Point-BERT and its successors
        check_decay(experiment.model)


def check_decay(task: PointTask) -> None:
    """No weight decay of vectors and tokens; a group of its own for the head, if there is one, decays whole."""
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    rest, *groups = build_optimizer(task.optimizer_config, task.named_parameters()).param_groups
    for group in (rest, *groups):
        head = group["lr"] == 10 * rest["lr"]
        for parameter in group["params"]:
            free = parameter.ndim == 1 or names[id(parameter)].endswith("token")
            assert (group["weight_decay"] == 0) == (free and not head), names[id(parameter)]
    assert max(group["weight_decay"] for group in (rest, *groups)) > 0
