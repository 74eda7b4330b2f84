"""Few-shot episodes: what they hold, that they can be drawn again, and the published files."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pc3d import InputError
from pc3d.config import instantiate
from pc3d.data.cache import CloudCache
from pc3d.datasets import FewShot, ModelNet40, ModelNetFewShot, SyntheticShapes
from pc3d.datasets.synthetic.objects import FIXTURES


def episode(fold: int = 0, **options: Any) -> FewShot:
    shapes = SyntheticShapes(train=14 * 4, val=0, test=14 * 3, points=64)
    return FewShot(shapes, **{"way": 5, "shot": 3, "queries": 2, "fold": fold, **options})


def contents(data: FewShot) -> list[tuple[str, int]]:
    return [
        (data.name(split, i), int(data.load(split, i).get("segment")[0]))
        for split in ("train", "test")
        for i in range(data.size(split))
    ]


def test_an_episode_has_its_classes_and_counts() -> None:
    data = episode()
    assert (data.size("train"), data.size("val"), data.size("test")) == (15, 10, 10)
    assert Counter(int(data.load("train", i).get("segment")[0]) for i in range(15)) == dict.fromkeys(range(5), 3)
    assert Counter(int(data.load("test", i).get("segment")[0]) for i in range(10)) == dict.fromkeys(range(5), 2)
    names = contents(data)
    assert len(names) == len(set(names))
    shapes = data.dataset
    kinds: dict[int, set[str]] = {}
    for name, label in names:  # a class is the same kind of shape in training and test
        kinds.setdefault(label, set()).add(name.split("_")[0])
    assert all(len(kind) == 1 for kind in kinds.values())
    assert len(set.union(*kinds.values())) == 5 < shapes.num_classes
    assert [data.name("val", i) for i in range(10)] == [data.name("test", i) for i in range(10)]


def test_folds_differ_and_come_again() -> None:
    folds = [contents(episode(fold)) for fold in range(3)]
    assert folds[0] != folds[1] != folds[2] != folds[0]
    assert folds[1] == contents(episode(1))
    assert contents(instantiate(episode(1).to_config())) == folds[1]
    assert folds[1] != contents(episode(1, seed=1))
    first, second = (episode(fold).fingerprint("train", 0) for fold in (0, 1))
    assert first != second


def test_classes_are_looked_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = episode()
    data.cache = CloudCache(tmp_path)
    expected = contents(data)
    again = episode()
    again.cache = CloudCache(tmp_path)
    monkeypatch.setattr(SyntheticShapes, "cloud_class", lambda *_: pytest.fail("looked up again"))
    assert contents(again) == expected


@pytest.mark.parametrize("layout", ["modelnet40_normal_resampled", "modelnet40_ply_hdf5_2048"])
def test_classes_of_modelnet_need_no_clouds(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("h5py")
    FIXTURES["modelnet40"](tmp_path, 0)
    base = ModelNet40(str(tmp_path / layout))
    data = FewShot(base, way=4, shot=5, queries=2)
    expected = [int(base.load("train", i).get("segment")[0]) for i in range(base.size("train"))]
    with monkeypatch.context() as patch:
        patch.setattr(ModelNet40, "load", lambda *_: pytest.fail("a cloud was read"))
        assert [base.cloud_class("train", i) for i in range(base.size("train"))] == expected
        assert data.size("train") == 20
    assert data.load("train", 0).num_points == 600
    data.relocate(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="expected"):
        data.size("train")


@pytest.mark.parametrize(
    "options", [{"way": 1}, {"shot": 0}, {"fold": -1}, {"queries": 0}, {"shot": 5}, {"way": 15}, {"queries": 4}]
)
def test_episodes_that_cannot_be(options: dict[str, int]) -> None:
    with pytest.raises(InputError):
        episode(**options).size("train")


def write_fold(root: Path, content: Any) -> Path:
    path = root / "5way_10shot" / "0.pkl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))
    return path


def published(classes: list[int], columns: int = 6) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        name: [(rng.random((64, columns), np.float32), label, "id") for label in classes for _ in range(count)]
        for name, count in (("train", 10), ("test", 20))
    }


def test_published_files(tmp_path: Path) -> None:
    write_fold(tmp_path, published([3, 7, 11, 20, 39]))
    data = ModelNetFewShot(str(tmp_path))
    assert (data.size("train"), data.size("test")) == (50, 100)
    cloud = data.load("test", 25)
    assert (cloud.get("segment") == 1).all()
    assert cloud.get("normal").shape == (64, 3)
    assert torch.equal(cloud.coord, ModelNetFewShot(str(tmp_path)).load("test", 25).coord)
    write_fold(tmp_path, published([0, 1, 2, 3, 4], columns=3))
    assert "normal" not in ModelNetFewShot(str(tmp_path)).load("train", 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (print, "not read"),
        ([1, 2], "holds no 'train'"),
        (published([0, 1, 2]), "3 classes to learn"),
        ({**published([0, 1, 2, 3, 4]), "test": published([5])["test"]}, "others to test"),
        (published([0, 1, 2, 3, 4], columns=4), r"expected \(N, 3\)"),
    ],
)
def test_broken_files_are_named(content: Any, message: str, tmp_path: Path) -> None:
    path = write_fold(tmp_path, content)
    with pytest.raises(InputError, match=message) as caught:
        ModelNetFewShot(str(tmp_path)).load("train", 0)
    assert str(path) in str(caught.value)


def test_a_file_cut_off_or_gone_is_named(tmp_path: Path) -> None:
    path = write_fold(tmp_path, published([0, 1, 2, 3, 4]))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"0\.pkl: not a readable pickle"):
        ModelNetFewShot(str(tmp_path)).size("train")
    path.unlink()
    with pytest.raises(InputError, match=r"0\.pkl: cannot be read"):
        ModelNetFewShot(str(tmp_path)).size("train")
    with pytest.raises(InputError, match="root is not set"):
        ModelNetFewShot().size("train")
