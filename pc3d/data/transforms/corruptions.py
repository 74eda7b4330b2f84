"""Corruptions of object clouds, as two robustness benchmarks make them.

ModelNet40-C: Sun et al., "Benchmarking robustness of 3D point cloud recognition against common corruptions"
(arXiv 2201.12296), 15 corruptions of severities 1 to 5. ModelNet-C, the classification part of PointCloud-C: Ren et
al., "Benchmarking and analyzing point cloud classification under corruptions" (ICML 2022), 7 corruptions of levels 0
to 4. Strengths are those of the published generators, for clouds in the unit sphere; counts are for 1,024 points and
grow with the cloud.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, get_args

import torch
from scipy.spatial import ConvexHull, QhullError
from torch import Tensor
from torch.nn import functional as F

from pc3d.data.boxes import drop_boxes
from pc3d.data.transforms.base import CloudTransform
from pc3d.data.transforms.geometric import rotation_matrix, unit_frame
from pc3d.errors import InputError
from pc3d.points import Points

Corruption = Literal[
    "occlusion", "lidar", "density_inc", "density", "cutout",
    "uniform", "gaussian", "impulse", "upsampling", "background",
    "rotation", "shear", "distortion", "distortion_rbf", "distortion_rbf_inv",
    "scale", "jitter", "rotate", "dropout_global", "dropout_local", "add_global", "add_local",
]  # fmt: skip
CLEAN = "clean"
UpAxis = Literal["y", "z"]
_Changed = tuple[Tensor, Tensor]
"""``(M, 3)`` coordinates and the ``(M,)`` row that each point was, or was made from."""

KINDS: tuple[Corruption, ...] = get_args(Corruption)
MODELNET40_C: dict[str, tuple[Corruption, ...]] = {
    "density": KINDS[:5],
    "noise": KINDS[5:10],
    "transformation": KINDS[10:15],
}
"""Groups of corruptions of ModelNet40-C, severities 1 to 5."""
MODELNET_C: tuple[Corruption, ...] = KINDS[15:]
"""Corruptions of ModelNet-C, levels 0 to 4."""
_POINTS = 1024  # that published counts are meant for


class Corrupt(CloudTransform):
    """Corrupt a cloud; random numbers of one generator give one result. A cloud in the unit sphere is as published.

    Any other cloud is corrupted at that size and put back. What comes out has ``points`` points, more or fewer as the
    corruption has it, in random order (in the published files added points are the last). Points made up carry the
    attributes of the point they were made from, or of the nearest; ``normal`` and boxes, no longer true, are dropped.

    Two corruptions are not quite the published ones, which render a mesh: here ``occlusion`` and ``lidar`` leave out
    points that other points hide. Give them dense clouds: where fewer points are seen than wanted, some are repeated.

    Args:
        corruption: name, of either benchmark; ``clean`` reduces the cloud only, at any severity.
        severity: 1 to 5 of ModelNet40-C, 0 to 4 of ModelNet-C. Of ``occlusion`` and ``lidar`` it is the side that the
            cloud is seen from, not a strength, as published.
        points: random points that the cloud is reduced to first; ``density_inc`` takes twice as many and gives half of
            them, ``occlusion`` and ``lidar`` look at all. A smaller cloud stays as it is.
        up: the vertical axis, around which ``occlusion`` and ``lidar`` look (ModelNet40: y).
    """

    def __init__(
        self, corruption: Corruption | Literal["clean"], severity: int, points: int = _POINTS, up: UpAxis = "z"
    ) -> None:
        check_corruption("Corrupt", corruption, severity)
        if points < 1 or up not in get_args(UpAxis):
            raise InputError(f"Corrupt: points {points} must be at least 1, and up '{up}' y or z")
        self.corruption, self.severity, self.points, self.up = corruption, severity, points, up

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        if cloud.num_points == 0:
            return cloud.without_attrs("normal")
        kind, draw = _KINDS[self.corruption], _Draw(generator, cloud.coord)
        center, size = unit_frame(cloud.coord, "sphere")
        wanted = min(self.points, cloud.num_points)
        first = draw.order(cloud.num_points)[: kind.oversample * self.points]
        coord = (cloud.coord[first].double() - center) / size
        strength: Any = dict(zip(severities(self.corruption), kind.strengths, strict=False)).get(self.severity)
        if isinstance(kind.change, _View):
            changed, rows = kind.change(coord, strength, draw, wanted, self.up)
        else:
            changed, rows = kind.change(coord, strength, draw)
        order = draw.order(len(rows))
        made = cloud.select(first[rows[order]]).without_attrs("normal")
        return drop_boxes(made.with_attrs(coord=(changed[order] * size + center).to(cloud.coord)))


def check_corruption(name: str, corruption: str, severity: int) -> None:
    """Raises InputError, for a class of this name, unless either benchmark has the corruption and the severity."""
    if corruption == CLEAN:
        return
    if corruption not in KINDS:
        raise InputError(f"{name}.corruption: '{corruption}' is none of {CLEAN}, {', '.join(KINDS)}")
    if severity not in (allowed := severities(corruption)):
        raise InputError(f"{name}.severity: {severity} of {corruption} is not {allowed[0]} to {allowed[-1]}")


def severities(corruption: str) -> range:
    """What a benchmark calls the severities of a corruption, weakest first."""
    return range(5) if corruption in MODELNET_C else range(1, 6)


@dataclass
class _Draw:
    """Random numbers drawn on the CPU, in float64 on the device of ``like``."""

    generator: torch.Generator | None
    like: Tensor

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        values = torch.rand(shape, dtype=torch.float64, generator=self.generator)
        return (low + (high - low) * values).to(self.like.device)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self.generator).to(self.like.device)

    def integers(self, end: int, *shape: int) -> Tensor:
        return torch.randint(end, shape, generator=self.generator).to(self.like.device)

    def signs(self, *shape: int) -> Tensor:
        return 2 * self.integers(2, *shape).double() - 1

    def order(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self.generator).to(self.like.device)


def _scaled(count: int, coord: Tensor) -> int:
    """A count for 1,024 points, of this cloud."""
    return round(count * len(coord) / _POINTS)


def _rows(coord: Tensor) -> Tensor:
    return torch.arange(len(coord), device=coord.device)


def _fitted(coord: Tensor, fit: Literal["sphere", "box"]) -> Tensor:
    center, size = unit_frame(coord, fit)
    return (coord - center) / size


# Noise ----------------------------------------------------------------------------------------------------------------


def _uniform(coord: Tensor, strength: float, draw: _Draw) -> _Changed:
    return _fitted(coord + draw.uniform(-strength, strength, len(coord), 3), "box"), _rows(coord)


def _jitter(coord: Tensor, sigma: float, draw: _Draw) -> _Changed:
    return coord + sigma * draw.normal(len(coord), 3), _rows(coord)


def _gaussian(coord: Tensor, sigma: float, draw: _Draw) -> _Changed:
    moved, rows = _jitter(coord, sigma, draw)
    return moved.clamp(-1, 1), rows


def _impulse(coord: Tensor, share: int, draw: _Draw) -> _Changed:
    """One of ``share`` points jumps by 0.1 along every axis."""
    chosen = draw.order(len(coord))[: len(coord) // share]
    return _fitted(coord.index_add(0, chosen, 0.1 * draw.signs(len(chosen), 3)), "box"), _rows(coord)


def _upsampling(coord: Tensor, share: int, draw: _Draw) -> _Changed:
    """A copy beside one of ``share`` points, within 0.05 along every axis."""
    chosen = draw.order(len(coord))[: len(coord) // share]
    copies = coord[chosen] + draw.uniform(-0.05, 0.05, len(chosen), 3)
    return _fitted(torch.cat([coord, copies]), "box"), torch.cat([_rows(coord), chosen])


def _background(coord: Tensor, share: int, draw: _Draw) -> _Changed:
    """Points anywhere in the box from -1 to 1, one for ``share`` points."""
    changed, rows = _with_strangers(coord, draw.uniform(-1, 1, len(coord) // share, 3))
    return _fitted(changed, "box"), rows


def _add_global(coord: Tensor, count: int, draw: _Draw) -> _Changed:
    """Points anywhere in the unit ball."""
    count = _scaled(count, coord)
    direction = F.normalize(draw.normal(count, 3), dim=1)
    return _with_strangers(coord, direction * draw.uniform(0, 1, count, 1) ** (1 / 3))


def _with_strangers(coord: Tensor, added: Tensor) -> _Changed:
    nearest = torch.cdist(added, coord).argmin(1)
    return torch.cat([coord, added]), torch.cat([_rows(coord), nearest])


def _add_local(coord: Tensor, count: int, draw: _Draw) -> _Changed:
    """Clusters of normal noise around some points; what leaves the unit ball comes back, to one over its distance."""
    sizes = _cluster_sizes(count, coord, draw)
    centre = torch.repeat_interleave(draw.order(len(coord))[: len(sizes)], sizes)
    sigma = torch.repeat_interleave(draw.uniform(0.075, 0.125, len(sizes)), sizes)
    added = coord[centre] + sigma[:, None] * draw.normal(len(centre), 3)
    squared = added.square().sum(1, keepdim=True)
    return torch.cat([coord, torch.where(squared > 1, added / squared, added)]), torch.cat([_rows(coord), centre])


def _cluster_sizes(count: int, coord: Tensor, draw: _Draw) -> Tensor:
    """``count`` points, of 1,024, in one to seven clusters."""
    clusters = 1 + int(draw.integers(min(7, len(coord))))
    return draw.integers(clusters, _scaled(count, coord)).bincount(minlength=clusters)


# Density --------------------------------------------------------------------------------------------------------------


def _cutout(coord: Tensor, holes: int, draw: _Draw) -> _Changed:
    """Holes of 30 points."""
    return _perforated(coord, [_scaled(30, coord)] * holes, draw)


def _density(coord: Tensor, places: int, draw: _Draw) -> _Changed:
    """Places of 100 points that lose 75."""
    return _perforated(coord, [_scaled(100, coord)] * places, draw, lost=0.75)


def _dropout_local(coord: Tensor, count: int, draw: _Draw) -> _Changed:
    return _perforated(coord, _cluster_sizes(count, coord, draw).tolist(), draw)


def _perforated(coord: Tensor, sizes: Sequence[int], draw: _Draw, lost: float = 1.0) -> _Changed:
    """The share ``lost`` of the nearest points of random ones is taken away, one place after the other."""
    rows = _rows(coord)
    for size in sizes:
        near = _around_any(coord[rows], min(size, len(rows) - 1), draw)
        gone = near[draw.order(len(near))[: int(lost * len(near))]]
        stays = torch.ones(len(rows), dtype=torch.bool, device=rows.device).index_fill(0, gone, False)
        rows = rows[stays]
    return coord[rows], rows


def _density_inc(coord: Tensor, places: int, draw: _Draw) -> _Changed:
    """Half as many points: places of 100, of 1,024 that stay, keep all of theirs, the rest is drawn with repeats."""
    left, kept, half = _rows(coord), [], len(coord) // 2
    size = round(100 * half / _POINTS)
    for _ in range(places):
        near = _around_any(coord[left], size, draw)
        kept.append(left[near])
        left = left[torch.ones(len(left), dtype=torch.bool, device=left.device).index_fill(0, near, False)]
    rows = torch.cat([*kept, left[draw.integers(len(left), max(half - places * size, 1))]])
    return coord[rows], rows


def _around_any(coord: Tensor, count: int, draw: _Draw) -> Tensor:
    """The ``count`` nearest rows of a random one."""
    centre = coord[int(draw.integers(len(coord)))]
    return (coord - centre).square().sum(1).topk(count, largest=False).indices


def _dropout_global(coord: Tensor, lost: float, draw: _Draw) -> _Changed:
    rows = draw.order(len(coord))[: max(int(len(coord) * (1 - lost)), 1)]
    return coord[rows], rows


# Transformation -------------------------------------------------------------------------------------------------------


def _rotation(coord: Tensor, degrees: float, draw: _Draw) -> _Changed:
    angles = torch.deg2rad(draw.uniform(degrees - 2.5, degrees + 2.5, 3) * draw.signs(3))
    x, y, z = _turns(angles, coord)
    return _fitted(coord @ x @ y @ z, "box"), _rows(coord)


def _rotate(coord: Tensor, most: float, draw: _Draw) -> _Changed:
    x, y, z = _turns(draw.uniform(-most, most, 3), coord)
    return coord @ z @ y @ x, _rows(coord)


def _turns(angles: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, y, z = angles.tolist()
    return rotation_matrix(x, "x").to(like), rotation_matrix(y, "y").to(like), rotation_matrix(z, "z").to(like)


def _shear(coord: Tensor, strength: float, draw: _Draw) -> _Changed:
    """x and z take shares of the other two axes each, y stays."""
    b, d, e, f = (draw.uniform(strength - 0.05, strength + 0.05, 4) * draw.signs(4)).tolist()
    return _fitted(coord @ coord.new_tensor([[1, 0, b], [d, 1, e], [f, 0, 1]]), "box"), _rows(coord)


def _scale(coord: Tensor, most: float, draw: _Draw) -> _Changed:
    return _fitted(coord * draw.uniform(1 / most, most, 3), "sphere"), _rows(coord)


def _free_form(coord: Tensor, strength: float, draw: _Draw) -> _Changed:
    """Free-form deformation (Sederberg and Parry 1986) of the box from -1 to 1 by 5 x 5 x 5 control points."""
    shift = draw.uniform(-strength, strength, 5, 5, 5, 3)  # in lengths of the box
    place, power = (coord[..., None] + 1) / 2, torch.arange(5, device=coord.device)
    x, y, z = (place.new_tensor([1, 4, 6, 4, 1]) * place**power * (1 - place) ** (4 - power)).unbind(1)
    return _fitted(coord + 2 * torch.einsum("ni,nj,nk,ijkc->nc", x, y, z, shift), "box"), _rows(coord)


def _radial(coord: Tensor, length: float, draw: _Draw, inverse: bool = False) -> _Changed:
    """Control points 0.5 apart in the box from -1 to 1 move by ``length``; (inverse) multiquadrics carry the rest."""
    control, system = _radial_system(inverse)
    alpha, gamma = draw.uniform(-math.pi, math.pi, 2, len(control))
    moved = length * torch.stack([alpha.cos() * gamma.sin(), alpha.sin() * gamma.sin(), gamma.cos()], 1)
    weights = torch.linalg.solve(system.to(coord), torch.cat([moved, moved.new_zeros(4, 3)]))
    return _fitted(coord + _radial_terms(coord, control.to(coord), inverse) @ weights, "box"), _rows(coord)


@lru_cache(2)
def _radial_system(inverse: bool) -> tuple[Tensor, Tensor]:
    """``(125, 3)`` control points, and the ``(129, 129)`` system of their weights and a linear polynomial's."""
    line = torch.linspace(-1, 1, 5, dtype=torch.float64)
    control = torch.cartesian_prod(line, line, line)
    terms = _radial_terms(control, control, inverse)
    return control, torch.cat([terms, F.pad(terms[:, len(control) :].T, (0, 4))])


def _radial_terms(coord: Tensor, control: Tensor, inverse: bool) -> Tensor:
    """``(N, 129)`` values of the basis functions, 1, x, y and z."""
    basis = torch.sqrt(torch.cdist(coord, control).square() + 0.5**2)
    return torch.cat([1 / basis if inverse else basis, coord.new_ones(len(coord), 1), coord], 1)


# Views ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """What is seen of a cloud in the unit box from a ``distance`` and an elevation of U(``degrees``), from outside."""

    distance: float
    degrees: tuple[float, float]
    rings: bool = False

    def __call__(self, coord: Tensor, side: int, draw: _Draw, wanted: int, up: UpAxis) -> _Changed:
        """``wanted`` points, or in rings three quarters of them; ``side`` of five."""
        coord = _fitted(coord if up == "z" else coord[:, [2, 0, 1]], "box")
        azimuth = math.radians(float(draw.uniform(72 * side - 36, 72 * side + 36)))
        elevation = math.radians(float(draw.uniform(*self.degrees)))
        flat = math.cos(elevation)
        direction = [flat * math.cos(azimuth), flat * math.sin(azimuth), math.sin(elevation)]
        eye = self.distance * coord.new_tensor(direction)
        rows = visible(coord, eye)
        coord = coord[rows]
        if self.rings:
            coord, hit = _on_rings(coord - eye)
            coord, rows, wanted = coord + eye, rows[hit], max(wanted * 3 // 4, 1)
        else:
            coord = _fitted(coord, "box")
        more = draw.integers(len(rows), max(wanted - len(rows), 0))
        taken = torch.cat([draw.order(len(rows)), more])[:wanted]
        return (coord if up == "z" else coord[:, [1, 2, 0]])[taken], rows[taken]


def visible(coord: Tensor, eye: Tensor) -> Tensor:
    """Rows of the points of a cloud that no others hide from ``eye`` (3,); all if they span no volume with it.

    Katz et al., "Direct visibility of point sets" (SIGGRAPH 2007): points are mirrored at a sphere around the eye, here
    of a hundred times the largest distance; those on the convex hull are seen.
    """
    ray = coord - eye
    length = ray.norm(dim=1, keepdim=True)
    mirrored = ray * (2 * 100 * length.amax() / length - 1)
    try:
        corners = ConvexHull(F.pad(mirrored, (0, 0, 0, 1)).cpu().numpy()).vertices
    except QhullError:
        return _rows(coord)
    seen = torch.from_numpy(corners).long().sort().values
    return seen[seen < len(coord)].to(coord.device)


def _on_rings(rays: Tensor) -> _Changed:
    """Points near the scan lines, one per degree from the vertical, moved onto them; all if there are none.

    Args:
        rays: ``(N, 3)`` from the sensor to the points.
    """
    line = math.radians(1)
    length, polar = rays.norm(dim=1), torch.atan2(rays[:, :2].norm(dim=1), rays[:, 2])
    place = (polar - polar.min()) / line
    hit = ((place % 1 >= 0.25) & (place % 1 < 0.75)).nonzero()[:, 0]
    if not len(hit):
        return rays, _rows(rays)
    polar = (polar.min() + (place.floor() + 0.5) * line)[hit]
    azimuth = torch.atan2(rays[hit, 1], rays[hit, 0])
    flat = polar.sin()
    return length[hit, None] * torch.stack([flat * azimuth.cos(), flat * azimuth.sin(), polar.cos()], 1), hit


@dataclass(frozen=True)
class _Kind:
    """How a corruption changes coordinates in the unit sphere, and how much at each severity."""

    change: Callable[..., _Changed]
    strengths: tuple[Any, ...]
    oversample: int = 1


_ALL_POINTS = 1 << 31
_SIDES = (1, 2, 3, 4, 5)
_RADIAL = (0.025, 0.05, 0.075, 0.1, 0.125)
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
_COUNTS = (100, 200, 300, 400, 500)
_KINDS: dict[str, _Kind] = {
    CLEAN: _Kind(lambda coord, _strength, _draw: (coord, _rows(coord)), ()),
    "occlusion": _Kind(_View(3, (30, 60)), _SIDES, _ALL_POINTS),
    "lidar": _Kind(_View(5, (22.5, 22.5), rings=True), _SIDES, _ALL_POINTS),
    "density_inc": _Kind(_density_inc, (1, 2, 3, 4, 5), 2),
    "density": _Kind(_density, (1, 2, 3, 4, 5)),
    "cutout": _Kind(_cutout, (2, 3, 5, 7, 10)),
    "uniform": _Kind(_uniform, (0.01, 0.02, 0.03, 0.04, 0.05)),
    "gaussian": _Kind(_gaussian, (0.01, 0.015, 0.02, 0.025, 0.03)),
    "impulse": _Kind(_impulse, (30, 25, 20, 15, 10)),
    "upsampling": _Kind(_upsampling, (5, 4, 3, 2, 1)),
    "background": _Kind(_background, (45, 40, 35, 30, 20)),
    "rotation": _Kind(_rotation, (2.5, 5, 7.5, 10, 15)),
    "shear": _Kind(_shear, (0.05, 0.1, 0.15, 0.2, 0.25)),
    "distortion": _Kind(_free_form, _SHARES),
    "distortion_rbf": _Kind(_radial, _RADIAL),
    "distortion_rbf_inv": _Kind(partial(_radial, inverse=True), _RADIAL),
    "scale": _Kind(_scale, (1.6, 1.7, 1.8, 1.9, 2.0)),
    "jitter": _Kind(_jitter, (0.01, 0.02, 0.03, 0.04, 0.05)),
    "rotate": _Kind(_rotate, tuple(math.pi / 30 * i for i in (1, 2, 3, 4, 5))),
    "dropout_global": _Kind(_dropout_global, (0.25, 0.375, 0.5, 0.625, 0.75)),
    "dropout_local": _Kind(_dropout_local, _COUNTS),
    "add_global": _Kind(_add_global, (10, 20, 30, 40, 50)),
    "add_local": _Kind(_add_local, _COUNTS),
}
