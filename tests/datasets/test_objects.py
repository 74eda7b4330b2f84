"""Object data sets: miniatures in every published layout, real files, and what goes wrong with files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pc3d import InputError
from pc3d.cli import main
from pc3d.datasets import MedPointS, ModelNet40, ScanObjectNN, ShapeNet55, ShapeNetPart, SyntheticShapes
from pc3d.datasets.prepare import prepare
from pc3d.datasets.scenes import SceneDataset
from pc3d.datasets.synthetic.objects import FIXTURES

h5py = pytest.importorskip("h5py")

BUILD: dict[str, tuple[str, Callable[..., SceneDataset], dict[str, Any]]] = {
    "modelnet40": ("modelnet40", ModelNet40, {}),
    "modelnet40-h5": ("modelnet40/modelnet40_ply_hdf5_2048", ModelNet40, {"val": 0.25}),
    "scanobjectnn-OBJ_ONLY": ("scanobjectnn", ScanObjectNN, {"variant": "OBJ_ONLY"}),
    "scanobjectnn-OBJ_BG": ("scanobjectnn", ScanObjectNN, {"variant": "OBJ_BG"}),
    "scanobjectnn-PB_T50_RS": ("scanobjectnn", ScanObjectNN, {}),
    "shapenetpart": ("shapenetpart", ShapeNetPart, {}),
    "shapenetpart-h5": ("shapenetpart/shapenet_part_seg_hdf5_data", ShapeNetPart, {"trainval": True}),
    "shapenet55": ("shapenet55", ShapeNet55, {"whole": True}),
    "shapenet34": ("shapenet55", ShapeNet55, {"subset": 34}),
    "medpoints-classification": ("medpoints", MedPointS, {}),
    "medpoints-segmentation": ("medpoints", MedPointS, {"task": "segmentation"}),
    "medpoints-completion": ("medpoints", MedPointS, {"task": "completion"}),
    "medpoints-fine": ("medpoints", MedPointS, {"task": "segmentation", "labels": "fine"}),
}  # fmt: skip
SIZES = {
    "modelnet40": (36, 12, 12),
    "modelnet40-h5": (27, 9, 12),
    "shapenetpart": (30, 10, 10),
    "shapenetpart-h5": (40, 10, 10),
    "shapenet55": (48, 16, 16),
    "shapenet34": (20, 10, 10),
    "medpoints-classification": (60, 20, 20),
    "medpoints-segmentation": (3, 1, 1),
    "medpoints-fine": (3, 1, 1),
    "medpoints-completion": (60, 20, 20),
}


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("objects")
    for name, make in FIXTURES.items():
        make(root / name, 0)
    return root


def build(case: str, root: Path) -> Any:
    place, make, options = BUILD[case]
    return make(root=str(root / place), **options)


@pytest.mark.parametrize("case", BUILD)
def test_miniatures_load(case: str, raw: Path) -> None:
    data = build(case, raw)
    assert tuple(data.size(split) for split in ("train", "val", "test")) == SIZES.get(case, (36, 12, 12))
    assert len(data.palette) == data.num_classes
    for split in ("train", "val", "test"):
        names = [data.name(split, i) for i in range(data.size(split))]
        assert len(set(names)) == len(names)
        for i in range(0, data.size(split), 7):
            points = data.load(split, i)
            segment = points.get("segment")
            assert segment.dtype == torch.int64
            assert -1 <= int(segment.min()) <= int(segment.max()) < data.num_classes
            assert points.coord.isfinite().all()
            assert points.meta[0]["name"] == names[i]
            json.dumps({k: v for k, v in points.meta[0].items() if k != "origin"})  # survives the cache
            assert data.fingerprint(split, i) == data.fingerprint(split, i)


def test_classes_are_those_of_the_files(raw: Path) -> None:
    text, h5 = build("modelnet40", raw), build("modelnet40-h5", raw)
    h5.val = 0.0
    for i in (0, 7, 35):
        left, right = text.load("train", i), h5.load("train", i)
        torch.testing.assert_close(left.coord, right.coord, rtol=0, atol=1e-6)
        name = text.class_names[int(left.get("segment")[0])]
        assert text.name("train", i).startswith(name + "_")  # night_stand_0001: the class has an underscore
        assert torch.equal(left.get("segment"), right.get("segment"))
    only, behind = build("scanobjectnn-OBJ_ONLY", raw), build("scanobjectnn-OBJ_BG", raw)
    assert (only.load("train", 0).get("instance") == 0).all()
    assert int((behind.load("train", 0).get("instance") == -1).sum()) == 100
    parts, parts_h5 = build("shapenetpart", raw), build("shapenetpart-h5", raw)
    assert (len(parts.class_names), len(parts.categories)) == (50, 16)
    assert sorted(p for own in parts.categories.values() for p in own) == list(range(50))
    for i in range(5):
        left, right = parts.load("test", i), parts_h5.load("test", i)
        for field in ("coord", "segment", "category"):
            torch.testing.assert_close(left.get(field), right.get(field), rtol=0, atol=1e-6)
        category = int(left.get("category")[0])
        assert set(left.get("segment").tolist()) <= set(list(parts.categories.values())[category])
    shapes = ShapeNet55()
    assert (shapes.num_classes, shapes.class_names[0], shapes.class_names[-1]) == (55, "airplane", "washer")


def test_medpoints_layouts(raw: Path, tmp_path: Path) -> None:
    data = build("medpoints-completion", raw)
    pair = data.load("train", 3)
    given, wanted = (pair.coord[pair.get("target") == i] for i in (0, 1))
    assert len(given) == len(wanted) - len(wanted) // 5
    assert torch.cdist(given.double(), wanted.double()).amin(1).max() < 1e-3  # what is there is part of what is wanted
    assert pair.get("category").unique().tolist() == [data.class_names.index("colon")]
    old = tmp_path / "completion"
    for path in (raw / "medpoints" / "completion").rglob("*.ply"):
        organ, kind = path.parent.name, path.parent.parent.name
        (old / organ / kind).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, old / organ / kind / path.name)
    older = MedPointS(str(tmp_path), task="completion")
    sizes = [older.size(split) for split in ("train", "val", "test")]
    assert (sum(sizes), sizes) == (100, [60, 20, 20])
    names = [older.name(split, i) for split in ("train", "val", "test") for i in range(older.size(split))]
    assert len(set(names)) == 100
    assert {"target", "category"} <= set(older.load("train", 0).attrs)
    fine, coarse = build("medpoints-fine", raw), build("medpoints-segmentation", raw)
    assert (fine.num_classes, coarse.num_classes) == (145, 46)
    heart = coarse.class_names.index("heart")
    both = coarse.load("train", 0).get("segment"), fine.load("train", 0).get("segment")
    assert (both[0] == heart).any()
    assert len(both[1][both[0] == heart].unique()) == 1


def test_real_caps(data_dir: Path) -> None:
    data = ShapeNetPart(str(data_dir / "shapenetpart_cap"))
    readme = (data_dir / "shapenetpart_cap" / "README.md").read_text()
    counted = 0
    for split in ("train", "val", "test"):
        for i in range(data.size(split)):
            points = data.load(split, i)
            name = data.name(split, i).rpartition("_")[2]
            parts = points.get("segment").bincount(minlength=8)
            assert f"| {name}.txt | {points.num_points} | 6:{parts[6]}, 7:{parts[7]} |" in readme
            assert points.get("category").unique().tolist() == [list(data.categories).index("Cap")]
            counted += 1
    assert counted == 12


def test_synthetic_shapes_are_drawn_from_their_seed() -> None:
    data, again = SyntheticShapes(points=200), SyntheticShapes(points=200)
    first = data.load("train", 3)
    assert torch.equal(first.coord, again.load("train", 3).coord)
    assert not torch.equal(first.coord, data.load("val", 3).coord)
    assert not torch.equal(first.coord, SyntheticShapes(points=200, seed=1).load("train", 3).coord)
    assert first.num_points == 200
    torch.testing.assert_close(first.get("normal").norm(dim=1), torch.ones(200))
    assert [int(data.load("train", i).get("segment")[0]) for i in range(16)] == [*range(14), 0, 1]
    for options in ({"classes": ["chiar"]}, {"points": 3}, {"occlusion": 1.0}, {"train": -1}):
        with pytest.raises(InputError, match="SyntheticShapes"):
            SyntheticShapes(**options)


# What goes wrong -----------------------------------------------------------------------------------------------------


def first_file(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


def replace_line(number: int, line: bytes) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        lines = content.splitlines()
        lines[number] = line
        return b"\n".join(lines) + b"\n"

    return change


BREAKS: dict[str, tuple[str, str, Any, str]] = {
    "text cut off": ("modelnet40", "**/airplane_0001.txt", lambda b: b[:-30], "airplane_0001"),
    "object gone": ("modelnet40", "**/airplane_0001.txt", None, "no such file"),
    "text is words": ("modelnet40", "**/airplane_0001.txt", replace_line(3, b"1,2,x,0,0,1"), "airplane_0001"),
    "list empty": ("modelnet40", "**/modelnet40_train.txt", lambda b: b"", "names nothing"),
    "file cut off": ("modelnet40-h5", "ply_data_train0.h5", lambda b: b[:2000], "not a readable HDF5"),
    "no HDF5": ("modelnet40-h5", "ply_data_train0.h5", lambda b: b"not a file", "not a readable HDF5"),
    "variant gone": ("scanobjectnn-PB_T50_RS", "**/main_split/training*scale75.h5", None, "is missing"),
    "a part of another object": ("shapenetpart", "{first}", replace_line(0, b"0 0 0 0 0 1 49.0"), "part 49"),
    "half a part": ("shapenetpart", "{first}", replace_line(0, b"0 0 0 0 0 1 0.5"), "not whole"),
    "columns missing": ("shapenetpart", "{first}", replace_line(5, b"0 0 0 1"), "line 6|columns"),
    "list is no list": ("shapenetpart", "**/shuffled_train_file_list.json", lambda b: b'{"a": 1}', "JSON list"),
    "list cut off": ("shapenetpart", "**/shuffled_train_file_list.json", lambda b: b[:50], "JSON list"),
    "list is gone": ("shapenetpart", "**/shuffled_train_file_list.json", None, "No such file"),
    "array cut off": ("shapenet55", "{first}", lambda b: b[:300], "no readable .npy"),
    "array gone": ("shapenet55", "{first}", None, "is missing"),
    "cloud cut off": ("medpoints-classification", "{first}", lambda b: b[:-9], "truncated"),
    "labels too few": ("medpoints-segmentation", "**/fold1/coarse_label/*.seg", lambda b: b[:3000], "labels|line"),
    "labels from 0": ("medpoints-segmentation", "**/fold1/coarse_label/*.seg", replace_line(2, b"0"), "line 3 is 0"),
    "no labels": ("medpoints-segmentation", "**/fold1/coarse_label/*.seg", None, "is missing"),
    "no target": ("medpoints-completion", "**/fold1/target/aorta/aorta_100.ply", None, "is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", BREAKS)
def test_broken_files_are_named(case: str, raw: Path, tmp_path: Path) -> None:
    name, pattern, change, message = BREAKS[case]
    place = BUILD[name][0].split("/")[0]
    shutil.copytree(raw / place, tmp_path / place)
    data = build(name, tmp_path)
    if pattern == "{first}":
        path = data.scenes("train")[0].raw
        data = build(name, tmp_path)
    else:
        path = first_file(tmp_path / BUILD[name][0], pattern)
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        data.load("train", 0)
    assert str(tmp_path / place) in str(caught.value)
    assert "\n" not in str(caught.value)


def rewrite(path: Path, **changes: np.ndarray | None) -> None:
    with h5py.File(path, "r+") as file:
        for name, array in changes.items():
            del file[name]
            if array is not None:
                file[name] = array


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("modelnet40-h5", {"data": None}, "has no numbers 'data'"),
        ("modelnet40-h5", {"data": np.zeros((36, 3, 600), "f4")}, r"expected \(B, N, 3\)"),
        ("modelnet40-h5", {"data": np.full((36, 9, 3), np.nan, "f4")}, "not finite"),
        ("modelnet40-h5", {"label": np.zeros((7, 1), "u1")}, "'label' has 7 rows"),
        ("modelnet40-h5", {"label": np.full((36, 1), 40, "u1")}, r"is 40, classes are 0\.\.39"),
        ("shapenetpart-h5", {"pid": None}, "has no parts 'pid'"),
        ("shapenetpart-h5", {"pid": np.full((30, 512), 49, "u1")}, "part 49 on 512 points"),
    ],
)
def test_broken_tables_are_named(case: str, changes: dict[str, Any], message: str, raw: Path, tmp_path: Path) -> None:
    place = BUILD[case][0]
    shutil.copytree(raw / place, tmp_path / place)
    rewrite(tmp_path / place / "ply_data_train0.h5", **changes)
    with pytest.raises(InputError, match=message) as caught:
        build(case, tmp_path).load("train", 0)
    assert "ply_data_train0.h5" in str(caught.value)


def test_options_that_cannot_be_are_refused() -> None:
    for make in (
        lambda: ModelNet40(val=1.0),
        lambda: ScanObjectNN(variant="PB"),
        lambda: ShapeNet55(subset=21),
        lambda: MedPointS(task="folding"),
        lambda: MedPointS(task="classification", labels="fine"),
        lambda: MedPointS(train=[1, 4], val=[4]),
        lambda: MedPointS(test=[6]),
    ):
        with pytest.raises(InputError):
            make()


@pytest.mark.parametrize("case", BUILD)
def test_wrong_roots_say_what_is_expected(case: str, tmp_path: Path) -> None:
    _, make, options = BUILD[case]
    for root in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputError, match="expected"):
            make(root=str(root), **options).size("train")


@pytest.mark.parametrize("case", ["modelnet40-h5", "shapenetpart", "medpoints-completion"])
def test_prepare_checks_and_sums_up(case: str, raw: Path, tmp_path: Path) -> None:
    data = build(case, raw)
    result = prepare(data, tmp_path)
    assert not result.problems
    assert result.written == sum(there for _, there in result.scenes.values())
    before = (tmp_path / "summary.json").read_bytes()
    sorted(tmp_path.rglob("stats.json"))[0].unlink()
    again = prepare(build(case, raw), tmp_path)
    assert (again.written, again.kept) == (1, result.written - 1)
    assert (tmp_path / "summary.json").read_bytes() == before


def test_prepare_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "fixture", "medpoints", "--out", str(tmp_path / "raw")]) == 0
    arguments = ["prepare", "medpoints-segmentation", "--raw", str(tmp_path / "raw"), "--out"]
    assert main([*arguments, str(tmp_path / "out")]) == 0
    assert "5 written" in capsys.readouterr().out
    (tmp_path / "raw/segmentation/fold2/coarse_label/body_2.seg").write_text("1\n")
    assert main([*arguments, str(tmp_path / "out2")]) == 2
    assert "body_2.seg" in capsys.readouterr().err
