"""``pc3d reconstruct``: surfaces of scanned clouds, with nothing but a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pc3d.cli.errors import one_line
from pc3d.cli.parser import Parser
from pc3d.cli.predict import choose_device, find_inputs, parse_columns
from pc3d.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pc3d.data.pipeline import Pipeline
    from pc3d.tasks import Reconstruction

EXAMPLES = """\
  pc3d reconstruct scan.ply --ckpt runs/solids/checkpoints/best.ckpt -o surface.ply
  pc3d reconstruct scans/ --ckpt best.ckpt -o surfaces/ --format obj
  pc3d reconstruct room.laz --ckpt rooms.ckpt -o room.obj --resolution 64 --threshold 0.3

A surface is the border of what the network takes for the inside, in the coordinates of the cloud. It is looked for on
a coarse grid of --resolution cells per axis, then --steps times on twice as fine a grid. A cloud that is larger than
the network's box is fitted to it."""


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)

    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from pc3d.tasks import Reconstruction, load_task

    jobs = plan_surfaces([Path(name) for name in options.inputs], Path(options.output), options.format)
    task, pipeline, _ = load_task(options.ckpt, trust=options.trust)
    if not isinstance(task, Reconstruction):
        raise InputError(f"{options.ckpt}: is a {type(task).__name__}, it reconstructs nothing: use pc3d predict")
    task.set_surface(options.threshold, options.resolution, options.steps)
    task.to(choose_device(options.device, torch))
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    console, failed = Console(), []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("reconstructing", total=len(jobs) * (task.steps + 1))
        for number, (source, target) in enumerate(jobs):
            progress.update(bar, description=source.name)
            try:
                line = reconstruct_file(source, target, task, pipeline, options, lambda cells: progress.advance(bar))
            except InputError as error:
                if len(jobs) == 1:
                    raise
                failed.append(source)  # the other files of a folder are not to blame
                line = f"failed: {one_line(str(error))}"
            console.print(line, soft_wrap=True, highlight=False, markup=False)
            progress.update(bar, completed=(number + 1) * (task.steps + 1))
    if failed:
        raise InputError(f"{len(failed)} of {len(jobs)} clouds have no surface, see above (first: {failed[0]})")
    return 0


def _parser() -> Parser:
    from pc3d.io.mesh import MESH_FORMATS

    formats = " ".join(suffix[1:] for suffix in MESH_FORMATS)
    parser = Parser("reconstruct", "Reconstruct the surfaces that clouds were scanned from.", EXAMPLES)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="cloud files, or folders of them")
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint (.ckpt) or export (.safetensors)")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="mesh file, or folder for several inputs")
    parser.add_argument("--format", metavar="SUFFIX", help=f"in a folder: {formats}; default: ply")
    parser.add_argument("--resolution", type=int, metavar="N", help="cells of the coarse grid; default: as trained")
    parser.add_argument("--steps", type=int, metavar="N", help="times it is made twice as fine; default: as trained")
    parser.add_argument("--threshold", type=float, metavar="P", help="probability of the surface; default: as trained")
    parser.add_argument("--columns", metavar="NAMES", help="columns of .bin, .npy and text files: x,y,z,intensity")
    parser.add_argument("--invalid", choices=["error", "drop"], help="points without finite coordinates")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1")
    parser.add_argument("--trust", action="store_true", help="run code inside the checkpoint (your own file only)")
    return parser


def plan_surfaces(inputs: list[Path], output: Path, suffix: str | None) -> list[tuple[Path, Path]]:
    """Pairs of cloud and mesh file; below a folder the meshes keep the sources' sub-folders.

    Raises:
        InputError: for missing inputs, formats that are not written, and targets that are inputs or collide.
    """
    from pc3d.cli.predict import check_targets, is_file_for_file
    from pc3d.io.mesh import MESH_FORMATS, check_mesh_format

    found = find_inputs(inputs)
    if is_file_for_file(inputs, output, MESH_FORMATS):
        if suffix is not None:
            raise InputError(f"--format {suffix}: of no use, the format is that of {output}")
        jobs = [(found[0][0], output)]
    else:
        ending = "." + (suffix or "ply").lower().lstrip(".")
        jobs = [(source, output / name.with_suffix(ending)) for source, name in found]
    for _, target in jobs:
        check_mesh_format(target)
    check_targets(jobs)
    return jobs


def reconstruct_file(
    source: Path,
    target: Path,
    task: Reconstruction,
    pipeline: Pipeline,
    options: Any,
    on_level: Callable[[int], None],
) -> str:
    """Reconstruct one file; returns a line that says what was written."""
    import torch

    from pc3d.io import read
    from pc3d.io.mesh import write_mesh
    from pc3d.tasks import reconstruct

    points = read(source, columns=parse_columns(options.columns), invalid=options.invalid)
    mesh = reconstruct(task, pipeline, points, torch.Generator().manual_seed(0), on_level)
    if not len(mesh.faces):
        raise InputError(f"{source}: no surface was found: try a lower --threshold or a larger --resolution")
    write_mesh(target, mesh, points.meta[0].get("origin", (0.0, 0.0, 0.0)))
    return f"{source} -> {target}: {points.num_points:,} points, {len(mesh.faces):,} triangles"
