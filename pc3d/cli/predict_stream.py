"""``pc3d predict --stream``: LAS and LAZ files larger than memory, labelled tile by tile."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pc3d.errors import InputError

if TYPE_CHECKING:
    import torch

    from pc3d.cli.parser import Parser
    from pc3d.io import LasIndex
    from pc3d.points import Points
    from pc3d.tasks.streaming import Predict

_SUFFIXES = (".las", ".laz")
_TARGETS = (".las", ".laz", ".npy")
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_BYTES_IN_MEMORY = 400  # of a point read whole with all its fields, copied once by a transform
_SMALLEST_BYTES = 500  # of a point in a model, should the probe find less
_PROBE = 20_000
_CACHE_SHARE, _MODEL_SHARE = 0.3, 0.5
_FEWEST_POINTS, _MOST_POINTS = 5_000, 5_000_000
_LEAST_FREE = 64e6
_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def add_options(parser: Parser) -> None:
    """Options of ``pc3d predict`` that are about streaming."""
    group = parser.add_argument_group("LAS and LAZ larger than memory")
    group.add_argument(
        "--stream",
        action="store_true",
        help="label tile by tile from the disk, all files together; an interrupted run goes on when repeated. "
        "Chosen by itself for files that do not fit --memory",
    )
    group.add_argument("--memory", metavar="SIZE", help="for the whole program, as 4GB; default half of the machine's")
    group.add_argument("--halo", type=float, metavar="METRES", help="context around a tile; default by the model")
    group.add_argument("--blend", action="store_true", help="average the predictions of tiles over their halos")
    group.add_argument("--label_field", metavar="NAME", help="field for the labels; default classification")


def wants_stream(options: argparse.Namespace, jobs: Sequence[tuple[Path, Path]], plain_task: bool) -> bool:
    """Whether to stream: asked for, or needed and possible.

    Args:
        jobs: pairs of source and target.
        plain_task: the model segments points into classes, and nothing else.

    Raises:
        InputError: if it is asked for and not possible, or one of its options is given without it.
    """
    sources = [source for source, _ in jobs]
    odd_source = next((source for source in sources if source.suffix.lower() not in _SUFFIXES), None)
    odd_target = next((target for _, target in jobs if target.suffix.lower() not in _TARGETS), None)
    if options.stream:
        if not plain_task:
            raise InputError("--stream: is for models that segment points into classes")
        if odd_source is not None:
            raise InputError(f"--stream: {odd_source} is no LAS or LAZ file: pc3d export turns it into one")
        if odd_target is not None:
            raise InputError(f"{odd_target}: --stream writes .las, .laz or .npy")
    memory, possible = memory_budget(options.memory), plain_task and odd_source is None and odd_target is None
    if options.memory is not None and not possible:
        raise InputError("--memory: is for LAS and LAZ files whose points a model segments into classes")
    if options.stream or (possible and _too_large(sources, memory)):
        if options.columns is not None:
            raise InputError("--columns: LAS and LAZ files name their fields themselves")
        if options.label_field is not None and jobs[0][1].suffix.lower() == ".npy":
            raise InputError("--label_field: is for LAS and LAZ; arrays have their labels in 'label'")
        return True
    given = {"--halo": options.halo, "--blend": options.blend or None, "--label_field": options.label_field}
    for name, value in given.items():
        if value is not None:
            raise InputError(f"{name}: is for --stream")
    return False


def _too_large(sources: Sequence[Path], memory: int) -> bool:
    largest = max(sources, key=_num_points)
    count = _num_points(largest)
    if count * _BYTES_IN_MEMORY <= memory:
        return False
    print(f"{largest}: {count:,} points are labelled tile by tile (--memory {memory / 1e9:.1f}GB)")
    return True


def _num_points(path: Path) -> int:
    from pc3d.io.las_header import ByteReader, read_header

    try:
        with ByteReader(path) as reader:
            return read_header(reader).num_points
    except InputError:
        return 0  # reading it will say what is wrong


def memory_budget(text: str | None) -> int:
    """Bytes of ``"4GB"``, ``"500 MB"``, ``"2e9"``; half of the machine's or container's without a text.

    Raises:
        InputError: if it is no size.
    """
    if text is None:
        return _machine_memory() // 2
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?)i?b?\s*", text.lower())
    try:
        value = float(found[1]) * _UNITS[found[2]] if found else 0.0
    except ValueError:
        value = 0.0
    if value < 1e6:
        raise InputError(f"--memory {text}: give a size such as 4GB or 800MB")
    return int(value)


def _machine_memory() -> int:
    """Bytes of the machine, or of the container the program runs in if that has less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**33
    for name in _CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such limit, or "max"
            total = min(total, int(Path(name).read_text()))
    return total


def stream_files(
    jobs: Sequence[tuple[Path, Path]], task: Any, pipeline: Any, card: Any, options: argparse.Namespace
) -> list[str]:
    """Label files together, tile by tile; a line about each of them.

    Raises:
        InputError: if the memory is too small, or a file is damaged.
    """
    from pc3d.data.tile_plan import TilePlan
    from pc3d.io import LasIndex
    from pc3d.tasks.streaming import StreamingPredictor, read_identity

    index = LasIndex.open([source for source, _ in jobs])
    if index.num_points == 0:
        raise InputError(f"{index.files[0].path}: holds no points")
    predict = _model(task, pipeline, options)
    folder = _work_folder(jobs, Path(options.output))
    identity = _identity(index, jobs, task, options)
    before = read_identity(folder) or {}
    budget = Budget(memory_budget(options.memory))
    resumed = {key: value for key, value in before.items() if key != "plan"} == identity
    plan = before["plan"] if resumed else _tiles(index, predict, task, pipeline, options, budget)
    if resumed:
        print(f"going on with the run in {folder}")
    started = time.perf_counter()
    run = StreamingPredictor(
        index,
        predict,
        TilePlan(index, **plan),
        _output(index, [target for _, target in jobs], card, options),
        folder,
        {**identity, "plan": plan},
        budget.cache,
        options.blend,
        options.probabilities,
    )
    try:
        with _bar(run.progress.total) as report:
            progress = run.run(report)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("repeat the command to go on") from None
    shutil.rmtree(folder)
    lines = [
        f"{source} -> {target}: {file.header.num_points:,} points"
        for (source, target), file in zip(jobs, index.files, strict=True)
    ]
    minutes, chunks = (time.perf_counter() - started) / 60, max(len(index.file), 1)
    again = f", {progress.repeated} of them again" if progress.repeated else ""
    return [
        *lines,
        f"{progress.tiles} tiles of up to {plan['side']:g} m with {plan['halo']:g} m around them{again}; "
        f"chunks decoded {progress.decoded / chunks:.2f} times; {minutes:.1f} minutes; "
        f"at most {peak_memory() / 1e9:.2f} GB of memory",
    ]


def _model(task: Any, pipeline: Any, options: argparse.Namespace) -> Predict:
    from pc3d.tasks import predict_cloud
    from pc3d.tasks.augmentations import augmentation_passes

    passes = None if options.tta == "none" else augmentation_passes(options.tta)

    def predict(cloud: Points, generator: Any) -> Any:
        return predict_cloud(task, pipeline, cloud, passes, mode=options.mode, generator=generator)

    return predict


def _output(index: LasIndex, targets: list[Path], card: Any, options: argparse.Namespace) -> Any:
    import torch

    from pc3d.cli.predict import label_codes, probability_names
    from pc3d.tasks.stream_output import ArrayOutput, LasOutput

    classes = torch.arange(len(card["class_names"]) + 1)
    classes[-1] = -1
    codes = label_codes(classes, card["label_map"]).numpy()
    names = probability_names(card["class_names"]) if options.probabilities else []
    if targets[0].suffix.lower() == ".npy":
        return ArrayOutput(index, targets, codes, names)
    field = "classification" if options.label_field is None else options.label_field
    return LasOutput(index, targets, codes.clip(min=0), field, names)


def _work_folder(jobs: Sequence[tuple[Path, Path]], output: Path) -> Path:
    """Where an interrupted run is kept: beside a file, or in the output folder."""
    if len(jobs) == 1:
        target = jobs[0][1]
        return target.with_name(f".{target.name}.stream")
    return output / ".stream"


def _identity(
    index: LasIndex, jobs: Sequence[tuple[Path, Path]], task: Any, options: argparse.Namespace
) -> dict[str, Any]:
    from pc3d.peft import fingerprint

    stats = [file.path.stat() for file in index.files]
    return {
        "inputs": [
            [str(source.resolve()), s.st_size, s.st_mtime_ns] for (source, _), s in zip(jobs, stats, strict=True)
        ],
        "targets": [str(target.resolve()) for _, target in jobs],
        "model": fingerprint(task.state_dict()),
        "options": {
            name: getattr(options, name)
            for name in ("mode", "tta", "blend", "probabilities", "label_field", "tile", "halo")
        },
    }


def _bar(total: int) -> Any:
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console()
    columns = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()]

    @contextmanager
    def bar() -> Any:
        with Progress(
            *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
        ) as progress:
            item = progress.add_task("reading", total=total)

            def report(now: Any) -> None:
                text = f"tile {now.tiles} of {now.tiles_total}"
                progress.update(item, completed=now.points, description=text)

            yield report

    return bar()


# Memory --------------------------------------------------------------------------------------------------------------


class Budget:
    """What of the memory is left for decoded chunks and for the model.

    Attributes:
        cache: bytes for decoded chunks.
        model: bytes for the points of a tile and what the model makes of them.

    Raises:
        InputError: if the program as it is takes nearly all of it.
    """

    def __init__(self, memory: int) -> None:
        free = memory - used_memory()
        if free < _LEAST_FREE:
            least = (used_memory() + _LEAST_FREE) / 1e6
            raise InputError(f"--memory {memory / 1e6:.0f}MB: the program with its model needs {least:.0f}MB at least")
        self.cache, self.model = int(_CACHE_SHARE * free), int(_MODEL_SHARE * free)


def _tiles(
    index: LasIndex,
    predict: Predict,
    task: Any,
    pipeline: Any,
    options: argparse.Namespace,
    budget: Budget,
) -> dict[str, Any]:
    """Side, halo and budget of points of the tiles."""
    import numpy as np

    halo = options.halo
    if halo is None:  # two cells of the coarsest stage: what it sees of its neighbours
        stride = max((info.stride for info in task.backbone.feature_info), default=1)
        halo = max(2.0 * stride * (pipeline.grid_size or 0.5), 1.0)
    each = max(point_memory(index, predict), _SMALLEST_BYTES)
    most = min(budget.model / each, _device_points(index, predict, task.device))
    max_points = int(np.clip(most, _FEWEST_POINTS, _MOST_POINTS))
    side = options.tile
    if side is None:
        area = float(np.maximum(index.boxes[:, 3:5] - index.boxes[:, :2], 1.0).prod(1).sum())
        window = (0.7 * max_points * area / index.num_points) ** 0.5
        side = float(f"{max(window - 2 * halo, 2 * halo):.3g}")
    return {"side": side, "halo": halo, "max_points": max_points}


def point_memory(index: LasIndex, predict: Predict) -> float:
    """Bytes that a point takes while it is predicted, tried on some neighbours in the middle of the scan."""
    import gc

    import torch

    cloud = _probe(index)
    gc.collect()  # or it may set memory free in the middle of the measurement
    before = own_memory()
    peak = _peak_while(lambda: predict(cloud, torch.Generator().manual_seed(0)))
    return (peak - before) / cloud.num_points


def _device_points(index: LasIndex, predict: Predict, device: torch.device) -> float:
    """Points that a model may be given on its device, tried on the same neighbours; infinity on the CPU."""
    import torch

    if device.type != "cuda":
        return float("inf")
    cloud = _probe(index)
    torch.cuda.empty_cache()
    free, before = torch.cuda.mem_get_info(device)[0], torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    predict(cloud, torch.Generator().manual_seed(0))
    taken = torch.cuda.max_memory_allocated(device) - before
    return _MODEL_SHARE * free / max(taken / cloud.num_points, 1)


def _probe(index: LasIndex) -> Points:
    """Some neighbours in the middle of the scan."""
    import numpy as np

    from pc3d.io.las_header import coordinates
    from pc3d.tasks.streaming import ScanPoints

    number = len(index.file) // 2
    file = int(index.file[number])
    records = index.records(number)
    xy = coordinates(index.files[file].header, records)[:, :2]
    near = np.sort(np.argsort(np.abs(xy - xy[len(xy) // 2]).max(1), kind="stable")[:_PROBE])
    return ScanPoints(index).cloud([(file, records[near])], "a probe", xy.min(0))


def _peak_while(call: Callable[[], Any]) -> int:
    """Most :func:`own_memory` while a call runs, looked at every few milliseconds."""
    peak, done = [own_memory()], threading.Event()

    def watch() -> None:
        while not done.wait(0.003):
            peak[0] = max(peak[0], own_memory())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return peak[0]


def used_memory() -> int:
    """Bytes this process holds now; where the system does not tell, the most it ever held."""
    pages = _pages()
    return pages[1] * os.sysconf("SC_PAGE_SIZE") if pages else peak_memory()


def own_memory() -> int:
    """As :func:`used_memory` without pages of files, which the system takes back and brings in as it likes."""
    pages = _pages()
    return (pages[1] - pages[2]) * os.sysconf("SC_PAGE_SIZE") if pages else peak_memory()


def _pages() -> list[int]:
    """The process's pages: its size, those in memory, those of them that belong to files, ...; empty if not told."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


def peak_memory() -> int:
    """Most bytes this process ever held; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
