"""From a published pre-trained encoder to a probed, partly frozen or fine-tuned network, by config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from pc3d.models import Sonata
from pc3d.models.convert import export_pointcept

TINY = Path(__file__).with_name("tiny.yaml")
ENCODER: dict[str, Any] = {
    "in_channels": 3,
    "stride": [2],
    "enc_depths": [1, 1],
    "enc_channels": [8, 12],
    "enc_num_head": [1, 2],
    "enc_patch_size": [64, 64],
    "drop_path": 0.3,
}
DECODER: dict[str, Any] = {
    "enc_mode": False,
    "dec_depths": [1],
    "dec_channels": [8],
    "dec_num_head": [1],
    "dec_patch_size": [64],
}


def write_config(path: Path, network: dict[str, Any], **model: Any) -> Path:
    """The tiny run with Sonata and other settings of the model, one epoch."""
    config = yaml.safe_load(TINY.read_text())
    config["trainer"] |= {"max_epochs": 1, "callbacks": [], "limit_val_batches": 0}
    settings = {name: value for name, value in network.items() if name != "in_channels"}
    config["model"] |= {"backbone": {"class_path": "pc3d.models.Sonata", "init_args": settings}, **model}
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A pre-training file: student, teacher and heads; and the student's weights."""
    torch.manual_seed(0)
    encoder = Sonata(**ENCODER, mask_token=True)
    state = {f"module.student.{name}": value for name, value in export_pointcept(encoder).items()}
    state |= {name.replace("student", "teacher"): value * 0 for name, value in state.items()}
    state["module.student.mask_head.weight"] = torch.zeros(3)
    torch.save({"state_dict": state, "epoch": 9}, tmp_path / "pretrained.pth")
    return tmp_path / "pretrained.pth", {f"backbone.{name}": value for name, value in encoder.state_dict().items()}


def changed(run: Path, before: dict[str, Tensor]) -> set[str]:
    """Names of the encoder's tensors that a run changed."""
    after = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}


def test_probing_and_fine_tuning(published: tuple[Path, dict[str, Tensor]], tmp_path: Path, pc3d) -> None:
    source, before = published
    ours = tmp_path / "encoder.safetensors"
    linear = write_config(tmp_path / "linear.yaml", ENCODER, freeze=[r"^backbone\."])
    assert pc3d("convert", source, ours, "--config", linear, "--layout", "krsc").status == 0

    def train(config: Path, *words: object) -> set[str]:
        words = ("--config", config, "--init_from", ours, "--run_dir", config.stem, "--test", "false", *words)
        outcome = pc3d("train", *words)
        assert outcome.status == 0, outcome.err
        assert "initialised from it" in outcome.out
        return changed(Path(config.stem), before)

    assert not train(linear), "linear probing"
    head = torch.load("linear/checkpoints/last.ckpt", weights_only=True)["state_dict"]["head.linear.weight"]
    assert head.shape[1] == 20, "all encoder stages, joined"

    network = {**ENCODER, **DECODER}
    decoder = write_config(tmp_path / "decoder.yaml", network, freeze=[r"^backbone\.(embedding|enc)\."])
    assert not train(decoder), "decoder probing"

    optimizer = {"lr": 1e-2, "groups": [{"pattern": "block", "lr": 0.0, "weight_decay": 0.0}]}
    moved = train(write_config(tmp_path / "full.yaml", network, optimizer=optimizer))
    assert moved, "full fine-tuning"
    assert not any("block" in name for name in moved), "learning rate by pattern"
    trained = {name for name in before if "block" not in name and "mask_token" not in name}
    assert moved == trained
