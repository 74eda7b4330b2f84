"""``pc3d profile``: time every sparse layer of a network on a cloud, beside the model and the floor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pc3d.cli.parser import Parser
from pc3d.errors import InputError

if TYPE_CHECKING:
    from pc3d.sparse.profile import Profile

EXAMPLES = """\
  pc3d profile --config configs/synthetic_rooms/semseg-spunet-small.yaml --input room.ply
  pc3d profile --config configs/lidarhd/semseg-spunet.yaml --input tile.laz --out runs/profile

Attributes of the config that the cloud lacks are filled with zeros: the figures depend on where the points are only.
With --out the table is also written as profile.txt, profile.json and profile.png (the picture needs matplotlib)."""


def main(arguments: list[str]) -> int:
    parser = Parser("profile", "Time every sparse layer of a network on a cloud.", EXAMPLES)
    parser.add_argument("--config", required=True, metavar="YAML", help="config of a network with sparse layers")
    parser.add_argument("--input", required=True, metavar="CLOUD", help="a cloud of any readable format")
    parser.add_argument("--checkpoint", metavar="FILE", help="take network and pipeline from it instead of the config")
    parser.add_argument("--trust", action="store_true", help="run code inside the checkpoint (your own file only)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads, default as torch")
    parser.add_argument("--out", metavar="DIR", help="also write text, JSON and a picture")
    options = parser.parse_args(arguments)
    if options.threads is not None and options.threads < 1:
        raise InputError(f"--threads {options.threads}: must be 1 or more")

    import torch

    from pc3d.sparse.profile import profile

    if options.threads:
        torch.set_num_threads(options.threads)
    task, pipeline = _network(options)
    points = _sample(pipeline, options.input)
    task.eval()
    try:
        result = profile(task.backbone, lambda: task.backbone(points))
    except ValueError as error:
        raise InputError(f"{options.config}: {error}") from error
    print(result.to_text())
    if options.out:
        _write(result, Path(options.out))
    return 0


def _network(options: Any) -> tuple[Any, Any]:
    if options.checkpoint:
        from pc3d.tasks import load_task

        task, pipeline, _ = load_task(Path(options.checkpoint), trust=options.trust)
        return task.cpu(), pipeline
    from pc3d.cli.experiment import Experiment
    from pc3d.cli.runs import Run

    arguments = ["--config", options.config]
    built = Experiment(arguments, lambda config: Run(Path("runs") / "profile", None), "pc3d profile")
    return built.model, built.datamodule.pipeline


def _sample(pipeline: Any, path: str) -> Any:
    """The cloud as the network takes it."""
    import torch

    from pc3d.io import read

    points = read(path, invalid="drop")
    known = {"color": 3, "normal": 3, "strength": 1, "intensity": 1, "return_number": 1, "number_of_returns": 1}
    missing = {name: torch.zeros(points.num_points, width) for name, width in known.items() if name not in points.attrs}
    return pipeline.evaluate(points.with_attrs(**missing))


def _write(result: Profile, folder: Path) -> None:
    from pc3d.io.atomic import atomic_write

    contents = {"txt": result.to_text(), "json": json.dumps(result.to_json(), indent=2)}
    for suffix, text in contents.items():
        with atomic_write(folder / f"profile.{suffix}") as temporary:
            temporary.write_text(text + "\n")
    try:
        _draw(result, folder / "profile.png")
    except ImportError:
        print("no picture: matplotlib is not installed (pip install 'pc3d[plots]')")
    print(f"wrote {folder}/profile.*")


def _draw(result: Profile, path: Path) -> None:
    """Bars per layer: the floor, ours, and plain torch."""
    import numpy as np
    from matplotlib.figure import Figure

    from pc3d.io.atomic import atomic_write

    rows = [row for row in result.rows if row.op == "fwd"]
    bars = {"floor": [r.floor_ms for r in rows], "pc3d": [r.measured_ms for r in rows]}
    bars |= {name: [r.others_ms[name] for r in rows] for name in rows[0].others_ms}
    figure = Figure(figsize=(10, 1 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places, height = np.arange(len(rows)), 0.8 / len(bars)
    for i, (name, values) in enumerate(bars.items()):
        axes.barh(places + (i - (len(bars) - 1) / 2) * height, values, height, label=name)
    axes.set_yticks(places, [row.layer for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("forward, milliseconds")
    axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)
