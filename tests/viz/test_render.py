"""The software renderer: what is in front is seen, rooms are opened, pictures are the same every time."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from pc3d.errors import InputError
from pc3d.points import Points
from pc3d.viz.render import View, choose_view, render, save_png

RED, BLUE = np.array([255, 0, 0]), np.array([0, 0, 255])
SIZE = (120, 90)


def square(z: float, half: float = 1.0) -> np.ndarray:
    axis = np.linspace(-half, half, 41)
    x, y = np.meshgrid(axis, axis)
    return np.stack([x.ravel(), y.ravel(), np.full(x.size, z)], 1)


def from_above(height: float) -> View:
    return View(np.array([0.0, 0.0, height]), np.zeros(3))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_nearer_surface_hides_the_farther(order: tuple[int, int]) -> None:
    surfaces = [(square(1.0), RED), (square(0.0), BLUE)]
    coord = np.concatenate([surfaces[i][0] for i in order])
    colors = np.concatenate([np.tile(surfaces[i][1], (41 * 41, 1)) for i in order])
    picture = render(coord, colors, SIZE, from_above(5.0))
    assert picture.shape == (90, 120, 3)
    assert picture[45, 60].tolist() == [255, 0, 0]
    below = render(coord, colors, SIZE, from_above(-5.0))
    assert below[45, 60].tolist() == [0, 0, 255]


def test_surfaces_have_no_holes_and_the_background_stays() -> None:
    picture = render(square(0.0), np.tile(RED, (41 * 41, 1)), SIZE, from_above(5.0))
    assert (picture[25:65, 40:80] == RED).all()
    assert (picture[:5] == 255).all()


def test_perspective_puts_right_to_the_right_and_up_to_the_top() -> None:
    places = np.array([[1.0, 0, 0], [0, 0, 1.0], [-1.0, 0, 0]])
    coord = (places[:, None] + square(0.0, half=0.2)).reshape(-1, 3)
    coord[:, 2] += np.tile(square(0.0, half=0.2)[:, 1], 3)
    colors = np.repeat([RED, BLUE, [0, 255, 0]], 41 * 41, axis=0)
    picture = render(coord, colors, SIZE, View(np.array([0.0, -6.0, 0.0]), np.zeros(3))).astype(int)

    def center(channel: int) -> tuple[float, float]:
        others = [c for c in range(3) if c != channel]
        line, column = np.nonzero((picture[..., others] < 20).all(2) & (picture[..., channel] > 80))
        return column.mean(), line.mean()

    (red_x, _), (blue_x, blue_y), (green_x, green_y) = center(0), center(2), center(1)
    assert green_x < 40 < 55 < blue_x < 65 < 80 < red_x
    assert blue_y < 30 < 40 < green_y < 50


def test_a_room_is_opened_and_an_object_is_not() -> None:
    rng = np.random.default_rng(0)
    box = rng.random((60_000, 3)) * [5, 4, 2.6]
    face = rng.integers(0, 6, 60_000)
    for i in range(6):
        box[face == i, i % 3] = [0, 0, 0, 5, 4, 2.6][i]
    view = choose_view(box)
    assert view.visible is not None
    assert not view.visible[face == 5].any(), "the ceiling is left out"
    assert view.visible[face == 2].mean() > 0.95, "the floor stays"
    walls = [view.visible[(face == i) & (box[:, 2] > 0.3)].mean() for i in (0, 1, 3, 4)]
    assert min(walls) < 0.1
    assert max(walls) > 0.8
    chair = choose_view(box * 0.2)
    assert chair.visible is None or chair.visible.all()


@pytest.mark.parametrize("scale", [0.01, 1.0, 5000.0])
def test_the_chosen_view_frames_the_cloud(scale: float) -> None:
    coord = np.random.default_rng(1).normal(size=(3000, 3)) * [3, 2, 1] * scale
    picture = render(coord, np.tile(RED, (3000, 1)), SIZE)
    used = (picture != 255).any(2)
    assert used.any(0).mean() > 0.5 or used.any(1).mean() > 0.5
    assert used[0].mean() < 0.2


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_tiny_clouds_are_drawn(count: int) -> None:
    picture = render(np.zeros((count, 3)) + np.arange(count)[:, None], np.tile(RED, (count, 1)), SIZE)
    assert (picture != 255).any() == (count > 0)


def test_normals_shade_and_pictures_repeat() -> None:
    coord = torch.from_numpy(square(0.0)).float()
    colors = np.full((len(coord), 3), 200)
    facing = Points(coord, attrs={"normal": torch.tensor([0.0, 0, 1]).repeat(len(coord), 1)})
    grazing = Points(coord, attrs={"normal": torch.tensor([1.0, 0, 0]).repeat(len(coord), 1)})
    bright, dark = (render(p, colors, SIZE, from_above(5.0))[45, 60, 0] for p in (facing, grazing))
    assert bright > dark + 30
    assert (render(coord, colors, SIZE) == render(coord, colors, SIZE)).all()


def test_png_holds_the_picture(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    content = save_png(tmp_path / "new" / "a.png", image).read_bytes()
    chunks, at = {}, 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        assert struct.unpack(">I", content[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        chunks[kind], at = body, at + 12 + length
    assert struct.unpack(">IIBB", chunks[b"IHDR"][:10]) == (5, 7, 8, 2)
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(7, 16)
    assert (lines[:, 1:].reshape(7, 5, 3) == image).all()
    with pytest.raises(InputError, match="cannot be written"):
        save_png(tmp_path, image)
