"""LitePT against LitePT-v1: every stage, and the round trip of its checkpoints."""

from __future__ import annotations

import pytest
import serialized
from harness import Golden, golden_files, needs_gpu

from pc3d.models import LitePT

FILES = golden_files("litept-semseg")


def build(golden: Golden) -> LitePT:
    return LitePT(**{**serialized.config_of(golden), "equal_windows": False})


@pytest.mark.parametrize("golden", FILES)
def test_outputs(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    serialized.check_outputs(golden, build(golden), monkeypatch, "cpu")


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("golden", FILES)
def test_outputs_on_gpu(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    serialized.check_outputs(golden, build(golden), monkeypatch, "cuda")


@pytest.mark.parametrize("golden", FILES)
def test_export_round_trip(golden: Golden) -> None:
    serialized.check_round_trip(golden, build(golden))
