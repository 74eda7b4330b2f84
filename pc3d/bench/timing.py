"""Interleaved timing: every engine does the same work in every round, so a busy machine is equally unfair to all."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from pc3d.errors import InputError
from pc3d.ops.backend import use_backend

Result = TypeVar("Result")


@dataclass(frozen=True)
class Timing:
    """How long one engine took for one case.

    Attributes:
        case: what was done.
        engine: who did it.
        rows: points or voxels it was done to.
        median_ms: elapsed milliseconds, median over the rounds.
        cpu_ms: processor time of all threads, median over the rounds. On one thread it is what ``median_ms`` would be
            if nobody else used the machine.
    """

    case: str
    engine: str
    rows: int
    median_ms: float
    cpu_ms: float

    @property
    def million_rows_per_second(self) -> float:
        return self.rows / self.median_ms / 1e3


def time_interleaved(case: str, rows: int, engines: Mapping[str, Callable[[], object]], rounds: int) -> list[Timing]:
    """Median time of each engine over ``rounds`` rounds, after one untimed round; in the order of ``engines``."""
    elapsed: dict[str, list[float]] = {name: [] for name in engines}
    processor: dict[str, list[float]] = {name: [] for name in engines}
    for round_number in range(rounds + 1):
        for name, work in engines.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            work()
            if round_number > 0:
                processor[name].append(time.process_time() - cpu_start)
                elapsed[name].append(time.perf_counter() - start)
    return [Timing(case, name, rows, _median_ms(elapsed[name]), _median_ms(processor[name])) for name in engines]


def _median_ms(seconds: list[float]) -> float:
    return 1e3 * statistics.median(seconds)


def on_reference(work: Callable[[], Result]) -> Callable[[], Result]:
    """The same work on the plain-torch path."""

    def run() -> Result:
        with use_backend("reference"):
            return work()

    return run


def check_equal(case: str, results: Mapping[str, tuple[np.ndarray, ...]]) -> None:
    """Refuse to time engines that do not agree on their ``results``.

    Raises:
        InputError: naming the engine that differs from the first one.
    """
    (first, expected), *others = results.items()
    for name, found in others:
        if not all(map(np.array_equal, expected, found)):
            raise InputError(f"{case}: {name} and {first} do not give the same result; no times are shown")


def table(timings: list[Timing]) -> str:
    """The timings as text, one line each; ``x`` is the time of the engine over that of the first engine of its case."""
    lines = [f"{'case':<52} {'engine':<10} {'rows':>9} {'median ms':>10} {'cpu ms':>9} {'M rows/s':>9} {'x':>6}"]
    baseline = {t.case: t for t in reversed(timings)}
    for t in timings:
        ratio = t.median_ms / baseline[t.case].median_ms
        lines.append(
            f"{t.case:<52} {t.engine:<10} {t.rows:>9} {t.median_ms:>10.2f} {t.cpu_ms:>9.2f} "
            f"{t.million_rows_per_second:>9.1f} {ratio:>6.2f}"
        )
    return "\n".join(lines)


def report(timings: list[Timing], rounds: int) -> dict[str, Any]:
    """The timings with the machine they were taken on, for a JSON file."""
    return {"machine": machine(), "rounds": rounds, "timings": [asdict(t) for t in timings]}


def machine() -> dict[str, Any]:
    """What a reader of the numbers has to know; a ``load`` above 0 means that somebody else was computing too."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
