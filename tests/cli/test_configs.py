"""Every config of the repository parses and builds its model; no data is needed for that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pc3d.cli.experiment import Experiment, check_configs
from pc3d.cli.runs import plan_run

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_config_builds_its_model(config: Path, tmp_path: Path) -> None:
    arguments = ["--config", str(config), "--run_dir", str(tmp_path / "run")]
    if not config.parent.name.startswith("synthetic"):  # made by procedure: it has no folder
        arguments += ["--data.root", str(tmp_path)]
    check_configs(arguments)
    with torch.device("meta"):  # nothing is computed: the weights need no memory and no start values
        experiment = Experiment(arguments, lambda parsed: plan_run(config, parsed["run_dir"], None))
    assert sum(weight.numel() for weight in experiment.model.parameters() if weight.requires_grad) > 10_000
