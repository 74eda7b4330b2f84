"""``pc3d evaluate``: score saved predictions, of one run or of several together."""

from __future__ import annotations

import json
from pathlib import Path

from pc3d.cli.parser import Parser, split_overrides
from pc3d.errors import InputError

EXAMPLES = """\
  pc3d test --ckpt runs/rooms/checkpoints/best.ckpt --save runs/rooms/predictions
  pc3d evaluate --config runs/rooms/config.yaml --predictions runs/rooms/predictions

S3DIS, 6-fold: six runs, each tested on its own area into one folder, then all rooms scored in one confusion matrix:
  pc3d test --ckpt runs/area1/checkpoints/best.ckpt --save runs/sixfold      (... and so on for the areas 2 to 6)
  pc3d evaluate --config configs/s3dis/semseg-ptv3.yaml --predictions runs/sixfold --split all -- --data.root DIR

KITTI boxes: label files with scores, one <frame>.txt per frame. What follows -- overrides the config."""


def main(arguments: list[str]) -> int:
    parser = Parser("evaluate", "Score saved predictions by the protocols of their data set.", EXAMPLES)
    parser.add_argument("--config", metavar="FILE", required=True, help="experiment that names the data set")
    parser.add_argument("--predictions", metavar="DIR", required=True, help="what pc3d test --save wrote")
    parser.add_argument(
        "--split", default="test", choices=("train", "val", "test", "all"), help="clouds scored (default: test)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures here too")
    own, overrides = split_overrides(arguments)
    options = parser.parse_args(own)

    from rich.console import Console

    from pc3d.cli.experiment import Experiment
    from pc3d.cli.runs import Run
    from pc3d.cli.scoring import clouds_of, evaluate_boxes, evaluate_points
    from pc3d.data.dataset import SPLITS
    from pc3d.datasets.kitti_frames import KittiFrames
    from pc3d.io import atomic_write

    folder = Path(options.predictions)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of predictions")
    command = ["--config", options.config, *overrides]
    experiment = Experiment(command, lambda _: Run(folder), "pc3d evaluate")
    data = experiment.datamodule
    splits = SPLITS if options.split == "all" else (data.stored_split(options.split),)
    clouds = list(clouds_of(data.dataset, splits))
    if not clouds:
        raise InputError(f"{data.dataset.root}: the {options.split} split has no clouds")
    if isinstance(data.dataset, KittiFrames):
        figures, tables = evaluate_boxes(data.dataset, clouds, folder)
    else:
        figures, tables = evaluate_points(data.dataset, experiment.model, clouds, folder)
    for table in tables:
        Console().print(table)
    if options.json:
        with atomic_write(options.json) as temporary:
            temporary.write_text(json.dumps({"clouds": len(clouds), **figures}, indent=2) + "\n")
    return 0
