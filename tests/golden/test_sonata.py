"""Sonata against PT-v3m2 of Pointcept: every stage."""

from __future__ import annotations

import pytest
import serialized
from harness import Golden, golden_files, needs_gpu

from pc3d.models import Sonata

FILES = golden_files("sonata")


def build(golden: Golden) -> Sonata:
    return Sonata(**serialized.config_of(golden))


@pytest.mark.parametrize("golden", FILES)
def test_outputs(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    serialized.check_outputs(golden, build(golden), monkeypatch, "cpu")


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("golden", FILES)
def test_outputs_on_gpu(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    serialized.check_outputs(golden, build(golden), monkeypatch, "cuda")


@pytest.mark.parametrize("golden", FILES)
def test_training_step(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    if "in/labels" not in golden.arrays:
        pytest.skip("no training step recorded")
    serialized.check_training_step(golden, build(golden), monkeypatch)


@pytest.mark.parametrize("golden", FILES)
def test_export_round_trip(golden: Golden) -> None:
    serialized.check_round_trip(golden, build(golden))
