"""``pc3d info``: the card of a checkpoint, and what is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch


def rows(text: str) -> dict[str, str]:
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def test_a_checkpoint_says_what_it_needs(checkpoint: Path, tmp_path: Path, pc3d) -> None:
    told = rows(pc3d("info", checkpoint).out)
    assert told["task"] == "SemanticSegmentation"
    assert told["backbone"] == "SparseUNet"
    assert told["features"] == "color (3)"
    assert told["grid size"] == "0.2 m"
    assert told["class 0"] == "ceiling"
    assert 0 <= float(told["val/mIoU"]) <= 1
    assert pc3d("export", checkpoint, tmp_path / "model.safetensors").status == 0
    assert rows(pc3d("info", tmp_path / "model.safetensors").out)["features"] == told["features"]


def test_codes_of_the_files_are_shown(checkpoint: Path, tmp_path: Path, pc3d) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["pc3d_card"]["label_map"] = {7: 1, 3: 1, 2: 0, 9: -1}
    torch.save(content, tmp_path / "coded.ckpt")
    told = rows(pc3d("info", "coded.ckpt").out)
    assert told["class 0"] == "ceiling (codes in files: 2)"
    assert told["class 1"] == "floor (codes in files: 3, 7)"


def test_without_a_checkpoint_the_installation_is_told() -> None:
    done = subprocess.run([sys.executable, "-m", "pc3d", "info"], capture_output=True, text=True, check=True)
    told = rows(done.stdout)
    assert told["torch"] == torch.__version__
    assert told["C++ kernels"]
