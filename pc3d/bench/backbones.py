"""Whole backbones at published size: forward pass and training step, time and memory, each in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from pc3d.data.transforms import GridSample
from pc3d.points import Points

IN_CHANNELS = 6
OURS, PEER = "SparseUNet-34C", "SparseUNet-34C on spconv"


@dataclass
class BackboneTiming:
    """One backbone on one cloud: medians in milliseconds, memory in MB above that of the process before it."""

    model: str
    data: str
    voxels: int
    threads: int
    parameters: int
    forward_ms: float
    step_ms: float
    forward_mb: float
    step_mb: float


def models() -> dict[str, Callable[[], Any]]:
    """Backbones by name, as published for 6 input channels; beside SparseUNet the same on spconv if it is installed."""
    from pc3d.models import LitePT, PTv3, Sonata, SparseUNet

    peers: dict[str, Callable[[], Any]] = {}
    if importlib.util.find_spec("spconv"):
        from pc3d.bench.spconv_unet import SpconvUNet

        peers[PEER] = lambda: SpconvUNet(SparseUNet(IN_CHANNELS))
    return {
        OURS: lambda: SparseUNet(IN_CHANNELS),
        **peers,
        "PTv3": lambda: PTv3(IN_CHANNELS),
        "PTv3 with Mamba": lambda: PTv3(IN_CHANNELS, mixer="mamba"),
        "LitePT-S": lambda: LitePT(IN_CHANNELS),
        "LitePT-B": lambda: LitePT.base(IN_CHANNELS),
        "LitePT-L": lambda: LitePT.large(IN_CHANNELS),
        "Sonata encoder": lambda: Sonata(IN_CHANNELS, enc_mode=True),
    }


def run(clouds: Sequence[Points], size: float, names: Sequence[str], rounds: int, threads: int) -> list[BackboneTiming]:
    """Time the named backbones on every cloud, one after the other."""
    results = []
    for cloud in clouds:
        sampled = GridSample(size, pick="first")(cloud)
        described = sampled.describe().rsplit("/", 1)[-1]
        arrays = sampled.coord.numpy(), sampled.get("grid_coord").numpy()
        for name in names:
            with get_context("spawn").Pool(1) as pool:
                figures = pool.apply(_measure, (name, *arrays, rounds, threads))
            results.append(BackboneTiming(name, described, sampled.num_points, threads, **figures))
            print(line(results[-1]), flush=True)
    return results


def _measure(name: str, coord: Any, grid: Any, rounds: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = models()[name]()
    feat = torch.randn(len(coord), IN_CHANNELS)
    attrs = {"grid_coord": torch.from_numpy(grid), "feat": feat}
    points = Points(torch.from_numpy(coord), attrs=attrs)

    def forward() -> None:
        with torch.no_grad():
            model(points.with_attrs())

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(points.with_attrs()).square().mean().backward()

    forget_peak()  # what making the network took does not count
    before = peak_mb()
    model.eval()
    forward_ms = median_ms(forward, rounds)
    forward_mb = peak_mb() - before
    model.train()
    step_ms = median_ms(step, rounds)
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "parameters": parameters,
        "forward_ms": forward_ms,
        "step_ms": step_ms,
        "forward_mb": forward_mb,
        "step_mb": peak_mb() - before,
    }


def median_ms(run: Callable[[], object], rounds: int, warm_up: bool = True) -> float:
    """Median of so many runs, after an untimed one."""
    if warm_up:
        run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def forget_peak() -> None:
    """Let :func:`peak_mb` start anew from what is resident now, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """Largest resident memory of this process so far, in MB."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def line(timing: BackboneTiming) -> str:
    return (
        f"{timing.model:24} {timing.data[-24:]:24} {timing.voxels:>8,} voxels, {timing.threads} threads: forward "
        f"{timing.forward_ms:>8,.0f} ms {timing.forward_mb:>6,.0f} MB, step {timing.step_ms:>8,.0f} ms "
        f"{timing.step_mb:>6,.0f} MB, {timing.parameters / 1e6:.2f} M parameters"
    )
