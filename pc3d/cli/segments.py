"""``pc3d segments``: how well graph segments keep classes and instances apart, before anything is fused."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pc3d.cli.parser import Parser, split_overrides
from pc3d.errors import InputError

if TYPE_CHECKING:
    from pc3d.points import Points

EXAMPLES = """\
  pc3d segments --config configs/synthetic_rooms/insseg-fusion-spunet-small.yaml --picture runs/segments.png
  pc3d segments --config configs/scannet/semseg-spunet.yaml --k 0.02 0.05 0.1 --min_size 20 -- --data.root /data/scannet

purity is the share of points with the most common class (or instance) of their segment, mIoU bound what a network that
labels every segment rightly would reach: nothing that works on segments can be better. Take the largest k with a purity
above 97 %. What follows -- overrides the config, as in pc3d train."""


def main(arguments: list[str]) -> int:
    parser = Parser("segments", "Purity of graph segments for several parameters.", EXAMPLES)
    parser.add_argument("--config", metavar="FILE", required=True, help="the experiment whose data are cut")
    parser.add_argument(
        "--split", default="val", choices=("train", "val", "test"), help="clouds looked at (default val)"
    )
    parser.add_argument("--clouds", type=int, default=4, metavar="N", help="how many of them (default 4)")
    parser.add_argument(
        "--k", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2], metavar="K", help="size parameters"
    )
    parser.add_argument("--min_size", type=int, nargs="+", default=[10, 20], metavar="N", help="smallest segments")
    parser.add_argument(
        "--color_weight", type=float, nargs="+", default=[0.0, 1.0], metavar="W", help="weights of colour"
    )
    parser.add_argument("--picture", metavar="FILE", help="draw the first cloud, its segments for every k in a panel")
    own, overrides = split_overrides(arguments)
    options = parser.parse_args(own)
    for name, least in (("clouds", 1), ("min_size", 1), ("color_weight", 0)):
        given = getattr(options, name)
        lowest = min(given) if isinstance(given, list) else given
        if lowest < least:
            raise InputError(f"--{name} {lowest} must be at least {least}")
    if min(options.k) <= 0:
        raise InputError(f"--k {min(options.k)} must be above 0")
    if options.picture is not None and Path(options.picture).suffix.lower() != ".png":
        raise InputError(f"--picture {options.picture}: pictures are written as .png")
    from rich.console import Console
    from rich.table import Table

    from pc3d.cli.experiment import Experiment
    from pc3d.cli.runs import Run

    command = ["--config", options.config, *overrides]
    data = Experiment(command, lambda _: Run(Path("runs"), None, False), "pc3d segments").datamodule
    count = min(options.clouds, data.dataset.size(options.split))
    if count < 1:
        raise InputError(f"{data.dataset.root}: the {options.split} split has no clouds")
    clouds = [data.samples(options.split).cloud(i) for i in range(count)]
    table = Table("color", "k", "min size", "segments", "purity", "of instances", "mIoU bound", title_justify="left")
    table.title = f"{count} clouds of {options.split}"
    for weight, k, least in itertools.product(options.color_weight, options.k, options.min_size):
        row = report(clouds, data.num_classes, k, least, weight)
        if row is not None:
            table.add_row(f"{weight:g}", f"{k:g}", str(least), *row)
    Console().print(table)
    if options.picture:
        print(f"wrote {picture(clouds[0], options)}")
    return 0


def cut(cloud: Points, k: float, min_size: int, color_weight: float) -> torch.Tensor:
    """``(N,)`` segments of a cloud."""
    from pc3d.ops.graph import graph_segments

    normal = cloud.get("normal") if "normal" in cloud else None
    color = cloud.get("color") if color_weight else None
    return graph_segments(
        cloud.coord, cloud.offsets, normal, k=k, min_size=min_size, color=color, color_weight=color_weight
    )


def report(clouds: list[Points], num_classes: int, k: float, min_size: int, color_weight: float) -> list[str] | None:
    """A row of the table; None where colour counts and the clouds have none."""
    from pc3d.metrics import SegmentationMetrics
    from pc3d.ops.graph import majority, segment_purity

    if color_weight and any("color" not in cloud for cloud in clouds):
        return None
    metrics, segments, purity, instances = SegmentationMetrics(num_classes), 0, [], []
    for cloud in clouds:
        labels, segment = cut(cloud, k, min_size, color_weight), cloud.get("segment")
        number = int(labels.max()) + 1
        segments += number
        purity.append(segment_purity(labels, segment))
        if "instance" in cloud:
            instances.append(segment_purity(labels, cloud.get("instance").reshape(-1)))
        best, _ = majority(labels, segment, number)
        metrics.update(best[labels].clamp(min=0), segment)
    mean = [f"{sum(values) / len(values):.2%}" if values else "-" for values in (purity, instances)]
    return [str(segments // len(clouds)), *mean, f"{metrics.compute().miou_present:.3f}"]


def picture(cloud: Points, options: argparse.Namespace) -> Path:
    """Draw a cloud's segments, one panel per k, in colours that tell neighbours apart."""
    from pc3d.viz.figures import save_label_panels

    weight = max(options.color_weight) if "color" in cloud else 0.0
    least = options.min_size[0]
    panels = {f"k = {k:g}": cut(cloud, k, least, weight) % 24 for k in options.k}
    return save_label_panels(Path(options.picture), cloud, panels)
