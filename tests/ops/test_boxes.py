"""Rotated rectangles against exact clipping, and boxes against their corners."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pc3d.ops.backend import use_backend
from pc3d.ops.boxes import (
    box_corners,
    box_iou,
    nearest_iou,
    points_in_boxes,
    rectangle_intersection,
    rectangle_iou,
    rotated_nms,
    wrap_angle,
)

backends = pytest.mark.parametrize("backend", ["auto", "reference"])


def clipped_area(a: np.ndarray, b: np.ndarray) -> float:
    """Sutherland-Hodgman, corner by corner."""

    def corners(box: np.ndarray) -> list[np.ndarray]:
        cos, sin = math.cos(box[4]), math.sin(box[4])
        unit = [(0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5), (0.5, -0.5)]
        return [
            box[:2] + np.array([cos * u * box[2] - sin * v * box[3], sin * u * box[2] + cos * v * box[3]])
            for u, v in unit
        ]

    polygon = corners(a)
    clip = corners(b)
    for i in range(4):
        start, end = clip[i], clip[(i + 1) % 4]
        edge = end - start

        def side(p: np.ndarray, start: np.ndarray = start, edge: np.ndarray = edge) -> float:
            return edge[0] * (p[1] - start[1]) - edge[1] * (p[0] - start[0])

        made = []
        for j, p in enumerate(polygon):
            q = polygon[(j + 1) % len(polygon)]
            if side(p) >= 0:
                made.append(p)
            if side(p) * side(q) < 0:
                made.append(p + (q - p) * side(p) / (side(p) - side(q)))
        polygon = made
        if not polygon:
            return 0.0
    x, y = np.array(polygon).T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


def random_rectangles(count: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(count, 5, generator=generator, dtype=torch.float64)
    boxes[:, :2] = (boxes[:, :2] - 0.5) * spread + 50
    boxes[:, 2:4] = boxes[:, 2:4] * 2 + 0.05
    boxes[:, 4] = (boxes[:, 4] - 0.5) * 8
    return boxes


@backends
@pytest.mark.parametrize("seed", range(5))
def test_area_equals_clipping(seed, backend):
    a, b = random_rectangles(25, seed), random_rectangles(30, seed + 100)
    with use_backend(backend):
        area = rectangle_intersection(a, b)
    expected = [[clipped_area(p, q) for q in b.numpy()] for p in a.numpy()]
    torch.testing.assert_close(area, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=1e-9)
    assert (area > 0).float().mean() > 0.2


@backends
def test_equal_touching_nested_and_flat(backend):
    with use_backend(backend):
        check_equal_touching_nested_and_flat()


def check_equal_touching_nested_and_flat():
    boxes = random_rectangles(50, 1)
    torch.testing.assert_close(rectangle_iou(boxes, boxes).diagonal(), torch.ones(50, dtype=torch.float64))
    turned = boxes.clone()
    turned[:, 4] += math.pi
    torch.testing.assert_close(rectangle_iou(boxes, turned).diagonal(), torch.ones(50, dtype=torch.float64))
    quarter = boxes[:, [0, 1, 3, 2, 4]].clone()
    quarter[:, 4] += math.pi / 2
    torch.testing.assert_close(rectangle_iou(boxes, quarter).diagonal(), torch.ones(50, dtype=torch.float64))
    small = boxes.clone()
    small[:, 2:4] /= 2
    torch.testing.assert_close(rectangle_iou(boxes, small).diagonal(), torch.full((50,), 0.25, dtype=torch.float64))
    beside = boxes.clone()
    beside[:, 0] += boxes[:, 2] * boxes[:, 4].cos()
    beside[:, 1] += boxes[:, 2] * boxes[:, 4].sin()
    assert rectangle_intersection(boxes, beside).diagonal().abs().max() < 1e-9
    flat = boxes.clone()
    flat[:, 2] = 0
    assert rectangle_intersection(boxes, flat).max() < 1e-9
    assert rectangle_intersection(boxes[:0], boxes).shape == (0, 50)


def test_points_in_boxes_and_corners():
    boxes = torch.tensor([[1.0, 2, 3, 4, 2, 1, 0.7], [9, 9, 9, 1, 1, 1, 0]], dtype=torch.float64)
    corners = box_corners(boxes)
    center = boxes[:, None, :3]
    assert points_in_boxes((center + (corners - center) * 0.999).reshape(-1, 3).float(), boxes).sum(0).tolist() == [
        8,
        8,
    ]
    assert not points_in_boxes((center + (corners - center) * 1.001).reshape(-1, 3).float(), boxes).any()
    assert corners[0, :4, 2].unique().tolist() == [2.5]
    assert points_in_boxes(torch.rand(5, 3), boxes[:0]).shape == (5, 0)


def random_boxes(count: int, seed: int) -> torch.Tensor:
    flat = random_rectangles(count, seed)
    z = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.stack([*flat[:, :2].T, z[:, 0], *flat[:, 2:4].T, z[:, 1] + 0.1, flat[:, 4]], 1)


def test_overlap_of_volumes():
    boxes, others = random_boxes(40, 3), random_boxes(40, 4)
    torch.testing.assert_close(box_iou(boxes, boxes), torch.ones(40, dtype=torch.float64))
    height = torch.minimum(boxes[:, 2] + boxes[:, 5] / 2, others[:, 2] + others[:, 5] / 2)
    height -= torch.maximum(boxes[:, 2] - boxes[:, 5] / 2, others[:, 2] - others[:, 5] / 2)
    columns = [0, 1, 3, 4, 6]
    flat = np.array(
        [clipped_area(a, b) for a, b in zip(boxes[:, columns].numpy(), others[:, columns].numpy(), strict=True)]
    )
    shared = torch.from_numpy(flat) * height.clamp(min=0)
    union = boxes[:, 3:6].prod(1) + others[:, 3:6].prod(1) - shared
    torch.testing.assert_close(box_iou(boxes, others), shared / union)
    assert (shared > 0).sum() > 3
    assert box_iou(boxes[:0], boxes[:0]).shape == (0,)


def greedy(boxes: torch.Tensor, scores: torch.Tensor, thresholds: list[float], labels: torch.Tensor) -> list[int]:
    kept: list[int] = []
    flat = boxes[:, [0, 1, 3, 4, 6]].double()
    for row in sorted(range(len(boxes)), key=lambda i: (-scores[i].item(), i)):
        rivals = [other for other in kept if labels[other] == labels[row]]
        overlaps = [rectangle_iou(flat[[other]], flat[[row]]).item() for other in rivals]
        if all(overlap <= thresholds[labels[row]] for overlap in overlaps):
            kept.append(row)
    return kept


@backends
def test_suppression_is_greedy_and_settles_ties_by_row(backend):
    boxes = random_boxes(80, 5).float()
    scores = (torch.rand(80, generator=torch.Generator().manual_seed(1)) * 10).round() / 10
    labels = torch.arange(80) % 3
    thresholds = [0.05, 0.2, 0.0]
    expected = greedy(boxes, scores, thresholds, labels)
    assert 3 < len(expected) < 75
    with use_backend(backend):
        assert rotated_nms(boxes, scores, thresholds, labels).tolist() == expected
        assert rotated_nms(boxes, scores, thresholds, labels, limit=4).tolist() == expected[:4]
        alone = greedy(boxes, scores, [0.05], torch.zeros(80, dtype=torch.long))
        assert rotated_nms(boxes, scores, 0.05).tolist() == alone
        assert rotated_nms(boxes[:0], scores[:0], 0.05).tolist() == []
        same = boxes[:1].repeat(3, 1)
        assert rotated_nms(same, torch.ones(3), 0.99).tolist() == [0]
        assert rotated_nms(same, torch.ones(3), 1.0).tolist() in ([0, 1, 2], [0])  # one, but for rounding
        with pytest.raises(ValueError, match="2 thresholds for classes 0 to 2"):
            rotated_nms(boxes, scores, [0.1, 0.1], labels)


def test_snapped_overlap_and_angles():
    boxes = torch.tensor([[0.0, 0, 0, 4, 2, 1, 0.7], [0, 0, 0, 4, 2, 1, 0.9], [0, 0, 0, 2, 4, 1, math.pi]])
    expected = torch.tensor([[1, 1 / 3, 1 / 3], [1 / 3, 1, 1], [1 / 3, 1, 1]])
    torch.testing.assert_close(nearest_iou(boxes, boxes), expected)
    angles = torch.tensor([0.1, 3.0, -3.0, 10.0])
    wrapped = wrap_angle(angles)
    assert (wrapped.abs() <= math.pi / 2).all()
    torch.testing.assert_close(((angles - wrapped) / math.pi).round() * math.pi, angles - wrapped)
    assert ((wrap_angle(angles, 0.0, 2 * math.pi) >= 0) & (wrap_angle(angles, 0.0, 2 * math.pi) < 2 * math.pi)).all()
