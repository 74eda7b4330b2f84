"""Streets by procedure: the same from memory and from files, and fit to be evaluated on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from pc3d import InputError
from pc3d.data.boxes import Boxes, box_tensor
from pc3d.data.prediction import Prediction
from pc3d.datasets import KITTIObject, SyntheticStreets
from pc3d.datasets.synthetic.scenes import kitti_object
from pc3d.io.kitti_object import KittiFrame, KittiObjects, read_objects
from pc3d.metrics.kitti import KittiMetrics, kitti_ap


def test_frames_are_the_same_from_files(tmp_path: Path) -> None:
    kitti_object(tmp_path, 5, {"train": 2, "val": 1})
    files, made = KITTIObject(str(tmp_path)), SyntheticStreets(seed=5)
    for index in range(2):
        stored, cloud = files.load("train", index), made.load("train", index)
        for name in ("coord", "strength"):
            assert torch.equal(stored.get(name), cloud.get(name)), name
        for name in ("segment", "instance"):  # label files have four decimals: points on faces may change sides
            assert (stored.get(name) != cloud.get(name)).float().mean() < 0.01, name
        assert stored.meta[0]["box_names"] == cloud.meta[0]["box_names"]
        torch.testing.assert_close(box_tensor(stored.meta[0]), box_tensor(cloud.meta[0]), atol=2e-4, rtol=0)
        frame, other = (KittiFrame.of(meta) for meta in (stored.meta[0], cloud.meta[0]))
        assert frame.labels is not None
        assert other.labels is not None
        assert frame.labels.names == other.labels.names
        np.testing.assert_allclose(frame.labels.bbox, other.labels.bbox, atol=1e-4)
        np.testing.assert_allclose(frame.calibration.p2, other.calibration.p2)


def test_frames_are_functions_of_their_seed() -> None:
    first, second = SyntheticStreets(seed=1).load("val", 3), SyntheticStreets(seed=1).load("val", 3)
    assert torch.equal(first.coord, second.coord)
    assert first.meta == second.meta
    other = SyntheticStreets(seed=2).load("val", 3)
    assert other.meta[0]["boxes"] != first.meta[0]["boxes"]
    with pytest.raises(InputError, match="has no files"):
        SyntheticStreets().relocate("somewhere")
    with pytest.raises(InputError, match="negative"):
        SyntheticStreets(train_frames=-1)


def test_labels_tell_what_is_hidden_and_cut_off() -> None:
    data = SyntheticStreets()
    labels = [data.labels("train", index) for index in range(12)]
    names = {name for frame in labels if frame for name in frame.names}
    assert names == {"Car", "Van", "Pedestrian", "Cyclist", "DontCare"}
    known = [frame.take(np.array([n != "DontCare" for n in frame.names], dtype=bool)) for frame in labels if frame]
    assert {0.0, 1.0, 2.0} == set(np.concatenate([frame.occluded for frame in known]).tolist())
    truncated = np.concatenate([frame.truncated for frame in known])
    assert (truncated > 0.1).any()
    assert ((truncated >= 0) & (truncated <= 0.8)).all()
    frame = known[0]
    assert frame.names == [name for name in labels[0].names if name != "DontCare"]
    assert (frame.bbox[:, 2:] > frame.bbox[:, :2]).all()


def perfect(labels: KittiObjects) -> KittiObjects:
    kept = labels.take(np.array([name != "DontCare" for name in labels.names], dtype=bool))
    return dataclasses.replace(kept, scores=np.linspace(1, 0.5, len(kept)))


def test_perfect_results_score_100_through_the_metric() -> None:
    data, names = SyntheticStreets(), ["Car", "Pedestrian", "Cyclist"]
    truth = [labels for index in range(40) if (labels := data.labels("train", index)) is not None]
    metric = KittiMetrics(names)
    for labels in truth:
        metric.update(labels, perfect(labels))
    found, plain = metric.compute(), kitti_ap(truth, [perfect(labels) for labels in truth], names)
    for key in plain.r40:
        np.testing.assert_allclose(found.r40[key], plain.r40[key])
        np.testing.assert_allclose(found.r11[key], plain.r11[key])
    assert np.array_equal(found.counted, plain.counted)
    assert found.counted[0].min() > 80
    assert found.r40["3d"][0].min() == pytest.approx(100)


def test_found_boxes_become_result_files(tmp_path: Path) -> None:
    data = SyntheticStreets()
    cloud = data.load("train", 0)
    rows = [i for i, name in enumerate(cloud.meta[0]["box_names"]) if name in data.class_names]
    labels = torch.tensor([data.class_names.index(cloud.meta[0]["box_names"][i]) for i in rows])
    found = Boxes(box_tensor(cloud.meta[0])[rows].float(), labels, torch.linspace(1, 0.2, len(rows)))
    prediction = Prediction(cloud.get("segment"), boxes=found)
    result = read_objects(data.save_prediction(tmp_path, cloud, prediction))
    truth = KittiFrame.of(cloud.meta[0]).labels
    assert truth is not None
    truth = truth.take(np.array([name in data.class_names for name in truth.names], dtype=bool))
    assert result.names == truth.names
    np.testing.assert_allclose(result.location, truth.location, atol=1e-3)
    np.testing.assert_allclose(result.bbox, truth.bbox, atol=0.05)
    turn = (result.rotation_y - truth.rotation_y) / (2 * np.pi)
    np.testing.assert_allclose(turn, turn.round(), atol=1e-4)
    assert result.scores is not None
    np.testing.assert_allclose(result.scores, np.linspace(1, 0.2, len(rows)), atol=1e-5)
    plain = data.save_prediction(tmp_path, cloud, Prediction(cloud.get("segment")))
    assert plain.suffix == ".npz"
