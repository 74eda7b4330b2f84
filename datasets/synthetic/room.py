"""A furnished room and the walk of a scanner through it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pc3d.datasets.synthetic import furniture
from pc3d.datasets.synthetic.furniture import FURNITURE, Rng, block
from pc3d.datasets.synthetic.raycast import Array, Box, Item, Material, cast

STRUCTURE = ("ceiling", "floor", "wall", "door", "window")
CLASSES = (*STRUCTURE, *FURNITURE)

_QUARTER = np.pi / 2
_NOISE = 0.004  # metres, standard deviation of a measured distance
_LOST = 0.03  # share of rays that never come back
_SHADOW = np.cos(np.radians(25))  # the scanner does not look straight down: its carrier stands there

_UPWARD = 0.75  # below 1: fewer rays towards the ceiling


@dataclass
class Scan:
    """N points: ``coord``, ``color`` (0..255) and ``normal`` (N, 3); ``label`` (in CLASSES), ``instance`` (N,)."""

    coord: Array
    color: Array
    normal: Array
    label: NDArray[np.int64]
    instance: NDArray[np.int64]


class Room:
    """Draws a room: shell, door and windows, then furniture where there is place for it.

    Args:
        rng: every choice comes from it.
        furniture: kinds of furniture that may stand in the room.
    """

    def __init__(self, rng: Rng, kinds: list[str]) -> None:
        self.rng = rng
        self.kinds = kinds
        self.size = np.array([rng.uniform(4.0, 6.5), rng.uniform(3.4, 5.5), rng.uniform(2.4, 2.9)])
        self.items: list[Item] = _shell(rng, self.size)
        self.taken: list[tuple[Array, Array]] = []  # footprints (lower, upper corner) on the floor plan
        self._build()
        self._furnish()

    # Layout ----------------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        """Walls that stand out, doors (with free floor before them) and windows."""
        rng, wall = self.rng, self.items[2].parts[0][1]
        for chance, low, high in ((0.4, 0.7, 1.6), (0.3, 0.2, 0.35)):  # an L-shaped room; a column
            if rng.random() < chance:
                width, depth = rng.uniform(low, high, 2)
                x, y = rng.choice([-1, 1], 2) * (self.size[:2] - np.array([width, depth])) / 2
                self._add(Item("wall", [(block(x, y, 0, width, depth, self.size[2]), wall)]))
        for _ in range(1 + (rng.random() < 0.3)):
            self._against_wall(furniture.door(rng), clear=0.8)
        for _ in range(rng.integers(1, 4)):
            self._against_wall(furniture.window(rng))

    def _furnish(self) -> None:
        rng = self.rng
        for kind, chances in {
            "bed": (0.7,),
            "sofa": (0.8, 0.2),
            "bookcase": (0.9, 0.4),
            "cabinet": (1.0, 0.7),
        }.items():
            for chance in chances:
                if kind in self.kinds and rng.random() < chance:
                    self._against_wall(FURNITURE[kind](rng), gap=0.02)
        for chance in (1.0, 0.4):
            if rng.random() < chance:
                self._dining_place()
        if "lamp" in self.kinds:
            self._hang_lamps()
        if "chair" in self.kinds and rng.random() < 0.4:
            self._anywhere(furniture.chair(rng))

    def _dining_place(self) -> None:
        """A table and the chairs around it, some pushed in, some not."""
        rng = self.rng
        table = self._anywhere(furniture.table(rng)) if "table" in self.kinds else None
        if table is None or "chair" not in self.kinds:
            return
        bounds = table.bounds
        for side in rng.permutation(4)[: rng.integers(3, 5)]:
            chair = furniture.chair(rng)
            angle = side * _QUARTER
            reach = bounds.upper[0] if side % 2 else bounds.upper[1]
            away = np.array([[-np.sin(angle), np.cos(angle), 0]]) * (reach + rng.uniform(0.05, 0.4))
            along = np.array([[np.cos(angle), np.sin(angle), 0]]) * rng.normal(0, 0.1)
            chair.position = table.to_room(away + along)[0]
            chair.yaw = table.yaw + angle + rng.normal(0, 0.2)
            self._try(chair, [box for box in self.taken if box is not self.taken[-1]], margin=-0.05, keep=False)

    def _hang_lamps(self) -> None:
        rng = self.rng
        for chance in (0.9, 0.5):
            if rng.random() < chance:
                self._anywhere(furniture.floor_lamp(rng))
        if rng.random() < 0.85:
            lamp = furniture.ceiling_lamp(rng, self.size[2])
            lamp.position[:2] = rng.uniform(-0.2, 0.2, 2) * self.size[:2]
            self.items.append(lamp)
        stands = [item for item in self.items if item.label in ("table", "cabinet") and item.bounds.upper[2] < 1.15]
        for stand in stands:
            if rng.random() < 0.5:
                lamp, bounds = furniture.table_lamp(rng), stand.bounds
                spot = rng.uniform(-0.3, 0.3, 2) * (bounds.upper - bounds.lower)[:2]
                lamp.position = stand.to_room(np.array([[*spot, bounds.upper[2]]]))[0]
                self.items.append(lamp)

    def _against_wall(self, item: Item, gap: float = 0.0, clear: float = 0.0) -> None:
        """Back to a wall; ``clear`` metres of floor before it stay free."""
        bounds = item.bounds
        for _ in range(30):
            item.yaw = self.rng.integers(4) * _QUARTER
            along, reach = self.size[:2] if item.yaw % np.pi < 1 else self.size[1::-1]
            room = along / 2 - bounds.upper[0] - 0.1
            if room < 0:
                continue
            local = np.array([[self.rng.uniform(-room, room), reach / 2 - max(bounds.upper[1], 0) - gap, 0]])
            item.position = Item("", [], yaw=item.yaw).to_room(local)[0]
            if self._try(item, self.taken, clear=clear):
                return

    def _anywhere(self, item: Item) -> Item | None:
        for _ in range(30):
            item.yaw = self.rng.integers(4) * _QUARTER + self.rng.normal(0, 0.12)
            item.position = np.append(self.rng.uniform(-0.5, 0.5, 2) * self.size[:2], 0)
            if self._try(item, self.taken, margin=0.08):
                return item
        return None

    def _try(
        self, item: Item, others: list[tuple[Array, Array]], margin: float = 0.0, clear: float = 0.0, keep: bool = True
    ) -> bool:
        """Add the item if it is inside the room and ``margin`` metres from ``others``."""
        lower, upper = item.footprint()
        if (lower[:2] < -self.size[:2] / 2 - 1e-6).any() or (upper[:2] > self.size[:2] / 2 + 1e-6).any():
            return False
        if clear:
            front = np.array([np.sin(item.yaw), -np.cos(item.yaw)]) * clear
            lower[:2], upper[:2] = np.minimum(lower[:2], lower[:2] + front), np.maximum(upper[:2], upper[:2] + front)
        if any(_overlap(lower, upper, low, high, margin) for low, high in others):
            return False
        self._add(item, (lower, upper))
        return True

    def _add(self, item: Item, footprint: tuple[Array, Array] | None = None) -> None:
        self.items.append(item)
        self.taken.append(footprint or item.footprint())

    # Scanning --------------------------------------------------------------------------------------------------------

    def scan(self, rays: int, stops: int = 8) -> Scan:
        """Points seen from ``stops`` places on a walk through the room, ``rays`` rays in all."""
        path = self._walk(stops)
        shares = self.rng.dirichlet(np.full(len(path), 3.0))  # the walk is not even: some places get more rays
        scans = [self._look(position, max(int(rays * share), 1)) for position, share in zip(path, shares, strict=True)]
        return Scan(*(np.concatenate([getattr(scan, name) for scan in scans]) for name in Scan.__dataclass_fields__))

    def _walk(self, stops: int) -> Array:
        """``(S, 3)`` positions between three free spots, at carrying height, clear of what is taller."""
        tall = [item.footprint() for item in self.items[6:] if item.label not in ("door", "window", "lamp")]
        tall = [(low, high) for low, high in tall if high[2] > 1.15]
        spots: list[Array] = []
        for _ in range(200):
            spot = self.rng.uniform(-0.42, 0.42, 2) * self.size[:2]
            blocked = any(_overlap(spot, spot, low, high, 0.25) for low, high in self.taken)
            far = all(np.linalg.norm(spot - other) > 1.2 for other in spots)
            if far and not blocked and len(spots) < 3:
                spots.append(spot)
        corners = np.array(spots or [np.zeros(2)])
        at = np.linspace(0, len(corners) - 1, stops)
        plan = np.stack([np.interp(at, np.arange(len(corners)), corners[:, axis]) for axis in (0, 1)], 1)
        height = 1.45 + self.rng.uniform(-0.1, 0.1) + 0.06 * np.sin(np.arange(stops) + self.rng.uniform(0, 6))
        free = [not any(_overlap(spot, spot, low, high, 0.15) for low, high in tall) for spot in plan]
        path = np.column_stack([plan, height])
        return path[free] if any(free) else path

    def _look(self, position: Array, rays: int) -> Scan:
        rng = self.rng
        direction = _directions(rng, rays)
        hits = cast(self.items, position, direction)
        seen = np.flatnonzero((hits.item >= 0) & (rng.random(rays) > _LOST))
        item, part, ray = hits.item[seen], hits.part[seen], direction[seen]
        exact = position + hits.distance[seen, None] * ray
        color, normal, returns = self._surface(exact, item, part)
        normal = np.where((normal * ray).sum(1, keepdims=True) > 0, -normal, normal)
        facing = -(normal * ray).sum(1)
        back = rng.random(len(seen)) < returns * np.minimum(1, facing * 6)  # grazing rays get lost
        noise = rng.normal(0, _NOISE, len(seen)) * (1 + hits.distance[seen] / 5)
        label = np.array([CLASSES.index(each.label) for each in self.items])[item]
        color = color * self._light(exact, normal)[:, None] * rng.uniform(0.92, 1.08) + rng.normal(0, 5, color.shape)
        scan = Scan(exact + noise[:, None] * ray, np.clip(color, 0, 255), normal, label, item)
        return Scan(*(getattr(scan, name)[back] for name in Scan.__dataclass_fields__))

    def _surface(self, points: Array, item: NDArray[np.int64], part: NDArray[np.int64]) -> tuple[Array, Array, Array]:
        """Colour, outward normal and share of returned rays where the rays hit."""
        color, normal, returns = np.empty_like(points), np.empty_like(points), np.ones(len(points))
        order = np.lexsort((part, item))
        starts = np.flatnonzero(np.diff(item[order], prepend=-1) | np.diff(part[order], prepend=-1))
        for rows in np.split(order, starts[1:]):
            thing, piece = self.items[item[rows[0]]], part[rows[0]]
            shape, material = thing.parts[piece]
            local = thing.to_local(points[rows])
            color[rows], returns[rows] = _paint(material, local, shape.upper - shape.lower), material.returns
            turned = Item("", [], yaw=thing.yaw)
            normal[rows] = turned.to_room(shape.normal(local))
        return color, normal, returns

    def _light(self, points: Array, normal: Array) -> Array:
        """Brightness under a lamp at the ceiling and a window's light from one side."""
        to_lamp = np.array([0, 0, self.size[2] - 0.2]) - points
        distance = np.linalg.norm(to_lamp, axis=1)
        lamp = np.maximum((normal * to_lamp).sum(1) / np.maximum(distance, 0.3), 0) / (1 + 0.08 * distance**2)
        return 0.6 + 0.35 * lamp + 0.12 * normal[:, 0]


def _shell(rng: Rng, size: Array) -> list[Item]:
    """Ceiling, floor and four walls as slabs around the room."""
    (x, y), z, thick = size[:2] / 2, size[2], 0.2
    wall = furniture.paint(rng)
    if rng.random() < 0.5:
        tint = rng.uniform(120, 235, 3)
        wall = Material(
            tint, ("plain", "stripes")[rng.integers(2)], tint * rng.uniform(0.85, 1.0), rng.uniform(0.1, 0.3)
        )
    accent = furniture.paint(rng) if rng.random() < 0.3 else wall
    ground = furniture.wood(rng) if rng.random() < 0.5 else furniture.fabric(rng)
    slabs = [
        ("ceiling", Box([-x, -y, z], [x, y, z + thick]), Material(rng.uniform(215, 250) + rng.normal(0, 4, 3))),
        ("floor", Box([-x, -y, -thick], [x, y, 0]), ground),
        ("wall", Box([-x, y, 0], [x, y + thick, z]), wall),
        ("wall", Box([-x, -y - thick, 0], [x, -y, z]), wall),
        ("wall", Box([x, -y, 0], [x + thick, y, z]), accent),
        ("wall", Box([-x - thick, -y, 0], [-x, y, z]), wall),
    ]
    return [Item(label, [(box, material)]) for label, box, material in slabs]


def _overlap(lower: Array, upper: Array, low: Array, high: Array, margin: float) -> bool:
    return bool((lower[:2] < high[:2] + margin).all() and (upper[:2] > low[:2] - margin).all())


def _directions(rng: Rng, count: int) -> Array:
    """``(R, 3)`` jittered unit vectors: a spiral without the shadow below, thinner towards the zenith."""
    index = np.arange(count) + 0.5
    z = 1 - (index / count) ** _UPWARD * (1 + _SHADOW)
    angle = np.pi * (1 + 5**0.5) * index + rng.uniform(0, 2 * np.pi)
    flat = np.sqrt(1 - z * z)
    rays = np.stack([flat * np.cos(angle), flat * np.sin(angle), z], 1) + rng.normal(0, 0.3 / count**0.5, (count, 3))
    return rays / np.linalg.norm(rays, axis=1, keepdims=True)


def _paint(material: Material, points: Array, extent: Array) -> Array:
    """``(R, 3)`` colour of a solid texture at points in the item's frame."""
    if material.texture == "plain" or material.second is None:
        return np.broadcast_to(material.color, points.shape)
    cells = points / material.scale + 0.01
    if material.texture == "wood":
        along = int(np.argmax(extent))
        u, v, w = cells[:, along], cells[:, along - 1], cells[:, along - 2]
        mix = 0.5 + 0.5 * np.sin(2 * np.pi * (v + 0.7 * w) + np.sin(0.8 * u) * 2)
    elif material.texture == "checker":
        mix = np.floor(cells).sum(1) % 2
    elif material.texture == "stripes":
        mix = np.floor(cells[:, 0] + cells[:, 1]) % 2
    else:  # speckle: a hash of fine cells
        key = np.floor(points * 60) @ np.array([12.9898, 78.233, 37.719])
        mix = np.abs(np.sin(key) * 43758.5453) % 1
    return material.color + mix[:, None] * (material.second - material.color)
