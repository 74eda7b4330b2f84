"""``pc3d dataflow``: measure this machine, so that sparse layers choose the fastest way to run."""

from __future__ import annotations

from pathlib import Path

from pc3d.cli.parser import Parser
from pc3d.errors import InputError

EXAMPLES = """\
  pc3d dataflow calibrate --device cpu
  pc3d dataflow calibrate --device cpu --threads 1 -o tables/one-thread.json

The table goes to the cache folder (PC3D_CACHE_DIR, else ~/.cache/pc3d) and is used from then on; before, a table that
comes with the package. PC3D_DATAFLOW_TABLE=FILE uses another one, PC3D_DATAFLOW=ws (or fwd=os@128,wgrad=ws) none."""


def main(arguments: list[str]) -> int:
    parser = Parser("dataflow", "Measure the dataflows of sparse convolution on this machine.", EXAMPLES)
    parser.add_argument("action", choices=["calibrate"], help="measure, and write the table")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default cpu")
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        default="float32",
        help="of the features; default float32",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads to measure with, default as torch")
    parser.add_argument("--quick", action="store_true", help="a coarse table in seconds, to try the command")
    parser.add_argument("-o", "--output", metavar="JSON", help="default: the cache folder")
    options = parser.parse_args(arguments)

    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from pc3d.io.atomic import atomic_write
    from pc3d.sparse.calibrate import QUICK, Effort, calibrate, file_name
    from pc3d.sparse.flows import REAL_FLOWS
    from pc3d.sparse.table import cache_folder

    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here")
    if options.threads is not None:
        if options.threads < 1:
            raise InputError(f"--threads {options.threads}: must be 1 or more")
        torch.set_num_threads(options.threads)
    console = Console()
    columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("calibrating", total=1.0)
        table = calibrate(
            REAL_FLOWS[options.device],
            options.device,
            getattr(torch, options.dtype),
            effort=QUICK if options.quick else Effort(),
            progress=lambda stage, share: bar.update(task, description=stage, completed=share),
        )
    path = Path(options.output) if options.output else cache_folder() / file_name(table)
    with atomic_write(path) as temporary:
        temporary.write_text(table.to_text())
    figures = ", ".join(f"{name} {share:.0%}" for name, share in table.fitted_error.items())
    print(f"{table.device}: {len(table.table):,} choices; model error {figures}")
    print(f"wrote {path}")
    return 0
