"""``pc3d data check``: what is in a folder of clouds, and what stands in the way of training on it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.spatial import cKDTree
from torch import Tensor

from pc3d.data.dataset import IGNORE, LabelMap, integer_codes, parse_label_map
from pc3d.errors import InputError
from pc3d.io import READABLE, can_read, read
from pc3d.io.atomic import visible_files
from pc3d.points import Points

LABEL_FIELDS = (
    "segment",
    "classification",
    "label",
    "labels",
    "class",
    "sem",
    "semantic",
    "scalar_Label",
    "scalar_label",
    "scalar_Classification",
    "scalar_classification",
)
"""Fields looked at, in this order, when no label field is named."""

_GRIDS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
_SAMPLE = 2000  # points whose nearest neighbour is measured, per file
_LARGEST_TREE = 2_000_000
_HUGE = 1e30  # no measurement: a sentinel for "no value"


@dataclass
class FileReport:
    """One file: ``error`` says why it cannot be used, otherwise the rest is filled in."""

    path: str
    points: int = 0
    spacing: float = math.nan
    error: str | None = None


@dataclass
class FieldReport:
    """An attribute over all files that have it.

    Attributes:
        files: how many have it.
        low: smallest finite value.
        high: largest finite value.
        bad: values that are not finite, or so large that they must mean "no value".
    """

    files: int = 0
    low: float = math.inf
    high: float = -math.inf
    bad: int = 0


@dataclass
class CheckReport:
    """What :func:`check_folder` found.

    Attributes:
        root: the file or folder.
        files: one report per file.
        fields: per attribute; coordinates are ``x``, ``y``, ``z`` with their origin.
        label_field: where the labels are, None if nowhere.
        codes: points per raw label code.
        classes: points per class (with a label map).
        unknown: points per code outside the label map.
        spacing: median over files of the median distance to the nearest neighbour, metres.
        grid_size: a cell edge that keeps about one point per cell, metres.
        warnings: what is readable but looks wrong.
    """

    root: str
    files: list[FileReport] = field(default_factory=list)
    fields: dict[str, FieldReport] = field(default_factory=dict)
    label_field: str | None = None
    codes: dict[int, int] = field(default_factory=dict)
    classes: dict[str, int] | None = None
    unknown: dict[int, int] = field(default_factory=dict)
    spacing: float | None = None
    grid_size: float | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def points(self) -> int:
        return sum(item.points for item in self.files)

    @property
    def ok(self) -> bool:
        """Whether every file can be used and every code is known."""
        return not self.unknown and not any(item.error for item in self.files)

    def to_json(self) -> str:
        """The whole report; values that JSON does not know (no value) are null."""
        return json.dumps(_finite({**asdict(self), "points": self.points, "ok": self.ok}), indent=2)

    def print(self, console: Console | None = None) -> None:
        """Tables for a person."""
        console = console or Console()
        good = [item for item in self.files if not item.error]
        console.print(f"[bold]{self.root}[/]: {len(good)} of {len(self.files)} files readable, {self.points:,} points")
        console.print(_file_table(self.files))
        console.print(_field_table(self.fields, len(good)))
        if self.label_field is not None:
            console.print(_class_table(self))
        if self.spacing is not None:
            console.print(f"Point spacing {self.spacing:.3g} m; suggested grid_size: [bold]{self.grid_size:g}[/]")
        for code, count in self.unknown.items():
            console.print(f"[red]unknown code {code}[/] in '{self.label_field}': {count:,} points are in no class")
        for warning in self.warnings:
            console.print(f"[yellow]{warning}[/]", highlight=False)
        for item in self.files:
            if item.error:
                console.print(f"[red]{item.error}[/]", highlight=False, soft_wrap=True)


def check_folder(
    path: str | Path,
    labels: LabelMap | None = None,
    label_field: str | None = None,
    columns: int | list[str] | None = None,
) -> CheckReport:
    """Read every cloud of a folder (or one file) and report on it; a file that fails is one line, the others go on.

    Args:
        path: folder, searched with its sub-folders, or a file.
        labels: label map, see :func:`~pc3d.data.dataset.parse_label_map`.
        label_field: attribute with the labels; by default the first of :data:`LABEL_FIELDS` that a file has.
        columns: of files that do not name them, see :func:`pc3d.io.read`.

    Raises:
        InputError: if there is nothing to read, or the label map is wrong.
    """
    files = _clouds(Path(path))
    label_map = None if labels is None else parse_label_map(labels)
    report = CheckReport(str(path), label_field=label_field)
    codes: Counter[int] = Counter()
    for file in files:
        entry = FileReport(str(file))
        report.files.append(entry)
        try:
            cloud = read(file, columns=columns, invalid="drop")
            _check_file(cloud, entry, report, codes)
        except InputError as error:
            entry.error = str(error)
    report.codes = dict(sorted(codes.items()))
    if label_map is not None:
        _count_classes(report, *label_map)
    spacings = [item.spacing for item in report.files if math.isfinite(item.spacing)]
    if spacings:
        report.spacing = float(np.median(spacings))
        report.grid_size = suggest_grid(report.spacing)
    report.warnings += _field_warnings(report)
    return report


def suggest_grid(spacing: float) -> float:
    """A round cell edge (metres) of about twice the median distance to the nearest neighbour.

    On a surface scanned at random that distance is half of ``1 / sqrt(density)``, the cell with one point on average.
    """
    scale = 10.0 ** math.floor(math.log10(2 * spacing))
    return round(min(_GRIDS, key=lambda step: abs(math.log(step * scale / (2 * spacing)))) * scale, 6)


def nearest_spacing(cloud: Points, sample: int = _SAMPLE) -> float:
    """Median distance (metres) from a point to its nearest neighbour elsewhere; NaN if all points coincide."""
    coord = cloud.coord.numpy()
    if len(coord) > _LARGEST_TREE:  # a slab keeps the density that a subset would lose
        order = np.argsort(coord[:, 0], kind="stable")
        start = (len(coord) - _LARGEST_TREE) // 2
        coord = coord[order[start : start + _LARGEST_TREE]]
    coord = np.unique(coord, axis=0)
    if len(coord) < 2:
        return math.nan
    chosen = np.random.default_rng(0).choice(len(coord), min(sample, len(coord)), replace=False)
    distance, _ = cKDTree(coord).query(coord[chosen], k=2)
    return float(np.median(distance[:, 1]))


def _clouds(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder")
    files = sorted(file for file in visible_files(path) if can_read(file))
    if not files:
        raise InputError(f"{path}: no readable point cloud in it or below it (suffixes: {' '.join(READABLE)})")
    return files


def _check_file(cloud: Points, entry: FileReport, report: CheckReport, codes: Counter[int]) -> None:
    if cloud.num_points < 2:
        raise InputError(f"{entry.path}: holds {cloud.num_points} point; a cloud needs at least 2")
    if report.label_field is None:
        report.label_field = next((name for name in LABEL_FIELDS if name in cloud.attrs), None)
    if report.label_field is not None:
        labels = integer_codes(cloud.get(report.label_field), entry.path, report.label_field)
        values, counts = labels.unique(return_counts=True)
        codes.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    rows = cloud.meta[0].get("valid_rows")
    if rows is not None:
        dropped = max(int(rows.max()) + 1 - len(rows), 1)
        report.warnings.append(
            f"{entry.path}: at least {dropped:,} points without finite coordinates are left out "
            "(organised clouds: always, others: set invalid: drop)"
        )
    entry.points = cloud.num_points
    entry.spacing = nearest_spacing(cloud)
    origin = cloud.meta[0].get("origin", (0.0, 0.0, 0.0))
    for axis, name in enumerate("xyz"):
        _add_range(report.fields.setdefault(name, FieldReport()), cloud.coord[:, axis].double() + origin[axis])
    for name, values in cloud.attrs.items():
        _add_range(report.fields.setdefault(name, FieldReport()), values)


def _add_range(into: FieldReport, values: Tensor) -> None:
    values = values.double()
    usable = values.isfinite() & (values.abs() < _HUGE)
    into.files += 1
    into.bad += int((~usable).sum())
    if usable.any():
        into.low = min(into.low, float(values[usable].min()))
        into.high = max(into.high, float(values[usable].max()))


def _count_classes(report: CheckReport, label_map: dict[int, int], names: Sequence[str]) -> None:
    report.classes = dict.fromkeys(names, 0)
    for code, count in report.codes.items():
        if code not in label_map:
            report.unknown[code] = count
        elif label_map[code] != IGNORE:
            report.classes[names[label_map[code]]] += count


def _field_warnings(report: CheckReport) -> list[str]:
    warnings = []
    for name, found in report.fields.items():
        if found.bad:
            warnings.append(f"field '{name}': {found.bad:,} values are not finite or mean 'no value'")
        if name == "color" and found.low == found.high:
            warnings.append(f"field 'color': is {found.low:g} everywhere; leave it out of the features")
    if report.classes is not None:
        empty = [name for name, count in report.classes.items() if not count]
        if empty:
            warnings.append(f"classes without a point: {', '.join(empty)}")
    if report.label_field is None:
        warnings.append("no label field found; name it with --label_field")
    return warnings


def _file_table(files: Sequence[FileReport]) -> Table:
    table = Table("file", "points", "spacing (m)", title="Files", title_justify="left")
    for item in files:
        name = Path(item.path).name
        if item.error:
            table.add_row(name, "[red]cannot be used[/]", "")
        else:
            table.add_row(name, f"{item.points:,}", f"{item.spacing:.3g}")
    return table


def _field_table(fields: dict[str, FieldReport], files: int) -> Table:
    table = Table("field", "lowest", "highest", "not finite", "in files", title="Fields", title_justify="left")
    for name, found in fields.items():
        values = [f"{value:.10g}" if math.isfinite(value) else "-" for value in (found.low, found.high)]
        table.add_row(name, *values, str(found.bad or ""), f"{found.files} of {files}")
    return table


def _class_table(report: CheckReport) -> Table:
    counts: dict[Any, int] = report.codes if report.classes is None else dict(report.classes)
    heading = "code" if report.classes is None else "class"
    total = max(sum(report.codes.values()), 1)
    table = Table(heading, "points", "share", title=f"Labels in '{report.label_field}'", title_justify="left")
    if report.classes is not None:
        counts["ignored"] = total - sum(report.classes.values()) - sum(report.unknown.values())
    for name, count in counts.items():
        table.add_row(str(name), f"{count:,}", f"{count / total:.2%}")
    return table


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
