"""Your own clouds: formats, labels, label maps, splits by file and by tile, bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pc3d.config import instantiate
from pc3d.data.cache import CloudCache
from pc3d.data.module import PointDataModule
from pc3d.data.pipeline import Pipeline
from pc3d.datasets import FolderDataset
from pc3d.errors import InputError
from pc3d.io import write
from pc3d.points import Points

MAP: dict[int, str | None] = {2: "ground", 3: "plant", 5: "plant", 6: "roof", 7: None}


def save(
    path: Path, count: int = 40, codes: tuple[int, ...] = (2, 3, 5, 6, 7), size: float = 1.0, **attrs: torch.Tensor
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(count)
    attrs.setdefault("label", torch.tensor([codes[i % len(codes)] for i in range(count)], dtype=torch.int32))
    return write(path, Points(torch.rand(count, 3, generator=generator) * size, attrs=attrs))


def folder(root: Path, **options: object) -> FolderDataset:
    settings = {"label_field": "label", "label_map": MAP, **options}
    return FolderDataset(str(root), **settings)


def names(dataset: FolderDataset) -> dict[str, list[str]]:
    return {split: [dataset.name(split, i) for i in range(dataset.size(split))] for split in ("train", "val", "test")}


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    for i in range(10):
        save(tmp_path / ("north" if i < 3 else "south") / f"scan{i}.ply", 40 + i)
    return tmp_path


# Labels --------------------------------------------------------------------------------------------------------------


def test_codes_become_classes(tmp_path: Path) -> None:
    save(tmp_path / "a.ply", 10)
    save(tmp_path / "b.ply", 10)
    dataset = folder(tmp_path, val=["b.ply"])
    points = dataset.load("train", 0)
    assert dataset.class_names == ["ground", "plant", "roof"]
    assert dataset.label_map == {2: 0, 3: 1, 5: 1, 6: 2, 7: -1}
    assert points.attrs["segment"].tolist() == [0, 1, 1, 2, -1] * 2
    assert points.attrs["label"].tolist() == [2, 3, 5, 6, 7] * 2
    assert points.meta[0]["path"].endswith("a.ply")


@pytest.mark.parametrize(
    "text",
    [
        "2: ground\n3: plant\n5: plant\n6: roof\n7: ignore\n",
        '{"2": "ground", "3": "plant", "5": "plant", "6": "roof", "7": null}',
    ],
)
def test_label_map_from_a_file(ten: Path, text: str) -> None:
    path = ten / "map.yaml"
    path.write_text(text)
    assert folder(ten, label_map=str(path)).label_map == folder(ten).label_map


def test_class_names_set_the_order(ten: Path) -> None:
    dataset = folder(ten, class_names=["roof", "ground", "plant"])
    assert dataset.label_map == {2: 1, 3: 2, 5: 2, 6: 0, 7: -1}
    with pytest.raises(InputError, match="differ from the names in label_map: roof, tower"):
        folder(ten, class_names=["tower", "ground", "plant"])


def test_class_numbers_need_no_map(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / f"{name}.ply", 6, (-1, 0, 1))
    dataset = folder(tmp_path, label_map=None, class_names=["x", "y"], val=["b*"])
    assert dataset.load("train", 0).attrs["segment"].tolist() == [-1, 0, 1] * 2


def test_unknown_codes_are_listed_or_ignored(tmp_path: Path) -> None:
    save(tmp_path / "a.ply", 10, (2, 9, 9, 64, 2))
    save(tmp_path / "b.ply")
    with pytest.raises(InputError) as caught:
        folder(tmp_path, val=["b*"]).load("train", 0)
    message = str(caught.value)
    assert message.startswith(
        f"{tmp_path}/a.ply: field 'label' has codes outside the label map: 9 (4 points), 64 (2 points)"
    )
    assert "\n" not in message
    ignored = folder(tmp_path, val=["b*"], unknown="ignore").load("train", 0)
    assert ignored.attrs["segment"].tolist() == [0, -1, -1, -1, 0] * 2


def test_labels_in_text_numpy_and_kitti_files(tmp_path: Path) -> None:
    codes = np.array([2, 3, 5, 6, 7] * 4)
    for name in "abc":
        save(tmp_path / "scans" / f"{name}.ply", 20, unused=torch.zeros(20))
        (tmp_path / "labels").mkdir(exist_ok=True)
    np.savetxt(tmp_path / "scans" / "a.txt", codes)
    np.save(tmp_path / "labels" / "b.npy", codes)
    (codes + (np.arange(20) << 16)).astype("<u4").tofile(tmp_path / "labels" / "c.label")
    for pattern, file in (("{stem}.txt", "a"), ("../labels/{stem}.npy", "b"), ("../labels/{stem}.label", "c")):
        others = [f"*{name}.ply" for name in "abc" if name != file]
        dataset = folder(
            tmp_path, label_file=pattern, label_field="code", files="scans/*.ply", train=[f"*{file}.ply"], val=others
        )
        points = dataset.load("train", 0)
        assert points.attrs["segment"].tolist() == [0, 1, 1, 2, -1] * 4
    assert points.attrs["instance"].tolist() == list(range(20))


def test_a_label_file_of_another_length(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / f"{name}.ply", 20)
        np.savetxt(tmp_path / f"{name}.lab", np.full(19, 2))
    with pytest.raises(InputError, match=r"[ab].lab: holds 19 labels for the 20 points of [ab].ply"):
        folder(tmp_path, label_file="{stem}.lab", val=0.5).load("train", 0)


# Splits --------------------------------------------------------------------------------------------------------------


def test_splits_by_pattern(ten: Path) -> None:
    split = names(folder(ten, val=["north/*"], test=["re:scan[89]"]))
    assert split["val"] == ["north__scan0", "north__scan1", "north__scan2"]
    assert split["test"] == ["south__scan8", "south__scan9"]
    assert split["train"] == [f"south__scan{i}" for i in range(3, 8)]


def test_test_is_val_by_default_and_may_be_given_as_val(ten: Path) -> None:
    split = names(folder(ten, val=["north/*"]))
    assert split["test"] == split["val"]
    assert names(folder(ten, val=["north/*"], test=["north/*"])) == split


def test_splits_by_share(ten: Path) -> None:
    split = names(folder(ten, val=0.2, test=0.3))
    assert [len(split[name]) for name in ("train", "val", "test")] == [5, 2, 3]
    assert sorted(name for group in split.values() for name in group) == sorted(
        names(folder(ten, val=0.0, train=1.0))["train"]
    )
    assert names(folder(ten, val=0.2, test=0.3)) == split
    assert names(folder(ten, val=0.2, test=0.3, seed=1)) != split


def test_a_share_of_the_training_clouds(ten: Path) -> None:
    split = names(folder(ten, train=0.4, val=["north/*"]))
    assert len(split["train"]) == 4
    assert not set(split["train"]) & set(split["val"])


def test_files_narrow_the_folder(ten: Path) -> None:
    (ten / "notes.txt").write_text("not a cloud")
    (ten / ".hidden.ply").write_text("")
    assert sum(map(len, names(folder(ten, files=["south/*.ply"], test=0.0)).values())) == 7


def test_names_stay_unique(tmp_path: Path) -> None:
    for name in ("a.ply", "a.pcd", "sub/a.ply", "b.ply"):
        save(tmp_path / name)
    split = names(folder(tmp_path, val=["b*"]))
    assert sorted(split["train"]) == ["a.pcd", "a.ply", "sub__a"]


def test_relocate_is_part_of_the_config(ten: Path, tmp_path: Path) -> None:
    dataset = folder(tmp_path / "elsewhere", val=["north/*"])
    data = PointDataModule(dataset, Pipeline(0.1, ["coord"]), root=str(ten), cache=False)
    assert data.dataset.size("val") == 3
    again = instantiate(dataset.to_config())
    assert again.root == ten
    assert again.label_map == dataset.label_map


# Tiles ---------------------------------------------------------------------------------------------------------------


def test_tiles_hold_every_point_once(tmp_path: Path) -> None:
    origin = (770012.0, 6277012.0, 0.0)
    for i, shift in enumerate((0.0, 40.0)):
        coord = torch.rand(3000, 3, generator=torch.Generator().manual_seed(i)) * 40
        meta = [{"origin": (origin[0] + shift, origin[1], 0.0)}]
        row = torch.arange(3000, dtype=torch.int32)
        label = torch.full((3000,), 2, dtype=torch.int32)
        write(tmp_path / f"{i}.ply", Points(coord, attrs={"row": row, "label": label}, meta=meta))
    dataset = folder(tmp_path, tile=20.0, val=0.25, min_points=200)
    loaded = [dataset.load(split, i) for split in ("train", "val") for i in range(dataset.size(split))]
    for path in (tmp_path / "0.ply", tmp_path / "1.ply"):
        rows = torch.cat([points.attrs["row"] for points in loaded if points.meta[0]["path"] == str(path)])
        assert sorted(rows.tolist()) == list(range(3000))
    assert min(points.num_points for points in loaded) >= 200
    assert dataset.size("val") == round(0.25 * len(loaded))
    assert all((points.coord[:, :2].amax(0) - points.coord[:, :2].amin(0)).max() < 41 for points in loaded)
    assert len({points.meta[0]["name"] for points in loaded}) == len(loaded)


def test_tiles_of_val_are_spread(tmp_path: Path) -> None:
    """Of a field of 12 x 12 tiles every block of 4 x 4 gives some to validation."""
    save(tmp_path / "a.ply", 12 * 12 * 200, (2,), size=12.0)
    dataset = folder(tmp_path, tile=1.0, val=0.25, min_points=1)
    tiles = [unit.tile for unit in dataset._units("val")]
    blocks = {(column // 4, row // 4) for column, row in tiles}
    assert len(tiles) == 36
    assert len(blocks) == 9


def test_tiles_of_one_place_in_two_files_share_their_split(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / f"{name}.ply", 2000, (2,), size=4.0)
    dataset = folder(tmp_path, tile=1.0, val=0.5, min_points=1)
    chosen = {split: {unit.tile for unit in dataset._units(split)} for split in ("train", "val")}
    assert not chosen["train"] & chosen["val"]


def test_tiles_with_patterns(ten: Path) -> None:
    dataset = folder(ten, tile=0.5, min_points=1, val=["north/*"])
    assert dataset.size("val") == 3 * 4
    assert dataset.size("train") == 7 * 4


def test_tile_counts_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "in" / "a.ply", 400)
    first = folder(tmp_path / "in", tile=0.5)
    first.cache = CloudCache(tmp_path / "cache")
    expected = names(first)
    second = folder(tmp_path / "in", tile=0.5)
    second.cache = CloudCache(tmp_path / "cache")
    monkeypatch.setattr("pc3d.datasets.folder.read", None)
    assert names(second) == expected


# Bad input -----------------------------------------------------------------------------------------------------------


def test_a_missing_field_names_what_there_is(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / f"{name}.ply")
    with pytest.raises(InputError, match=r"a.ply: field 'kind' is missing \(it has: coord, label\)"):
        folder(tmp_path, label_field="kind", val=["b*"]).load("train", 0)


def test_explicit_test_clouds_may_lack_labels(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / f"{name}.ply")
    write(tmp_path / "c.ply", Points(torch.rand(5, 3)))
    dataset = folder(tmp_path, val=["b*"], test=["c*"])
    assert dataset.load("test", 0).attrs["segment"].tolist() == [-1] * 5
    with pytest.raises(InputError, match="field 'label' is missing"):
        folder(tmp_path, val=["c*"]).load("test", 0)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.tensor([2.0, 2.5] * 10), "10 labels that are not whole numbers (first at point 1: 2.5)"),
        (torch.tensor([2.0, float("nan")] * 10), "(first at point 1: nan)"),
    ],
)
def test_labels_that_are_no_codes(tmp_path: Path, labels: torch.Tensor, words: str) -> None:
    save(tmp_path / "a.ply", 20, label=labels)
    save(tmp_path / "b.ply")
    with pytest.raises(InputError) as caught:
        folder(tmp_path, val=["b*"]).load("train", 0)
    assert words in str(caught.value)
    assert "a.ply: field 'label'" in str(caught.value)


def test_one_point_none_and_nan(tmp_path: Path) -> None:
    save(tmp_path / "b.ply")
    for text, words in (
        ("1 2 3 2\n", "holds 1 point"),
        ("", "a.xyz"),
        ("1 2 nan 2\n1 2 3 2\n", "field 'z' holds 1 non-finite"),
    ):
        (tmp_path / "a.xyz").write_text(text)
        with pytest.raises(InputError, match=words):
            folder(tmp_path, columns=["x", "y", "z", "label"], files="*.xyz", val=0.0).load("train", 0)


def test_nan_points_can_be_dropped_with_their_labels(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text("1 2 nan 3\n1 2 3 2\n1 2 4 6\n")
    dataset = folder(tmp_path, columns=["x", "y", "z", "label"], invalid="drop", val=0.0)
    assert dataset.load("train", 0).attrs["segment"].tolist() == [0, 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label_map": None}, "set label_map"),
        ({"label_map": "missing.yaml"}, "label map missing.yaml: No such file"),
        ({"label_map": {"two": "ground"}}, "code 'two' is not a whole number"),
        ({"label_map": {}}, "expected 'code: class name' lines"),
        ({"label_map": {1: None}}, "every code is ignored"),
        ({"tile": 0.0}, "tile: 0.0 must be a length"),
        ({"val": ["west/*"]}, "val pattern 'west/*' matches none of 10 files"),
        ({"val": ["re:("]}, "'re:(' is no regular expression"),
        ({"val": 1.5}, "val: 1.5 is no share"),
        ({"train": ["*"], "val": ["north/*"]}, "scan0.ply: is in the train and the"),
        ({"val": ["*"]}, "nothing left to train on"),
    ],
)
def test_bad_options_are_one_clear_line(ten: Path, options: dict[str, object], words: str) -> None:
    with pytest.raises(InputError) as caught:
        folder(ten, **options).size("train")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no readable point cloud"):
        folder(tmp_path).size("train")
    with pytest.raises(InputError, match="no such folder"):
        folder(tmp_path / "missing").size("train")
    with pytest.raises(InputError, match="root is not set"):
        FolderDataset(label_map=MAP).size("train")


# Whole way -----------------------------------------------------------------------------------------------------------


def test_an_own_dataset_in_a_few_lines_of_yaml(ten: Path) -> None:
    text = f"""
class_path: pc3d.datasets.FolderDataset
init_args:
  root: {ten}
  label_field: label
  label_map: {{2: ground, 3: plant, 5: plant, 6: roof, 7: ignore}}
  val: ["north/*.ply"]
"""
    dataset = instantiate(yaml.safe_load(text))
    data = PointDataModule(dataset, Pipeline(0.05, ["coord"]), batch_size=3, cache=str(ten / ".cache"))
    batch = next(iter(data.train_dataloader()))
    assert len(batch) == 3
    assert data.class_names == ["ground", "plant", "roof"]
    assert next(iter(data.val_dataloader())).source is not None


def test_a_changed_file_or_map_is_read_again(ten: Path) -> None:
    def first(**options: object) -> Points:
        data = PointDataModule(
            folder(ten, val=["north/*"], **options), Pipeline(0.05, ["coord"]), cache=str(ten / ".cache")
        )
        return data.samples("train").cloud(0)

    before = first()
    assert torch.equal(first().coord, before.coord)
    assert (first(label_map={**MAP, 2: None}).attrs["segment"] == -1).sum() > (before.attrs["segment"] == -1).sum()
    save(ten / "south" / "scan3.ply", 77)
    assert first().num_points == 77


def test_real_tiles(data_dir: Path) -> None:
    pytest.importorskip("laspy")
    classes: dict[int, str | None] = {
        1: "unassigned",
        2: "ground",
        3: "low",
        4: "medium",
        5: "high",
        6: "building",
        64: None,
    }
    root = data_dir / "ign_lidarhd" / "tiles"
    dataset = folder(root, label_field="classification", label_map=classes, val=["*77060*"])
    points = dataset.load("val", 0)
    assert dataset.size("train") == 3
    assert torch.bincount(points.attrs["segment"][points.attrs["segment"] >= 0]).tolist() == [
        4436,
        32663,
        2347,
        3335,
        19871,
        20839,
    ]
    assert points.meta[0]["origin"][0] > 770000
    assert {"intensity", "return_number", "number_of_returns"} <= set(points.attrs)
