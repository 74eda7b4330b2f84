"""What PointSP's sampling is for: a trained network that outliers do not confuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pc3d.cli import main

CONFIG = Path(__file__).parents[2] / "configs" / "synthetic_shapes" / "cls-pct-tiny.yaml"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_filtered_sampling_withstands_outliers_and_costs_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    common = ["--trainer.accelerator", "cpu", "--data.cache", str(tmp_path / "cache")]
    assert main(["train", "--config", str(CONFIG), "--run_dir", str(run), "--test", "false", *common]) == 0

    def figures(rule: str) -> dict[str, Any]:
        out = tmp_path / f"{rule}.json"
        command = ["robustness", "--ckpt", str(run / "checkpoints" / "last.ckpt"), "-o", str(out)]
        command += ["--corruptions", "impulse", "background", "--", *common]
        overrides = ["--data.dataset.init_args.test", "420", "--model.backbone.inference_rule", rule]
        assert main([*command, *overrides]) == 0
        return json.loads(out.read_text())

    filtered, farthest = figures("filtered"), figures("farthest")
    assert farthest["clean"] > 0.75
    assert filtered["clean"] >= farthest["clean"] - 0.005
    for name in ("impulse", "background"):
        gains = [filtered["accuracy"][name][s] - farthest["accuracy"][name][s] for s in "12345"]
        assert sum(gains) / 5 >= 0.03, name
