"""KITTI evaluation and conversions against their golden files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from harness import Golden, golden_files

from pc3d.io.kitti_object import Calibration, KittiObjects, camera_corners
from pc3d.metrics.kitti import METRICS, _Frame, _overlaps, kitti_ap
from pc3d.ops.boxes import box_corners


def frames(golden: Golden, kind: str) -> list[KittiObjects]:
    arrays, table = golden.arrays, golden.meta["name_table"]
    ends = np.cumsum(arrays[f"in/{kind}_count"])[:-1]
    parts = {
        name: np.split(arrays[f"in/{kind}_{name}"], ends)
        for name in ("name", "truncated", "occluded", "alpha", "bbox", "dimensions", "location", "rotation_y")
    }
    scores = np.split(arrays["in/dt_score"], ends) if kind == "dt" else [None] * len(parts["name"])
    return [
        KittiObjects([table[int(n)] for n in names], *(parts[field][i] for field in list(parts)[1:]), scores[i])
        for i, names in enumerate(parts["name"])
    ]


@pytest.mark.parametrize("golden", golden_files("kitti-eval"))
@pytest.mark.filterwarnings("ignore:KITTI AP with few objects")
def test_average_precision(golden: Golden) -> None:
    truth, found = frames(golden, "gt"), frames(golden, "dt")
    classes = golden.meta["classes"]
    scores = kitti_ap(truth, found, classes)
    assert np.array_equal(scores.counted, golden.arrays["out/num_valid_gt"])
    for name in (*METRICS, "aos"):
        np.testing.assert_allclose(scores.curves[name], golden.arrays[f"out/curve_{name}"], atol=1e-6)
        np.testing.assert_allclose(scores.r40[name], golden.arrays[f"out/AP_{name}_R40"], atol=1e-6)
        np.testing.assert_allclose(scores.r11[name], golden.arrays[f"out/AP_{name}_R11"], atol=1e-6)
    for metric in METRICS:
        overlaps = [_overlaps(metric, gt, dt).reshape(-1) for gt, dt in zip(truth, found, strict=True)]
        np.testing.assert_allclose(np.concatenate(overlaps), golden.arrays[f"out/iou_{metric}"], atol=2e-3)
    for c, name in enumerate(classes):
        for d in range(3):
            made = [_Frame.of(gt, dt, name, d) for gt, dt in zip(truth, found, strict=True)]
            assert np.array_equal(np.concatenate([f.gt_flags for f in made]), golden.arrays["out/ignored_gt"][c, d])
            assert np.array_equal(np.concatenate([f.dt_flags for f in made]), golden.arrays["out/ignored_dt"][c, d])


@pytest.mark.parametrize("golden", golden_files("kitti-transforms"))
def test_conversions(golden: Golden) -> None:
    arrays = golden.arrays
    calibration = Calibration(*(arrays[f"in/{name}"].astype(np.float64) for name in ("P2", "R0", "Tr_velo2cam")))
    boxes, points = arrays["in/boxes_lidar"], arrays["in/points_lidar"].astype(np.float64)
    height, width = arrays["in/image_shape_hw"].tolist()
    location, dimensions, rotation = calibration.boxes_to_camera(boxes)
    camera = arrays["out/boxes_camera"]
    np.testing.assert_allclose(np.column_stack([location, dimensions, rotation]), camera, atol=1e-5)
    objects = calibration.results(boxes, ["Car"] * len(boxes), np.ones(len(boxes)), height, width)
    np.testing.assert_allclose(objects.bbox, arrays["out/boxes_image"], atol=2e-3)
    np.testing.assert_allclose(objects.alpha, arrays["out/alpha"], atol=1e-6)
    np.testing.assert_allclose(
        calibration.image_boxes(location, dimensions, rotation),
        arrays["out/boxes_image_unclipped"],
        atol=2e-3,
        rtol=1e-5,
    )
    np.testing.assert_allclose(calibration.boxes_to_lidar(objects), arrays["out/boxes_back_to_lidar"], atol=1e-5)
    corners = camera_corners(location, dimensions, rotation)
    np.testing.assert_allclose(corners, arrays["out/corners_camera"], atol=1e-4)
    ours = np.sort(box_corners(torch.from_numpy(boxes)).numpy().round(3), axis=1)
    np.testing.assert_allclose(ours, np.sort(arrays["out/corners_lidar"].round(3), axis=1), atol=2e-3)
    rect = calibration.to_camera(points)
    np.testing.assert_allclose(rect, arrays["out/points_rect"], atol=1e-4)
    pixel, depth = calibration.to_image(rect)
    np.testing.assert_allclose(depth, arrays["out/points_depth"], atol=1e-4)
    np.testing.assert_allclose(pixel, arrays["out/points_img"], rtol=1e-3, atol=0.05)
    assert np.array_equal(calibration.in_view(points, height, width), arrays["out/fov_mask"])
