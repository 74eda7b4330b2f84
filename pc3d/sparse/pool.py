"""Pooling of sparse voxels over kernel windows, and over whole clouds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pc3d.ops.kernel_map import KernelMap
from pc3d.ops.segment import segment_max, segment_mean, segment_sum
from pc3d.sparse import maps
from pc3d.sparse.modules import SparseModule
from pc3d.voxels import Voxels


class _Pool(SparseModule):
    """Reduces the voxels under each window; absent voxels take no part (no implicit zeros).

    Args:
        kernel_size: window along each axis, one number or three.
        stride: step of the window; ``kernel_size`` by default.
        padding, dilation: as in :class:`~pc3d.sparse.SparseConv3d`, whose output grid and maps a pooling shares.
    """

    reduce: Callable[[Tensor, Tensor], Tensor]

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
    ) -> None:
        super().__init__()
        self.window = maps.window(kernel_size, kernel_size if stride is None else stride, padding, dilation)

    def forward(self, voxels: Voxels) -> Voxels:
        made = maps.strided(voxels, self.window)
        rows, offsets = _pairs_by_output(made.kernel_map)
        return made.grid(voxels, self.reduce(voxels.feat.index_select(0, rows), offsets))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.window._asdict().items())


class SparseMaxPool3d(_Pool):
    """Largest value of each channel under the window."""

    reduce = staticmethod(segment_max)


class SparseAvgPool3d(_Pool):
    """Mean over the voxels that exist under the window."""

    reduce = staticmethod(segment_mean)


class SparseGlobalPool(nn.Module):
    """One row per cloud, ``(B, C)``: mean, max or sum over its voxels; a cloud without voxels gives zeros."""

    def __init__(self, mode: Literal["mean", "max", "sum"] = "mean") -> None:
        super().__init__()
        self.mode = mode
        self.reduce = {"mean": segment_mean, "max": segment_max, "sum": segment_sum}[mode]

    def forward(self, voxels: Voxels) -> Tensor:
        batch = voxels.coord[:, 0].long()
        order, offsets = _runs(batch, voxels.batch_size)
        return self.reduce(voxels.feat.index_select(0, order), offsets)

    def extra_repr(self) -> str:
        return self.mode


def _pairs_by_output(kernel_map: KernelMap) -> tuple[Tensor, Tensor]:
    """Input row of every pair, output row after output row, and the ``(num_out + 1,)`` borders between them."""
    if "by_output" not in kernel_map.plans:
        order, offsets = _runs(kernel_map.out_rows.long(), kernel_map.num_out)
        kernel_map.plans["by_output"] = kernel_map.in_rows[order].long(), offsets
    return kernel_map.plans["by_output"]


def _runs(group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Order that brings the rows of each group together, and the borders of the groups."""
    counts = torch.bincount(group, minlength=num_groups)
    return group.argsort(stable=True), torch.cat([counts.new_zeros(1), counts.cumsum(0)])
