"""MOSD on real scenes, and what is wrong with a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pc3d import InputError, Points
from pc3d.datasets import MOSD
from pc3d.io import write


def test_real_scenes(data_dir: Path) -> None:
    data = MOSD(str(data_dir / "mosd_rgbd_instances"), val=0.5)
    assert [data.size(split) for split in ("train", "val", "test")] == [1, 1, 1]
    few = MOSD(str(data_dir / "mosd_rgbd_instances"))
    assert [few.size(split) for split in ("train", "val", "test")] == [2, 0, 0]  # all of two are learnt from
    counts = {"learn0": (153_323, [20_792, 8_177]), "learn25": (172_802, [10_907, 11_312])}
    for split in ("train", "val"):
        points = data.load(split, 0)
        table, objects = counts[data.name(split, 0)]
        segment, instance = points.get("segment"), points.get("instance")
        assert int((segment == 0).sum()) == table
        assert instance[instance >= 0].bincount().tolist() == objects
        assert ((instance >= 0) == (segment == 1)).all()
        assert points.coord.isfinite().all()
        assert points.get("color").max() > 100


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder 'learn'"):
        MOSD(str(tmp_path)).size("train")
    (tmp_path / "learn").mkdir()
    data = MOSD(str(tmp_path))
    assert data.size("train") == 0
    coord = torch.rand(5, 3)
    write(tmp_path / "learn" / "a.pcd", Points(coord, attrs={"color": coord * 200}))
    data.relocate(tmp_path)
    with pytest.raises(InputError, match=r"a\.pcd: field 'label' is missing"):
        data.load("train", 0)
    attrs = {"color": coord * 200, "label": torch.full((5,), 15)}
    write(tmp_path / "learn" / "a.pcd", Points(coord, attrs=attrs))
    with pytest.raises(InputError, match=r"a\.pcd: field 'label' holds 15"):
        data.load("train", 0)
