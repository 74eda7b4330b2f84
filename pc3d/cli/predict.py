"""``pc3d predict``: class labels for clouds of any readable format, with nothing but a checkpoint."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pc3d.cli.errors import one_line
from pc3d.cli.parser import PRESETS, Parser
from pc3d.cli.predict_stream import add_options
from pc3d.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from pc3d.points import Points

EXAMPLES = """\
  pc3d predict scan.laz --ckpt runs/demo/checkpoints/best.ckpt -o labelled.laz
  pc3d predict tiles/ --ckpt best.ckpt -o labelled/ --format laz --tile 100
  pc3d predict country/ --ckpt best.ckpt -o labelled/ --stream --memory 4GB
  pc3d predict room.ply --ckpt best.ckpt -o room_labelled.ply --tta scannet --probabilities
  pc3d predict objects/ --ckpt classifier.ckpt -o classes.csv
  pc3d predict chair.ply --ckpt parts.ckpt -o chair_parts.ply --category Chair
  pc3d predict partial.ply --ckpt completion.ckpt -o whole.ply
  pc3d predict training/velodyne/ --ckpt detector.ckpt -o results/ --format txt

LAS and LAZ get 'classification' (the codes of the training files) and 'confidence'; header, coordinate system, point
order and all other fields stay as they are. Other formats get 'label', 'confidence' and colours by label. A classifier
writes a table with one line per cloud, a completion the points of the whole shape. A detector writes its boxes as .json
or .txt (result files of KITTI, with the calibration beside the scan or --calib) or .png (seen from above); to other
formats the points with the class of the box around them."""


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)

    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from pc3d.cli.predict_boxes import SUFFIXES, detect_file
    from pc3d.cli.predict_objects import ClassTable, complete_file, refuse_foreign_options
    from pc3d.cli.predict_stream import stream_files, wants_stream
    from pc3d.tasks import (
        Classification,
        Completion,
        Detection,
        Pretraining,
        Reconstruction,
        SemanticSegmentation,
        load_task,
    )

    inputs, output = [Path(name) for name in options.inputs], Path(options.output)
    found = find_inputs(inputs)
    task, pipeline, card = load_task(options.ckpt, trust=options.trust)
    if isinstance(task, Pretraining):
        raise InputError(f"{options.ckpt}: is pre-trained only; fine-tune it: pc3d train --init_from {options.ckpt}")
    if isinstance(task, Reconstruction):
        raise InputError(f"{options.ckpt}: reconstructs surfaces: use pc3d reconstruct")
    refuse_foreign_options(task, options, _parser())
    table = ClassTable(output, task, options.probabilities) if isinstance(task, Classification) else None
    more = SUFFIXES if isinstance(task, Detection) else (".label",)
    jobs = [(source, output) for source, _ in found] if table else plan_jobs(inputs, output, options.format, more)
    streamed = wants_stream(options, jobs, type(task) is SemanticSegmentation)
    task.to(choose_device(options.device, torch))
    if streamed:
        for line in stream_files(jobs, task, pipeline, card, options):
            print(line)
        return 0
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    console = Console()
    failed = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("predicting", total=len(jobs))
        for source, target in jobs:
            progress.update(bar, description=source.name)
            try:
                if table:
                    line = table.add(source, pipeline, options)
                elif isinstance(task, Completion):
                    line = complete_file(source, target, task, pipeline, options)
                elif isinstance(task, Detection):
                    line = detect_file(source, target, task, pipeline, options)
                else:
                    line = predict_file(source, target, task, pipeline, card, options)
            except InputError as error:
                if len(jobs) == 1:
                    raise
                failed.append(source)  # the other files of a folder are not to blame
                line = f"failed: {one_line(str(error))}"
            console.print(line, soft_wrap=True, highlight=False, markup=False)
            progress.advance(bar)
    if table:
        table.write()
    if failed:
        raise InputError(f"{len(failed)} of {len(jobs)} clouds could not be labelled, see above (first: {failed[0]})")
    return 0


def _parser() -> Parser:
    parser = Parser("predict", "Label clouds with a checkpoint; they need no labels of their own.", EXAMPLES)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="cloud files, or folders of them")
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint (.ckpt) or export (.safetensors)")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        help="file, or folder for several inputs; of a classifier a .csv",
    )
    parser.add_argument("--format", metavar="SUFFIX", help="ply, pcd, las, laz, npz, label ...; default: as the input")
    parser.add_argument("--probabilities", action="store_true", help="add the probability of every class")
    parser.add_argument("--keep_colors", action="store_true", help="keep the colours instead of colouring by label")
    parser.add_argument(
        "--mode", choices=["vote", "fast"], default="vote", help="vote over all points (default), or one pass per cell"
    )
    parser.add_argument(
        "--tta", choices=["none", *PRESETS], default="none", help="test-time augmentation, in mode vote"
    )
    parser.add_argument("--tile", type=float, metavar="METRES", help="cut large clouds into square tiles")
    parser.add_argument("--category", metavar="NAME", help="what the objects are, for models that ask for it")
    parser.add_argument("--calib", metavar="FILE", help="calibration of KITTI's form, for detectors")
    parser.add_argument("--columns", metavar="NAMES", help="columns of .bin, .npy and text files: x,y,z,intensity")
    parser.add_argument("--invalid", choices=["error", "drop"], help="points without finite coordinates")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1")
    parser.add_argument("--trust", action="store_true", help="run code inside the checkpoint (your own file only)")
    add_options(parser)
    return parser


# What to read and where to write ------------------------------------------------------------------------------------


def plan_jobs(
    inputs: Sequence[Path], output: Path, suffix: str | None, more: tuple[str, ...] = (".label",)
) -> list[tuple[Path, Path]]:
    """Pairs of source and target file; below a folder the targets keep the sources' sub-folders.

    Args:
        more: suffixes that can be written besides those of clouds.

    Raises:
        InputError: for missing inputs, formats that cannot be written, and targets that are inputs or collide.
    """
    from pc3d.io import WRITABLE

    # A .bin holds its own columns only: labels have no place in it.
    writable = tuple(dict.fromkeys(suffix for suffix in (*WRITABLE, *more) if suffix != ".bin"))
    wanted = None if suffix is None else "." + suffix.lower().lstrip(".")
    if wanted is not None and wanted not in writable:
        raise InputError(f"--format {suffix}: cannot be written (formats: {' '.join(s[1:] for s in writable)})")
    found = find_inputs(inputs)
    single = is_file_for_file(inputs, output, writable)
    jobs = []
    for source, name in found:
        if single:
            jobs.append((source, output if wanted is None else output.with_suffix(wanted)))
            continue
        own = source.suffix.lower()
        plain = name.with_name(re.sub(r"\.copc(?=\.laz$)", "", name.name, flags=re.IGNORECASE))  # no octree is written
        jobs.append((source, output / plain.with_suffix(wanted or (own if own in writable else ".ply"))))
    check_targets(jobs)
    return jobs


def is_file_for_file(inputs: Sequence[Path], output: Path, writable: Sequence[str]) -> bool:
    """Whether one file is to be written for one file, not a folder; what has a suffix and is no folder yet is a file.

    Raises:
        InputError: if that file has another suffix than ``writable``, or is to hold what comes of several inputs.
    """
    if not output.suffix or output.is_dir():
        return False
    if len(inputs) > 1 or inputs[0].is_dir():
        if output.suffix.lower() in writable:
            raise InputError(f"{output}: several clouds need a folder for their results; choose another -o")
        return False
    if output.suffix.lower() not in writable:
        raise InputError(f"{output}: cannot write '{output.suffix}' (writable: {' '.join(writable)})")
    return True


def find_inputs(inputs: Sequence[Path]) -> list[tuple[Path, Path]]:
    """The cloud files, and their paths below an output folder.

    Raises:
        InputError: for a missing file, or a folder without clouds.
    """
    from pc3d.io import READABLE, can_read
    from pc3d.io.atomic import visible_files

    found: list[tuple[Path, Path]] = []
    for path in inputs:
        if path.is_dir():
            below = sorted(p for p in visible_files(path) if can_read(p))
            if not below:
                raise InputError(f"{path}: no readable point cloud in it (suffixes: {' '.join(READABLE)})")
            found += [(file, file.relative_to(path)) for file in below]
        elif not path.is_file():
            raise InputError(f"{path}: no such file")
        else:
            found.append((path, Path(path.name)))
    return found


def check_targets(jobs: Sequence[tuple[Path, Path]]) -> None:
    sources = {source.resolve() for source, _ in jobs}
    seen: dict[Path, Path] = {}
    for source, target in jobs:
        if target.resolve() in sources:
            raise InputError(f"{target}: is an input; choose another -o, inputs are never overwritten")
        other = seen.setdefault(target.resolve(), source)
        if other is not source:
            raise InputError(f"{target}: would hold the labels of both {other} and {source}")


def choose_device(name: str, torch: Any) -> Any:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not available here ({str(error).splitlines()[0]})") from error
    return device


# One file -----------------------------------------------------------------------------------------------------------


def predict_file(source: Path, target: Path, task: Any, pipeline: Any, card: Any, options: argparse.Namespace) -> str:
    """Label one file; returns a line that says what was found."""
    import torch

    from pc3d.cli.predict_objects import with_category
    from pc3d.io import read, write, write_labels
    from pc3d.tasks import InstanceSegmentation, labels_of, predict_cloud
    from pc3d.tasks.augmentations import augmentation_passes

    points = read(source, columns=parse_columns(options.columns), invalid=options.invalid)
    points = with_category(points, task, options.category)
    probabilities = predict_cloud(
        task,
        pipeline,
        points,
        None if options.tta == "none" else augmentation_passes(options.tta),
        mode=options.mode,
        tile=options.tile,
        generator=torch.Generator().manual_seed(0),
    ).cpu()
    labels = labels_of(probabilities)
    instance = task.cloud_instances(pipeline, points) if isinstance(task, InstanceSegmentation) else None
    suffix = target.suffix.lower()
    if suffix == ".label":
        codes = label_codes(labels, card["label_map"]).clamp(min=0)
        write_labels(target, codes, None if instance is None else instance + 1)
    else:
        las = suffix in (".las", ".laz")
        result = labelled(points, labels, probabilities, card, las, options.probabilities, options.keep_colors)
        result = result if instance is None else result.with_attrs(instance=instance)
        write(target, result, template=template_for(source, target))
    shares = torch.bincount(labels[labels >= 0], minlength=len(task.class_names)) / max(len(labels), 1)
    largest = shares.argsort(descending=True)[:4].tolist()
    classes = ", ".join(f"{task.class_names[i]} {100 * shares[i]:.0f} %" for i in largest if shares[i] >= 0.005)
    found = "" if instance is None else f"; {len(instance[instance >= 0].unique())} instances"
    return f"{source} -> {target}: {len(labels):,} points; {classes}{found}"


def labelled(
    points: Points,
    labels: Tensor,
    probabilities: Tensor,
    card: dict[str, Any],
    las: bool,
    all_probabilities: bool = False,
    keep_colors: bool = False,
) -> Points:
    """The cloud with its predicted label codes, their confidence and, except in LAS, colours by label.

    Args:
        labels: ``(N,)`` class numbers, -1 without a prediction.
        probabilities: ``(N, K)``.
        las: name the codes ``classification``, with 0 (never classified) for points without a prediction.
    """
    import torch

    from pc3d.viz.colors import label_colors

    codes = label_codes(labels, card["label_map"])
    confidence = probabilities.amax(1)
    attrs = {"classification": codes.clamp(min=0)} if las else {"label": codes}
    attrs["confidence"] = confidence
    if all_probabilities:
        names = probability_names(card["class_names"])
        attrs |= {name: probabilities[:, i].contiguous() for i, name in enumerate(names)}
    if not las and not keep_colors:
        attrs["color"] = torch.from_numpy(label_colors(labels, card["palette"])).float()
    return points.with_attrs(**attrs)


def probability_names(class_names: Sequence[str]) -> list[str]:
    """Names of the fields that hold the probability of each class."""
    return [f"prob_{name}".replace(" ", "_")[:31] for name in class_names]


def label_codes(labels: Tensor, label_map: dict[int, int] | None) -> Tensor:
    """``(N,)`` raw codes of class numbers: the lowest code that stands for the class; -1 stays -1."""
    import torch

    if label_map is None:
        return labels
    lowest: dict[int, int] = {}
    for code, number in sorted(label_map.items(), reverse=True):
        lowest[number] = code
    table = torch.tensor([lowest.get(number, number) for number in range(max(lowest) + 1)] + [-1])
    return table[labels]


def parse_columns(names: str | None) -> int | list[str] | None:
    if names is None or not names.isdigit():
        return None if names is None else names.split(",")
    return int(names)


def template_for(source: Path, target: Path) -> Path | None:
    """The source, if its header and other fields can be kept in the target: both of one of these kinds."""
    kinds = {".las": "las", ".laz": "las", ".ply": "ply", ".pcd": "pcd"}
    kind = kinds.get(target.suffix.lower())
    return source if kind is not None and kind == kinds.get(source.suffix.lower()) else None
