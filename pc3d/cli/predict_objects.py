"""``pc3d predict`` for objects: a table of their classes, completed shapes, and the category that a model asks for."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import torch

from pc3d.cli.parser import Parser, suggest
from pc3d.cli.predict import parse_columns
from pc3d.data.pipeline import Pipeline
from pc3d.errors import InputError
from pc3d.io import read, write
from pc3d.io.atomic import atomic_write
from pc3d.points import Points
from pc3d.tasks import Classification, Completion, Detection, PartSegmentation, PointTask, classify, complete
from pc3d.tasks.augmentations import augmentation_passes

_FOREIGN: dict[type[PointTask], tuple[str, ...]] = {
    Classification: ("format", "keep_colors", "mode", "tile"),
    Completion: ("probabilities", "keep_colors", "mode", "tile", "tta"),
    Detection: ("probabilities", "mode", "tile", "tta"),
}


def refuse_foreign_options(task: PointTask, options: argparse.Namespace, parser: Parser) -> None:
    """Raises InputError for an option that this kind of model has no use for."""
    names = next((own for kind, own in _FOREIGN.items() if isinstance(task, kind)), ())
    for name in names:
        if getattr(options, name) != parser.get_default(name):
            raise InputError(f"--{name}: of no use, the checkpoint is a {type(task).__name__}")
    if options.calib is not None and not isinstance(task, Detection):
        raise InputError("--calib: of no use, the checkpoint's model finds no boxes")
    if options.category is not None and not _categories(task):
        raise InputError("--category: of no use, the checkpoint's model does not ask for one")


class ClassTable:
    """Classes of clouds, written as ``file,class,confidence`` and on request the probability of every class.

    Raises:
        InputError: if the path does not end in ``.csv``.
    """

    def __init__(self, path: Path, task: Classification, probabilities: bool) -> None:
        if path.suffix.lower() != ".csv":
            raise InputError(f"{path}: a classifier writes a table: name it .csv")
        self.path, self.task, self.probabilities = path, task, probabilities
        names = [f"prob_{name}".replace(" ", "_") for name in task.class_names] if probabilities else []
        self.rows: list[list[Any]] = [["file", "class", "confidence", *names]]

    def add(self, source: Path, pipeline: Pipeline, options: argparse.Namespace) -> str:
        """Classify one file; returns a line that says what it is."""
        points = read(source, columns=parse_columns(options.columns), invalid=options.invalid)
        points = with_category(points, self.task, options.category)
        passes = [[]] if options.tta == "none" else augmentation_passes(options.tta)
        values = classify(self.task, pipeline, points, passes, torch.Generator().manual_seed(0)).cpu()
        best = int(values.argmax())
        name = self.task.class_names[best]
        every = [f"{value:.6f}" for value in values.tolist()] if self.probabilities else []
        self.rows.append([str(source), name, f"{values[best]:.6f}", *every])
        return f"{source}: {name} ({values[best]:.1%})"

    def write(self) -> None:
        if len(self.rows) == 1:
            return
        with atomic_write(self.path) as temporary, temporary.open("w", newline="") as file:
            csv.writer(file).writerows(self.rows)


def complete_file(source: Path, target: Path, task: Completion, pipeline: Pipeline, options: argparse.Namespace) -> str:
    """Complete one file; returns a line that says what was written."""
    points = read(source, columns=parse_columns(options.columns), invalid=options.invalid)
    points = with_category(points, task, options.category)
    made = complete(task, pipeline, points, torch.Generator().manual_seed(0)).cpu()
    meta = [{"name": source.stem, "origin": points.meta[0].get("origin", (0.0, 0.0, 0.0))}]
    write(target, Points(made, meta=meta))
    return f"{source} -> {target}: {points.num_points:,} points completed to {len(made):,}"


def with_category(points: Points, task: PointTask, category: str | None) -> Points:
    """The cloud with the category that its model asks for, from the option or the file.

    Raises:
        InputError: if neither has it, or the name is unknown.
    """
    names = _categories(task)
    if not names or (category is None and "category" in points):
        return points
    if category not in names:
        what = "is missing" if category is None else f"'{category}' is unknown{suggest(category, names)}"
        raise InputError(f"{points.describe()}: --category {what}; the model knows {', '.join(names)}")
    return points.with_attrs(category=torch.full((points.num_points,), names.index(category)))


def _categories(task: PointTask) -> list[str]:
    """Names of the categories of a model that asks for one, else nothing."""
    if isinstance(task, PartSegmentation):
        return list(task.categories)
    return task.class_names if getattr(task.backbone, "categories", 0) else []
