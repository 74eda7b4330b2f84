"""The Open3D window and off-screen pictures (skipped without Open3D)."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pc3d.errors import InputError
from pc3d.points import Points
from pc3d.viz import open3d as viewer


@pytest.fixture
def points() -> Points:
    attrs = {"color": torch.rand(500, 3) * 255, "segment": torch.arange(500) % 3, "nir": torch.rand(500, 1)}
    return Points(torch.rand(500, 3), attrs=attrs, meta=[{"name": "cloud"}])


def test_without_open3d_one_line_says_so(points: Points, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open3d", None)
    with pytest.raises(InputError, match=r"pip install pc3d\[viewer\]"):
        viewer.show(points)


def test_off_screen_picture(points: Points, tmp_path: Path) -> None:
    pytest.importorskip("open3d")
    try:
        path = viewer.screenshot(tmp_path / "a.png", points, np.full((500, 3), 40, np.uint8), (160, 120))
    except InputError as error:
        pytest.skip(str(error))
    assert path.read_bytes()[16:24] == (160).to_bytes(4, "big") + (120).to_bytes(4, "big")


def test_keys_switch_the_colours(points: Points, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    o3d = pytest.importorskip("open3d")
    shown: list[np.ndarray] = []

    class Window:
        def __init__(self) -> None:
            self.keys: dict[int, object] = {}

        def create_window(self, window_name: str) -> bool:
            return window_name == "cloud"

        def add_geometry(self, cloud) -> None:
            self.cloud = cloud

        def update_geometry(self, cloud) -> None:
            shown.append(np.asarray(cloud.colors).copy())

        def get_render_option(self):
            return type("Option", (), {})()

        def register_key_callback(self, key: int, callback) -> None:
            self.keys[key] = callback

        def run(self) -> None:
            for key in "LCHN":
                assert self.keys[ord(key)](self) is False

        def destroy_window(self) -> None:
            pass

    monkeypatch.setattr(o3d.visualization, "VisualizerWithKeyCallback", Window)
    viewer.show(points)
    assert capsys.readouterr().out.split("\n")[:4] == [
        "colours: label",
        "colours: rgb",
        "colours: height",
        "colours: rgb",
    ]
    assert np.abs(shown[1] * 255 - points.get("color").numpy()).max() <= 0.5 + 1e-4
    assert (shown[1] == shown[3]).all()
    assert len(np.unique(shown[0], axis=0)) == 3
