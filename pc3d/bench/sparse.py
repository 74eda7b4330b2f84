"""Sparse convolution engines beside each other: layers, kernel maps and the whole SparseUNet-34C."""

from __future__ import annotations

import argparse
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pc3d.bench.clouds import lidar_sweep
from pc3d.bench.engines import Engine, Pc3dBfloat16, installed_engines
from pc3d.errors import InputError
from pc3d.io import read
from pc3d.models import SparseUNet
from pc3d.ops.kernel_map import KernelMap, strided_map, submanifold_map
from pc3d.voxels import Voxels, voxelize

CHANNELS = ((4, 32), (32, 32), (64, 64), (128, 128), (256, 256))
STRIDED_CHANNELS = ((32, 64), (128, 256))
LEVELS = 5
GROWTH = (10_000, 31_623, 100_000, 316_228, 1_000_000)  # voxels
CLASSES = 20
DEFAULT_CLOUDS = (
    "scannet_scene0000_00.bin:0.05:6",
    "scannet_scene0000_00.bin:0.02:6",
    "fragment.pcd:0.01",
    "lidar_benchmark-pc.npz:0.1",
)
OPS = (
    *(f"subm3_{i}x{o}_{what}" for i, o in CHANNELS for what in ("fwd", "fwdbwd")),
    *(f"down2_{i}x{o}_fwd" for i, o in STRIDED_CHANNELS),
    *(f"up2_{o}x{i}_fwd" for i, o in STRIDED_CHANNELS),
    "map_subm3",
    f"map_pyramid{LEVELS}",
    "unet34c_infer",
    "unet34c_train",
)
_REFERENCE = "torch_gather"
_RACES = "spconv_cpu"  # on more than one thread: timed, but neither checked nor a reference


@dataclass(frozen=True)
class Row:
    """One case on one cloud with one number of threads.

    Attributes:
        ms: median elapsed milliseconds of each engine.
        ratio: each peer's time over ours; above 1 we are faster.
        max_err: largest difference of our result from plain torch's, relative to the largest value; None for maps.
    """

    op: str
    data: str
    voxels: int
    threads: int
    ms: dict[str, float]
    ratio: dict[str, float]
    max_err: float | None


@dataclass(frozen=True)
class Case:
    """Works of the engines, and their results where they can be compared."""

    works: Mapping[str, Callable[[], object]]
    results: Mapping[str, Callable[[], Tensor]]


def read_voxels(spec: str) -> tuple[str, Tensor]:
    """Name and ``(M, 4)`` int32 raster-sorted voxels of ``PATH:VOXEL[:COLS]``, coordinates from 0.

    Raises:
        InputError: if the text has another form or the file cannot be read.
    """
    path, *numbers = spec.rsplit(":", 2)
    if len(numbers) == 2 and not numbers[1].isdigit():
        path, numbers = f"{path}:{numbers[0]}", numbers[1:]
    try:
        size, columns = float(numbers[0]), int(numbers[1]) if len(numbers) > 1 else None
    except (ValueError, IndexError):
        raise InputError(f"{spec}: a cloud is named PATH:VOXEL[:COLS], such as scan.bin:0.05:6") from None
    if not (math.isfinite(size) and size > 0):
        raise InputError(f"{spec}: the voxel size must be positive, in metres")
    points = read(path) if columns is None else read(path, columns=columns)
    coord = voxelize(points.with_attrs(feat=points.coord), size, "first").coord
    return f"{Path(path).name}@{size:g}", coord


def default_clouds() -> list[str]:
    """The real clouds in ``bench_clouds`` of ``$PC3D_DATA_DIR`` (default ``../shared/data`` beside the repository)."""
    beside = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
    folder = Path(os.environ.get("PC3D_DATA_DIR", beside)) / "bench_clouds"
    return [str(folder / name) for name in DEFAULT_CLOUDS if (folder / name.split(":")[0]).exists()]


def measure(
    name: str, coord: Tensor, engines: Sequence[Engine], ops: Sequence[str], rounds: int, budget: float = 60.0
) -> Iterator[Row]:
    """Time the cases ``ops`` on one set of voxels with torch's present number of threads.

    Args:
        name: of the data, for the rows.
        coord: ``(M, 4)`` int32, coordinates from 0.
        engines: ours first; plain torch among them is the reference of the accuracy check.
        ops: names out of :data:`OPS`.
        rounds: timed rounds; all engines work in each, one after the other.
        budget: seconds after which a case ends early, after 3 rounds at least.

    Raises:
        InputError: if our result differs from plain torch's.
    """
    maps = _Maps(coord)
    for op in ops:
        torch.manual_seed(0)
        case = _case(op, maps, engines)
        error = _check(op, case, {engine.name: engine.tolerance for engine in engines})
        ms = _interleaved(case.works, rounds, budget)
        ours, *peers = ms
        ratio = {peer: round(ms[peer] / ms[ours], 3) for peer in peers}
        yield Row(op, name, len(coord), torch.get_num_threads(), ms, ratio, error)


class _Maps:
    """The kernel maps of one set of voxels, made when first asked for; ``context`` is shared by all networks."""

    def __init__(self, coord: Tensor) -> None:
        self.coord = coord
        self.context: dict[Any, Any] = {}
        self._made: dict[str, KernelMap] = {}

    def of(self, kind: str) -> KernelMap:
        if kind not in self._made:
            if kind == "subm3":
                self._made[kind] = submanifold_map(self.coord, (3, 3, 3))
            elif kind == "down2":
                self._made[kind] = strided_map(self.coord, (2, 2, 2), (2, 2, 2))[1]
            else:
                self._made[kind] = self.of("down2").inverse()
        return self._made[kind]


def _case(op: str, maps: _Maps, engines: Sequence[Engine]) -> Case:
    kind, *rest = op.split("_")
    if kind == "map":
        levels = 1 if rest == ["subm3"] else LEVELS
        return Case({e.name: _work(e.build_maps, maps.coord, levels) for e in engines if e.builds_maps}, {})
    if kind == "unet34c":
        return _network_case(maps, engines, training=rest == ["train"])
    cin, cout = map(int, rest[0].split("x"))
    return _layer_case(maps.of(kind), engines, cin, cout, training=rest[1] == "fwdbwd")


def _work(function: Callable[..., object], *arguments: object) -> Callable[[], object]:
    return lambda: function(*arguments)


def _layer_case(kmap: KernelMap, engines: Sequence[Engine], cin: int, cout: int, training: bool) -> Case:
    feat, upstream = torch.randn(kmap.num_in, cin), torch.randn(kmap.num_out, cout)
    weight = torch.randn(kmap.kernel_volume, cin, cout) / (kmap.kernel_volume * cin) ** 0.5

    def forward(engine: Engine) -> Callable[[], Tensor]:
        own, product = engine.layout(weight), engine.convolution(kmap)
        return torch.no_grad()(lambda: product(feat, own))

    def step(engine: Engine) -> Callable[[], tuple[Tensor, ...]]:
        leaf, own, product = (
            feat.clone().requires_grad_(),
            engine.layout(weight).requires_grad_(),
            engine.convolution(kmap),
        )
        return lambda: torch.autograd.grad(product(leaf, own), [leaf, own], upstream)

    if not training:
        works = {engine.name: forward(engine) for engine in engines}
        return Case(works, works)
    steps = {engine.name: step(engine) for engine in engines}
    return Case(steps, {name: _work_of(run) for name, run in steps.items()})


def _work_of(step: Callable[[], tuple[Tensor, ...]]) -> Callable[[], Tensor]:
    return lambda: step()[0]


def _network_case(maps: _Maps, engines: Sequence[Engine], training: bool) -> Case:
    feat, label = torch.randn(len(maps.coord), 6), torch.randint(0, CLASSES, (len(maps.coord),))
    batch = int(maps.coord[:, 0].max()) + 1

    def run(engine: Engine) -> tuple[Callable[[], object], Callable[[], Tensor]]:
        torch.manual_seed(0)
        backbone = engine.adopt(SparseUNet(in_channels=6).train(training))
        assert isinstance(backbone, SparseUNet)
        head = nn.Linear(backbone.out_channels, CLASSES)

        def logits() -> Tensor:
            return head(backbone.forward_voxels(Voxels(maps.coord, feat, batch, context=maps.context)).feat)

        def step() -> None:
            backbone.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(logits(), label).backward()

        return step if training else torch.no_grad()(logits), torch.no_grad()(logits)

    runs = {engine.name: run(engine) for engine in engines}
    return Case({name: work for name, (work, _) in runs.items()}, {name: result for name, (_, result) in runs.items()})


def _check(op: str, case: Case, tolerances: Mapping[str, float]) -> float | None:
    """Largest difference of our result from the reference's, relative to its largest value."""
    if _REFERENCE not in case.results:
        return None
    expected = case.results[_REFERENCE]()
    errors = {
        name: float((result() - expected).abs().max() / expected.abs().max())
        for name, result in case.results.items()
        if name != _REFERENCE and (name != _RACES or torch.get_num_threads() == 1)
    }
    for name, error in errors.items():
        if not error <= tolerances[name]:
            raise InputError(f"{op}: {name} and {_REFERENCE} differ by {error:.1e} of the maximum; no times are shown")
    return next(iter(errors.values()), None)


def _interleaved(works: Mapping[str, Callable[[], object]], rounds: int, budget: float) -> dict[str, float]:
    """Median milliseconds of each work; every one runs once per round, after one untimed round."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    end = time.perf_counter() + budget
    for number in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if number:
                seconds[name].append(time.perf_counter() - start)
        if number >= 3 and time.perf_counter() > end:
            break
    return {name: round(1e3 * statistics.median(times), 4) for name, times in seconds.items()}


def matrix_gflops(rounds: int = 15) -> float:
    """Rate of torch's float32 matrix product, 4096 x 256 by 256 x 256, with its present number of threads."""
    a, b = torch.randn(4096, 256), torch.randn(256, 256)
    out = torch.empty(4096, 256)
    ms = _interleaved({"mm": lambda: torch.mm(a, b, out=out)}, rounds, budget=5.0)["mm"]
    return round(2e-6 * 4096 * 256 * 256 / ms, 1)


def growth(engines: Sequence[Engine], sizes: Sequence[int], rounds: int) -> Iterator[Row]:
    """Map and 32 to 32 layer of ours on generated sweeps of about ``sizes`` voxels, without the peers."""
    for size in sizes:
        coord = sweep_voxels(size)
        yield from measure("lidar", coord, engines[:1], ["map_subm3", "subm3_32x32_fwd"], rounds)


def sweep_voxels(count: int) -> Tensor:
    """``(count, 4)`` int32: the first voxels of a generated street, 5 cm cells."""
    cloud = lidar_sweep(2 * count)
    coord = voxelize(cloud.with_attrs(feat=cloud.coord), 0.05, "first").coord
    return coord[:count].contiguous()


def inference_memory(count: int) -> tuple[float, float]:
    """Seconds and peak resident GiB of this process after SparseUNet-34C inference on ``count`` voxels."""
    coord = sweep_voxels(count)
    network = SparseUNet(in_channels=6).eval()
    start = time.perf_counter()
    with torch.inference_mode():
        network.forward_voxels(Voxels(coord, torch.randn(len(coord), 6), 1))
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tools/bench.py sparse``."""
    parser.add_argument(
        "clouds",
        nargs="*",
        metavar="PATH:VOXEL[:COLS]",
        help="clouds, voxel edge in metres, columns of a raw file "
        "(default: the real ones in bench_clouds of $PC3D_DATA_DIR, else a generated sweep)",
    )
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1], help="numbers of threads to measure with (default 1)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds per case, 3 rounds at least (default 60)")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="OP",
        default=[""],
        help="cases whose names start so, such as subm3_64 map unet34c_infer",
    )
    parser.add_argument(
        "--skip",
        nargs="+",
        metavar="PEER",
        default=[],
        help="peers to leave out, such as torch_gather (no accuracy check then)",
    )
    parser.add_argument(
        "--bf16", action="store_true", help="also time our kernels in autocast to bfloat16 (results within 3 %% pass)"
    )
    parser.add_argument(
        "--growth",
        action="store_true",
        help="instead: time against 10^4 to 10^6 voxels, and peak memory of inference at the most",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="also draw the ratios (with --growth: the times) to this PNG"
    )


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure what the command line asks for, showing each row as it comes."""
    ops = [op for op in OPS if any(op.startswith(start) for start in args.only)]
    if not ops:
        raise InputError(f"--only {' '.join(args.only)}: no such case; there are {', '.join(OPS)}")
    if min(args.threads) < 1 or args.rounds < 1:
        raise InputError("--threads and --rounds must be 1 or more")
    engines = [engine for engine in installed_engines() if engine.name == "pc3d" or engine.name not in args.skip]
    if args.bf16 and args.growth:
        raise InputError("--bf16: --growth times float32 only")
    if args.bf16:
        engines.append(Pc3dBfloat16())
    rows: list[Row] = []
    clouds = [] if args.growth else [read_voxels(spec) for spec in args.clouds or default_clouds()]
    for threads in args.threads:
        torch.set_num_threads(threads)
        print(f"{threads} thread(s): torch.mm {matrix_gflops()} GFLOP/s", flush=True)
        if args.growth:
            rows += _show(growth(engines, GROWTH, args.rounds))
        for name, coord in clouds or ([] if args.growth else [("lidar", sweep_voxels(50_000))]):
            rows += _show(measure(name, coord, engines, ops, args.rounds, args.budget))
    if args.growth:
        seconds, gigabytes = inference_memory(GROWTH[-1])
        print(f"SparseUNet-34C inference on {GROWTH[-1]:,} voxels: {seconds:.1f} s, peak memory {gigabytes:.2f} GiB")
    return [asdict(row) for row in rows]


def _show(rows: Iterator[Row]) -> list[Row]:
    shown = []
    for row in rows:
        times = "  ".join(
            f"{n} {ms:.2f}" + (f" (x{row.ratio[n]:.2f})" if n in row.ratio else "") for n, ms in row.ms.items()
        )
        error = "" if row.max_err is None else f"  err {row.max_err:.1e}"
        print(f"{row.data} {row.voxels} t{row.threads} {row.op:<20} {times}{error}", flush=True)
        shown.append(row)
    return shown
