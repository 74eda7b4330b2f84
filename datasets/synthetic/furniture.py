"""Furniture by procedure: each function draws one item of its kind, standing on the floor with its back towards +y."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pc3d.datasets.synthetic.raycast import Array, Box, Cone, Ellipsoid, Item, Material, Shape

Rng = np.random.Generator
Parts = list[tuple[Shape, Material]]

# Colours overlap between kinds on purpose: wood, white paint and the fabrics each occur on several classes.
_WOOD = [(150, 105, 65), (115, 75, 45), (190, 150, 105), (90, 60, 42), (205, 175, 135)]
_PAINT = [(225, 222, 215), (200, 200, 198), (240, 238, 230), (170, 175, 178), (95, 100, 105)]
_FABRIC = [(70, 85, 120), (130, 60, 55), (85, 110, 80), (160, 150, 135), (60, 60, 65), (180, 140, 70), (205, 200, 190)]
_METAL = [(140, 142, 145), (60, 60, 62), (190, 190, 192)]


def _pick(rng: Rng, colors: list[tuple[int, int, int]]) -> Array:
    return np.array(colors[rng.integers(len(colors))], float) + rng.normal(0, 10, 3)


def wood(rng: Rng) -> Material:
    color = _pick(rng, _WOOD)
    return Material(color, "wood", color * rng.uniform(0.7, 0.9), rng.uniform(0.04, 0.12))


def paint(rng: Rng) -> Material:
    return Material(_pick(rng, _PAINT))


def metal(rng: Rng) -> Material:
    return Material(_pick(rng, _METAL))


def hard(rng: Rng) -> Material:
    """What table tops, cabinets, doors and shelves are made of."""
    return wood(rng) if rng.random() < 0.65 else paint(rng)


def fabric(rng: Rng) -> Material:
    color = _pick(rng, _FABRIC)
    texture = ("speckle", "stripes", "plain", "checker")[rng.integers(4)]
    return Material(color, texture, color * rng.uniform(0.6, 0.85) + rng.uniform(0, 40), rng.uniform(0.05, 0.15))


def block(x: float, y: float, z: float, width: float, depth: float, height: float) -> Box:
    """A box centred at (x, y), standing at height z (metres)."""
    return Box(np.array([x - width / 2, y - depth / 2, z]), np.array([x + width / 2, y + depth / 2, z + height]))


def _legs(width: float, depth: float, height: float, thickness: float, material: Material) -> Parts:
    x, y = width / 2 - thickness, depth / 2 - thickness
    return [(block(sx * x, sy * y, 0, thickness, thickness, height), material) for sx in (-1, 1) for sy in (-1, 1)]


def table(rng: Rng) -> Item:
    height, top, material = rng.uniform(0.68, 0.78), rng.uniform(0.025, 0.05), hard(rng)
    under = metal(rng) if rng.random() < 0.4 else material
    if rng.random() < 0.25:
        radius = rng.uniform(0.45, 0.65)
        parts: Parts = [(Cone([0, 0, height - top], radius, radius, top), material)]
        parts += [(Cone([0, 0, 0], 0.05, 0.05, height - top), under), (Cone([0, 0, 0], 0.28, 0.28, 0.03), under)]
        return Item("table", parts)
    width, depth = rng.uniform(1.0, 1.8), rng.uniform(0.65, 0.95)
    parts = [(block(0, 0, height - top, width, depth, top), material)]
    if rng.random() < 0.3:  # a desk: side panels instead of legs
        parts += [(block(sx * (width / 2 - 0.02), 0, 0, 0.03, depth * 0.95, height - top), under) for sx in (-1, 1)]
    else:
        parts += _legs(width, depth, height - top, rng.uniform(0.04, 0.08), under)
    return Item("table", parts)


def chair(rng: Rng) -> Item:
    size, seat, back = rng.uniform(0.40, 0.48), rng.uniform(0.43, 0.48), rng.uniform(0.36, 0.52)
    frame = metal(rng) if rng.random() < 0.4 else hard(rng)
    cover = fabric(rng) if rng.random() < 0.6 else frame
    thick = rng.uniform(0.03, 0.07)
    parts: Parts = [(block(0, 0, seat - thick, size, size, thick), cover)]
    parts.append((block(0, size / 2 - 0.02, seat + rng.uniform(0, 0.15), size * 0.95, 0.035, back), cover))
    if rng.random() < 0.3:  # an office chair
        parts += [(Cone([0, 0, 0.06], 0.03, 0.03, seat - thick - 0.06), frame)]
        parts += [(block(0, 0, 0.03, 0.55, 0.05, 0.04), frame), (block(0, 0, 0.03, 0.05, 0.55, 0.04), frame)]
    else:
        parts += _legs(size, size, seat - thick, 0.035, frame)
    if rng.random() < 0.3:
        parts += [(block(sx * size / 2, 0, seat + 0.2, 0.04, size * 0.8, 0.03), frame) for sx in (-1, 1)]
        parts += [(block(sx * size / 2, -size * 0.3, seat, 0.03, 0.03, 0.2), frame) for sx in (-1, 1)]
    return Item("chair", parts)


def sofa(rng: Rng) -> Item:
    seats = int(rng.integers(1, 4))
    arm, depth, seat = rng.uniform(0.12, 0.24), rng.uniform(0.8, 0.98), rng.uniform(0.38, 0.46)
    width, back, cover = seats * rng.uniform(0.58, 0.72) + 2 * arm, rng.uniform(0.74, 0.92), fabric(rng)
    parts: Parts = [
        (block(0, 0, 0.06, width, depth, seat - 0.2), cover),
        (block(0, depth / 2 - 0.11, 0.06, width, 0.22, back - 0.06), cover),
    ]
    parts += [(block(sx * (width - arm) / 2, 0, 0.06, arm, depth, rng.uniform(0.5, 0.6)), cover) for sx in (-1, 1)]
    each = (width - 2 * arm) / seats
    for i in range(seats):
        x = -width / 2 + arm + each * (i + 0.5)
        parts.append((block(x, -0.1, seat - 0.14, each - 0.015, depth - 0.22, 0.14), cover))
    if rng.random() < 0.6:
        x, pillow = rng.uniform(-1, 1) * (width / 2 - arm - 0.2), fabric(rng)
        parts.append((Ellipsoid([x, depth / 2 - 0.3, seat + 0.17], [0.21, 0.09, 0.19]), pillow))
    return Item("sofa", parts)


def bed(rng: Rng) -> Item:
    width, length, base = rng.choice([0.9, 1.2, 1.4, 1.6]), rng.uniform(1.95, 2.1), rng.uniform(0.2, 0.32)
    frame, sheet, cover = hard(rng), Material(_pick(rng, [(235, 233, 228), (215, 220, 228)])), fabric(rng)
    mattress = rng.uniform(0.16, 0.24)
    parts: Parts = [
        (block(0, 0, rng.uniform(0.03, 0.1), width + 0.06, length, base - 0.05), frame),
        (block(0, length / 2 + 0.03, 0, width + 0.08, 0.06, rng.uniform(0.75, 1.2)), frame),
        (block(0, 0, base, width, length - 0.04, mattress), sheet),
        (block(0, -0.32, base + mattress * 0.4, width + 0.05, length - 0.6, mattress * 0.6 + 0.04), cover),
    ]
    pillows = 1 if width < 1.3 else 2
    for i in range(pillows):
        x = (i - (pillows - 1) / 2) * width / 2
        parts.append((Ellipsoid([x, length / 2 - 0.3, base + mattress + 0.05], [0.32, 0.2, 0.09]), sheet))
    return Item("bed", parts)


def bookcase(rng: Rng) -> Item:
    width, depth, height = rng.uniform(0.7, 1.3), rng.uniform(0.26, 0.36), rng.uniform(1.5, 2.15)
    material, shelves = hard(rng), int(rng.integers(4, 7))
    parts: Parts = [(block(0, depth / 2 - 0.01, 0, width, 0.02, height), material)]
    parts += [(block(sx * (width / 2 - 0.0125), 0, 0, 0.025, depth, height), material) for sx in (-1, 1)]
    step = (height - 0.05) / shelves
    for level in range(shelves + 1):
        parts.append((block(0, 0, 0.02 + level * step, width, depth, 0.025), material))
    for level in range(shelves):
        parts += _books(rng, width - 0.06, depth, 0.045 + level * step, step - 0.03)
    return Item("bookcase", parts)


def _books(rng: Rng, width: float, depth: float, floor: float, room: float) -> Parts:
    """Runs of books of one colour and height each, with gaps."""
    parts: Parts = []
    x = -width / 2
    while x < width / 2 - 0.05:
        run = min(rng.uniform(0.03, 0.2), width / 2 - x)
        if rng.random() < 0.8:
            size = rng.uniform(0.5, 0.92) * room, rng.uniform(0.5, 0.8) * depth
            color = Material(rng.uniform(40, 225, 3), "stripes", rng.uniform(40, 225, 3), 0.05)
            parts.append((block(x + run / 2, (depth - size[1]) / 2 - 0.02, floor, run * 0.96, size[1], size[0]), color))
        x += run
    return parts


def cabinet(rng: Rng) -> Item:
    wardrobe = rng.random() < 0.35
    width = rng.uniform(0.8, 1.5) if wardrobe else rng.uniform(0.5, 1.4)
    depth, height = rng.uniform(0.42, 0.62), rng.uniform(1.8, 2.1) if wardrobe else rng.uniform(0.6, 1.1)
    material, handle = hard(rng), metal(rng)
    parts: Parts = [(block(0, 0, 0.06, width, depth, height - 0.06), material)]
    parts += _legs(width, depth, 0.06, 0.05, material)
    columns, rows = (int(rng.integers(2, 4)), 1) if wardrobe else (int(rng.integers(1, 4)), int(rng.integers(1, 4)))
    for i in range(columns):
        for j in range(rows):
            w, h = width / columns, (height - 0.1) / rows
            x, z = -width / 2 + (i + 0.5) * w, 0.08 + j * h
            parts.append((block(x, -depth / 2 - 0.009, z + 0.01, w - 0.02, 0.018, h - 0.02), material))
            parts.append((block(x, -depth / 2 - 0.03, z + h * 0.6, 0.12, 0.03, 0.02), handle))
    return Item("cabinet", parts)


def floor_lamp(rng: Rng) -> Item:
    height, pole, shade = rng.uniform(1.35, 1.75), metal(rng), _shade(rng)
    bottom, tall = rng.uniform(0.15, 0.25), rng.uniform(0.2, 0.32)
    return Item(
        "lamp",
        [
            (Cone([0, 0, 0], rng.uniform(0.12, 0.16), 0.1, 0.03), pole),
            (Cone([0, 0, 0.03], 0.015, 0.015, height - tall), pole),
            (Cone([0, 0, height - tall], bottom, bottom * rng.uniform(0.5, 0.95), tall), shade),
        ],
    )


def table_lamp(rng: Rng) -> Item:
    foot, radius = rng.uniform(0.14, 0.24), rng.uniform(0.11, 0.17)
    return Item(
        "lamp",
        [
            (Ellipsoid([0, 0, foot / 2], [foot * 0.4, foot * 0.4, foot / 2]), hard(rng)),
            (Cone([0, 0, foot], radius, radius * rng.uniform(0.5, 0.9), rng.uniform(0.14, 0.2)), _shade(rng)),
        ],
    )


def ceiling_lamp(rng: Rng, ceiling: float) -> Item:
    """Hangs from ``ceiling`` (metres)."""
    drop, radius = rng.uniform(0.35, 0.75), rng.uniform(0.16, 0.28)
    bulb = _shade(rng)
    cord = (Cone([0, 0, ceiling - drop], 0.012, 0.012, drop), metal(rng))
    if rng.random() < 0.5:
        return Item("lamp", [cord, (Ellipsoid([0, 0, ceiling - drop], [radius, radius, radius * 0.8]), bulb)])
    return Item("lamp", [cord, (Cone([0, 0, ceiling - drop - 0.1], radius * 1.2, radius * 0.4, 0.22), bulb)])


def _shade(rng: Rng) -> Material:
    return Material(_pick(rng, [(240, 225, 190), (235, 232, 225), (200, 120, 70), (90, 95, 100)]))


def door(rng: Rng) -> Item:
    """Hinged at x = -width/2; closed it lies in the plane y = 0."""
    width, height, panel, frame = rng.uniform(0.8, 1.0), rng.uniform(2.0, 2.1), hard(rng), hard(rng)
    parts: Parts = [(block(sx * (width / 2 + 0.05), -0.045, 0, 0.1, 0.09, height + 0.1), frame) for sx in (-1, 1)]
    parts.append((block(0, -0.045, height, width, 0.09, 0.1), frame))
    parts.append((block(0, -0.02, 0.01, width, 0.04, height - 0.02), panel))
    parts.append((block(width / 2 - 0.09, -0.08, 1.0, 0.12, 0.04, 0.03), metal(rng)))
    if rng.random() < 0.5:
        for z in (0.15, 1.15):
            parts.append((block(0, -0.045, z, width - 0.3, 0.012, 0.75), panel))
    return Item("door", parts)


def window(rng: Rng) -> Item:
    """In the plane y = 0, with its sill; glass returns few rays."""
    width, height, sill = rng.uniform(0.9, 1.8), rng.uniform(1.0, 1.4), rng.uniform(0.75, 1.0)
    frame = hard(rng)
    glass = Material(_pick(rng, [(150, 175, 190), (110, 130, 140), (190, 205, 215)]), returns=0.6)
    bar = rng.uniform(0.05, 0.08)
    parts: Parts = [(block(0, -0.005, sill, width, 0.01, height), glass)]
    parts += [(block(x, -0.045, sill, bar, 0.09, height), frame) for x in (-width / 2, 0, width / 2)]
    parts += [(block(0, -0.045, sill + z - bar / 2, width, 0.09, bar), frame) for z in (0, height)]
    parts.append((block(0, -0.1, sill - 0.07, width + 0.15, 0.2, 0.03), frame))
    return Item("window", parts)


FURNITURE: dict[str, Callable[[Rng], Item]] = {
    "table": table,
    "chair": chair,
    "sofa": sofa,
    "bed": bed,
    "bookcase": bookcase,
    "cabinet": cabinet,
    "lamp": floor_lamp,
}
