"""``pc3d fewshot``: train and test every fold of an n-way k-shot protocol; mean and deviation."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pc3d.cli.parser import Parser, split_overrides
from pc3d.errors import InputError

EXAMPLES = """\
  pc3d fewshot --config configs/modelnet40/fewshot-pcm.yaml --way 5 --shot 10 --run_dir runs/fewshot -- --data.root DIR
  pc3d fewshot --config my.yaml --way 10 --shot 20 --run_dir runs/tuned -- --init_from pretrained.ckpt

data.dataset is pc3d.datasets.FewShot (episodes of any data set) or ModelNetFewShot (the published files). A run that
was stopped goes on with the first fold that is not done. What follows -- overrides the config, as in pc3d train."""


def main(arguments: list[str]) -> int:
    parser = Parser("fewshot", "Train and test the folds of an n-way k-shot protocol: mean and deviation.", EXAMPLES)
    parser.add_argument("--config", metavar="FILE", required=True, help="experiment on few-shot episodes")
    parser.add_argument("--way", type=int, default=5, metavar="N", help="classes (default 5)")
    parser.add_argument("--shot", type=int, default=10, metavar="K", help="training clouds per class (default 10)")
    parser.add_argument("--folds", type=int, default=10, metavar="F", help="episodes (default 10)")
    parser.add_argument("--run_dir", required=True, metavar="DIR", help="where the folds' runs and summary.json go")
    own, overrides = split_overrides(arguments)
    options = parser.parse_args(own)
    if options.folds < 1:
        raise InputError(f"--folds {options.folds} must be at least 1")
    from pc3d.metrics import few_shot_score
    from pc3d.tasks.record import write_json

    base = Path(options.run_dir) / f"{options.way}way-{options.shot}shot"
    best, last = [], []
    for fold in range(options.folds):
        figures = _done(base, fold) or _run(options, overrides, base, fold)
        best.append(figures["test/OA"])
        last.append(figures["val/OA"])
        print(f"fold {fold}: best epoch {100 * best[-1]:.1f} %, last epoch {100 * last[-1]:.1f} %")
    scores = {
        name: few_shot_score(values, options.way, options.shot, options.folds)
        for name, values in (("best epoch (as published)", best), ("last epoch", last))
    }
    for name, score in scores.items():
        print(f"{score}, {name}")
    summary = {name: {"mean": score.mean, "deviation": score.deviation} for name, score in scores.items()}
    write_json(base / "summary.json", {"best": best, "last": last, **summary})
    return 0


def _done(base: Path, fold: int) -> dict[str, float] | None:
    """Figures of a fold that an earlier call finished."""
    for path in sorted(base.glob(f"fold-{fold:02d}*/summary.json")):
        figures = json.loads(path.read_text())
        if "test/OA" in figures:
            return figures
    return None


def _run(options: argparse.Namespace, overrides: list[str], base: Path, fold: int) -> dict[str, float]:
    from pc3d.cli.experiment import Experiment
    from pc3d.cli.runs import Run, free_folder
    from pc3d.cli.train import fit_and_test

    keys = {"way": options.way, "shot": options.shot, "fold": fold}
    arguments = ["--config", options.config, *overrides]
    arguments += [word for key, value in keys.items() for word in (f"--data.dataset.init_args.{key}", str(value))]
    folder = free_folder(base / f"fold-{fold:02d}")

    def plan(config: Any) -> Run:
        _name_classes(config, options.way)
        return Run(folder)

    fit_and_test(Experiment(arguments, plan, "pc3d fewshot"), arguments)
    figures = json.loads((folder / "summary.json").read_text())
    missing = [name for name in ("test/OA", "val/OA") if name not in figures]
    if missing:
        raise InputError(
            f"{folder}: the run has no {missing[0]}: few-shot learning needs a Classification that is tested"
        )
    return figures


def _name_classes(config: Any, way: int) -> None:
    """Give a head which names its number of classes as many as the episodes have."""
    key = "model.init_args.head.init_args.num_classes"
    if key in config:
        config[key] = way
