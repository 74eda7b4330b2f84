"""``tools/bench.py``: time the kernels beside their peers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from pc3d.bench import (
    backbones,
    configs,
    data,
    fusion,
    kernel_maps,
    orders,
    points,
    scan,
    scenes,
    segments,
    serialize,
    sparse,
    voxelize,
    windows,
)
from pc3d.bench.clouds import load
from pc3d.bench.figures import draw_growth, draw_ratios
from pc3d.bench.timing import Timing, machine, report, table
from pc3d.errors import InputError
from pc3d.io.atomic import atomic_write

LEAST_ROUNDS = 7

EXAMPLES = """examples:
  tools/bench.py voxelize --threads 1
  tools/bench.py points scan.bin sweep.npz --threads 1
  tools/bench.py map --size 0.05 scan.ply sweep.bin --json runs/bench/map.json
  tools/bench.py serialize --size 0.005 --depth 16 --threads 1
  tools/bench.py sparse --threads 1 2 --only subm3_64 map --json runs/bench/sparse.json
  tools/bench.py orders scan.ply --size 0.05 --threads 1
  tools/bench.py backbones scan.ply --size 0.02 --threads 2 --model PTv3
  tools/bench.py data --config configs/synthetic_rooms/semseg-spunet-small.yaml -- --data.batch_size 4
  tools/bench.py configs configs/synthetic_shapes/*.yaml --threads 2
  tools/bench.py scenes --threads 2 --picture runs/bench/scenes.png
  tools/bench.py fusion --seconds 240 --picture runs/bench/fusion.png
  tools/bench.py windows --threads 1 --json runs/bench/windows.json
  tools/bench.py scan --shape 8x1024x384x16 --threads 2
  tools/bench.py sparse scan.bin:0.05:6 sweep.npz:0.1 --picture runs/bench/sparse.png
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark; 0 when it ran, 2 on bad input (one line on stderr)."""
    args = _parser().parse_args(argv)
    try:
        special = {
            "sparse": _run_sparse,
            "scan": _run_scan,
            "fusion": _run_fusion,
            "backbones": _run_backbones,
            "data": _run_data,
            "configs": _run_configs,
            "scenes": _run_scenes,
            "windows": _run_windows,
        }
        return special.get(args.op, _run)(args)
    except InputError as error:
        print(f"bench {args.op}: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    if args.threads:
        torch.set_num_threads(args.threads)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    timings: list[Timing] = []
    for cloud in load(args.clouds, args.points):
        for size in args.size or args.default_sizes:
            if args.op == "voxelize":
                timings += voxelize.bench(cloud, size, args.rounds)
            elif args.op == "points":
                timings += points.bench(cloud, size, args.rounds)
            elif args.op == "segments":
                timings += segments.bench(cloud, size, args.rounds)
            elif args.op == "orders":
                timings += orders.bench(cloud, size, args.rounds)
            elif args.op == "serialize":
                timings += serialize.bench(cloud, size, args.depth, args.rounds)
            else:
                timings += kernel_maps.bench(cloud, size, args.kernel, args.rounds)
    print(table(timings))
    _write_json(args.json, report(timings, args.rounds))
    return 0


def _run_sparse(args: argparse.Namespace) -> int:
    print(", ".join(f"{key} {value}" for key, value in machine().items() if key != "threads"))
    rows = sparse.run(args)
    _write_json(args.json, {"machine": machine(), "rounds": args.rounds, "rows": rows})
    if args.picture:
        (draw_growth if args.growth else draw_ratios)(rows, args.picture)
        print(f"written: {args.picture}")
    return 0


def _run_scan(args: argparse.Namespace) -> int:
    if args.threads:
        torch.set_num_threads(args.threads)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    shapes = [(1, length, 128, 16) for length in scan.LENGTHS] if args.growth else args.shape or scan.SHAPES
    timings: list[Timing] = []
    for shape in shapes:
        timings += scan.bench(shape, args.rounds, args.growth)
        if args.growth:  # lengths rise, so the peak is that of the last one
            print(f"length {shape[1]:,}: peak memory of the process {backbones.peak_mb():,.0f} MB")
    print(table(timings))
    _write_json(args.json, report(timings, args.rounds))
    return 0


def _run_backbones(args: argparse.Namespace) -> int:
    names = args.model or list(backbones.models())
    unknown = sorted(set(names) - set(backbones.models()))
    if unknown:
        raise InputError(f"no backbone {unknown[0]!r}; there are {', '.join(backbones.models())}")
    print(", ".join(f"{key} {value}" for key, value in machine().items() if key != "threads"))
    threads = args.threads or torch.get_num_threads()
    clouds = load(args.clouds, args.points)
    timings = backbones.run(clouds, (args.size or args.default_sizes)[0], names, args.rounds, threads)
    _write_json(args.json, {"machine": machine(), "rows": [asdict(timing) for timing in timings]})
    return 0


def _run_data(args: argparse.Namespace) -> int:
    if args.threads:
        torch.set_num_threads(args.threads)
    print(", ".join(f"{key} {value}" for key, value in machine().items()), flush=True)
    rates = data.run(args.config, args.overrides, args.clouds, args.rounds, args.workers, args.steps)
    print(data.lines(rates))
    _write_json(args.json, {"machine": machine(), "rounds": args.rounds, "rows": [vars(rate) for rate in rates]})
    return 0


def _run_configs(args: argparse.Namespace) -> int:
    for config in args.configs:
        if not config.is_file():
            raise InputError(f"{config}: no such file")
    print(", ".join(f"{key} {value}" for key, value in machine().items() if key != "threads"))
    timings = configs.run(args.configs, args.root, args.rounds, args.threads or torch.get_num_threads())
    _write_json(args.json, {"machine": machine(), "rows": [asdict(timing) for timing in timings]})
    return 0


def _run_scenes(args: argparse.Namespace) -> int:
    print(", ".join(f"{key} {value}" for key, value in machine().items() if key != "threads"))
    timings = scenes.run(args.size or scenes.SIZES, args.rounds, args.threads or torch.get_num_threads())
    _write_json(args.json, {"machine": machine(), "rows": scenes.rows(timings)})
    if args.picture:
        draw_growth(scenes.rows(timings), args.picture)
        print(f"written: {args.picture}")
    return 0


def _run_windows(args: argparse.Namespace) -> int:
    print(", ".join(f"{key} {value}" for key, value in machine().items() if key != "threads"))
    names = args.engine or list(windows.engines())
    timings = windows.run(args.cloud or windows.CLOUDS, names, args.rounds, args.threads or torch.get_num_threads())
    _write_json(args.json, {"machine": machine(), "rows": [asdict(timing) for timing in timings]})
    return 0


def _run_fusion(args: argparse.Namespace) -> int:
    if args.threads:
        torch.set_num_threads(args.threads)
    result = fusion.run(args.seconds, args.seed, args.picture)
    print(result.table())
    _write_json(args.json, {"machine": machine(), **vars(result)})
    return 0


def _write_json(target: Path | None, content: object) -> None:
    if target is None:
        return
    with atomic_write(target) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
    print(f"written: {target}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/bench.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ops = parser.add_subparsers(dest="op", required=True, metavar="OP")
    voxels = ops.add_parser("voxelize", help="grid sampling: cells, distinct voxels, inverse map")
    _add_shared(voxels, points=1_000_000, sizes=[0.05, 0.1])
    maps = ops.add_parser("map", help="kernel maps of sparse convolutions")
    _add_shared(maps, points=200_000, sizes=[0.1])
    maps.add_argument("--kernel", type=_odd, default=3, help="edge of the submanifold kernel, odd (default 3)")
    layers = ops.add_parser(
        "sparse", help="sparse convolutions and SparseUNet-34C beside plain torch and spconv's CPU path"
    )
    sparse.add_arguments(layers)
    curves = ops.add_parser("serialize", help="codes and orders along space-filling curves, levels, reordering")
    _add_shared(curves, points=1_000_000, sizes=[0.05, 0.005])
    curves.add_argument(
        "--depth", type=int, help="bits per axis (default: what the cells need, as published models do)"
    )
    networks = ops.add_parser("backbones", help="whole backbones: forward pass and training step, time and memory")
    _add_shared(networks, points=200_000, sizes=[0.05], rounds=3, least=1)
    networks.add_argument("--model", action="append", metavar="NAME", help="may repeat (default: all)")
    experiments = ops.add_parser("configs", help="the models of configs on a training batch of their own data")
    experiments.add_argument("configs", nargs="+", type=Path, metavar="CONFIG", help="experiments, as for pc3d train")
    experiments.add_argument("--root", metavar="DIR", help="folder of the data set's files")
    experiments.add_argument("--threads", type=_at_least(1), help="threads of torch and of the kernels")
    experiments.add_argument("--rounds", type=_at_least(3), default=5, help="timed rounds, 3 or more (default 5)")
    experiments.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    layouts = ops.add_parser("orders", help="sparse layers on voxels in every order, and the time to find the order")
    _add_shared(layouts, points=200_000, sizes=[0.1])
    growing = ops.add_parser("scenes", help="PTv3 with attention and with Mamba on scenes of growing size")
    growing.add_argument("--size", type=_at_least(10_000), action="append", help="voxels, may repeat (10^4 to 10^6)")
    growing.add_argument("--threads", type=_at_least(1), help="threads of torch and of the kernels")
    growing.add_argument("--rounds", type=_at_least(1), default=3, help="timed rounds of small scenes (default 3)")
    growing.add_argument("--picture", type=Path, metavar="FILE", help="draw time against size")
    growing.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    clouds = ops.add_parser(
        "points", help="neighbours, farthest points, balls, distinct voxels, segments; beside SciPy, Open3D, fpsample"
    )
    _add_shared(clouds, points=200_000, sizes=[0.1])
    graphs = ops.add_parser("segments", help="graph segmentation, step by step")
    _add_shared(graphs, points=200_000, sizes=[0.02, 0.05])
    feeding = ops.add_parser("data", help="the data of a config: stages, loader with workers, training fed by it")
    feeding.add_argument("--config", required=True, metavar="FILE", help="the experiment")
    feeding.add_argument("--clouds", type=_at_least(1), default=8, help="training clouds for the stages (default 8)")
    feeding.add_argument("--workers", type=_at_least(1), default=2, help="processes of the loader (default 2)")
    feeding.add_argument("--steps", type=int, default=20, help="of training, with and without workers (default 20)")
    feeding.add_argument("--rounds", type=_at_least(1), default=3, help="timed rounds (default 3)")
    feeding.add_argument("--threads", type=_at_least(1), help="threads of training (default: torch's)")
    feeding.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    feeding.add_argument("overrides", nargs="*", help="after --: overrides of the config, as in pc3d train")
    grouped = ops.add_parser(
        "windows", help="a layer of linear attention in windows of voxels beside softmax attention"
    )
    grouped.add_argument(
        "--cloud", type=_points_and_size, action="append", metavar="POINTS:SIZE", help="generated sweep, may repeat"
    )
    grouped.add_argument("--engine", choices=list(windows.engines()), action="append", help="may repeat (default: all)")
    grouped.add_argument("--threads", type=_at_least(1), help="threads of torch and of the kernels (default: torch's)")
    grouped.add_argument("--rounds", type=_at_least(1), default=3, help="timed rounds (default 3)")
    grouped.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    parts = ops.add_parser("fusion", help="Segment-Fusion on rooms with part errors put in: what it repairs")
    parts.add_argument("--seconds", type=_at_least(1), default=240, help="of training (default 240)")
    parts.add_argument("--seed", type=int, default=0, help="of rooms, errors and training")
    parts.add_argument("--threads", type=_at_least(1), help="threads of torch and of the kernels (default: torch's)")
    parts.add_argument("--picture", type=Path, metavar="FILE", help="draw a room: truth, backbone, voting, fusion")
    parts.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    scans = ops.add_parser("scan", help="selective scan of Mamba beside its sequential and chunked forms in torch")
    scans.add_argument(
        "--shape", type=scan.shape, action="append", metavar="BxLxDxN", help="may repeat (default: two of the field)"
    )
    scans.add_argument("--growth", action="store_true", help="the kernels alone, for lengths from 10^4 to 10^6")
    scans.add_argument("--threads", type=_at_least(1), help="threads of torch and of the kernels (default: torch's)")
    scans.add_argument("--rounds", type=_at_least(1), default=7, help="timed rounds (default 7)")
    scans.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    return parser


def _add_shared(
    parser: argparse.ArgumentParser, points: int, sizes: list[float], rounds: int = 9, least: int = LEAST_ROUNDS
) -> None:
    parser.set_defaults(default_sizes=sizes)
    parser.add_argument("clouds", nargs="*", type=Path, help="readable clouds; none: a generated lidar sweep")
    parser.add_argument(
        "--points", type=_at_least(1), default=points, help=f"of the generated sweep (default {points})"
    )
    parser.add_argument(
        "--size", type=float, action="append", help=f"cell edge in metres, may repeat (default {sizes})"
    )
    parser.add_argument("--threads", type=_at_least(1), help="threads of torch and of the kernels (default: torch's)")
    parser.add_argument(
        "--rounds", type=_at_least(least), default=rounds, help=f"timed rounds, {least} or more (default {rounds})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")


def _at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return integer


def _points_and_size(text: str) -> tuple[int, float]:
    points, _, size = text.partition(":")
    try:
        return int(points), float(size)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not POINTS:SIZE, as in 120000:0.32") from None


def _odd(text: str) -> int:
    value = int(text)
    if value < 1 or value % 2 == 0:
        raise argparse.ArgumentTypeError(f"{value} is not odd and positive")
    return value
