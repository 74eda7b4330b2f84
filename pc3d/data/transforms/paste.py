"""Objects of other frames pasted into a frame."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from pc3d.data.boxes import add_boxes, box_tensor
from pc3d.data.object_database import ObjectDatabase
from pc3d.data.transforms.base import CloudTransform
from pc3d.errors import InputError
from pc3d.io.kitti_object import KittiFrame
from pc3d.ops.boxes import points_in_boxes, rectangle_intersection
from pc3d.points import Points

_BEV = [0, 1, 3, 4, 6]


class PasteObjects(CloudTransform):
    """Fill a frame up with objects of other frames, each where it stood, as OpenPCDet does.

    For every class in turn as many random objects are drawn as the frame lacks; those which overlap, seen from above,
    with a box of the frame or with another one drawn are dropped. They are moved to the ground where the frame has a
    ``plane``, and the frame's points inside their boxes are removed. Yan et al., "SECOND", Sensors 2018, section 3.2.

    Args:
        database: folder written by ``pc3d prepare kitti``, read when first needed.
        counts: name of a class -> number of its objects that a frame is filled up to.
        min_points: objects with fewer points are not pasted.
    """

    def __init__(self, database: str, counts: Mapping[str, int], min_points: int = 5) -> None:
        for name, count in counts.items():
            if count < 0:
                raise InputError(f"PasteObjects.counts: {name} is {count}, it must not be negative")
        self.folder = database
        self.counts = dict(counts)
        self.min_points = min_points

    @cached_property
    def database(self) -> ObjectDatabase:
        return ObjectDatabase(self.folder)

    @cached_property
    def candidates(self) -> dict[str, Tensor]:
        """Objects of every class; a warning names those that there are none of."""
        found = {name: self.database.of_class(name, self.min_points) for name in self.counts}
        if none := [name for name, own in found.items() if not len(own) and self.counts[name]]:
            kinds = ", ".join(sorted(set(self.database.names))) or "nothing"
            warnings.warn(
                f"PasteObjects: {self.folder} has no {' or '.join(none)} to paste (it has {kinds})", stacklevel=2
            )
        return found

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        meta = cloud.meta[0]
        if "boxes" not in meta:
            raise InputError(f"{cloud.describe()}: has no boxes to fill up with objects")
        placed = box_tensor(meta)[:, :7]
        chosen: list[int] = []
        for name, count in self.counts.items():
            own = self.candidates[name]
            wanted = count - list(meta["box_names"]).count(name)
            drawn = own[torch.randperm(len(own), generator=generator)[: max(wanted, 0)]]
            boxes = self.database.boxes[drawn]
            free = _stand_free(boxes, placed)
            chosen += drawn[free].tolist()
            placed = torch.cat([placed, boxes[free]])
        return self._paste(cloud, chosen) if chosen else cloud

    def _paste(self, cloud: Points, chosen: list[int]) -> Points:
        boxes = self.database.boxes[chosen].clone()
        drop = self._above_ground(cloud, boxes)
        boxes[:, 2] -= drop
        parts = [self.database.points(number) for number in chosen]
        coord = torch.cat(
            [coord - coord.new_tensor([0, 0, height]) for (coord, _), height in zip(parts, drop.tolist(), strict=True)]
        )
        strength = torch.cat([strength for _, strength in parts])
        rest = cloud.select(~points_in_boxes(cloud.coord, boxes).any(1))
        attrs = {"strength": torch.cat([strength.to(rest.device), rest.get("strength")])}
        number = torch.repeat_interleave(
            torch.arange(len(chosen)) + len(cloud.meta[0]["boxes"]), torch.tensor([len(c) for c, _ in parts])
        )
        for name, value in rest.attrs.items():
            if name == "instance":
                attrs[name] = torch.cat([number.to(value), value])
            elif name == "segment":
                attrs[name] = torch.cat([torch.full_like(number, -1).to(value), value])
            elif name != "strength":
                raise InputError(f"{cloud.describe()}: field '{name}' is unknown of the objects to be pasted; drop it")
        both = torch.cat([coord.to(rest.coord), rest.coord])
        pasted = Points(both, attrs={name: attrs[name] for name in rest.attrs}, meta=rest.meta)
        return add_boxes(pasted, boxes, [self.database.names[number] for number in chosen])

    def _above_ground(self, cloud: Points, boxes: Tensor) -> Tensor:
        """``(M,)`` height of the lower faces above the frame's ground; zeros where nobody knows it."""
        plane = cloud.meta[0].get("plane")
        if plane is None:
            return torch.zeros(len(boxes), dtype=torch.float64)
        calibration = KittiFrame.of(cloud.meta[0]).calibration
        ground = torch.from_numpy(calibration.ground_height(boxes[:, :3].numpy(), plane))
        return boxes[:, 2] - boxes[:, 5] / 2 - ground


def _stand_free(boxes: Tensor, placed: Tensor) -> Tensor:
    """``(M,)`` bool: which boxes overlap neither with what is there nor with each other."""
    rectangles, there = boxes[:, _BEV], placed[:, _BEV]
    among = rectangle_intersection(rectangles, rectangles).fill_diagonal_(0)
    return (rectangle_intersection(rectangles, there).sum(1) + among.sum(1)) == 0
