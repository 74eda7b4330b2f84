"""Damaged files of every data set: cut off anywhere, overwritten, in the wrong order; and runs that were killed."""

from __future__ import annotations

import io
import os
import random
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pc3d import InputError, Points, datasets
from pc3d.cli import main
from pc3d.data.dataset import PointDataset
from pc3d.datasets.prepare import prepare
from pc3d.datasets.scenes import SceneDataset
from pc3d.datasets.synthetic import objects, scenes
from pc3d.io import write

pytest.importorskip("h5py")
pytestmark = pytest.mark.filterwarnings("ignore:.*damaged", "ignore:.*in part")
SCENE = "scans/scene0191_00/scene0191_00"
# Case: miniature, class and options, and the files that its first training cloud is made from.
CASES: dict[str, tuple[str, Callable[..., PointDataset], dict[str, Any], list[str]]] = {
    "scannet": ("scannet", datasets.ScanNet, {}, [
        f"{SCENE}_vh_clean_2.ply", f"{SCENE}_vh_clean_2.0.010000.segs.json", f"{SCENE}.aggregation.json",
        "scannetv2-labels.combined.tsv",
    ]),
    "scannet-prepared": ("scannet-prepared", datasets.ScanNet, {}, [
        f"train/scene0191_00/{name}.npy" for name in ("coord", "color", "normal", "segment20", "instance")
    ]),
    "s3dis": ("s3dis", datasets.S3DIS, {}, ["Area_1/office_1/Annotations/{first}"]),
    "s3dis-prepared": ("s3dis-prepared", datasets.S3DIS, {}, [
        f"Area_1/office_1/{name}.npy" for name in ("coord", "color", "segment", "instance")
    ]),
    "semantickitti": ("semantickitti", datasets.SemanticKITTI, {"scans": 2}, [
        "sequences/00/velodyne/000000.bin", "sequences/00/labels/000000.label", "sequences/00/poses.txt",
        "sequences/00/calib.txt",
    ]),
    "kitti": ("kitti", datasets.KITTIObject, {}, [
        "training/velodyne/000000.bin", "training/calib/000000.txt", "training/label_2/000000.txt",
        "ImageSets/train.txt",
    ]),
    "nuscenes": ("nuscenes", datasets.NuScenes, {}, [
        "info/nuscenes_infos_10sweeps_train.pkl", "raw/samples/LIDAR_TOP/train0__LIDAR_TOP.pcd.bin",
        "raw/lidarseg/v1.0-trainval/train0__LIDAR_TOP_lidarseg.bin",
    ]),
    "waymo": ("waymo", datasets.Waymo, {}, [
        f"training/segment-0/1000000/{name}.npy" for name in ("coord", "strength", "segment")
    ]),
    "modelnet40": ("modelnet40", datasets.ModelNet40, {}, [
        "modelnet40_normal_resampled/airplane/airplane_0001.txt", "modelnet40_normal_resampled/modelnet40_train.txt",
    ]),
    "modelnet40-h5": ("modelnet40/modelnet40_ply_hdf5_2048", datasets.ModelNet40, {}, ["ply_data_train0.h5"]),
    "scanobjectnn": ("scanobjectnn", datasets.ScanObjectNN, {}, [
        "h5_files/main_split/training_objectdataset_augmentedrot_scale75.h5",
    ]),
    "shapenetpart": ("shapenetpart", datasets.ShapeNetPart, {}, [
        "shapenetcore_partanno_segmentation_benchmark_v0_normal/train_test_split/shuffled_train_file_list.json",
        "{cloud}",
    ]),
    "shapenetpart-h5": ("shapenetpart/shapenet_part_seg_hdf5_data", datasets.ShapeNetPart, {}, ["ply_data_train0.h5"]),
    "shapenet55": ("shapenet55", datasets.ShapeNet55, {}, ["ShapeNet55-34/ShapeNet-55/train.txt", "{cloud}"]),
    "medpoints": ("medpoints", datasets.MedPointS, {}, ["{cloud}"]),
    "medpoints-segmentation": ("medpoints", datasets.MedPointS, {"task": "segmentation"}, [
        "segmentation/fold1/pcd/body_1.ply", "segmentation/fold1/coarse_label/body_1.seg",
    ]),
    "medpoints-completion": ("medpoints", datasets.MedPointS, {"task": "completion"}, [
        "{cloud}", "completion/fold1/target/aorta/aorta_100.ply",
    ]),
    "mosd": ("mosd", datasets.MOSD, {}, ["learn/learn0.pcd"]),
    "fewshot": ("fewshot", datasets.ModelNetFewShot, {}, ["5way_10shot/0.pkl"]),
}  # fmt: skip
FILES = [(case, file) for case, (_, _, _, files) in CASES.items() for file in files]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every miniature, undamaged."""
    root = tmp_path_factory.mktemp("whole")
    for name, make in (scenes.FIXTURES | objects.FIXTURES).items():
        make(root / name, 0)
    for name in ("scannet", "s3dis"):
        kind = {"scannet": datasets.ScanNet, "s3dis": datasets.S3DIS}[name]
        prepare(kind(root=str(root / name)), root / f"{name}-prepared")
    for i in range(2):
        cloud = datasets.SyntheticRooms(2, 0, 0, points=1000).load("train", i)
        label = torch.where(cloud.get("segment") > 3, 20, 1)
        scene = Points(cloud.coord, attrs={"color": cloud.get("color"), "label": label}, meta=cloud.meta)
        write(root / "mosd" / "learn" / f"learn{i}.pcd", scene)
    _few_shot_file(root / "fewshot" / "5way_10shot" / "0.pkl")
    return root


def _few_shot_file(path: Path) -> None:
    import pickle

    rng = np.random.default_rng(0)
    content = {
        name: [(rng.random((16, 6), np.float32), label, i) for label in range(5) for i in range(10)]
        for name in ("train", "test")
    }
    path.parent.mkdir(parents=True)
    path.write_bytes(pickle.dumps(content))


def build(case: str, whole: Path) -> PointDataset:
    place, make, options, _ = CASES[case]
    return make(root=str(whole / place), **options)


def file_of(case: str, file: str, whole: Path) -> Path:
    """The file of a case: by name, the raw file of its first cloud, or the first in a folder."""
    base = whole / CASES[case][0]
    if file == "{cloud}":
        data = build(case, whole)
        assert isinstance(data, SceneDataset)
        path = data.scenes("train")[0].raw
        assert path is not None
        return path
    path = base / file
    return sorted(path.parent.iterdir())[0] if path.name == "{first}" else path


def outcome(case: str, whole: Path, path: Path, content: bytes) -> str | None:
    """The error of loading the first training cloud with other bytes in one file; None if it loads."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        data = build(case, whole)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if data.size("train"):
                data.load("train", 0)
    except InputError as error:
        message = str(error)
        assert "\n" not in message
        assert str(whole / CASES[case][0]) in message, message
        return message
    finally:
        path.write_bytes(before)
    return None


def cut(case: str, file: str, whole: Path, share: float) -> str | None:
    path = file_of(case, file, whole)
    content = path.read_bytes()
    return outcome(case, whole, path, content[: int(share * len(content))])


def overwritten(case: str, file: str, whole: Path, seed: int) -> str | None:
    path, rng = file_of(case, file, whole), random.Random(seed)
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content) if rng.random() < 0.5 else min(len(content), 200))  # often in the header
    noise = rng.randbytes(rng.choice([1, 4, 40]))
    content[start : start + len(noise)] = noise
    return outcome(case, whole, path, bytes(content))


few = settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
many = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
BINARY = (".bin", ".label", ".npy", ".h5", ".pkl", ".ply", ".json", ".pcd")


@pytest.mark.parametrize(("case", "file"), FILES)
@few
@given(share=st.floats(0, 0.999))
def test_files_cut_off_anywhere_are_named(case: str, file: str, whole: Path, share: float) -> None:
    message = cut(case, file, whole, share)
    if file_of(case, file, whole).suffix in BINARY:  # a text may end after any line
        assert message is not None


@pytest.mark.parametrize(("case", "file"), FILES)
@few
@given(seed=st.integers(0, 2**32))
def test_overwritten_files_are_named_or_readable(case: str, file: str, whole: Path, seed: int) -> None:
    overwritten(case, file, whole, seed)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "file"), FILES)
@many
@given(share=st.floats(0, 0.999), seed=st.integers(0, 2**32))
def test_files_damaged_in_100_ways(case: str, file: str, whole: Path, share: float, seed: int) -> None:
    cut(case, file, whole, share)
    overwritten(case, file, whole, seed)


# Well-formed, but wrong ----------------------------------------------------------------------------------------------


def columns_swapped(content: bytes) -> bytes:
    """Rows of text with their first three columns behind the others."""
    lines = [line.replace(b",", b" ").split() for line in content.splitlines()]
    joint = b"," if b"," in content else b" "
    return b"\n".join(joint.join([*line[3:], *line[:3]]) for line in lines) + b"\n"


WRONG: dict[str, tuple[str, str, Callable[[bytes], bytes], str]] = {
    "colours before coordinates": ("s3dis", "Area_1/office_1/Annotations/{first}", columns_swapped, "x y z r g b"),
    "a column less": ("modelnet40", "{cloud}", lambda b: b.replace(b",", b" ", 1), "line 1|column"),
    "parts before coordinates": ("shapenetpart", "{cloud}", columns_swapped, "part"),
    "dimensions before the type": ("kitti", "training/label_2/000001.txt", columns_swapped, "not numbers"),
    "labels of another scan": (
        "semantickitti", "sequences/00/labels/000000.label", lambda b: b + b[:400], "labels for a scan of",
    ),
    "fewer codes than points": (
        "nuscenes", "raw/lidarseg/v1.0-trainval/train0__LIDAR_TOP_lidarseg.bin", lambda b: b[:-1],
        "labels for a scan of",
    ),
    "fewer labels than points": (
        "medpoints-segmentation", "segmentation/fold1/coarse_label/body_1.seg",
        lambda b: b"\n".join(b.splitlines()[:-1]), "labels for a cloud of",
    ),
    "no calibration of the LiDAR": (
        "kitti", "training/calib/000000.txt", lambda b: b.replace(b"Tr_velo_to_cam", b"Tr"), "Tr_velo_to_cam",
    ),
    "no pose of a scan": ("semantickitti", "sequences/00/poses.txt", lambda b: b"", "poses"),
    "no frame of the camera": ("semantickitti", "sequences/00/calib.txt", lambda b: b.replace(b"Tr:", b"Q:"), "'Tr'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_files_that_do_not_fit_are_named(name: str, whole: Path) -> None:
    case, file, change, says = WRONG[name]
    path = file_of(case, file, whole)
    if "000001.txt" in file:  # a frame with objects
        path = next(p for p in sorted(path.parent.iterdir()) if p.read_bytes())
        other = whole / "kitti" / "ImageSets" / "train.txt"
        names = other.read_text()
        other.write_text(path.stem + "\n")
        message = outcome(case, whole, path, change(path.read_bytes()))
        other.write_text(names)
    else:
        message = outcome(case, whole, path, change(path.read_bytes()))
    assert message is not None
    assert re.search(says, message), message


@pytest.mark.parametrize("case", CASES)
def test_a_split_that_is_not_there_is_named(case: str, whole: Path) -> None:
    data = build(case, whole)
    with pytest.raises(InputError, match="split 'training' is none of train, val, test"):
        data.size("training")


def test_swapped_axes_of_a_prepared_cloud_are_named(whole: Path) -> None:
    path = whole / "scannet-prepared" / "train" / "scene0191_00" / "coord.npy"
    flipped = np.load(path).T.copy()
    message = outcome("scannet-prepared", whole, path, as_npy(flipped))
    assert message is not None
    assert "coord.npy" in message
    assert "expected" in message


def as_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


# Preparations that were killed ---------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import numpy
from pathlib import Path
left, save, text = [int(sys.argv[1])], numpy.save, Path.write_text
def count():
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
def dying_save(file, array, **options):
    save(file, array, **options)
    count()
def dying_text(self, *arguments, **options):
    result = text(self, *arguments, **options)
    count()
    return result
numpy.save, Path.write_text = dying_save, dying_text
from pc3d.cli import main
sys.exit(main(sys.argv[2:]))
"""


def snapshot(folder: Path) -> dict[str, bytes]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".png")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def kill_and_resume(name: str, writes: int, whole: Path, tmp_path: Path) -> None:
    """A run that dies after so many files goes on, and ends with the bytes of a run that did not."""
    command = ["prepare", name, "--raw", str(whole / name.partition("-")[0]), "--out"]
    assert main([*command, str(tmp_path / "unbroken")]) == 0
    killed = [sys.executable, "-c", KILLED, str(writes), *command, str(tmp_path / "killed")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.run(killed, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == -9, process.stderr
    assert not (tmp_path / "killed" / "summary.json").exists()
    before = snapshot(whole / name.partition("-")[0])
    assert main([*command, str(tmp_path / "killed")]) == 0
    assert snapshot(tmp_path / "killed") == snapshot(tmp_path / "unbroken")
    assert snapshot(whole / name.partition("-")[0]) == before


def test_a_killed_preparation_ends_with_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    kill_and_resume("scannet", 10, whole, tmp_path)


PREPARED = ["scannet", "s3dis", "semantickitti", "kitti", "nuscenes", "waymo", "modelnet40", "scanobjectnn",
            "shapenetpart", "shapenet55", "medpoints", "medpoints-segmentation", "medpoints-completion"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PREPARED)
@pytest.mark.parametrize("writes", [0, 2])
def test_every_killed_preparation_ends_with_the_same_bytes(name: str, writes: int, whole: Path, tmp_path: Path) -> None:
    kill_and_resume(name, writes, whole, tmp_path)


def test_a_half_prepared_folder_is_told_and_mended(whole: Path, tmp_path: Path) -> None:
    out, raw = tmp_path / "out", datasets.ScanNet(str(whole / "scannet"))
    shutil.copytree(whole / "scannet-prepared", out)
    first, second, third = (out / "train" / "scene0191_00", out / "train" / "scene0191_01", out / "val")
    left = out / "train" / ".writing-scene0191_01-abc"
    shutil.copytree(second, left)  # a run was killed here
    (first / "stats.json").write_text('{"poi')
    np.save(second / "coord.npy", np.zeros((3, 3), np.float32))
    (out / "summary.json").unlink()
    half = datasets.ScanNet(str(out))
    with pytest.warns(UserWarning, match=r"is prepared in part \(summary\.json is missing\)"):
        assert half.size("train") == 2
    assert not any("writing" in half.name("train", i) for i in range(2))
    with pytest.raises(InputError, match=r"does not fit coord\.npy with 3 points"):
        half.load("train", 1)
    result = prepare(raw, out)
    assert (result.written, result.kept) == (2, len(list(third.iterdir())) + 1)
    assert snapshot(out) == snapshot(whole / "scannet-prepared")
