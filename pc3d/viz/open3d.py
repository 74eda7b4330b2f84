"""Open3D: an interactive window with colour modes, and pictures rendered without a display."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pc3d.errors import InputError
from pc3d.ops.boxes import box_corners
from pc3d.points import Points
from pc3d.viz.boxes import EDGE_COLOR, EDGES
from pc3d.viz.colors import Palette, color_modes, point_colors
from pc3d.viz.render import View, choose_view, save_png

_TIMEOUT = 90  # seconds; a driver that has not drawn one picture by then is broken
_KEYS = {"L": "label", "C": "rgb", "H": "height"}


def show(
    points: Points, mode: str = "auto", palette: Palette | None = None, boxes: NDArray[np.float64] | None = None
) -> None:
    """Open a window on a cloud, and perhaps boxes ``(M, 7)``, and return when it is closed.

    Keys: ``L`` labels, ``C`` colours, ``H`` height, ``N`` next attribute; Open3D's own: ``+`` ``-`` point size, ``R``
    reset the view, ``Q`` quit.

    Raises:
        InputError: if Open3D is missing or there is no display.
    """
    o3d = _open3d()
    cloud = _geometry(o3d, points.coord.cpu().numpy(), point_colors(points, mode, palette))
    window = o3d.visualization.VisualizerWithKeyCallback()
    if not window.create_window(window_name=points.describe()):
        raise InputError("no display to open a window on: use --screenshot picture.png")
    try:
        window.add_geometry(cloud)
        if boxes is not None:
            window.add_geometry(_wires(o3d, boxes))
        window.get_render_option().point_size = 2.0
        for key, callback in _key_callbacks(o3d, cloud, points, palette).items():
            window.register_key_callback(ord(key), callback)
        window.run()
    finally:
        window.destroy_window()


def _key_callbacks(o3d: Any, cloud: Any, points: Points, palette: Palette | None) -> dict[str, Callable[[Any], bool]]:
    modes = color_modes(points)
    current = 0

    def paint(window: Any, mode: str) -> bool:
        cloud.colors = o3d.utility.Vector3dVector(point_colors(points, mode, palette) / 255.0)
        window.update_geometry(cloud)
        print(f"colours: {mode}")
        return False

    def next_mode(window: Any) -> bool:
        nonlocal current
        current = (current + 1) % len(modes)
        return paint(window, modes[current])

    return {"N": next_mode, **{key: partial(paint, mode=mode) for key, mode in _KEYS.items() if mode in modes}}


def screenshot(path: str | Path, points: Points, colors: NDArray[np.uint8], size: tuple[int, int] = (960, 720)) -> Path:
    """Draw a cloud with Open3D's off-screen renderer.

    It runs in a process of its own: with an unsuitable graphics driver Open3D ends the process that calls it.

    Args:
        colors: ``(N, 3)`` uint8.
        size: width and height in pixels.

    Raises:
        InputError: if Open3D is missing or cannot render on this machine.
    """
    _open3d()
    view = choose_view(points, size[0] / size[1])
    with tempfile.TemporaryDirectory() as folder:
        job, picture = Path(folder, "job.npz"), Path(folder, "picture.npy")
        visible = slice(None) if view.visible is None else view.visible
        coord = points.coord.cpu().numpy()[visible]
        np.savez(job, coord=coord, colors=colors[visible], size=size, eye=view.eye, target=view.target, fov=view.fov)
        command = [sys.executable, "-m", "pc3d.viz.open3d", str(job), str(picture)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT, env=environment)
        except subprocess.TimeoutExpired as error:
            raise InputError(f"Open3D has not rendered a picture within {_TIMEOUT} s") from error
        if done.returncode != 0 or not picture.exists():
            raise InputError(f"Open3D cannot render off screen here (exit status {done.returncode})")
        return save_png(path, np.load(picture))


def _render_job(job: str, picture: str) -> None:
    o3d = _open3d()
    data = np.load(job)
    width, height = data["size"].tolist()
    view = View(data["eye"], data["target"], fov=float(data["fov"]))
    renderer = o3d.visualization.rendering.OffscreenRenderer(width, height)
    material = o3d.visualization.rendering.MaterialRecord()
    material.shader = "defaultUnlit"
    material.point_size = max(2.0, min(9.0, 2500 / max(len(data["coord"]), 1) ** 0.5))
    renderer.scene.view.set_post_processing(False)  # its tone mapping would wash out the colours of classes
    renderer.scene.set_background([1, 1, 1, 1])
    renderer.scene.add_geometry("cloud", _geometry(o3d, data["coord"], data["colors"]), material)
    renderer.setup_camera(view.fov, *(np.asarray(v, np.float32) for v in (view.target, view.eye, view.up)))
    np.save(picture, np.asarray(renderer.render_to_image())[..., :3])


def _geometry(o3d: Any, coord: NDArray, colors: NDArray) -> Any:
    cloud = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(np.asarray(coord, np.float64)))
    cloud.colors = o3d.utility.Vector3dVector(np.asarray(colors, np.float64) / 255)
    return cloud


def _wires(o3d: Any, boxes: NDArray[np.float64]) -> Any:
    corners = box_corners(torch.from_numpy(boxes)).numpy()
    edges = EDGES[None] + 8 * np.arange(len(boxes))[:, None, None]
    wires = o3d.geometry.LineSet(
        o3d.utility.Vector3dVector(corners.reshape(-1, 3)), o3d.utility.Vector2iVector(edges.reshape(-1, 2))
    )
    wires.paint_uniform_color(np.array(EDGE_COLOR) / 255)
    return wires


def _open3d() -> Any:
    try:
        import open3d
    except (ImportError, OSError) as error:  # OSError: a system library it needs is missing
        raise InputError(f"the viewer needs Open3D: pip install pc3d[viewer] ({error})") from error
    return open3d


if __name__ == "__main__":
    _render_job(*sys.argv[1:])
