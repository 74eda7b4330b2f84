"""KITTI object frames: boxes around the right points, files, and their errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pc3d import InputError
from pc3d.cli import main
from pc3d.datasets import KITTIObject
from pc3d.datasets.kitti_object import image_size, read_plane
from pc3d.datasets.synthetic.scenes import FIXTURES
from pc3d.io.kitti_object import Calibration, read_objects, write_objects
from pc3d.viz.figures import save_bird_eye_view
from pc3d.viz.render import save_png


def test_real_frames(data_dir: Path, tmp_path: Path) -> None:
    data = KITTIObject(str(data_dir / "kitti_object"))
    assert [data.name("train", i) for i in range(2)] == ["000001", "000002"]
    assert KITTIObject(str(data_dir / "kitti_object"), in_view=False).load("train", 0).num_points == 120_268
    for index, (names, inside) in enumerate(
        [(["Truck", "Car", "Cyclist"], [71, 9, 18]), (["Misc", "Car"], [1349, 67])]
    ):
        points = data.load("train", index)
        meta = points.meta[0]
        assert meta["box_names"] == names
        assert points.get("instance")[points.get("instance") >= 0].bincount().tolist() == inside
        scene = data.scenes("train")[index]
        calibration, objects = data.calibration(scene), data.objects(scene)
        assert objects is not None
        kept = objects.take(np.array([name != "DontCare" for name in objects.names]))
        # The projected corners of a labelled box lie around its labelled image box.
        boxes = calibration.image_boxes(kept.location, kept.dimensions, kept.rotation_y).clip(0, [1241, 374, 1241, 374])
        assert np.abs(boxes - kept.bbox).max() < 12
        path = save_bird_eye_view(tmp_path / f"{index}.png", points, meta["boxes"], names)
        assert path.stat().st_size > 20_000
    car = data.load("train", 1)
    assert (car.get("segment") == 0).sum() == 67  # Misc is no class


def test_label_files_round_trip(data_dir: Path, tmp_path: Path) -> None:
    path = data_dir / "kitti_object/training/label_2/000001.txt"
    objects = read_objects(path)
    again = read_objects(write_objects(tmp_path / "a.txt", objects))
    assert again.names == objects.names == ["Truck", "Car", "Cyclist", *["DontCare"] * 4]
    for field in ("bbox", "dimensions", "location", "rotation_y", "alpha"):
        np.testing.assert_allclose(getattr(again, field), getattr(objects, field), atol=1e-4)
    (tmp_path / "empty.txt").write_text("")
    assert len(read_objects(tmp_path / "empty.txt")) == 0


def test_miniature_boxes_hold_their_cars(tmp_path: Path) -> None:
    FIXTURES["kitti"](tmp_path, 3)
    data = KITTIObject(str(tmp_path))
    assert [data.size(split) for split in ("train", "val", "test")] == [2, 1, 1]
    assert "boxes" not in data.load("test", 0).meta[0]
    total = 0
    for i in range(2):
        points = data.load("train", i)
        for number, box in enumerate(points.meta[0]["boxes"]):
            own = points.get("instance") == number
            assert own.sum() >= 3
            assert (points.coord[own].double() - torch.tensor(box[:3])).norm(dim=1).max() < 3
            total += 1
    assert total > 10


def test_background_is_a_class_of_its_own(tmp_path: Path) -> None:
    FIXTURES["kitti"](tmp_path, 3)
    plain, whole = KITTIObject(str(tmp_path)), KITTIObject(str(tmp_path), background=True)
    assert whole.class_names == [*plain.class_names, "background"]
    names = [scene.name for scene in plain.scenes("train") if plain.objects(scene)]
    label = tmp_path / "training" / "label_2" / f"{names[0]}.txt"
    label.write_text(label.read_text().replace("Car", "Van", 1))
    index = [scene.name for scene in plain.scenes("train")].index(names[0])
    before, after = plain.load("train", index), whole.load("train", index)
    assert torch.equal(before.get("instance"), after.get("instance"))
    outside = before.get("instance") < 0
    assert (after.get("segment")[outside] == 3).all()
    assert torch.equal(before.get("segment")[~outside], after.get("segment")[~outside])
    assert (after.get("segment")[before.get("instance") == 0] == -1).all()  # in the box of the van
    assert (whole.load("test", 0).get("segment") == -1).all()


def test_some_of_the_classes(tmp_path: Path) -> None:
    FIXTURES["kitti"](tmp_path, 3)
    plain, some = KITTIObject(str(tmp_path)), KITTIObject(str(tmp_path), classes=["Cyclist", "Car"])
    assert some.class_names == ["Cyclist", "Car"]
    for index in range(2):
        before, after = plain.load("train", index).get("segment"), some.load("train", index).get("segment")
        assert torch.equal(after, torch.tensor([1, -1, 0, -1])[before])
    assert some.fingerprint("train", 0) != plain.fingerprint("train", 0)
    for wrong in (["Van"], [], ["Car", "Car"]):
        with pytest.raises(InputError, match="must be some of Car, Pedestrian, Cyclist, each once"):
            KITTIObject(str(tmp_path), classes=wrong)


def test_the_picture_tells_what_the_camera_sees(tmp_path: Path) -> None:
    FIXTURES["kitti"](tmp_path, 0)
    before = KITTIObject(str(tmp_path)).load("train", 0).num_points
    picture = tmp_path / "training/image_2/000000.png"
    picture.parent.mkdir()
    save_png(picture, np.zeros((370, 700, 3), np.uint8))
    assert image_size(picture) == (370, 700)
    assert 0 < KITTIObject(str(tmp_path)).load("train", 0).num_points < before
    picture.write_text("hello")
    with pytest.raises(InputError, match="is not a PNG"):
        KITTIObject(str(tmp_path)).load("train", 0)


def test_planes_point_up(tmp_path: Path) -> None:
    path = tmp_path / "000000.txt"
    path.write_text("# Plane\nWidth 4\nHeight 1\n0.02 2.0 0.0 -3.3\n")
    a, b, c, d = read_plane(path)
    assert (round(b, 3), round(d, 3)) == (-1.0, 1.65)
    assert a * a + b * b + c * c == pytest.approx(1)
    path.write_text("# Plane\n")
    with pytest.raises(InputError, match="line 4"):
        read_plane(path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("calib/000000.txt", None, "cannot be read"),
        ("calib/000000.txt", "P2: 1 2 3\n", "field 'P2'"),
        ("label_2/000000.txt", None, "cannot be read"),
        ("label_2/000000.txt", "Car 0 0 1 2 3\n", "line 1 has 6 columns"),
        ("label_2/000000.txt", "Car" + " x" * 14 + "\n", "not numbers"),
        (
            "label_2/000000.txt",
            ("Car" + " 1" * 14 + "\n") * 2 + "Car" + " nan" * 14,
            "object 3 has a value that is not",
        ),
    ],
)
def test_broken_files_are_named(tmp_path: Path, file: str, content: str | None, message: str) -> None:
    FIXTURES["kitti"](tmp_path, 0)
    path = tmp_path / "training" / file
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        KITTIObject(str(tmp_path)).load("train", 0)
    assert str(path) in str(caught.value)


def test_calibration_there_and_back(data_dir: Path) -> None:
    calibration = Calibration.read(data_dir / "kitti_object/training/calib/000001.txt")
    coord = np.random.default_rng(0).normal(0, 30, (50, 3))
    np.testing.assert_allclose(calibration.to_lidar(calibration.to_camera(coord)), coord, atol=1e-9)


def test_inspect_draws_classes_samples_and_boxes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FIXTURES["kitti"](tmp_path / "kitti", 3)
    config = Path(__file__).parents[2] / "configs/semantickitti/semseg-spunet-small.yaml"
    text = config.read_text().replace("pc3d.datasets.SemanticKITTI", "pc3d.datasets.KITTIObject")
    lines = [line for line in text.splitlines() if "init_args: {train:" not in line]
    (tmp_path / "kitti.yaml").write_text("\n".join(lines) + "\n")
    arguments = ["data", "inspect", "--config", str(tmp_path / "kitti.yaml"), "--out", str(tmp_path / "out")]
    options = [
        "--clouds",
        "2",
        "--pictures",
        "1",
        "--",
        "--data.root",
        str(tmp_path / "kitti"),
        "--data.cache",
        "false",
    ]
    assert main([*arguments, *options]) == 0
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert {"classes.png", "samples.png"} <= set(made)
    assert "train: 2 clouds" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "out")
    assert main([*arguments, "--clouds", "0"]) == 2
