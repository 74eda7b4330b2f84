"""``pc3d predict`` for detectors: boxes as JSON, result files of KITTI, pictures, or labels of the points inside."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from pc3d.cli.predict import parse_columns, template_for
from pc3d.data.boxes import Boxes, kitti_results
from pc3d.data.pipeline import Pipeline
from pc3d.datasets.kitti_object import image_size
from pc3d.errors import InputError
from pc3d.io import atomic_write, read, write
from pc3d.io.kitti_object import Calibration, KittiFrame, write_objects
from pc3d.points import Points
from pc3d.tasks import Detection, detect
from pc3d.tasks.detection import label_points
from pc3d.viz.colors import label_colors

SUFFIXES = (".json", ".txt", ".png")
"""What boxes are written as, besides the formats of clouds."""


def detect_file(source: Path, target: Path, task: Detection, pipeline: Pipeline, options: argparse.Namespace) -> str:
    """Find the boxes in one file; returns a line that says what was found.

    Raises:
        InputError: for a result file without a calibration, besides what reading and detecting say.
    """
    points = read(source, columns=parse_columns(options.columns), invalid=options.invalid)
    calibration = _calibration(source, options.calib)
    size = image_size(source.parent.parent / "image_2" / f"{source.stem}.png")
    if calibration is not None:  # a detector of KITTI has never seen what the camera does not
        points = points.select(torch.from_numpy(calibration.in_view(points.coord.double().numpy(), *size)))
    found = detect(task, pipeline, points).cpu()
    suffix = target.suffix.lower()
    if suffix == ".txt":
        if calibration is None:
            raise InputError(f"{target}: result files are in the camera's frame: add --calib FILE (or write .json)")
        write_objects(target, kitti_results(found, KittiFrame(calibration, size, None), task.class_names))
    elif suffix == ".json":
        write_boxes(target, found, task.class_names)
    elif suffix == ".png":
        task.save_picture(target, points, found)
    else:
        result = labelled_by_boxes(points, found, task, options.keep_colors)
        write(target, result, template=template_for(source, target))
    counts = torch.bincount(found.labels, minlength=len(task.class_names)).tolist()
    kinds = ", ".join(f"{count} {name}" for name, count in zip(task.class_names, counts, strict=True) if count)
    return f"{source} -> {target}: {points.num_points:,} points; {kinds or 'nothing found'}"


def _calibration(source: Path, given: str | None) -> Calibration | None:
    """Of the option, or of the frame of a KITTI folder that the file lies in."""
    beside = source.parent.parent / "calib" / f"{source.stem}.txt"
    if given is not None:
        return Calibration.read(given)
    return Calibration.read(beside) if source.parent.name == "velodyne" and beside.is_file() else None


def write_boxes(path: Path, found: Boxes, class_names: list[str]) -> Path:
    """Write ``{"boxes": [{"class", "score", "center", "size", "heading"}, ...]}``: metres and radians, best first."""
    assert found.scores is not None
    rows = zip(found.labels.tolist(), found.scores.tolist(), found.boxes.double().tolist(), strict=True)
    entries = [
        {
            "class": class_names[label],
            "score": round(score, 6),
            "center": [round(value, 4) for value in box[:3]],
            "size": [round(value, 4) for value in box[3:6]],
            "heading": round(box[6], 5),
            **({"velocity": box[7:]} if len(box) > 7 else {}),
        }
        for label, score, box in rows
    ]
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps({"boxes": entries}, indent=1) + "\n")
    return path


def labelled_by_boxes(points: Points, found: Boxes, task: Detection, keep_colors: bool) -> Points:
    """The cloud with ``label`` (class of the box around a point, -1 outside), ``instance``, and colours by label."""
    labels, instance = label_points(points, found)
    attrs = {"label": labels, "instance": instance}
    if not keep_colors:
        attrs["color"] = torch.from_numpy(label_colors(labels, task.palette)).float()
    return points.with_attrs(**attrs)
