"""Boxes of objects, which travel in the ``meta`` of their cloud.

``meta["boxes"]`` is a list of ``x y z dx dy dz heading`` (centre and size in metres, dx along the heading, heading in
radians counter-clockwise from +x seen from above), ``meta["box_names"]`` the kind of each. They are few: lists, so that
the cache can keep them. Transforms that shift, turn about z, scale or mirror points do the same to the boxes; those
that tilt or bend points drop them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pc3d.errors import InputError
from pc3d.io.kitti_object import KittiFrame, KittiObjects
from pc3d.points import Points


@dataclass
class Boxes:
    """Boxes of one cloud, true or found.

    Attributes:
        boxes: ``(M, 7)`` float32 ``x y z dx dy dz heading``, or ``(M, 9)`` with the velocity along x and y in m/s.
        labels: ``(M,)`` int64 classes.
        scores: ``(M,)`` of found boxes; None for true ones.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def take(self, rows: Tensor) -> Boxes:
        """The boxes of a mask or an index."""
        return Boxes(self.boxes[rows], self.labels[rows], None if self.scores is None else self.scores[rows])

    def cpu(self) -> Boxes:
        return Boxes(self.boxes.cpu(), self.labels.cpu(), None if self.scores is None else self.scores.cpu())


def box_tensor(meta: dict[str, Any]) -> Tensor:
    """``(M, 7)`` float64 boxes of a cloud (9 columns with velocities); none if its ``meta`` has no boxes."""
    boxes = meta.get("boxes") or []
    return torch.tensor(boxes, dtype=torch.float64) if boxes else torch.zeros(0, 7, dtype=torch.float64)


def labelled_boxes(points: Points, class_names: Sequence[str]) -> list[Boxes]:
    """The true boxes of every cloud whose kind is a class, on the device of the points.

    Raises:
        InputError: if a cloud has no labels.
    """
    found = []
    for meta in points.meta:
        if "boxes" not in meta:
            name = meta.get("path") or meta.get("name") or "point cloud"
            raise InputError(
                f"{name}: has no boxes: detection learns from labelled frames, as those of KITTIObject (transforms "
                "that tilt or bend a cloud drop its boxes)"
            )
        rows = [i for i, name in enumerate(meta["box_names"]) if name in class_names]
        labels = [list(class_names).index(meta["box_names"][i]) for i in rows]
        boxes = box_tensor(meta)[rows].float()
        found.append(Boxes(boxes.to(points.device), torch.tensor(labels, dtype=torch.int64).to(points.device)))
    return found


def kitti_results(found: Boxes, frame: KittiFrame, class_names: Sequence[str]) -> KittiObjects:
    """Found boxes as objects of a result file, in the camera frame."""
    assert found.scores is not None
    names = [class_names[label] for label in found.labels.tolist()]
    boxes, scores = (values.detach().cpu().double().numpy() for values in (found.boxes[:, :7], found.scores))
    return frame.calibration.results(boxes, names, scores, *frame.image_size)


def take_boxes(meta: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """The ``meta`` of a cloud with these of its boxes; as it is if it has none."""
    return {**meta, **{key: [meta[key][i] for i in rows] for key in ("boxes", "box_names") if key in meta}}


def add_boxes(cloud: Points, boxes: Tensor, names: Sequence[str]) -> Points:
    """One cloud with more boxes ``(M, 7 or 9)``."""
    meta = cloud.meta[0]
    both = {
        "boxes": [*meta.get("boxes", []), *boxes.double().tolist()],
        "box_names": [*meta.get("box_names", []), *names],
    }
    return cloud.replace(meta=[{**meta, **both}])


def drop_boxes(cloud: Points) -> Points:
    """One cloud that nobody knows the boxes of."""
    meta = {key: value for key, value in cloud.meta[0].items() if key not in ("boxes", "box_names")}
    return cloud.replace(meta=[meta])


def move_boxes(cloud: Points, move: Callable[[Tensor], Tensor]) -> Points:
    """One cloud with its boxes ``(M, 7 or 9)`` float64 changed; as it is if it has none."""
    meta = cloud.meta[0]
    if not meta.get("boxes"):
        return cloud
    return cloud.replace(meta=[{**meta, "boxes": move(box_tensor(meta)).tolist()}])


def shift_boxes(cloud: Points, shift: Tensor) -> Points:
    """One cloud with its boxes moved by ``(3,)`` metres."""

    def shifted(boxes: Tensor) -> Tensor:
        return torch.cat([boxes[:, :3] + shift.cpu().double(), boxes[:, 3:]], 1)

    return move_boxes(cloud, shifted)


def scale_boxes(cloud: Points, factor: float) -> Points:
    """One cloud with its boxes scaled about the origin."""

    def scaled(boxes: Tensor) -> Tensor:
        return torch.cat([boxes[:, :6] * factor, boxes[:, 6:7], boxes[:, 7:] * factor], 1)

    return move_boxes(cloud, scaled)


def mirror_boxes(cloud: Points, axis: int) -> Points:
    """One cloud with its boxes mirrored in x (axis 0) or y (axis 1)."""

    def mirrored(boxes: Tensor) -> Tensor:
        boxes = boxes.clone()
        boxes[:, axis] *= -1
        boxes[:, 6] = -boxes[:, 6] if axis == 1 else -(boxes[:, 6] + math.pi)
        if boxes.shape[1] > 7:
            boxes[:, 7 + axis] *= -1
        return boxes

    return move_boxes(cloud, mirrored)


def turn_boxes(cloud: Points, matrix: Tensor, pivot: Tensor) -> Points:
    """One cloud with its boxes turned by a rotation ``(3, 3)`` about z through ``pivot`` (3,); another drops them."""
    matrix, pivot = matrix.cpu().double(), pivot.cpu().double()
    if matrix[2, 2] != 1:
        return drop_boxes(cloud) if "boxes" in cloud.meta[0] else cloud

    def turned(boxes: Tensor) -> Tensor:
        boxes = boxes.clone()
        boxes[:, :3] = (boxes[:, :3] - pivot) @ matrix.T + pivot
        boxes[:, 6] += torch.atan2(matrix[1, 0], matrix[0, 0])
        if boxes.shape[1] > 7:
            boxes[:, 7:] = boxes[:, 7:] @ matrix[:2, :2].T
        return boxes

    return move_boxes(cloud, turned)
