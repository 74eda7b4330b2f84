"""Objects of other frames, or of the same cloud once more, pasted into a cloud."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from pc3d.data.boxes import add_boxes, box_tensor, drop_boxes
from pc3d.data.object_database import ObjectDatabase
from pc3d.data.transforms.base import CloudTransform, chance, uniform
from pc3d.data.transforms.geometric import rotate, rotation_matrix
from pc3d.errors import InputError
from pc3d.io.kitti_object import KittiFrame
from pc3d.ops.boxes import points_in_boxes, rectangle_intersection
from pc3d.points import Points

_BEV = [0, 1, 3, 4, 6]
_PLACES = 5  # that CopyInstances tries for a copy


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


class CopyInstances(CloudTransform):
    """Put copies of a cloud's own objects against and onto its objects: more of them, and more that touch.

    Copy-paste augmentation (Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method for Instance
    Segmentation", CVPR 2021) for objects that stand on a plane of any height, z up. A copy is turned about the vertical,
    then moved until it touches another object from a random side, or is laid on top of it. What it would stand on or
    cover goes; a copy that would reach into a third object is put elsewhere, or after some tries not made. Copies get an ``instance`` and ``superpoint``
    numbers of their own and keep everything else.

    Args:
        copies: most copies; as many as a random number from 0 to this are tried.
        on_top: share of them that are laid on an object.
        gap: metres between what touches.
        cell: edge in metres of the columns in which objects collide: about twice the distance of points.
    """

    def __init__(self, copies: int = 3, on_top: float = 0.5, gap: float = 0.005, cell: float = 0.01) -> None:
        if copies < 0 or not 0 <= on_top <= 1 or gap < 0 or cell <= 0:
            raise InputError(
                f"CopyInstances: copies {copies} and gap {gap} must not be negative, on_top {on_top} must lie in 0..1, "
                f"cell {cell} be above 0"
            )
        self.copies = copies
        self.on_top = on_top
        self.gap = gap
        self.cell = cell

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        for name in ("segment", "instance"):
            if name not in cloud:
                raise InputError(f"{cloud.describe()}: field '{name}' is missing, CopyInstances needs it")
        wanted = int(torch.randint(self.copies + 1, (), generator=generator))
        cloud = drop_boxes(cloud.replace(source=None)) if wanted else cloud
        for _ in range(wanted):
            tries = (self._with_copy(cloud, generator) for _ in range(_PLACES))
            cloud = next((more for more in tries if more is not None), cloud)
        return cloud

    def _with_copy(self, cloud: Points, generator: torch.Generator | None) -> Points | None:
        """The cloud with one copy more, None where that would reach into a third object."""
        instance = cloud.get("instance").reshape(-1)
        there = instance[instance >= 0].unique()
        if not len(there):
            return None
        source, target = there[torch.randint(len(there), (2,), generator=generator).to(there.device)]
        angle = uniform(-math.pi, math.pi, generator)
        copy = rotate(cloud.select(instance == source), rotation_matrix(angle, "z"))
        other, rest = cloud.coord[instance == target], (instance >= 0) & (instance != target)
        if chance(self.on_top, generator):
            place = other[int(torch.randint(len(other), (), generator=generator))]
            low, high = copy.coord.amin(0), copy.coord.amax(0)
            shift = torch.cat([place[:2] - (low + high)[:2] / 2, (other[:, 2].amax() + self.gap - low[2])[None]])
        else:
            shift = self._beside(copy.coord, other, uniform(-math.pi, math.pi, generator))
        copy = copy.with_attrs(coord=copy.coord + shift)
        below = _in_columns(cloud.coord, copy.coord, self.cell)
        hit = below & rest & (cloud.coord[:, 2] > copy.coord[:, 2].amin())
        if bool(hit.any()):
            return None
        kept = cloud.select(~(below & (cloud.coord[:, 2] < copy.coord[:, 2].amax())))
        return _joined(kept, copy)

    def _beside(self, coord: Tensor, other: Tensor, angle: float) -> Tensor:
        """How far ``(3,)`` points move to touch others from the side at this angle, seen from above."""
        along = coord.new_tensor([math.cos(angle), math.sin(angle)])
        across = torch.stack([-along[1], along[0]])
        middle, goal = ((c.amin(0) + c.amax(0))[:2] / 2 for c in (coord, other))
        step = goal - middle
        own, its = ((c[:, :2] @ across / self.cell).floor().long() for c in (coord[:, :2] + step, other))
        first = torch.minimum(own.min(), its.min())
        size = int(torch.maximum(own.max(), its.max()) - first) + 1
        near = coord.new_full((size,), math.inf).scatter_reduce(0, own - first, (coord[:, :2] + step) @ along, "amin")
        far = coord.new_full((size,), -math.inf).scatter_reduce(0, its - first, other[:, :2] @ along, "amax")
        apart = (far - near).amax()  # both have their middle on the same line, so some bin holds both
        step = step + along * (apart + self.gap)
        return torch.cat([step, other[:, 2].amin()[None] - coord[:, 2].amin()[None]])


def _in_columns(coord: Tensor, other: Tensor, cell: float) -> Tensor:
    """``(N,)`` bool: which points lie in a vertical column with some point of ``other``."""
    columns = torch.cat([other, coord])[:, :2].div(cell).floor().long()
    columns = columns - columns.amin(0)
    keys = columns[:, 0] * (columns[:, 1].max() + 1) + columns[:, 1]
    return torch.isin(keys[len(other) :], keys[: len(other)])


def _joined(cloud: Points, copy: Points) -> Points:
    """Both as one cloud, the second with numbers of its own for its instance and segments."""
    attrs = {}
    for name, value in cloud.attrs.items():
        added = copy.get(name)
        if name == "instance":
            added = torch.full_like(added, int(value.max()) + 1)
        elif name == "superpoint":
            added = added + value.amax(0) + 1
        attrs[name] = torch.cat([value, added])
    return Points(torch.cat([cloud.coord, copy.coord]), attrs=attrs, meta=cloud.meta)
