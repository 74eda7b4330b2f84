"""``pc3d view``: a cloud in a window, or as a picture."""

from __future__ import annotations

from pathlib import Path

from pc3d.cli.parser import Parser
from pc3d.errors import InputError

EXAMPLES = """\
  pc3d view scan.laz
  pc3d view labelled.ply --color label
  pc3d view 000001.bin --boxes 000001.json
  pc3d view scan.laz --color intensity --screenshot scan.png --size 1600x1200

In the window: L labels, C colours, H height, N next field, + and - point size, R reset the view, Q quit.
Pictures need no display and no graphics driver; --renderer open3d draws them as the window would."""


def main(arguments: list[str]) -> int:
    parser = Parser("view", "Look at a cloud in a window, or write a picture of it.", EXAMPLES)
    parser.add_argument("file", metavar="FILE", help="a cloud of any readable format")
    parser.add_argument("--color", default="auto", help="label, rgb, height, or the name of any field of the file")
    parser.add_argument("--label_field", metavar="NAME", help="field that holds the labels")
    parser.add_argument("--ckpt", metavar="FILE", help="take class colours and label codes from this checkpoint")
    parser.add_argument("--boxes", metavar="JSON", help="draw the boxes that pc3d predict wrote")
    parser.add_argument("--screenshot", metavar="PNG", help="write a picture instead of opening a window")
    parser.add_argument("--size", default="1200x900", metavar="WxH", help="of the picture, default 1200x900")
    parser.add_argument("--renderer", choices=["software", "open3d"], default="software", help="of the picture")
    options = parser.parse_args(arguments)
    size = _size(options.size)

    from pc3d.cli.export import class_numbers
    from pc3d.io import read
    from pc3d.viz import open3d
    from pc3d.viz.boxes import read_boxes, with_edges
    from pc3d.viz.colors import label_field, point_colors
    from pc3d.viz.render import render, save_png

    points = read(options.file, invalid="drop")
    points, palette = class_numbers(points, options.label_field or label_field(points), options.ckpt)
    boxes = None if options.boxes is None else read_boxes(options.boxes)
    if options.screenshot is None:
        open3d.show(points, options.color, palette, boxes)
        return 0
    colors = point_colors(points, options.color, palette)
    if boxes is not None:
        points, colors = with_edges(points, colors, boxes)
    path = Path(options.screenshot)
    if path.suffix.lower() != ".png":
        raise InputError(f"{path}: pictures are written as .png")
    if options.renderer == "open3d":
        try:
            print(f"wrote {open3d.screenshot(path, points, colors, size)}")
            return 0
        except InputError as error:
            print(f"{error}; drawn by the software renderer instead")
    print(f"wrote {save_png(path, render(points, colors, size))}")
    return 0


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and 16 <= int(width) <= 8192 and 16 <= int(height) <= 8192):
        raise InputError(f"--size {text}: expected WIDTHxHEIGHT in pixels, 16 to 8192 each, such as 1200x900")
    return int(width), int(height)
