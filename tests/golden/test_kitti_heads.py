"""Heads of detectors against their golden files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Golden, golden_files

from pc3d.data.boxes import Boxes
from pc3d.models.heads import Anchor, AnchorHead, CenterHead
from pc3d.models.heads.anchor_head import AnchorOutput
from pc3d.nn.bev import BevGrid
from pc3d.ops.boxes import encode_boxes, nearest_iou


def true_boxes(stored: torch.Tensor) -> list[Boxes]:
    """Frames of rows that end in the class, counted from 1; rows of zeros fill up."""
    frames = [frame[frame[:, -1] > 0] for frame in stored]
    return [Boxes(frame[:, :-1], frame[:, -1].long() - 1) for frame in frames]


@pytest.mark.parametrize("golden", golden_files("kitti-anchors"))
def test_anchors_and_their_targets(golden: Golden) -> None:
    meta = golden.meta
    width, height = meta["feature_map_xy"]
    low, high = meta["point_cloud_range"][:3], meta["point_cloud_range"][3:]
    stride = meta["anchors"][0]["feature_map_stride"]
    sides = [(h - l) / (n * stride) for l, h, n in zip(low, high, (width, height), strict=False)]
    grid = BevGrid(meta["point_cloud_range"], [*sides, high[2] - low[2]])
    settings = [
        Anchor(
            anchor["class_name"],
            anchor["anchor_sizes"][0],
            anchor["anchor_bottom_heights"][0],
            anchor["matched_threshold"],
            anchor["unmatched_threshold"],
            anchor["anchor_rotations"],
        )
        for anchor in meta["anchors"]
    ]
    head = AnchorHead(settings)
    head.build(4, [setting.name for setting in settings], grid, stride)
    torch.testing.assert_close(head.anchors, golden.tensor("out/anchors"), atol=1e-5, rtol=0)
    truth = true_boxes(golden.tensor("in/gt_boxes"))
    for number, boxes in enumerate(truth):
        labels, residuals = head.targets(boxes)
        stored = golden.tensor("out/box_cls_labels")[number].long()
        assert torch.equal(torch.where(labels == -2, -1, labels + 1), stored)
        torch.testing.assert_close(residuals, golden.tensor("out/box_reg_targets")[number], atol=1e-5, rtol=1e-5)
        assert torch.equal((labels >= 0).float(), golden.tensor("out/reg_weights")[number])
        # The stored boxes are the decoded targets, with headings as they come.
        directions = torch.zeros(len(labels), 2)
        output = AnchorOutput(torch.zeros(len(labels), len(settings)), residuals, directions)
        decoded, expected = head.decode(output, head.anchors), golden.tensor("out/decoded")[number]
        torch.testing.assert_close(decoded[:, :6], expected[:, :6], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(encode_boxes(expected, head.anchors), residuals, atol=1e-4, rtol=1e-4)
    per_class = head.anchors.view(-1, len(settings), len(settings[0].headings), 7)
    first = nearest_iou(per_class[:, 0].reshape(-1, 7), golden.tensor("in/gt_boxes")[0][:, :7])
    torch.testing.assert_close(first, golden.tensor(f"out/nearest_iou_{settings[0].name.lower()}"), atol=1e-5, rtol=0)


def center_head(meta: dict[str, Any], in_channels: int) -> CenterHead:
    cfg = meta["cfg"]
    branches, targets, post = (cfg[name] for name in ("SEPARATE_HEAD_CFG", "TARGET_ASSIGNER_CONFIG", "POST_PROCESSING"))
    nms, weights = post["NMS_CONFIG"], cfg["LOSS_CONFIG"]["LOSS_WEIGHTS"]
    names = [name for group in cfg["CLASS_NAMES_EACH_HEAD"] for name in group]
    assert all(branch["num_conv"] == cfg["NUM_HM_CONV"] for branch in branches["HEAD_DICT"].values())
    per_class = nms["NMS_TYPE"] == "class_specific_nms"
    before = nms["NMS_PRE_MAXSIZE"]
    head = CenterHead(
        groups=cfg["CLASS_NAMES_EACH_HEAD"],
        shared_channels=cfg["SHARED_CONV_CHANNEL"],
        num_conv=cfg["NUM_HM_CONV"],
        iou="iou" in branches["HEAD_DICT"],
        diou_loss=cfg.get("IOU_REG_LOSS", False),
        velocity="vel" in branches["HEAD_DICT"],
        norm_bias=cfg.get("USE_BIAS_BEFORE_NORM", False),
        norm_eps=cfg.get("BN_EPS", 1e-5),
        norm_momentum=cfg.get("BN_MOM", 0.1),
        heat_weight=weights["cls_weight"],
        box_weight=weights["loc_weight"],
        code_weights=weights["code_weights"],
        overlap=targets["GAUSSIAN_OVERLAP"],
        min_radius=targets["MIN_RADIUS"],
        max_objects=targets["NUM_MAX_OBJS"],
        max_peaks=post["MAX_OBJ_PER_SAMPLE"],
        score_threshold=post["SCORE_THRESH"],
        center_range=post["POST_CENTER_LIMIT_RANGE"],
        iou_powers=post.get("IOU_RECTIFIER", 0.5),
        nms_threshold=nms["NMS_THRESH"],
        nms_candidates=before[0] if per_class else before,
        max_boxes=500 if per_class else nms["NMS_POST_MAXSIZE"],
    )
    assert not per_class or len(set(before)) == 1
    head.build(in_channels, names, BevGrid(meta["point_cloud_range"], meta["voxel_size"]), meta["stride"])
    return head


@pytest.mark.parametrize("golden", golden_files("kitti-centerhead"))
def test_center_head(golden: Golden) -> None:
    features = golden.tensor("in/spatial_features_2d").requires_grad_()
    head = center_head(golden.meta, features.shape[1])
    head.load_state_dict(golden.group("state"))
    head.eval()
    output, truth = head(features), true_boxes(golden.tensor("in/gt_boxes"))
    if len(output) == 1:
        for name, value in output[0].items():
            torch.testing.assert_close(value, golden.tensor(f"out/pred_{name}"), atol=1e-5, rtol=1e-5)

        targets = head.targets(truth, head.members[0], features.shape[2:])
        torch.testing.assert_close(targets.heat, golden.tensor("out/tgt_heatmaps"), atol=1e-6, rtol=0)
        masks = golden.tensor("out/tgt_masks").bool()
        assert torch.equal(targets.cell, golden.tensor("out/tgt_inds")[masks])
        torch.testing.assert_close(targets.values, golden.tensor("out/tgt_target_boxes")[masks], atol=1e-5, rtol=1e-5)

    losses = head.losses(output, truth)
    names = {"heat": "hm_loss", "box": "loc_loss", "iou": "iou_loss", "diou": "iou_reg_loss"}
    for name, loss in losses.items():
        parts = [v for k, v in golden.group("out").items() if k.startswith(f"part_{names[name]}_head")]
        torch.testing.assert_close(loss, torch.stack(parts).sum(), atol=1e-5, rtol=1e-5)
    total = torch.stack(list(losses.values())).sum()
    torch.testing.assert_close(total, golden.tensor("out/loss")[0], atol=1e-5, rtol=1e-5)
    total.backward()
    torch.testing.assert_close(features.grad, golden.tensor("out/grad_features"), atol=1e-5, rtol=1e-4)

    for frame, found in enumerate(head.detections(output)):
        boxes, scores, labels = (
            golden.tensor(f"out/final{frame}_pred_{name}") for name in ("boxes", "scores", "labels")
        )
        order = scores.sort(descending=True, stable=True).indices
        torch.testing.assert_close(found.scores, scores[order], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.boxes, boxes[order], atol=1e-4, rtol=1e-5)
        assert torch.equal(found.labels, labels[order] - 1)
