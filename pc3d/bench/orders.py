"""What the order of the voxels is worth, layer by layer; the time to find the order stands in a row of its own."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pc3d.bench.timing import Timing, time_interleaved
from pc3d.ops.conv import sparse_conv
from pc3d.ops.depthwise import depthwise_conv
from pc3d.ops.kernel_map import submanifold_map
from pc3d.points import Points
from pc3d.sparse.order import ORDERS, Order, reorder
from pc3d.voxels import Voxels

CHANNELS = ((4, 16), (16, 16), (32, 32), (64, 64), (128, 128))
DEPTHWISE = 96


def bench(points: Points, size: float, rounds: int) -> list[Timing]:
    """3^3 submanifold layers and a depth-wise one on voxels in every order, ``random`` as a control; forward."""
    raster = points.with_attrs(feat=points.coord).voxelize(size, "first")
    generator = torch.Generator().manual_seed(0)
    shuffled = raster.coord[torch.randperm(len(raster), generator=generator)]
    finding = {name: partial(_reordered, shuffled, order) for name, order in ORDERS.items()}
    coords = {name: find() for name, find in finding.items()} | {"random": shuffled}
    maps = {name: submanifold_map(coord, (3, 3, 3)) for name, coord in coords.items()}
    count, where = len(raster), f"{points.describe()[-20:]}, {size:g} m"
    timings = time_interleaved(f"order {where}", count, finding, rounds)
    with torch.inference_mode():
        for cin, cout in CHANNELS:
            feat = torch.randn(count, cin, generator=generator)
            weight = torch.randn(27, cin, cout, generator=generator)
            works = {name: partial(sparse_conv, feat, weight, kmap) for name, kmap in maps.items()}
            timings += time_interleaved(f"subm3 {cin}x{cout} {where}", count, works, rounds)
        feat = torch.randn(count, DEPTHWISE, generator=generator)
        weight = torch.randn(27, DEPTHWISE, generator=generator)
        works = {name: partial(depthwise_conv, feat, weight, kmap) for name, kmap in maps.items()}
        return timings + time_interleaved(f"depthwise {DEPTHWISE} {where}", count, works, rounds)


def _reordered(coord: Tensor, order: Order) -> Tensor:
    """The coordinates in another order, found anew at every call."""
    return reorder(Voxels(coord, coord[:, :1].float(), 1), order)[0].coord
