"""Triangle meshes: sampling their surface, and which points they contain."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_PAIRS = 1 << 22  # points and triangles compared at a time
_MOST_CELLS = 1024  # of the table of triangles, per axis


@dataclass(frozen=True, eq=False)
class Mesh:
    """Triangles.

    Attributes:
        vertices: ``(V, 3)`` float32.
        faces: ``(F, 3)`` int64 rows of ``vertices``, counter-clockwise seen from outside.
    """

    vertices: Tensor
    faces: Tensor

    @property
    def corners(self) -> Tensor:
        """``(F, 3, 3)`` corners of every triangle."""
        return self.vertices[self.faces]

    def normals(self) -> Tensor:
        """``(F, 3)`` unit normals; zeros where a triangle has no area."""
        return torch.nn.functional.normalize(self._areas(), dim=1).to(self.vertices.dtype)

    def _areas(self) -> Tensor:
        """``(F, 3)`` float64 normals, twice as long as the triangle's area."""
        a, b, c = self.corners.double().unbind(1)
        return torch.linalg.cross(b - a, c - a)

    def sample(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """``(count, 3)`` points spread evenly over the surface, and the normals of their triangles.

        A mesh without area gives none.
        """
        areas = self._areas().norm(dim=1).cumsum(0)
        if not len(areas) or areas[-1] <= 0:
            return self.vertices[:0], self.vertices[:0]
        draws = torch.rand(count, 3, dtype=torch.float64, generator=generator).to(areas)
        face = torch.searchsorted(areas, draws[:, 0] * areas[-1], right=True).clamp(max=len(areas) - 1)
        root = draws[:, 1].sqrt()
        weight = torch.stack([1 - root, root * (1 - draws[:, 2]), root * draws[:, 2]], 1)
        points = (self.corners[face] * weight[:, :, None]).sum(1)
        return points.to(self.vertices.dtype), self.normals()[face]


def contains(mesh: Mesh, points: Tensor) -> Tensor:
    """``(N,)`` bool: which of ``(N, 3)`` points are inside a closed mesh.

    A ray along z leaves the point; inside, it meets an odd number of triangles. Computed in float64, and so that a ray
    through an edge meets just one of its two triangles.
    """
    inside = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    if not len(mesh.faces) or not len(points):
        return inside
    corners, points = mesh.corners.double(), points.double()
    low, high = corners.amin((0, 1)), corners.amax((0, 1))
    near = ((points >= low) & (points <= high)).all(1).nonzero()[:, 0]
    side = min(max(round(len(corners) ** 0.5), 1), _MOST_CELLS)
    scale = side / (high - low)[:2].clamp(min=1e-300)

    def cells(xy: Tensor) -> Tensor:
        return ((xy - low[:2]) * scale).long().clamp(0, side - 1)

    first, last = cells(corners.amin(1)[:, :2]), cells(corners.amax(1)[:, :2])
    extent = last - first + 1
    triangle, place = _repeated(extent.prod(1))
    row, column = place.div(extent[triangle, 0], rounding_mode="floor"), place % extent[triangle, 0]
    listed, order = ((first[triangle, 1] + row) * side + first[triangle, 0] + column).sort(stable=True)
    triangle, borders = triangle[order], torch.searchsorted(listed, torch.arange(side * side + 1, device=points.device))
    own = cells(points[near, :2])
    cell = own[:, 1] * side + own[:, 0]
    counts = borders[cell + 1] - borders[cell]
    crossings, pairs, start = torch.zeros_like(counts), counts.cumsum(0), 0
    while start < len(near):
        done = pairs[start] - counts[start]
        end = max(int(torch.searchsorted(pairs, done + _PAIRS)), start + 1)
        point, place = _repeated(counts[start:end])
        point = point + start
        met = _above(points[near[point]], corners[triangle[borders[cell[point]] + place]])
        crossings.index_add_(0, point, met.long())
        start = end
    inside[near] = crossings % 2 == 1
    return inside


def _repeated(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as often as its count says, and 0, 1, ... within a row."""
    row = torch.repeat_interleave(counts)
    return row, torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]


def _above(points: Tensor, corners: Tensor) -> Tensor:
    """``(P,)`` whether the ray from each point along +z meets its triangle ``(P, 3, 3)``."""
    x, y, z = points.unbind(1)
    hit = torch.zeros_like(x, dtype=torch.bool)
    for i in range(3):
        a, b = corners[:, i], corners[:, (i + 1) % 3]
        swap = (a[:, 1:2] > b[:, 1:2]) | ((a[:, 1:2] == b[:, 1:2]) & (a[:, :1] > b[:, :1]))
        a, b = torch.where(swap, b, a), torch.where(swap, a, b)  # an edge is computed alike for both its triangles
        spans = (a[:, 1] > y) != (b[:, 1] > y)
        at = a[:, 0] + (y - a[:, 1]) * (b[:, 0] - a[:, 0]) / torch.where(spans, b[:, 1] - a[:, 1], 1)
        hit ^= spans & (x < at)
    normal = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    slope = torch.where(normal[:, 2] == 0, 1, normal[:, 2])
    height = corners[:, 0, 2] - (normal[:, 0] * (x - corners[:, 0, 0]) + normal[:, 1] * (y - corners[:, 0, 1])) / slope
    return hit & (height > z)
