"""Attention inside windows of voxels of any size: scattered linear attention beside softmax attention, time and memory.

One layer is the projection to queries, keys and values, attention of 4 heads in 128 channels, and the projection back.
Every engine works on the same windows, in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pc3d.bench.backbones import forget_peak, median_ms, peak_mb
from pc3d.bench.clouds import lidar_sweep
from pc3d.nn.attention import group_windows, window_attention
from pc3d.ops.backend import use_backend
from pc3d.ops.linear_attention import linear_attention
from pc3d.ops.order import WindowOrder
from pc3d.ops.voxelize import grid_coords, unique_voxels

CHANNELS, HEADS, SIDE = 128, 4, 12
# Points of the generated sweep and edge of a voxel in metres: about 20, 100 and 300 thousand voxels.
CLOUDS = ((160_000, 0.25), (480_000, 0.14), (900_000, 0.08))

Attend = Callable[[Tensor, Tensor], Tensor]


@dataclass
class WindowTiming:
    """One engine on one cloud: medians in milliseconds, memory in MB above that of the process before it."""

    engine: str
    voxels: int
    windows: int
    largest: int
    threads: int
    forward_ms: float
    step_ms: float
    forward_mb: float
    step_mb: float


def windows(points: int, size: float) -> Tensor:
    """``(W + 1,)`` int64 borders of the windows of a generated sweep, 12 x 12 voxels seen from above."""
    cloud = lidar_sweep(points)
    grid = grid_coords(cloud.coord, cloud.offsets, size)
    cells = unique_voxels(grid, cloud.offsets)
    coord = F.pad(grid[cells.first], (1, 0))
    order = WindowOrder(SIDE)
    return order.offsets(coord[order.rows(coord)])


def engines() -> dict[str, Attend]:
    """``(N, 3, H, D)`` projections and ``(W + 1,)`` borders of windows to ``(N, H, D)``, by name."""
    return {
        "linear, kernels": linear_attention,
        "linear, plain torch": linear_in_torch,
        "softmax, kernels": softmax_in_kernels,
        "softmax, padded": softmax_in_padded_windows,
    }


def linear_in_torch(qkv: Tensor, borders: Tensor) -> Tensor:
    """The reference of our kernels."""
    with use_backend("reference"):
        return linear_attention(qkv, borders)


def softmax_in_kernels(qkv: Tensor, borders: Tensor) -> Tensor:
    """Softmax attention without padding."""
    counts = borders.diff()
    number = torch.repeat_interleave(torch.arange(len(counts)), counts)
    q, k, v = qkv.unbind(1)
    return window_attention(q, k, v, group_windows(number, counts))


def softmax_in_padded_windows(qkv: Tensor, borders: Tensor) -> Tensor:
    """torch's softmax attention in windows filled up to the next power of two, those of one size together."""
    counts = borders.diff()
    sizes = torch.pow(2, counts.clamp(min=1).log2().ceil()).long()
    out = qkv.new_empty(len(qkv), *qkv.shape[2:])
    for size in sizes.unique().tolist():
        chosen = (sizes == size) & (counts > 0)
        place = torch.arange(size)
        real = place < counts[chosen][:, None]
        rows = torch.where(real, borders[:-1][chosen][:, None] + place, 0)
        q, k, v = qkv[rows].permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None])
        out = out.index_put((rows[real],), found.transpose(1, 2)[real])
    return out


def run(clouds: Sequence[tuple[int, float]], names: Sequence[str], rounds: int, threads: int) -> list[WindowTiming]:
    """Time the named engines on every cloud of so many points and voxels of such an edge."""
    results = []
    for points, size in clouds:
        borders = windows(points, size)
        for name in names:
            with get_context("spawn").Pool(1) as pool:
                figures = pool.apply(_measure, (name, borders.numpy(), rounds, threads))
            counts = borders.diff()
            described = int(borders[-1]), len(counts), int(counts.max())
            results.append(WindowTiming(name, *described, threads, *figures))
            print(line(results[-1]), flush=True)
    return results


def _measure(name: str, borders: object, rounds: int, threads: int) -> tuple[float, float, float, float]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    attend, offsets = engines()[name], torch.as_tensor(borders)
    feat = torch.randn(int(offsets[-1]), CHANNELS)
    qkv, proj = nn.Linear(CHANNELS, 3 * CHANNELS, bias=False), nn.Linear(CHANNELS, CHANNELS)
    parameters = [*qkv.parameters(), *proj.parameters()]

    def layer(x: Tensor) -> Tensor:
        return proj(attend(qkv(x).unflatten(1, (3, HEADS, -1)), offsets).flatten(1))

    def forward() -> None:
        with torch.no_grad():
            layer(feat)

    def step() -> None:
        leaf = feat.detach().requires_grad_()
        torch.autograd.grad(layer(leaf).square().mean(), [leaf, *parameters])

    forget_peak()
    before = peak_mb()
    forward_ms = median_ms(forward, rounds)
    forward_mb = peak_mb() - before
    step_ms = median_ms(step, rounds)
    return forward_ms, step_ms, forward_mb, peak_mb() - before


def line(timing: WindowTiming) -> str:
    return (
        f"{timing.voxels:>8,} voxels, {timing.windows:>6,} windows of up to {timing.largest:>5,}, {timing.threads} "
        f"threads, {timing.engine:20} forward {timing.forward_ms:>8,.0f} ms {timing.forward_mb:>6,.0f} MB, step "
        f"{timing.step_ms:>8,.0f} ms {timing.step_mb:>6,.0f} MB"
    )
