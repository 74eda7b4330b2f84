"""``pc3d robustness``: a classifier on corrupted clouds, every corruption at every severity."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pc3d.cli.parser import Parser, split_overrides, suggest
from pc3d.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from pc3d.data.module import PointDataModule
    from pc3d.metrics import RobustnessScores
    from pc3d.points import Points
    from pc3d.tasks import Classification

EXAMPLES = """\
  pc3d robustness --ckpt runs/synthetic_shapes-cls-pct-tiny/checkpoints/best.ckpt
  pc3d robustness --ckpt best.ckpt --benchmark modelnet-c --corruptions rotate add_local --severities 2 4
  pc3d robustness --ckpt best.ckpt --files /data/modelnet40_c                    (or /data/modelnet_c: as published)
  pc3d robustness --ckpt best.ckpt --up y -- --data.root /data      (ModelNet40 itself, corrupted here; y is upward)

The test clouds of the config are prepared as it says, then corrupted; its samplers of evaluation ('select') are left
out, so that a network sees all points. Published files are read instead with --files: they have their size, so
UnitShape and FixedPoints are left out of 'prepare'. Mean error rate: the mean over corruptions of the mean over
severities; mCE and RmCE, relative to DGCNN, are of the files of ModelNet-C only. What follows -- overrides the config,
as in pc3d train."""
BENCHMARKS = ("modelnet40-c", "modelnet-c")
Batches = Callable[[Any, int], "Iterator[Points]"]
"""The test clouds under a corruption, or ``clean``, of a severity."""


def main(arguments: list[str]) -> int:
    options, overrides = _options(arguments)

    from rich.console import Console
    from rich.progress import Progress

    from pc3d.cli.experiment import trained_experiment
    from pc3d.cli.runs import Run, run_of
    from pc3d.data.transforms.corruptions import CLEAN
    from pc3d.metrics import RobustnessScores
    from pc3d.tasks import Classification
    from pc3d.tasks.record import write_json

    path = Path(options.ckpt)
    folder = run_of(path) or path.parent
    experiment = trained_experiment(path, options.config, overrides, lambda _: Run(folder), "pc3d robustness")
    task, trainer = experiment.model, experiment.trainer
    if not isinstance(task, Classification):
        raise InputError(f"{path}: holds a {type(task).__name__}, not a Classification")
    batches = (_published if options.files else _generated)(options, experiment.datamodule)
    wanted = _wanted(options)
    out = Path(options.out or folder / f"{options.benchmark}.json")
    task.to(trainer.strategy.root_device).eval()
    accuracy: dict[str, dict[int, float]] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(CLEAN, total=1 + sum(map(len, wanted.values())))
        clean, count = _accuracy(task, batches(CLEAN, 0), trainer.precision_plugin.forward_context)
        for corruption, severities in wanted.items():
            accuracy[corruption] = {}
            for severity in severities:
                progress.update(bar, advance=1, description=f"{corruption} {severity}")
                clouds = batches(corruption, severity)
                accuracy[corruption][severity], _ = _accuracy(task, clouds, trainer.precision_plugin.forward_context)
    scores = RobustnessScores(clean, accuracy)
    figures = _figures(scores, options)
    Console().print(_table(scores, figures, f"{options.benchmark}, {count} clouds: accuracy in %"))
    made = {"points": options.points, "up": options.up, "seed": experiment.datamodule.seed}
    source = {"files": options.files} if options.files else made
    head = {"checkpoint": str(path), "benchmark": options.benchmark, "clouds": count, **source}
    write_json(out, {**head, **figures, "accuracy": accuracy})
    print(f"figures: {out}")
    _draw(out.with_suffix(".png"), scores, figures)
    return 0


def _options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own options, and overrides of the config."""
    parser = Parser("robustness", "Score a classifier on clean and on corrupted test clouds.", EXAMPLES)
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint (.ckpt) or export (.safetensors)")
    parser.add_argument("--config", metavar="FILE", help="experiment; default: the config.yaml of the checkpoint's run")
    parser.add_argument("--files", metavar="DIR", help="ModelNet40-C or ModelNet-C as published; default: made here")
    parser.add_argument("--benchmark", choices=BENCHMARKS, help=f"whose corruptions (default {BENCHMARKS[0]})")
    parser.add_argument("--corruptions", nargs="+", metavar="C", help="some of them (default all)")
    parser.add_argument("--severities", nargs="+", type=int, metavar="S", help="some of them (default all)")
    parser.add_argument("--points", type=int, metavar="N", help="of a clean cloud (default: as the config, or 1024)")
    parser.add_argument("--up", choices=("y", "z"), help="vertical axis, for occlusion and lidar (default z)")
    parser.add_argument("-o", "--out", metavar="FILE", help="default: <benchmark>.json in the checkpoint's run")
    own, overrides = split_overrides(arguments)
    options = parser.parse_args(own)
    if options.out is not None and Path(options.out).suffix != ".json":
        raise InputError(f"--out {options.out}: figures are written as .json")
    for name in ("points", "up"):
        if options.files and getattr(options, name) is not None:
            raise InputError(f"--{name}: of no use with --files, whose clouds are as they are")
    return options, overrides


# What is tested -------------------------------------------------------------------------------------------------------


def _published(options: argparse.Namespace, data: PointDataModule) -> Batches:
    """Clouds of published files, whose benchmark becomes the one in the options."""
    from pc3d.data.module import PointDataModule
    from pc3d.data.transforms import FixedPoints, UnitShape
    from pc3d.datasets import CorruptedModelNet40

    files = CorruptedModelNet40(options.files)
    files.size("test")
    if files.class_names != data.class_names:
        raise InputError(
            f"--files {options.files}: has the classes of ModelNet40, the checkpoint others: "
            f"{', '.join(data.class_names[:3])}, ..."
        )
    found = BENCHMARKS[files.is_modelnet_c]
    if options.benchmark not in (None, found):
        raise InputError(f"--benchmark {options.benchmark}: the files in {options.files} are of {found}")
    options.benchmark = found
    prepare = [step for step in data.pipeline.prepare if not isinstance(step, (UnitShape, FixedPoints))]
    pipeline = dataclasses.replace(data.pipeline, prepare=prepare, select=[])

    def batches(corruption: str, severity: int) -> Iterator[Points]:
        clouds = CorruptedModelNet40(options.files, corruption, severity)
        module = PointDataModule(
            clouds,
            pipeline,
            val_batch_size=data.val_batch_size,
            num_workers=data.num_workers,
            seed=data.seed,
            cache=False,
        )
        return module.evaluated("test", range(clouds.size("test")))

    return batches


def _generated(options: argparse.Namespace, data: PointDataModule) -> Batches:
    """Test clouds of the config, corrupted here; fills in what the options leave open."""
    from pc3d.data.transforms import Corrupt, FixedPoints

    options.benchmark = options.benchmark or BENCHMARKS[0]
    if options.points is None:
        options.points = next((s.count for s in data.pipeline.select if isinstance(s, FixedPoints)), 1024)
    options.up = options.up or "z"
    data.pipeline = dataclasses.replace(data.pipeline, select=[])
    clouds = range(len(data.samples("test")))

    def batches(corruption: Any, severity: int) -> Iterator[Points]:
        step = Corrupt(corruption, severity, options.points, options.up)
        return data.evaluated(data.stored_split("test"), clouds, [step])

    return batches


def _wanted(options: argparse.Namespace) -> dict[str, list[int]]:
    """Corruptions and their severities.

    Raises:
        InputError: for one that the benchmark does not have.
    """
    from pc3d.data.transforms.corruptions import severities

    every = _corruptions(options.benchmark)
    for name in options.corruptions or ():
        if name not in every:
            raise InputError(f"--corruptions {name}: {options.benchmark} has {', '.join(every)}{suggest(name, every)}")
    allowed = severities(every[0])
    for severity in options.severities or ():
        if severity not in allowed:
            raise InputError(f"--severities {severity}: {options.benchmark} has {allowed[0]} to {allowed[-1]}")
    chosen = sorted(set(options.severities or allowed))
    return {name: chosen for name in every if name in (options.corruptions or every)}


def _corruptions(benchmark: str) -> list[str]:
    from pc3d.data.transforms.corruptions import MODELNET40_C, MODELNET_C

    return (
        list(MODELNET_C) if benchmark == BENCHMARKS[1] else [name for group in MODELNET40_C.values() for name in group]
    )


def _accuracy(
    task: Classification, batches: Iterable[Points], precision: Callable[[], AbstractContextManager[Any]]
) -> tuple[float, int]:
    """Share of the clouds with the right class, and how many have one.

    Raises:
        InputError: if none has.
    """
    import torch

    from pc3d.tasks.classification import cloud_labels

    right = count = 0
    for i, batch in enumerate(batches):
        labels = cloud_labels(batch)
        torch.manual_seed(i)  # some networks sample their points at random
        with torch.no_grad(), precision():
            found = task(batch.replace(source=None).to(task.device)).argmax(1).cpu()
        right += int((found == labels).sum())
        count += int((labels >= 0).sum())
    if not count:
        raise InputError("no test cloud has a class (data.test_split: val tests the validation clouds)")
    return right / count, count


# What is reported -----------------------------------------------------------------------------------------------------


def _figures(scores: RobustnessScores, options: argparse.Namespace) -> dict[str, Any]:
    """Sums over corruptions; those relative to DGCNN where all published files were tested."""
    from pc3d.data.transforms.corruptions import MODELNET40_C

    figures: dict[str, Any] = {"clean": scores.clean, "mean_error_rate": scores.error_rate()}
    groups = {name: [c for c in group if c in scores.accuracy] for name, group in MODELNET40_C.items()}
    figures |= {f"error_rate_{name}": scores.error_rate(group) for name, group in groups.items() if group}
    if options.files and options.benchmark == BENCHMARKS[1] and not (options.corruptions or options.severities):
        figures |= dict(zip(("mCE", "RmCE"), scores.relative_errors(), strict=True))
    return figures


def _table(scores: RobustnessScores, figures: dict[str, Any], title: str) -> Table:
    """Accuracies of every corruption and severity, and the sums."""
    from rich.table import Table

    columns = list(next(iter(scores.accuracy.values())))
    table = Table("corruption", title=title, title_justify="left")
    for heading in (*map(str, columns), "mean", "error rate"):
        table.add_column(heading, justify="right")
    for name, values in scores.accuracy.items():
        mean = scores.mean(name)
        table.add_row(name, *(f"{100 * v:.1f}" for v in (*values.values(), mean, 1 - mean)))
    table.add_section()
    for name, value in figures.items():
        percent = name not in ("mCE", "RmCE")
        cells = [f"{100 * value:.1f}" if percent else f"{value:.3f}"]
        cells = [*cells, ""] if name == "clean" else ["", *cells]
        table.add_row(name.replace("_", " "), *[""] * len(columns), *cells)
    return table


def _draw(path: Path, scores: RobustnessScores, figures: dict[str, Any]) -> None:
    """A heat map; without matplotlib one line says so."""
    from importlib.util import find_spec

    from pc3d.viz.figures import save_heat_map

    if find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed (pip install 'pc3d[plots]')")
        return
    rows = {name: list(values.values()) for name, values in scores.accuracy.items()}
    columns = [f"severity {severity}" for severity in next(iter(scores.accuracy.values()))]
    title = f"clean {100 * scores.clean:.1f} %, mean error rate {100 * figures['mean_error_rate']:.1f} %"
    save_heat_map(path, rows, columns, title, "accuracy")
    print(f"picture: {path}")
