"""Objects cut out of frames and pasted into others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pc3d import InputError
from pc3d.cli import main
from pc3d.config import instantiate
from pc3d.data.boxes import box_tensor
from pc3d.data.object_database import ObjectDatabase
from pc3d.data.transforms import PasteObjects
from pc3d.datasets import KITTIObject
from pc3d.datasets.synthetic.scenes import kitti_object
from pc3d.io.kitti_object import KittiFrame, difficulty_levels
from pc3d.ops.boxes import points_in_boxes, rectangle_intersection
from pc3d.points import Points


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kitti")
    kitti_object(folder / "raw", 1, {"train": 4, "val": 1, "test": 1})
    assert main(["prepare", "kitti", "--raw", str(folder / "raw"), "--out", str(folder / "out")]) == 0
    return folder


def frame(prepared: Path, split: str = "val") -> Points:
    return KITTIObject(str(prepared / "raw")).load(split, 0)


def test_database_holds_the_objects_of_training_frames(prepared: Path) -> None:
    database = ObjectDatabase(prepared / "out" / "objects")
    whole = KITTIObject(str(prepared / "raw"), in_view=False)
    number = 0
    for index in range(4):
        cloud = whole.load("train", index)
        labels = KittiFrame.of(cloud.meta[0]).labels
        assert labels is not None
        levels = difficulty_levels(labels)[np.array([name != "DontCare" for name in labels.names])]
        for i, name in enumerate(cloud.meta[0]["box_names"]):
            coord, strength = database.points(number)
            inside = points_in_boxes(cloud.coord, box_tensor(cloud.meta[0])[i : i + 1])[:, 0]
            assert torch.equal(coord, cloud.coord[inside])
            assert torch.equal(strength, cloud.get("strength")[inside])
            assert (database.names[number], database.levels[number]) == (name, levels[i])
            number += 1
    assert number == len(database) > 30
    cars = database.of_class("Car", 5)
    assert (database.counts[cars] >= 5).all()
    assert 0 < len(cars) < database.names.count("Car")


def test_pasting(prepared: Path) -> None:
    paste = PasteObjects(str(prepared / "out" / "objects"), {"Car": 12, "Pedestrian": 6})
    before, after = frame(prepared), paste(frame(prepared), torch.Generator().manual_seed(0))
    old, new = before.meta[0]["box_names"], after.meta[0]["box_names"]
    assert new[: len(old)] == old
    added = new[len(old) :]
    assert added.count("Car") > 1
    assert new.count("Car") <= 12
    assert set(added) <= {"Car", "Pedestrian"}
    boxes = box_tensor(after.meta[0])
    assert boxes[: len(old)].tolist() == before.meta[0]["boxes"]
    flat = boxes[:, [0, 1, 3, 4, 6]]
    shared = rectangle_intersection(flat, flat).fill_diagonal_(0)
    assert not shared[len(old) :].any()
    # Inside a pasted box are its own points alone, numbered as its instance.
    database = paste.database
    for number in range(len(old), len(new)):
        source = (database.boxes == boxes[number]).all(1).nonzero().item()
        own = after.get("instance") == number
        assert torch.equal(after.coord[own], database.points(int(source))[0])
        inside = points_in_boxes(after.coord, boxes[number : number + 1])[:, 0]
        assert torch.equal(inside, own)
    assert (after.get("segment")[after.get("instance") >= len(old)] == -1).all()
    outside = after.get("instance") < len(old)
    rest = before.select(~points_in_boxes(before.coord, boxes[len(old) :]).any(1))
    assert torch.equal(after.coord[outside], rest.coord)
    again = instantiate(paste.to_config())(frame(prepared), torch.Generator().manual_seed(0))
    assert torch.equal(again.coord, after.coord)
    assert PasteObjects(str(prepared / "out" / "objects"), {"Car": 0})(before).coord is before.coord


def test_objects_stand_on_the_ground_of_the_frame(prepared: Path) -> None:
    paste = PasteObjects(str(prepared / "out" / "objects"), {"Car": 15, "Pedestrian": 15})
    cloud = frame(prepared)
    meta = {**cloud.meta[0], "plane": (0.0, -1.0, 0.0, 2.65)}  # a metre lower than the sensor's own 1.65 m
    free = paste(cloud, torch.Generator().manual_seed(3))
    lowered = paste(cloud.replace(meta=[meta]), torch.Generator().manual_seed(3))
    old = len(cloud.meta[0]["boxes"])
    boxes, others = (box_tensor(c.meta[0])[old:] for c in (lowered, free))
    assert len(boxes) == len(others) > 1
    bottom = boxes[:, 2] - boxes[:, 5] / 2
    torch.testing.assert_close(bottom, torch.full_like(bottom, -2.65 - 0.08))  # the camera is 0.08 m below the scanner
    number = lowered.get("instance")
    drop = (others[0, 2] - boxes[0, 2]).item()
    own = [c.coord[n == old] for c, n in ((free, free.get("instance")), (lowered, number))]
    torch.testing.assert_close(own[0] - torch.tensor([0, 0, drop]), own[1], atol=1e-5, rtol=0)


def test_what_cannot_be_pasted(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no database of objects"):
        PasteObjects(str(tmp_path), {"Car": 20})(frame(prepared))
    paste = PasteObjects(str(prepared / "out" / "objects"), {"Car": 20})
    with pytest.raises(InputError, match="has no boxes to fill up"):
        paste(frame(prepared, "test"))
    cloud = frame(prepared)
    with pytest.raises(InputError, match="field 'ring' is unknown"):
        paste(cloud.with_attrs(ring=torch.zeros(cloud.num_points)), torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="must not be negative"):
        PasteObjects(str(tmp_path), {"Car": -1})
    with pytest.warns(UserWarning, match=r"has no Cra to paste \(it has Car,"):
        PasteObjects(str(prepared / "out" / "objects"), {"Cra": 3, "Tram": 0})(cloud)
    broken = tmp_path / "objects"
    broken.mkdir()
    for path in (prepared / "out" / "objects").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    content = json.loads((broken / "objects.json").read_text())
    (broken / "objects.json").write_text(json.dumps({**content, "names": content["names"][1:]}))
    with pytest.raises(InputError, match="is damaged"):
        ObjectDatabase(broken)


def test_levels_follow_the_rule_of_the_database() -> None:
    """At their limits: heights count one pixel more, and the limits belong to the level."""
    from pc3d.io.kitti_object import KittiObjects

    rows = [(39, 0.15, 0, 0), (38.9, 0.15, 0, 1), (60, 0.16, 0, 1), (24, 0.3, 1, 1), (24, 0.31, 1, 2), (24, 0.5, 2, 2),
            (24, 0.51, 2, -1), (60, 0.0, 3, -1), (23.9, 0, 0, -1)]  # fmt: skip
    bbox = np.array([[0, 100, 50, 100 + height] for height, *_ in rows])
    zeros, three = np.zeros(len(rows)), np.zeros((len(rows), 3))
    truncated, occluded = (np.array([row[i] for row in rows], float) for i in (1, 2))
    objects = KittiObjects(["Car"] * len(rows), truncated, occluded, zeros, bbox, three, three, zeros)
    assert difficulty_levels(objects).tolist() == [row[3] for row in rows]
