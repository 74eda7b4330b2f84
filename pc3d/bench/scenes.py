"""PTv3 with attention and with Mamba on scenes of 10^4 to 10^6 voxels: time and memory of the forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from pc3d.bench.backbones import median_ms, peak_mb
from pc3d.data.transforms import GridSample
from pc3d.points import Points

SIZES = (10_000, 31_623, 100_000, 316_228, 1_000_000)
IN_CHANNELS = 6
_LARGE = 200_000  # voxels from which one run must do
_ROOMS, _GRID, _PITCH = 4, 0.08, 150  # different rooms, metres of a voxel, voxels between copies


@dataclass
class SceneTiming:
    """One network on one scene; memory in MB above that of the process before it."""

    model: str
    voxels: int
    threads: int
    forward_ms: float
    forward_mb: float


def models() -> dict[str, Callable[[], Any]]:
    """The networks, alike but for what mixes the tokens."""
    from pc3d.models import PTv3

    return {
        "PTv3.small, attention": lambda: PTv3.small(IN_CHANNELS),
        "PTv3.small, Mamba": lambda: PTv3.small(IN_CHANNELS, mixer="mamba"),
    }


def scene(voxels: int) -> Points:
    """Copies of a few generated rooms side by side, cut to so many voxels."""
    from pc3d.datasets import SyntheticRooms

    rooms = SyntheticRooms(train_rooms=_ROOMS, points=25_000)
    sampled = [GridSample(_GRID, pick="first")(rooms.load("train", i)) for i in range(_ROOMS)]
    side = math.isqrt(voxels * _ROOMS // sum(room.num_points for room in sampled)) + 1
    coords: list[Tensor] = []
    grids: list[Tensor] = []
    while sum(map(len, grids)) < voxels:
        room, copies = sampled[len(grids) % _ROOMS], len(grids)
        place = torch.tensor([copies % side, copies // side, 0]) * _PITCH
        grids.append(room.get("grid_coord") + place.int())
        coords.append(room.coord + place * _GRID)
    coord, grid = torch.cat(coords)[:voxels], torch.cat(grids)[:voxels]
    feat = torch.randn(voxels, IN_CHANNELS, generator=torch.Generator().manual_seed(0))
    return Points(coord, attrs={"grid_coord": grid, "feat": feat})


def run(sizes: Sequence[int], rounds: int, threads: int) -> list[SceneTiming]:
    """Time every network on every scene, each in a process of its own."""
    timings = []
    for size in sizes:
        for name in models():
            with get_context("spawn").Pool(1) as pool:
                timings.append(pool.apply(_measure, (name, size, 1 if size > _LARGE else rounds, threads)))
            print(line(timings[-1]), flush=True)
    return timings


def _measure(name: str, voxels: int, rounds: int, threads: int) -> SceneTiming:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = models()[name]().eval()
    small, large = scene(min(SIZES)), scene(voxels)
    with torch.no_grad():
        model(small)  # what is set up once is not timed
        before = peak_mb()
        took = median_ms(lambda: model(large.with_attrs()), rounds, warm_up=voxels <= _LARGE)
    return SceneTiming(name, voxels, threads, took, peak_mb() - before)


def line(timing: SceneTiming) -> str:
    return (
        f"{timing.model:24} {timing.voxels:>9,} voxels, {timing.threads} threads: {timing.forward_ms:>8,.0f} ms, "
        f"{1e3 * timing.forward_ms / timing.voxels:.1f} us per voxel, {timing.forward_mb:>6,.0f} MB"
    )


def rows(timings: Sequence[SceneTiming]) -> list[dict[str, Any]]:
    """As JSON and the pictures hold them."""
    return [
        {
            "op": timing.model,
            "threads": timing.threads,
            "voxels": timing.voxels,
            "ms": {"pc3d": timing.forward_ms},
            "mb": timing.forward_mb,
        }
        for timing in timings
    ]
