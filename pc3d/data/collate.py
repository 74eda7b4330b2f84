"""From samples to a training batch: packing and Mix3D."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pc3d.data.transforms import GridSample
from pc3d.data.transforms.base import chance
from pc3d.errors import InputError
from pc3d.ops.voxelize import grid_coords
from pc3d.points import Points

Cells = Literal["distinct", "regrid", "overlay"]
InstanceShift = Literal["distinct", "published"]


@dataclass(frozen=True)
class Collate:
    """Pack samples into a batch and, with probability ``mix_prob``, merge its clouds in pairs (Mix3D).

    Nekrasov et al., "Mix3D: Out-of-context data augmentation for 3D scenes", 3DV 2021, as Pointcept applies it: one
    draw per batch, consecutive clouds form pairs, an odd last cloud stays alone.

    Attributes:
        mix_prob: probability of mixing a batch.
        grid_size: edge of a cell in metres, for ``cells`` other than ``"overlay"``.
        cells: what becomes of ``grid_coord`` in a mixed batch. ``"distinct"`` grids the merged clouds anew and keeps
            one random point per cell; ``"regrid"`` grids anew and keeps all points; ``"overlay"`` leaves the cells
            of both scenes, each counted from its own corner. The last two are published, and let cells hold points
            of both scenes.
        instances: ``"distinct"`` gives the second cloud of a pair instance numbers of its own; ``"published"`` adds
            the highest number of the first one, so that its last instance and number 0 of the second become one.
    """

    mix_prob: float = 0.0
    grid_size: float | None = None
    cells: Cells = "distinct"
    instances: InstanceShift = "distinct"

    def __post_init__(self) -> None:
        if self.mix_prob > 0 and self.cells != "overlay" and self.grid_size is None:
            raise InputError(f"Mix3D with cells='{self.cells}' needs grid_size")

    def __call__(self, clouds: Sequence[Points], generator: torch.Generator | None = None) -> Points:
        batch = Points.cat(clouds)
        if self.mix_prob == 0 or not chance(self.mix_prob, generator) or len(batch) == 1:
            return batch
        mixed = mix3d(batch, self.instances)
        if "grid_coord" not in mixed or self.cells == "overlay":
            return mixed
        assert self.grid_size is not None
        if self.cells == "distinct":
            return GridSample(self.grid_size, pick="random")(mixed, generator)
        return mixed.with_attrs(grid_coord=grid_coords(mixed.coord, mixed.offsets, self.grid_size))


def mix3d(points: Points, instances: InstanceShift = "distinct") -> Points:
    """Merge the clouds of a batch in consecutive pairs; cells stay as they are. See :class:`Collate`."""
    if len(points) < 2:
        return points
    borders = torch.cat([points.offsets[:-1:2], points.offsets[-1:]])
    attrs = dict(points.attrs)
    if "instance" in attrs:
        attrs["instance"] = _shift_instances(points, instances)
    meta = [_merged_meta(points.meta[i : i + 2]) for i in range(0, len(points), 2)]
    return Points(points.coord, borders, attrs, meta)


def _merged_meta(pair: list[dict[str, Any]]) -> dict[str, Any]:
    return pair[0] if len(pair) == 1 else {"name": "+".join(str(meta.get("name", "?")) for meta in pair)}


def _shift_instances(points: Points, instances: InstanceShift) -> Tensor:
    shifted = points.get("instance").clone()
    offsets = points.offsets.tolist()
    for first in range(0, len(points) - 1, 2):
        start, middle, end = offsets[first : first + 3]
        if start == middle:
            continue
        shift = shifted[start:middle].max() + (1 if instances == "distinct" else 0)
        second = shifted[middle:end]
        second += torch.where(second != -1, shift, 0)
    return shifted
