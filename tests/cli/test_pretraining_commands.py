"""From a pre-training without labels to a fine-tuned classifier, on the command line."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pc3d.models.pretrain import PointMAE
from pc3d.tasks import Pretraining, load_task

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = ["--data.dataset.init_args.train", 8, "--data.dataset.init_args.val", 2, "--data.dataset.init_args.test", 1,
         "--data.batch_size", 4, "--trainer.max_epochs", 2, "--trainer.enable_progress_bar", "false",
         "--data.num_workers", 0, "--data.cache", "false"]  # fmt: skip
ONE_PICTURE = ["--trainer.callbacks+", "pc3d.tasks.callbacks.SavePictures", "--trainer.callbacks.clouds", 1,
               "--test", "false"]  # fmt: skip
QUICK = ["--test", "false", "--trainer.callbacks+", "pc3d.tasks.callbacks.SavePictures",
         "--trainer.callbacks.clouds", 0]  # fmt: skip


@pytest.mark.parametrize("method", ["point-mae", pytest.param("point-pqae", marks=pytest.mark.slow)])
def test_pretrain_and_fine_tune(method: str, pc3d: Any, tmp_path: Path) -> None:
    config = CONFIGS / "synthetic_shapes" / f"pretrain-{method}-tiny.yaml"
    result = pc3d("train", "--config", config, "--run_dir", tmp_path / "pre", *SMALL, *ONE_PICTURE)
    assert result.status == 0, result.err
    assert "fine-tune it" in result.out
    checkpoint = tmp_path / "pre" / "checkpoints" / "last.ckpt"
    assert list((tmp_path / "pre" / "pictures").glob("val-*.png"))
    task, _, card = load_task(checkpoint)
    assert isinstance(task, Pretraining)
    assert card["metrics"]["val/loss"] == pytest.approx(float(card["metrics"]["val/loss"]))

    downstream = CONFIGS / "synthetic_shapes" / "cls-pretrained-tiny.yaml"
    tuned = pc3d("train", "--config", downstream, "--run_dir", tmp_path / "tuned",
                 "--init_from", checkpoint, *SMALL, *QUICK, "--model.init_args.optimizer.lr", 0)  # fmt: skip
    assert tuned.status == 0, tuned.err
    before = torch.load(checkpoint, weights_only=True)["state_dict"]
    after = torch.load(tmp_path / "tuned" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    weights = [name for name in after if name.startswith("backbone.") and "running" not in name and "num_" not in name]
    assert weights
    assert all(torch.equal(before[name], after[name]) for name in weights)  # they began with the pre-trained ones

    probed = pc3d("probe", "--ckpt", checkpoint, "--config", downstream, "--", *SMALL)
    if importlib.util.find_spec("sklearn"):
        assert probed.status == 0, probed.err
        assert "test: OA" in probed.out
        for own, message in (
            (["--device", "abacus"], "error: --device abacus: not available here"),
            (["--C", "nan"], "error: --C nan must be positive"),
        ):
            refused = pc3d("probe", "--ckpt", checkpoint, "--config", downstream, *own, "--", *SMALL)
            assert (refused.status, message in refused.err) == (2, True), refused.err
        one = ["--data.dataset.init_args.train", 1]
        refused = pc3d("probe", "--ckpt", checkpoint, "--config", downstream, "--", *SMALL, *one)
        assert "the training clouds are of 1 class; a classifier needs two" in refused.err
    else:
        assert "needs scikit-learn" in probed.err

    refused = pc3d("predict", "chair.ply", "--ckpt", checkpoint, "-o", "labels.ply")
    assert refused.status != 0


def test_a_resumed_pretraining_ends_with_the_same_weights(
    pc3d: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    monkeypatch.setattr(PointMAE, "start", lambda method, backbone: started.append(backbone))
    config = yaml.safe_load((CONFIGS / "synthetic_shapes" / "pretrain-point-mae-tiny.yaml").read_text())
    config["model"]["init_args"]["schedule"] = {"name": "constant"}
    path = tmp_path / "pre.yaml"
    path.write_text(yaml.safe_dump(config))
    common = ["--config", path, *SMALL, *QUICK]
    assert pc3d("train", *common, "--run_dir", tmp_path / "whole").status == 0
    assert pc3d("train", *common, "--run_dir", tmp_path / "half", "--trainer.max_epochs", 1).status == 0
    last = tmp_path / "half" / "checkpoints" / "last.ckpt"
    assert pc3d("train", *common, "--ckpt_path", last).status == 0
    states = [
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in (tmp_path / "whole", tmp_path / "half")
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert len(started) == 2, "a resumed method is not started again: it would lose its momentum encoder"


@pytest.mark.slow
def test_point_bert_in_two_stages(pc3d: Any, tmp_path: Path) -> None:
    configs = CONFIGS / "synthetic_shapes"
    first = pc3d(
        "train", "--config", configs / "pretrain-point-bert-dvae-tiny.yaml", "--run_dir", tmp_path / "a", *SMALL
    )
    assert first.status == 0, first.err
    words = tmp_path / "a" / "checkpoints" / "last.ckpt"
    second = pc3d("train", "--config", configs / "pretrain-point-bert-tiny.yaml", "--run_dir", tmp_path / "b",
                  "--init_from", words, *SMALL, *QUICK)  # fmt: skip
    assert second.status == 0, second.err
    states = [torch.load(path, weights_only=True)["state_dict"] for path in
              (words, tmp_path / "b" / "checkpoints" / "last.ckpt")]  # fmt: skip
    assert torch.equal(states[0]["backbone.codebook"], states[1]["method.tokenizer.codebook"])
    task, _, _ = load_task(tmp_path / "b" / "checkpoints" / "last.ckpt")
    assert isinstance(task, Pretraining)
