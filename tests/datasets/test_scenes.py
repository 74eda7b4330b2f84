"""Scene data sets: miniatures in every published layout, real scans, preparation, and what goes wrong with files."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pc3d import InputError, Points
from pc3d.cli import main
from pc3d.datasets import S3DIS, NuScenes, ScanNet, SemanticKITTI, Waymo
from pc3d.datasets.meta import facts
from pc3d.datasets.prepare import prepare
from pc3d.datasets.s3dis import read_annotation
from pc3d.datasets.scannet import vertex_normals
from pc3d.datasets.scenes import SceneDataset
from pc3d.datasets.synthetic.scenes import FIXTURES
from pc3d.io import read_labels

CLASSES: dict[str, type[SceneDataset]] = {
    "scannet": ScanNet,
    "s3dis": S3DIS,
    "semantickitti": SemanticKITTI,
    "nuscenes": NuScenes,
    "waymo": Waymo,
}
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*/semseg-*.yaml"))


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("raw")
    for name, make in FIXTURES.items():
        make(root / name, 0)
    return root


def build(name: str, root: Path, **options: Any) -> SceneDataset:
    return CLASSES[name](root=str(root / name), **options)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.filterwarnings("ignore:.*damaged")
def test_miniatures_load(name: str, raw: Path) -> None:
    data = build(name, raw)
    assert len(data.palette) == data.num_classes
    for split in ("train", "val", "test"):
        for i in range(data.size(split)):
            points = data.load(split, i)
            segment = points.get("segment")
            assert segment.dtype == torch.int64
            assert -1 <= int(segment.min()) <= int(segment.max()) < data.num_classes
            assert points.coord.isfinite().all()
            assert points.meta[0]["name"] == data.name(split, i)
            assert data.fingerprint(split, i) == data.fingerprint(split, i)
    assert (data.load("val", 0).get("segment") >= 0).float().mean() > 0.7


def test_scannet_is_the_published_one(raw: Path) -> None:
    known = facts("scannet")
    assert [len(known["splits"][split]) for split in ("train", "val", "test")] == [1201, 312, 100]
    assert not {n[:9] for n in known["splits"]["train"]} & {n[:9] for n in known["splits"]["val"]}
    assert [code for code, *_ in known["classes20"]] == [*range(1, 13), 14, 16, 24, 28, 33, 34, 36, 39]
    small, large = build("scannet", raw), build("scannet", raw, classes=200)
    assert (small.class_names[:2], large.class_names[:3]) == (["wall", "floor"], ["wall", "chair", "floor"])
    few, many = (data.load("train", 0).get("segment") for data in (small, large))
    chairs = few == small.class_names.index("chair")
    assert chairs.any()
    assert (many[chairs] == large.class_names.index("chair")).all()
    points = small.load("train", 0)
    assert points.get("superpoint").unique().numel() > points.get("instance").unique().numel()
    torch.testing.assert_close(points.get("normal").norm(dim=1), torch.ones(points.num_points))
    assert (small.load("test", 0).get("segment") == -1).all()


def test_scannet_later_groups_win_and_the_table_in_the_root_counts(raw: Path, tmp_path: Path) -> None:
    shutil.copytree(raw / "scannet", tmp_path / "scannet")
    scene = tmp_path / "scannet" / "scans" / "scene0191_00"
    path = scene / "scene0191_00.aggregation.json"
    content = json.loads(path.read_text())
    first = content["segGroups"][0]
    content["segGroups"].append({"id": 99, "objectId": 99, "segments": first["segments"], "label": "thing"})
    path.write_text(json.dumps(content))
    table = tmp_path / "scannet" / "scannetv2-labels.combined.tsv"
    table.write_text(table.read_text() + "2\tthing\t5\n")
    points = build("scannet", tmp_path).load("train", 0)
    taken = torch.isin(
        torch.tensor(json.loads((scene / "scene0191_00_vh_clean_2.0.010000.segs.json").read_text())["segIndices"]),
        torch.tensor(first["segments"]),
    )
    assert (points.get("instance")[taken] == len(content["segGroups"]) - 1).all()
    assert (points.get("segment")[taken] == ScanNet().class_names.index("chair")).all()


def test_vertex_normals_are_weighted_by_area() -> None:
    coord = torch.tensor([[0.0, 0, 0], [2, 0, 0], [0, 2, 0], [0, 0, 1], [9, 9, 9]])
    normal = vertex_normals(coord, np.array([[0, 1, 2], [0, 3, 1]]))
    torch.testing.assert_close(normal[0], torch.nn.functional.normalize(torch.tensor([0.0, 2.0, 4.0]), dim=0))
    assert normal[4].tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="vertex 7"):
        vertex_normals(coord, np.array([[0, 1, 7]]))


def test_s3dis_lines(tmp_path: Path) -> None:
    path = tmp_path / "wall_1.txt"
    good = b"1 2 3 10 20 30\n"
    path.write_bytes(good + b"1.5 2 3 103.0\x100000 20 30\n4 5 6 185\x10187 7\n7 8 -9.1\x160 1 2 3\n1 2 3\n" + good)
    with pytest.warns(UserWarning, match="line") as seen:
        rows = read_annotation(path)
    assert [f"line {n}" in str(w.message) for n, w in zip((2, 3, 4, 5), seen, strict=True)] == [True] * 4
    assert rows.shape == (5, 6)
    assert rows[1].tolist() == [1.5, 2, 3, 103, 20, 30]
    assert rows[2].tolist() == [4, 5, 6, 185, 187, 7]
    assert rows[3, 2] == pytest.approx(-9.1)
    path.write_bytes(b"a b c\n")
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(InputError, match=r"wall_1\.txt: no rows"):
        read_annotation(path)


@pytest.mark.filterwarnings("ignore:.*damaged")
def test_s3dis_areas_and_unknown_objects(raw: Path) -> None:
    data = build("s3dis", raw)
    assert [data.name("train", i) for i in range(2)] == ["Area_1_office_1", "Area_2_hallway_1"]
    assert (data.name("val", 0), data.name("test", 0)) == ("Area_5_office_19",) * 2
    points = data.load("train", 0)
    clutter = data.class_names.index("clutter")
    assert (points.get("segment") == clutter).any()  # beds and lamps
    sixfold = build("s3dis", raw, test_area=1)
    assert sixfold.size("train") == 2
    assert sixfold.name("test", 0) == "Area_1_office_1"
    with pytest.raises(InputError, match="different areas"):
        S3DIS(test_area=5, train_areas=[5])


def test_real_semantickitti(data_dir: Path) -> None:
    data = SemanticKITTI(str(data_dir / "semantickitti"), train=["00/00000*"], val=[0])
    assert (data.size("train"), data.name("train", 1)) == (2, "00_000001")
    expected = {
        0: {"car": 4234, "road": 34228 + 1053, "parking": 3268, "sidewalk": 26360, "building": 18268, "fence": 370,
            "vegetation": 27123, "trunk": 1192, "terrain": 2964, "pole": 532, "traffic-sign": 102, "motorcyclist": 88},
        1: {"car": 4387, "road": 33233 + 868, "parking": 3831, "sidewalk": 26040, "building": 19180, "fence": 386,
            "vegetation": 27116, "trunk": 1242, "terrain": 2765, "pole": 585, "traffic-sign": 100, "motorcyclist": 73},
    }  # fmt: skip
    for i, counts in expected.items():
        points = data.load("train", i)
        found = points.get("segment")[points.get("segment") >= 0].bincount(minlength=19).tolist()
        assert {name: n for name, n in zip(data.class_names, found, strict=True) if n} == counts
        assert 0 <= points.get("strength").min() <= points.get("strength").max() < 1
        codes, _ = read_labels(data_dir / f"semantickitti/sequences/00/labels/{i:06d}.label")
        back = data.raw_labels(points.get("segment"))
        assert (back[back > 0] == codes[back > 0]).float().mean() > 0.98  # 60 and 255 come back as 40 and 32
    with pytest.raises(InputError, match=r"poses\.txt"):
        SemanticKITTI(str(data_dir / "semantickitti"), train=[0], scans=2).load("train", 1)


def test_several_scans_share_a_frame(raw: Path) -> None:
    single, double = build("semantickitti", raw), build("semantickitti", raw, scans=2, classes=25)
    now, before = single.load("val", 1), single.load("val", 0)
    points = double.load("val", 1)
    assert points.num_points == now.num_points + before.num_points
    old = points.get("time")[:, 0] == 1
    torch.testing.assert_close(
        points.coord[old], before.coord - torch.tensor([0.5, 0, 0])
    )  # the car drove half a metre
    assert (points.get("segment")[old] == -1).all()
    assert (double.load("train", 1).get("segment") >= 0).all()
    assert double.load("val", 0).num_points == before.num_points
    moving = double.class_names.index("moving-car") if "moving-car" in double.class_names else 19
    assert double.codes[moving] == 252


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.suffix in (".npy", ".json")
    }


@pytest.mark.parametrize("name", ["scannet", "s3dis", "semantickitti", "nuscenes"])
@pytest.mark.filterwarnings("ignore:.*damaged")
def test_prepared_equals_raw_and_a_stopped_run_goes_on(name: str, raw: Path, tmp_path: Path) -> None:
    before = snapshot(raw / name)
    data, out = build(name, raw), tmp_path / "out"
    whole = prepare(data, out)
    assert not whole.problems
    assert (whole.kept, whole.written > 2) == (0, True)
    full = snapshot(out)
    victims = sorted(out.rglob("stats.json"))[:2]
    for victim in victims:
        shutil.rmtree(victim.parent) if data.writes else victim.unlink()
    (out / "summary.json").unlink()
    again = prepare(build(name, raw), out)
    assert (again.written, again.kept) == (2, whole.written - 2)
    assert snapshot(out) == full
    assert snapshot(raw / name) == before
    assert json.loads((out / "summary.json").read_text())["scenes"] == whole.scenes
    if not data.writes:
        return
    prepared = CLASSES[name](root=str(out))
    for split in ("train", "val", "test"):
        assert [prepared.name(split, i) for i in range(prepared.size(split))] == [
            data.name(split, i) for i in range(data.size(split))
        ]
        for i in range(data.size(split)):
            left, right = data.load(split, i), prepared.load(split, i)
            assert set(left.attrs) == set(right.attrs)
            for field in ("coord", *left.attrs):
                torch.testing.assert_close(left.get(field), right.get(field), rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="prepared already"):
        prepare(prepared, tmp_path / "twice")
    with pytest.raises(InputError, match="never written to"):
        prepare(data, raw / name / "inside")


@pytest.mark.filterwarnings("ignore:.*damaged")
def test_shards_and_workers_together_do_the_whole(raw: Path, tmp_path: Path) -> None:
    prepare(build("scannet", raw), tmp_path / "whole")
    for i in range(3):
        result = prepare(build("scannet", raw), tmp_path / "parts", shard=(i, 3), workers=2 if i == 0 else 1)
        assert (tmp_path / "parts" / "summary.json").exists() == (i == 2)
        assert not result.problems
    assert snapshot(tmp_path / "parts") == snapshot(tmp_path / "whole")


SCENE, SEQUENCE = "scans/scene0191_00/scene0191_00", "sequences/00"
SEGMENTS = f"{SCENE}_vh_clean_2.0.010000.segs.json"
INFOS, FRAME = "info/nuscenes_infos_10sweeps_train.pkl", "training/segment-0/1000000"
LABELS = f"{SEQUENCE}/labels/000000.label"
BREAKS: dict[str, tuple[str, str, Any, str]] = {
    "mesh cut off": ("scannet", f"{SCENE}_vh_clean_2.ply", lambda b: b[:-500], "truncated"),
    "segments cut off": ("scannet", SEGMENTS, lambda b: b[:300], "JSON"),
    "segments too few": ("scannet", SEGMENTS, lambda b: b'{"segIndices": [1, 2]}', "2 numbers"),
    "groups empty": ("scannet", f"{SCENE}.aggregation.json", lambda b: b"{}", "segGroups"),
    "groups gone": ("scannet", f"{SCENE}.aggregation.json", None, "aggregation.json is missing"),
    "mesh gone": ("scannet", f"{SCENE}_vh_clean_2.ply", None, "is missing"),
    "scan cut off": ("semantickitti", f"{SEQUENCE}/velodyne/000000.bin", lambda b: b[:-7], "truncated"),
    "labels short": ("semantickitti", LABELS, lambda b: b[:-8], "labels for a scan of"),
    "labels gone": ("semantickitti", LABELS, None, "is missing"),
    "unknown label": ("semantickitti", LABELS, lambda b: b"\x07\0\0\0" + b[4:], r"7 \(1 points\)"),
    "infos with code": ("nuscenes", INFOS, lambda b: pickle.dumps(print), "not read"),
    "infos cut off": ("nuscenes", INFOS, lambda b: b[:50], "not a readable pickle"),
    "keyframe short": ("nuscenes", "raw/samples/LIDAR_TOP/train0__LIDAR_TOP.pcd.bin", lambda b: b[:-4], "rows of 5"),
    "array cut off": ("waymo", f"{FRAME}/coord.npy", lambda b: b[:-40], r"coord\.npy"),
    "array too short": ("waymo", f"{FRAME}/segment.npy", lambda b: np_bytes(SHORT), "does not fit"),
}  # fmt: skip


SHORT = np.zeros(3, np.int16)


def np_bytes(array: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("case", BREAKS)
def test_broken_files_are_named(case: str, raw: Path, tmp_path: Path) -> None:
    name, file, change, message = BREAKS[case]
    shutil.copytree(raw / name, tmp_path / name)
    path = tmp_path / name / file
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    data = build(name, tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        data.load("train", 0)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", CLASSES)
def test_wrong_roots_say_what_is_expected(name: str, tmp_path: Path) -> None:
    for root in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputError, match="expected"):
            CLASSES[name](root=str(root)).size("train")


def test_prepare_command(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "fixture", "scannet", "--out", str(tmp_path / "raw")]) == 0
    arguments = ["prepare", "scannet", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]
    (tmp_path / "raw/scans/scene0191_01/scene0191_01.aggregation.json").unlink()
    assert main(arguments) == 2
    assert "scene0191_01" in capsys.readouterr().err
    assert not (tmp_path / "out/summary.json").exists()
    assert (tmp_path / "out/train/scene0191_00/coord.npy").exists()
    assert main(["prepare", "scanet", "--raw", "x", "--out", "y"]) == 2
    assert "did you mean 'scannet'" in capsys.readouterr().err
    assert main([*arguments, "--shard", "3/2"]) == 2


def test_one_command_trains_on_a_prepared_miniature(raw: Path, tmp_path: Path) -> None:
    assert main(["prepare", "scannet", "--raw", str(raw / "scannet"), "--out", str(tmp_path / "out")]) == 0
    config = next(path for path in CONFIGS if path.parent.name == "scannet" and "spunet" in path.name)
    assert fast_dev_run(config, tmp_path / "out", tmp_path) == 0


def fast_dev_run(config: Path, root: Path, folder: Path) -> int:
    options = ["--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu", "--data.num_workers", "0"]
    options += ["--data.batch_size", "2", "--data.cache", "false", "--trainer.enable_progress_bar", "false"]
    return main(
        ["train", "--config", str(config), "--data.root", str(root), "--run_dir", str(folder / "run"), *options]
    )


def test_points_without_labels_stay_usable(raw: Path) -> None:
    points = build("semantickitti", raw).load("test", 0)
    assert isinstance(points, Points)
    assert (points.get("segment") == -1).all()
    assert (points.get("instance") == -1).all()
