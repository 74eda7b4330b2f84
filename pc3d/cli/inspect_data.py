"""``pc3d data inspect``: what a config's data look like, with and without augmentation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pc3d.cli.parser import Parser, split_overrides
from pc3d.errors import InputError

if TYPE_CHECKING:
    from pc3d.data.module import PointDataModule
    from pc3d.points import Points

EXAMPLES = """\
  pc3d data inspect --config configs/synthetic_rooms/semseg-spunet-small.yaml --out runs/look
  pc3d data inspect --config configs/scannet/semseg-ptv3.yaml --out runs/look --clouds 20 -- --data.root /data/scannet

Writes classes.png (share of every class), samples.png (each cloud as it is, and three times augmented) and, where there
are boxes, boxes-*.png. What follows -- overrides the config, as in pc3d train."""


def main(arguments: list[str]) -> int:
    parser = Parser("data inspect", "Tables and pictures of the data of a config.", EXAMPLES)
    parser.add_argument("--config", metavar="FILE", required=True, help="the experiment")
    parser.add_argument("--out", metavar="DIR", required=True, help="where the pictures go")
    parser.add_argument(
        "--clouds", type=int, default=10, metavar="N", help="clouds of each split looked at (default 10)"
    )
    parser.add_argument("--pictures", type=int, default=3, metavar="N", help="clouds drawn (default 3)")
    own, overrides = split_overrides(arguments)
    options = parser.parse_args(own)
    if options.clouds < 1 or options.pictures < 0:
        raise InputError(f"--clouds {options.clouds} must be at least 1, --pictures {options.pictures} at least 0")
    from pc3d.cli.experiment import Experiment
    from pc3d.cli.runs import Run

    out = Path(options.out)
    command = ["--config", options.config, *overrides]
    data = Experiment(command, lambda _: Run(out, None, False), "pc3d data inspect").datamodule
    written = inspect(data, out, options.clouds, options.pictures)
    print("wrote " + ", ".join(map(str, written)))
    return 0


def inspect(data: PointDataModule, out: Path, clouds: int, pictures: int) -> list[Path]:
    """Print the tables and write the pictures; returns their paths."""
    from rich.console import Console
    from rich.progress import track

    from pc3d.viz.figures import save_bird_eye_view, save_class_histogram

    console = Console()
    counts: dict[str, Any] = {}
    looked: dict[str, list[Points]] = {}
    for split in ("train", "val", "test"):
        size = data.size(split)
        if not size:
            continue
        samples = data.samples(split)
        chosen = torch.linspace(0, size - 1, min(clouds, size)).round().long().tolist()
        looked[split] = [samples.cloud(i) for i in track(chosen, description=f"Reading {split}", transient=True)]
        total = torch.zeros(data.num_classes, dtype=torch.int64)
        for cloud in looked[split]:
            segment = cloud.get("segment")
            total += torch.bincount(segment[segment >= 0], minlength=data.num_classes)
        counts[split] = total.tolist()
        console.print(_table(split, size, looked[split]))
    if not looked:
        raise InputError(f"{data.dataset.root}: no split has clouds")
    out.mkdir(parents=True, exist_ok=True)
    written = [save_class_histogram(out / "classes.png", counts, data.class_names)]
    if pictures and data.dataset.size("train"):
        written.append(_contact_sheet(data, out / "samples.png", pictures))
    first = next(iter(looked.values()))
    for cloud in first[:pictures]:
        if boxes := cloud.meta[0].get("boxes"):
            target = out / f"boxes-{cloud.meta[0].get('name', 'cloud')}.png"
            written.append(save_bird_eye_view(target, cloud, boxes, cloud.meta[0].get("box_names")))
    return written


def _table(split: str, size: int, clouds: list[Points]) -> Any:
    from rich.table import Table

    points = [cloud.num_points for cloud in clouds]
    title = f"{split}: {size} clouds, {len(clouds)} looked at, {min(points):,} to {max(points):,} points each"
    table = Table("attribute", "width", "dtype", "lowest", "highest", title=title, title_justify="left")
    for name in ("coord", *sorted({name for cloud in clouds for name in cloud.attrs})):
        values = [cloud.get(name) for cloud in clouds if name in cloud and cloud.num_points]
        if not values:
            continue
        low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
        kind = str(values[0].dtype).removeprefix("torch.")
        table.add_row(name, str(values[0][0].numel()), kind, f"{low:.6g}", f"{high:.6g}")
    return table


def _contact_sheet(data: PointDataModule, path: Path, pictures: int) -> Path:
    """Rows of clouds: as prepared, sampled for evaluation, and three augmented views with their labels."""
    from pc3d.viz.figures import save_picture_grid

    samples = data.samples("train")
    rows = []
    for index in range(min(pictures, len(samples))):
        cloud = samples.cloud(index)
        views = [samples.pipeline.train(cloud, torch.Generator().manual_seed(seed)) for seed in range(3)]
        rows.append([("as it is", cloud), *((f"augmented, seed {seed}", view) for seed, view in enumerate(views))])
    return save_picture_grid(path, rows, data.dataset.palette)
