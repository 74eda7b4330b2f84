"""Oriented boxes: corners, points inside, exact overlap of rotated rectangles, suppression of what overlaps.

A rectangle is ``x, y, length, width, angle``: its length lies along (cos angle, sin angle). A LiDAR box is ``x, y, z``
of its centre, ``dx, dy, dz`` and the heading about z.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pc3d.ops.backend import cpu_kernels

_PAIRS_AT_ONCE = 1 << 18
_LEAST_SIZE = 1e-5  # metres
_BEV = [0, 1, 3, 4, 6]  # columns of a box that are its rectangle seen from above


def rectangle_intersection(a: Tensor, b: Tensor) -> Tensor:
    """``(N, M)`` float64 area shared by each of ``(N, 5)`` and each of ``(M, 5)`` rectangles.

    Exact but for rounding (float64, relative to one of the two): equal rectangles share their whole area.
    """
    a, b = a.detach().double(), b.detach().double()
    area = a.new_zeros(len(a), len(b))
    kernels = cpu_kernels(a, b)
    if kernels is not None:
        kernels.rectangle_intersection(a.contiguous(), b.contiguous(), area)
        return area
    reach = [boxes[:, 2:4].norm(dim=1) / 2 for boxes in (a, b)]
    near = (a[:, None, :2] - b[None, :, :2]).norm(dim=2) < reach[0][:, None] + reach[1]
    rows, columns = near.nonzero().unbind(1)
    for i, j in zip(rows.split(_PAIRS_AT_ONCE), columns.split(_PAIRS_AT_ONCE), strict=True):
        area[i, j] = _shared_area(a[i], b[j])
    return area


def rectangle_iou(a: Tensor, b: Tensor) -> Tensor:
    """``(N, M)`` float64 intersection over union of rectangles ``(N, 5)`` and ``(M, 5)``."""
    shared = rectangle_intersection(a, b)
    union = (a[:, 2] * a[:, 3]).double()[:, None] + (b[:, 2] * b[:, 3]).double() - shared
    return shared / union.clamp(min=1e-12)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """``(N,)`` float64 intersection over union of the volumes of LiDAR boxes, pair by pair; not differentiable."""
    a, b = a.detach().double(), b.detach().double()
    shared = torch.cat(
        [
            _shared_area(i, j)
            for i, j in zip(a[:, _BEV].split(_PAIRS_AT_ONCE), b[:, _BEV].split(_PAIRS_AT_ONCE), strict=True)
        ]
    )
    top = torch.minimum(a[:, 2] + a[:, 5] / 2, b[:, 2] + b[:, 5] / 2)
    bottom = torch.maximum(a[:, 2] - a[:, 5] / 2, b[:, 2] - b[:, 5] / 2)
    shared = shared * (top - bottom).clamp(min=0)
    union = a[:, 3:6].prod(1) + b[:, 3:6].prod(1) - shared
    return shared / union.clamp(min=1e-6)


def box_iou_table(a: Tensor, b: Tensor) -> Tensor:
    """``(N, M)`` float64 intersection over union of the volumes of LiDAR boxes ``(N, 7)`` and ``(M, 7)``."""
    a, b = a.detach().double(), b.detach().double()
    shared = rectangle_intersection(a[:, _BEV], b[:, _BEV])
    (low_a, high_a), (low_b, high_b) = ((box[:, 2] - box[:, 5] / 2, box[:, 2] + box[:, 5] / 2) for box in (a, b))
    shared = shared * (torch.minimum(high_a[:, None], high_b) - torch.maximum(low_a[:, None], low_b)).clamp(min=0)
    union = a[:, 3:6].prod(1)[:, None] + b[:, 3:6].prod(1) - shared
    return shared / union.clamp(min=1e-6)


def rotated_nms(
    boxes: Tensor,
    scores: Tensor,
    thresholds: float | Sequence[float],
    labels: Tensor | None = None,
    limit: int | None = None,
) -> Tensor:
    """Greedy suppression of boxes, the best score first, by the overlap of their rectangles seen from above.

    A box goes if its overlap with one kept before it is greater than the threshold. Deterministic: of equal scores the
    smaller row comes first.

    Args:
        boxes: ``(N, 7)`` LiDAR boxes (more columns are ignored).
        scores: ``(N,)``.
        thresholds: largest overlap allowed, ``shared / max(union, 1e-8)``; with ``labels`` one per class.
        labels: ``(N,)`` int64; boxes of different classes do not suppress each other. None: all are one class.
        limit: keep the best so many.

    Returns:
        ``(K,)`` int64 rows kept, best first.

    Raises:
        ValueError: if a class has no threshold.
    """
    order = scores.sort(descending=True, stable=True).indices
    rectangles = boxes.detach()[order][:, _BEV].double()
    group = torch.zeros_like(order) if labels is None else labels[order]
    limits = [thresholds] if isinstance(thresholds, (int, float)) else list(thresholds)
    if len(group) and not 0 <= int(group.min()) <= int(group.max()) < len(limits):
        raise ValueError(f"{len(limits)} thresholds for classes {int(group.min())} to {int(group.max())}")
    kernels = cpu_kernels(rectangles, group)
    if kernels is None:
        return order[_suppress(rectangles, group, limits)[:limit]]
    keep = torch.empty(len(order), dtype=torch.bool)
    kernels.rectangle_nms(
        rectangles.contiguous(),
        group.contiguous(),
        torch.tensor(limits, dtype=torch.float64),
        -1 if limit is None else limit,
        keep,
    )
    return order[keep]


def _suppress(rectangles: Tensor, group: Tensor, limits: Sequence[float]) -> Tensor:
    """Rows kept of rectangles in descending order of score: overlaps on their device, the choice on the CPU."""
    shared = rectangle_intersection(rectangles, rectangles)
    area = rectangles[:, 2] * rectangles[:, 3]
    overlap = shared / (area[:, None] + area - shared).clamp(min=1e-8)
    above = overlap > rectangles.new_tensor(limits)[group][:, None]
    rivals = (above & (group[:, None] == group)).cpu()
    alive = torch.ones(len(group), dtype=torch.bool)
    for row in range(len(group)):
        if alive[row]:
            alive[row + 1 :] &= ~rivals[row, row + 1 :]
    return alive.nonzero()[:, 0].to(rectangles.device)


def wrap_angle(angle: Tensor, offset: float = 0.5, period: float = math.pi) -> Tensor:
    """``angle`` in ``[-offset, 1 - offset) * period``."""
    return angle - torch.floor(angle / period + offset) * period


def nearest_iou(a: Tensor, b: Tensor) -> Tensor:
    """``(N, M)`` overlap of boxes seen from above, each snapped to the nearer of 0 and 90 degrees; in their dtype.

    Lang et al., "PointPillars", CVPR 2019, section 3.2: what anchors are matched by.
    """
    low, high = zip(*(_snapped(boxes) for boxes in (a, b)), strict=True)
    sides = (torch.minimum(high[0][:, None], high[1]) - torch.maximum(low[0][:, None], low[1])).clamp(min=0)
    shared = sides[..., 0] * sides[..., 1]
    area = [(h - l)[:, 0] * (h - l)[:, 1] for l, h in zip(low, high, strict=True)]
    return shared / (area[0][:, None] + area[1] - shared).clamp(min=1e-6)


def _snapped(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """``(N, 2)`` lower and upper corner of the upright rectangle that is nearest to each box."""
    along = wrap_angle(boxes[:, 6]).abs() < math.pi / 4
    size = torch.where(along[:, None], boxes[:, 3:5], boxes[:, [4, 3]])
    return boxes[:, :2] - size / 2, boxes[:, :2] + size / 2


def encode_boxes(boxes: Tensor, anchors: Tensor) -> Tensor:
    """``(N, 7)`` residuals of boxes from anchors, pair by pair.

    Offsets of the centre over the diagonal of the anchor seen from above, twice, and over its height; logarithms of the
    ratios of sizes; difference of headings. Yan et al., "SECOND", Sensors 2018, section 3.2.2.
    """
    size, anchor_size = boxes[:, 3:6].clamp(min=_LEAST_SIZE), anchors[:, 3:6].clamp(min=_LEAST_SIZE)
    offset = (boxes[:, :3] - anchors[:, :3]) / _scale(anchor_size)
    return torch.cat([offset, torch.log(size / anchor_size), boxes[:, 6:] - anchors[:, 6:]], 1)


def decode_boxes(residuals: Tensor, anchors: Tensor) -> Tensor:
    """The inverse of :func:`encode_boxes`."""
    center = residuals[:, :3] * _scale(anchors[:, 3:6]) + anchors[:, :3]
    return torch.cat([center, residuals[:, 3:6].exp() * anchors[:, 3:6], residuals[:, 6:] + anchors[:, 6:]], 1)


def _scale(size: Tensor) -> Tensor:
    """``(N, 3)`` units of an offset: the diagonal seen from above, twice, and the height."""
    diagonal = size[:, :2].square().sum(1, keepdim=True).sqrt()
    return torch.cat([diagonal, diagonal, size[:, 2:]], 1)


def turn(points: Tensor, angle: Tensor) -> Tensor:
    """``(P, K, 2)`` points turned by ``(P,)`` angles, counter-clockwise."""
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    x, y = points.unbind(-1)
    return torch.stack([cos * x - sin * y, sin * x + cos * y], -1)


def _shared_area(a: Tensor, b: Tensor) -> Tensor:
    """``(P,)`` area of pairs: corners of either inside the other and crossings of edges, sorted around their middle."""
    half, other = a[:, None, 2:4] / 2, b[:, None, 2:4] / 2
    slack = 1e-9 * (half.amax(-1) + other.amax(-1))
    offset = turn(b[:, None, :2] - a[:, None, :2], -a[:, 4])[:, 0]  # of b in the frame of a
    angle_between = b[:, 4] - a[:, 4]
    corners_b = turn(_unit_corners(a) * b[:, None, 2:4], angle_between) + offset[:, None]
    corners_a = _unit_corners(a) * a[:, None, 2:4]
    inside_a = (corners_b.abs() <= half + slack[..., None]).all(2)
    inside_b = (turn(corners_a - offset[:, None], -angle_between).abs() <= other + slack[..., None]).all(2)
    crossings, crosses = _edge_crossings(corners_b, half[:, 0])
    points = torch.cat([corners_b, corners_a, crossings], 1)
    valid = torch.cat([inside_a, inside_b, crosses], 1)
    count = valid.sum(1, keepdim=True)
    middle = (points * valid[..., None]).sum(1, keepdim=True) / count.clamp(min=1)[..., None]
    around = points - middle
    angle = torch.atan2(around[..., 1], around[..., 0]).masked_fill(~valid, 9.0)
    order = angle.argsort(dim=1)
    around = around.gather(1, order[..., None].expand_as(around))
    first = around[:, :1].expand_as(around)
    around = torch.where((torch.arange(around.shape[1], device=a.device) < count)[..., None], around, first)
    following = around.roll(-1, 1)
    area = (around[..., 0] * following[..., 1] - around[..., 1] * following[..., 0]).sum(1) / 2
    return torch.where(count[:, 0] > 2, area.clamp(min=0), 0.0)


def _unit_corners(like: Tensor) -> Tensor:
    return like.new_tensor([[0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5], [0.5, -0.5]])


def _edge_crossings(corners: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """Where the edges of a quadrilateral meet the sides of the box ``|x|, |y| <= half``: ``(P, 16, 2)`` and whether."""
    start, step = corners, corners.roll(-1, 1) - corners
    points, valid = [], []
    for axis in (0, 1):
        for side in (-1.0, 1.0):
            line = side * half[:, axis, None]
            flat = step[..., axis] == 0
            t = (line - start[..., axis]) / torch.where(flat, torch.ones_like(step[..., axis]), step[..., axis])
            along = start[..., 1 - axis] + t * step[..., 1 - axis]
            point = torch.stack([line.expand_as(along), along], -1)
            points.append(point if axis == 0 else point.flip(-1))
            valid.append(~flat & (t >= 0) & (t <= 1) & (along.abs() <= half[:, 1 - axis, None]))
    return torch.cat(points, 1), torch.cat(valid, 1)


def box_corners(boxes: Tensor) -> Tensor:
    """``(N, 8, 3)`` corners of LiDAR boxes ``(N, 7)``: the lower four, then the upper four."""
    signs = boxes.new_tensor([[1, 1], [1, -1], [-1, -1], [-1, 1]]) / 2
    flat = turn(signs * boxes[:, None, 3:5], boxes[:, 6]) + boxes[:, None, :2]
    low, high = (boxes[:, None, 2:3] + side * boxes[:, None, 5:6] / 2 for side in (-1, 1))
    return torch.cat([torch.cat([flat, z.expand(-1, 4, -1)], 2) for z in (low, high)], 1)


def points_in_boxes(coord: Tensor, boxes: Tensor) -> Tensor:
    """``(N, M)`` bool: which of ``(N, 3)`` points lie in which of ``(M, 7)`` LiDAR boxes, faces included."""
    portion = max(_PAIRS_AT_ONCE // max(len(boxes), 1), 1)
    return torch.cat([_points_inside(part, boxes) for part in coord.split(portion)])


def _points_inside(coord: Tensor, boxes: Tensor) -> Tensor:
    center, reach = boxes[:, :3].to(coord), boxes[:, 3:5].norm(dim=1).to(coord) * 0.501
    x, y = ((coord[:, axis, None] - center[:, axis]).abs() <= reach for axis in (0, 1))
    inside = x & y
    point, box = inside.nonzero().unbind(1)  # few: these are looked at closely
    local, chosen = (coord[point] - center[box]).double(), boxes[box].double()
    flat = turn(local[:, None, :2], -chosen[:, 6])[:, 0]
    offset = torch.cat([flat, local[:, 2:]], 1)
    inside[point, box] = (offset.abs() <= chosen[:, 3:6] / 2).all(1)
    return inside
