"""Maps of folders from the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pc3d.datasets.synthetic.aerial import write_aerial
from pc3d.io import read
from pc3d.models import HeightMapNet

pytest.importorskip("lazrs")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for column in range(2):
        write_aerial(tmp_path / f"tiles/{column}.laz", (column * 350, 0), 350, 0.1, 7, chunk_size=500)
    return tmp_path / "tiles"


def test_pictures_clouds_and_arrays(pc3d, folder: Path) -> None:
    outcome = pc3d("overview", folder, "-o", "map.png")
    assert outcome.status == 0, outcome.err
    assert "2 files, 24,500 points in 50 chunks; 50 samples" in outcome.out
    assert Path("map.png").read_bytes()[:4] == b"\x89PNG"
    assert pc3d("overview", folder, "-o", "map.ply", "--decode", 2).status == 0
    cloud = read("map.ply")
    assert cloud.num_points == 48 + 500 + 250
    assert cloud.get("weight").sum() == 24_500
    assert "color" in cloud
    assert pc3d("overview", folder, "-o", "map.npz", "--cell", 10).status == 0
    with np.load("map.npz") as arrays:
        assert arrays["height"].shape == arrays["density"].shape == (35, 70)
        assert arrays["coord"].dtype == np.float64
        assert arrays["estimate"].sum() == 24_500


def test_network(pc3d, folder: Path) -> None:
    torch.manual_seed(0)
    torch.save(HeightMapNet().state_dict(), "weights.pth")
    assert pc3d("overview", folder, "-o", "plain.npz", "--cell", 10).status == 0
    outcome = pc3d("overview", folder, "-o", "learned.npz", "--cell", 10, "--network", "weights.pth")
    assert outcome.status == 0, outcome.err
    plain, learned = np.load("plain.npz")["height"], np.load("learned.npz")["height"]
    assert np.array_equal(np.isnan(plain), np.isnan(learned))
    assert (plain != learned).mean() > 0.9
    outcome = pc3d("overview", folder / "0.laz", "-o", "a.npz", "--network", "missing.pt")
    assert outcome.status == 2
    assert "missing.pt: no such file" in outcome.err


def test_errors(pc3d, folder: Path, tmp_path: Path) -> None:
    for words, message in [
        (("overview", folder, "-o", "map.jpg"), "written as .png, .ply or .npz"),
        (("overview", tmp_path / "nothing.laz", "-o", "map.png"), "nothing.laz: cannot be read"),
        (("overview", folder, "-o", "map.png", "--decode", -1), "--decode -1"),
        (("overview", folder, "-o", "map.png", "--cell", 0), "cells of 0.0 m"),
        (("overview", folder.parent / "empty", "-o", "map.png"), "no LAS or LAZ file in it"),
    ]:
        (folder.parent / "empty").mkdir(exist_ok=True)
        outcome = pc3d(*words)
        assert outcome.status == 2
        assert outcome.err.count("\n") == 1
        assert message in outcome.err
