"""PTv3, Sonata, Utonia and LitePT against Pointcept: every stage, training steps with all gradients, round trips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import serialized
from harness import Golden, golden_files, needs_gpu

from pc3d.models import LitePT, PTv3, Sonata, Utonia
from pc3d.nn.serialized import SerializedUNet


def ptv3(golden: Golden) -> PTv3:
    return PTv3(**serialized.config_of(golden), legacy_v151="1.5.1" in golden.meta["system"])


def sonata(golden: Golden) -> Sonata:
    return Sonata(**serialized.config_of(golden))


def utonia(golden: Golden) -> Utonia:
    config = serialized.config_of(golden)
    assert not config.pop("enable_rpe", False)
    return Utonia(**config)


def litept(golden: Golden) -> LitePT:
    return LitePT(**{**serialized.config_of(golden), "equal_windows": False})


Build = Callable[[Golden], SerializedUNet]
FAMILIES: list[tuple[str, Build]] = [
    ("ptv3-semseg", ptv3),
    ("ptv3-train", ptv3),
    ("sonata", sonata),
    ("utonia", utonia),
    ("litept", litept),
]
CASES: list[Any] = [
    pytest.param(*file.values, build, id=file.id) for family, build in FAMILIES for file in golden_files(family)
]
STEPS = [case for case in CASES if "in/labels" in case.values[0].arrays]


@pytest.mark.parametrize(("golden", "build"), CASES)
def test_outputs(golden: Golden, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    serialized.check_outputs(golden, build(golden), monkeypatch, "cpu")


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("golden", "build"), CASES)
def test_outputs_on_gpu(golden: Golden, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    serialized.check_outputs(golden, build(golden), monkeypatch, "cuda")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("golden", "build"), STEPS)
def test_training_step(golden: Golden, build: Build, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = build(golden)
    backbone.checkpoint_blocks = checkpointing
    serialized.check_training_step(golden, backbone, monkeypatch)


@pytest.mark.parametrize(("golden", "build"), CASES)
def test_export_round_trip(golden: Golden, build: Build) -> None:
    serialized.check_round_trip(golden, build(golden))
