"""Saved predictions: benchmark files, written and read back, and what is wrong with damaged ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pc3d import InputError, Points
from pc3d.data.dataset import PointDataset
from pc3d.data.prediction import Prediction
from pc3d.datasets import S3DIS, ScanNet, SemanticKITTI, SyntheticRooms
from pc3d.datasets.meta import facts
from pc3d.datasets.synthetic.scenes import FIXTURES
from pc3d.metrics import InstanceAveragePrecision, Instances

BUILD: dict[str, tuple[str, Callable[..., PointDataset], dict[str, Any]]] = {
    "scannet": ("scannet", ScanNet, {}),
    "scannet200": ("scannet", ScanNet, {"classes": 200}),
    "s3dis": ("s3dis", S3DIS, {}),
    "semantickitti": ("semantickitti", SemanticKITTI, {}),
    "semantickitti-moving": ("semantickitti", SemanticKITTI, {"classes": 25, "scans": 2}),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*damaged")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("raw")
    for name in ("scannet", "s3dis", "semantickitti"):
        FIXTURES[name](root / name, 0)
    return root


def build(case: str, raw: Path) -> PointDataset:
    name, make, options = BUILD[case]
    return make(root=str(raw / name), **options)


def guess(data: PointDataset, cloud: Points, seed: int = 0) -> Prediction:
    """Random classes, and instances of random blocks of points with the class of their own."""
    generator = torch.Generator().manual_seed(seed)
    count = cloud.num_points
    segment = torch.randint(-1, data.num_classes, (count,), generator=generator)
    labels = torch.randint(-1, 6, (count,), generator=generator)
    things = torch.tensor(data.things).nonzero()[:, 0]
    classes = things[torch.randint(len(things), (6,), generator=generator)]
    segment = torch.where(labels >= 0, classes[labels], segment)
    if "time" in cloud:  # of several scans only the newest is predicted
        old = cloud.get("time")[:, 0] > 0
        segment, labels = segment.masked_fill(old, -1), labels.masked_fill(old, -1)
    return Prediction(segment, Instances.of(labels, classes, torch.rand(6, generator=generator)))


def masks(found: Instances, count: int) -> set[tuple[int, tuple[int, ...]]]:
    rows = found.rows.split(found.sizes.tolist())
    return {(label, tuple(sorted(own.tolist()))) for label, own in zip(found.classes.tolist(), rows, strict=True)}


@pytest.mark.parametrize("case", BUILD)
def test_predictions_come_back(case: str, raw: Path, tmp_path: Path) -> None:
    data = build(case, raw)
    for split in ("val", "test"):
        for i in range(data.size(split)):
            cloud = data.load(split, i)
            wanted = guess(data, cloud, i)
            path = data.save_prediction(tmp_path, cloud, wanted)
            assert path.is_file()
            found = data.load_prediction(tmp_path, cloud)
            assert torch.equal(found.segment, wanted.segment)
            assert found.instances is not None
            assert wanted.instances is not None
            assert masks(found.instances, cloud.num_points) == masks(wanted.instances, cloud.num_points)
            if not isinstance(data, SemanticKITTI):  # its files hold no confidence
                assert torch.equal(found.instances.scores, wanted.instances.scores)


@pytest.mark.parametrize("case", BUILD)
def test_predictions_without_instances(case: str, raw: Path, tmp_path: Path) -> None:
    data = build(case, raw)
    cloud = data.load("val", 0)
    segment = guess(data, cloud).segment
    data.save_prediction(tmp_path, cloud, Prediction(segment))
    found = data.load_prediction(tmp_path, cloud)
    assert torch.equal(found.segment, segment)
    assert found.instances is None


def test_scannet_files_are_what_the_server_takes(raw: Path, tmp_path: Path) -> None:
    data = build("scannet", raw)
    cloud = data.load("val", 0)
    prediction = guess(data, cloud)
    data.save_prediction(tmp_path, cloud, prediction)
    name, official = data.name("val", 0), [code for code, *_ in facts("scannet")["classes20"]]
    lines = (tmp_path / "semantic" / f"{name}.txt").read_text().splitlines()
    expected = [official[c] if c >= 0 else 0 for c in prediction.segment.tolist()]
    assert [int(line) for line in lines] == expected
    listed = (tmp_path / "instance" / f"{name}.txt").read_text().splitlines()
    assert len(listed) == 6
    for number, line in enumerate(listed):
        place, label, confidence = line.split(" ")
        assert place == f"predicted_masks/{name}_{number:03d}.txt"
        assert int(label) in official
        assert int(label) not in (1, 2)  # wall and floor have no instances
        assert 0 <= float(confidence) <= 1
        assert set((tmp_path / "instance" / place).read_text().split()) == {"0", "1"}
    assert {p.parent.name for p in (tmp_path / "instance").rglob("*.txt")} == {"instance", "predicted_masks"}


def test_ap_of_the_files_is_ap_of_the_prediction(raw: Path, tmp_path: Path) -> None:
    data = build("scannet", raw)
    cloud = data.load("val", 0)
    segment, instance = cloud.get("segment"), cloud.get("instance")
    classes = torch.stack([segment[instance == i].mode().values for i in range(int(instance.max()) + 1)])
    noisy = torch.where(torch.rand(len(instance), generator=torch.Generator().manual_seed(1)) < 0.2, -1, instance)
    wanted = Instances.of(noisy, classes, torch.linspace(0.1, 0.9, len(classes))).take(classes > 1)
    data.save_prediction(tmp_path, cloud, Prediction(segment, wanted))
    read = data.load_prediction(tmp_path, cloud).instances
    assert read is not None
    scores = []
    for found in (wanted, read):
        metric = InstanceAveragePrecision(data.things or [], min_points=20)
        metric.update(found, segment, instance)
        scores.append(metric.compute())
    assert scores[0].ap == scores[1].ap > 0.3
    assert scores[0].ap50 == scores[1].ap50 == 1


def test_semantickitti_files_are_what_the_evaluator_takes(raw: Path, tmp_path: Path) -> None:
    data = build("semantickitti-moving", raw)
    cloud = data.load("test", 0)
    prediction = guess(data, cloud)
    data.save_prediction(tmp_path, cloud, prediction)
    words = np.fromfile(tmp_path / "sequences/11/predictions/000000.label", "<u4")
    scan = np.fromfile(raw / "semantickitti/sequences/11/velodyne/000000.bin", "<f4")
    assert len(words) == len(scan) // 4
    known = {int(code) for code in facts("semantickitti")["names"]}
    assert set((words & 0xFFFF).tolist()) <= known
    assert (words >> 16).max() == 6
    assert ((words & 0xFFFF) > 0).mean() > 0.9


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("case", "file", "change", "message"),
    [
        ("scannet", "semantic/{name}.txt", truncate, "lines for a mesh of|not one whole number"),
        ("scannet", "semantic/{name}.txt", lambda p: p.write_text("wall\n"), "not one whole number"),
        ("scannet", "semantic/{name}.txt", Path.unlink, "No such file"),
        ("scannet", "instance/{name}.txt", Path.unlink, "No such file"),
        ("scannet", "instance/{name}.txt", lambda p: p.write_text("a.txt 5\n"), "line 1 is not"),
        ("scannet", "instance/{name}.txt", lambda p: p.write_text("../x.txt 5 0.5\n"), "lies outside"),
        ("scannet", "instance/predicted_masks/{name}_002.txt", truncate, "lines for a mesh of"),
        ("scannet", "instance/predicted_masks/{name}_002.txt", Path.unlink, "No such file"),
        ("s3dis", "{name}.npz", truncate, "no readable"),
        ("s3dis", "{name}.npz", Path.unlink, "no prediction was saved"),
        ("s3dis", "{name}.npz", lambda p: np.savez(p, segment=np.zeros(3, int)), "expected"),
        ("semantickitti", "sequences/08/predictions/000000.label", truncate, "labels for a scan"),
        ("semantickitti", "sequences/08/predictions/000000.label", Path.unlink, "cannot be read"),
    ],
)
def test_damaged_predictions_are_named(
    case: str, file: str, change: Callable[[Path], Any], message: str, raw: Path, tmp_path: Path
) -> None:
    data = build(case, raw)
    cloud = data.load("val", 0)
    data.save_prediction(tmp_path, cloud, guess(data, cloud))
    path = tmp_path / file.format(name=data.name("val", 0))
    change(path)
    with pytest.raises(InputError, match=message) as caught:
        data.load_prediction(tmp_path, cloud)
    assert str(path.parent) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["rows", "borders", "classes", "scores"])
def test_instances_that_do_not_fit_are_refused(field: str, tmp_path: Path) -> None:
    data = SyntheticRooms(1, 0, 0, points=1000)
    cloud = data.load("train", 0)
    data.things = [True] * data.num_classes
    path = data.save_prediction(tmp_path, cloud, guess(data, cloud))
    arrays = dict(np.load(path))
    arrays[field] = arrays[field] + 1000 if field in ("rows", "borders") else arrays[field][:-1]
    np.savez(path, **arrays)
    with pytest.raises(InputError, match=r"does not fit|fitting lengths"):
        data.load_prediction(tmp_path, cloud)
