"""Boxes of objects, which travel in the ``meta`` of their cloud.

``meta["boxes"]`` is a list of ``x y z dx dy dz heading`` (centre and size in metres, dx along the heading, heading in
radians counter-clockwise from +x seen from above), ``meta["box_names"]`` the kind of each. They are few: lists, so that
the cache can keep them, and every transform that moves points moves them too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pc3d.errors import InputError
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


def has_boxes(points: Points) -> bool:
    """Whether the clouds are labelled with boxes, be it none."""
    return all("boxes" in meta for meta in points.meta)


def labelled_boxes(points: Points, class_names: Sequence[str]) -> list[Boxes]:
    """The true boxes of every cloud whose kind is a class, on the device of the points.

    Raises:
        InputError: if a cloud has no labels.
    """
    found = []
    for meta in points.meta:
        if "boxes" not in meta:
            name = meta.get("path") or meta.get("name") or "point cloud"
            raise InputError(f"{name}: has no boxes: detection learns from labelled frames, e.g. of KITTIObject")
        rows = [i for i, name in enumerate(meta["box_names"]) if name in class_names]
        labels = [list(class_names).index(meta["box_names"][i]) for i in rows]
        boxes = box_tensor(meta)[rows].float()
        found.append(Boxes(boxes.to(points.device), torch.tensor(labels, dtype=torch.int64).to(points.device)))
    return found


def take_boxes(cloud: Points, rows: Sequence[int]) -> Points:
    """One cloud with these of its boxes."""
    meta = cloud.meta[0]
    kept = {key: [meta[key][i] for i in rows] for key in ("boxes", "box_names")}
    return cloud.replace(meta=[{**meta, **kept}])


def move_boxes(cloud: Points, move: Callable[[Tensor], Tensor]) -> Points:
    """One cloud with its boxes ``(M, 7 or 9)`` float64 changed; as it is if it has none."""
    meta = cloud.meta[0]
    if not meta.get("boxes"):
        return cloud
    return cloud.replace(meta=[{**meta, "boxes": move(box_tensor(meta)).tolist()}])
