"""Files of ModelNet40-C and ModelNet-C: what they hold, where they are found, and broken ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pc3d import InputError
from pc3d.config import instantiate
from pc3d.datasets import CorruptedModelNet40

h5py = pytest.importorskip("h5py")
LABELS = np.array([[3], [39], [0]], np.int64)


def clouds(points: int = 20, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((3, points, 3), np.float32)


def modelnet40_c(folder: Path) -> Path:
    folder.mkdir(parents=True)
    np.save(folder / "label.npy", LABELS)
    np.save(folder / "data_original.npy", clouds(20))
    np.save(folder / "data_impulse_5.npy", clouds(22, seed=5))
    return folder


def modelnet_c(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for seed, name in enumerate(("clean", "add_local_0")):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["data"], file["label"] = clouds(20 + seed, seed), LABELS
    return folder


def test_files_of_modelnet40_c(tmp_path: Path) -> None:
    folder = modelnet40_c(tmp_path / "modelnet40_c")
    data = CorruptedModelNet40(str(folder), "impulse", 5)
    assert [data.size(split) for split in ("train", "val", "test")] == [0, 3, 3]
    cloud = data.load("test", 1)
    assert np.array_equal(cloud.coord.numpy(), clouds(22, seed=5)[1])
    assert (cloud.get("segment") == 39).all()
    assert [data.cloud_class("test", i) for i in range(3)] == [3, 39, 0]
    assert data.class_names[39] == "xbox"
    assert CorruptedModelNet40(str(tmp_path)).load("test", 2).num_points == 20  # clean, below the root
    assert not data.is_modelnet_c
    again = instantiate(data.to_config())
    assert again.fingerprint("test", 1) == data.fingerprint("test", 1) != data.fingerprint("test", 2)
    before = data.fingerprint("test", 1)
    np.save(folder / "label.npy", LABELS.astype(np.int32))
    assert data.fingerprint("test", 1) != before


def test_files_of_modelnet_c(tmp_path: Path) -> None:
    modelnet_c(tmp_path / "modelnet_c")
    data = CorruptedModelNet40(str(tmp_path), "add_local", 0)
    assert data.is_modelnet_c
    cloud = data.load("val", 0)
    assert np.array_equal(cloud.coord.numpy(), clouds(21, seed=1)[0])
    assert [data.cloud_class("test", i) for i in range(3)] == [3, 39, 0]
    assert CorruptedModelNet40(str(tmp_path)).load("test", 0).num_points == 20


@pytest.mark.parametrize(
    ("corruption", "severity", "message"),
    [
        ("fog", 1, "'fog' is none of clean, occlusion"),
        ("impulse", 0, "0 of impulse is not 1 to 5"),
        ("rotate", 5, "5 of rotate is not 0 to 4"),
        ("rotate", 0, "holds ModelNet40-C; 'rotate' is a corruption of ModelNet-C"),
        ("impulse", 4, r"data_impulse_4\.npy: cannot be read: No such file"),
    ],
)
def test_what_is_not_there(corruption: str, severity: int, message: str, tmp_path: Path) -> None:
    modelnet40_c(tmp_path / "files")
    with pytest.raises(InputError, match=message):
        CorruptedModelNet40(str(tmp_path / "files"), corruption, severity).size("test")


def test_other_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a raw nor"):
        CorruptedModelNet40(str(tmp_path)).size("test")
    with pytest.raises(
        InputError, match=r"CorruptedModelNet40.root: is not set: --data.root DIR; expected data_<corruption>"
    ):
        CorruptedModelNet40().size("test")
    modelnet_c(tmp_path / "files")
    with pytest.raises(InputError, match="holds ModelNet-C"):
        CorruptedModelNet40(str(tmp_path / "files"), "impulse", 1).size("test")
    with pytest.raises(InputError, match=r"add_local_3\.h5: is missing"):
        CorruptedModelNet40(str(tmp_path / "files"), "add_local", 3).size("test")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("label.npy", LABELS[:2], "expected a number for each of 3 clouds"),
        ("label.npy", LABELS + 1, "'label' of row 1 is 40, classes are 0..39"),
        ("data_original.npy", clouds()[..., :2], r"expected \(B, N, 3\)"),
        ("data_original.npy", clouds() * np.nan, "not finite"),
        ("data_original.npy", None, r"data_original\.npy: no readable"),
    ],
)
def test_broken_files_are_named(name: str, content: np.ndarray | None, message: str, tmp_path: Path) -> None:
    folder = modelnet40_c(tmp_path / "files")
    if content is None:
        (folder / name).write_bytes((folder / name).read_bytes()[:200])
    else:
        np.save(folder / name, content)
    with pytest.raises(InputError, match=message):
        CorruptedModelNet40(str(folder)).load("test", 1)
