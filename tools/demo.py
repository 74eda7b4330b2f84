"""The main job once, end to end: train on synthetic rooms, test on held-out ones, label a cloud, draw pictures.

python tools/demo.py [any override of the config, e.g. --trainer.max_epochs 2]
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.pop(0)  # tools/: its profile.py would hide the standard library's
sys.path.append(str(Path(__file__).resolve().parent.parent))  # without an installed pc3d, the one beside

from pc3d.cli import main as pc3d
from pc3d.cli.runs import free_folder
from pc3d.datasets import SyntheticRooms
from pc3d.io import write
from pc3d.tasks.record import write_json

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "synthetic_rooms" / "semseg-spunet-small.yaml"
RUN = Path("runs") / "demo"


def main(overrides: Sequence[str]) -> int:
    if "-h" in overrides or "--help" in overrides:
        print(__doc__.strip())
        return 0
    started = time.perf_counter()
    keep_earlier_run()
    status = pc3d(["train", "--config", str(CONFIG), "--run_dir", str(RUN), *overrides])
    if status:
        return status
    cloud, labelled, picture = RUN / "room.ply", RUN / "prediction.ply", RUN / "pictures" / "prediction.png"
    # A run too short to be validated has no best.ckpt, a trial (--trainer.fast_dev_run) none at all.
    names = RUN / "checkpoints" / "best.ckpt", RUN / "checkpoints" / "last.ckpt"
    checkpoint = next((path for path in names if path.is_file()), None)
    if checkpoint is None:
        print("no checkpoint was written: nothing to show")
        return 0
    write_unlabelled_room(cloud)
    for command in (
        ["predict", str(cloud), "--ckpt", str(checkpoint), "-o", str(labelled)],
        ["view", str(labelled), "--color", "rgb", "--screenshot", str(picture)],
    ):
        status = pc3d(command)
        if status:
            return status
    report(time.perf_counter() - started, checkpoint, labelled)
    return 0


def keep_earlier_run() -> None:
    """Results are never overwritten: an earlier ``runs/demo`` becomes ``runs/demo-2``, ..."""
    target = free_folder(RUN)
    if target != RUN:
        RUN.rename(target)
        print(f"the earlier demo is now {target}")


def write_unlabelled_room(path: Path) -> None:
    """A room that training has not seen, with colours and normals and no labels, as a scanner would deliver it."""
    room = SyntheticRooms(train_rooms=0, val_rooms=0, test_rooms=1).load("test", 0)
    write(path, room.without_attrs("segment", "instance"))


def report(seconds: float, checkpoint: Path, labelled: Path) -> None:
    """Add what the demo made to ``summary.json``; print where everything is and what to try next."""
    summary = json.loads((RUN / "summary.json").read_text())
    pictures = sorted((RUN / "pictures").glob("**/*.png"))
    paths = {
        "checkpoint": checkpoint,
        "config": RUN / "config.yaml",
        "metrics": RUN / "logs" / "metrics.csv",
        "tensorboard": RUN / "logs",
        "pictures": RUN / "pictures",
        "prediction": labelled,
    }
    summary |= {"seconds": round(seconds, 1), "paths": {name: str(path) for name, path in paths.items()}}
    write_json(RUN / "summary.json", summary)

    table = Table("what", "where", title="pc3d demo", title_justify="left")
    for name, path in paths.items():
        table.add_row(name, str(path))
    for picture in pictures:
        table.add_row("picture", str(picture))
    table.add_row("figures", str(RUN / "summary.json"))
    console = Console()
    console.print(table)
    console.print(
        f"test mIoU {summary['test/mIoU']:.3f}, mAcc {summary['test/mAcc']:.3f}, {seconds / 60:.1f} minutes\n\n"
        "try next:\n"
        f"  .venv/bin/pc3d view {labelled}\n"
        f"  .venv/bin/pc3d predict YOUR_CLOUD.ply --ckpt {checkpoint} -o labelled.ply\n"
        "  .venv/bin/pc3d data check FOLDER_WITH_YOUR_CLOUDS",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
