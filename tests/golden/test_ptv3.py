"""Point Transformer V3 against PT-v3m1 of Pointcept: every stage, and one training step with all gradients."""

from __future__ import annotations

import pytest
import serialized
from harness import Golden, golden_files, needs_gpu

from pc3d.models import PTv3

FILES = [*golden_files("ptv3-semseg"), *golden_files("ptv3-train")]


def build(golden: Golden) -> PTv3:
    return PTv3(**serialized.config_of(golden), legacy_v151="1.5.1" in golden.meta["system"])


@pytest.mark.parametrize("golden", FILES)
def test_outputs(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    serialized.check_outputs(golden, build(golden), monkeypatch, "cpu")


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("golden", FILES)
def test_outputs_on_gpu(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    serialized.check_outputs(golden, build(golden), monkeypatch, "cuda")


@pytest.mark.parametrize("golden", golden_files("ptv3-train"))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_step(golden: Golden, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = build(golden)
    backbone.checkpoint_blocks = checkpointing
    serialized.check_training_step(golden, backbone, monkeypatch)


@pytest.mark.parametrize("golden", FILES)
def test_export_round_trip(golden: Golden) -> None:
    serialized.check_round_trip(golden, build(golden))
