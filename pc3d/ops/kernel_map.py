"""Kernel maps: which input voxel meets which output voxel under which offset of a sparse convolution kernel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pc3d.errors import InputError
from pc3d.ops.backend import cpu_kernels

Triple = tuple[int, int, int]
_SEARCHED_AT_ONCE = 1 << 25  # keys the reference looks up at a time


@dataclass(frozen=True, eq=False)
class KernelMap:
    """The pairs (input row, output row) of a sparse convolution, kernel offset after kernel offset.

    Kernel offsets are numbered row-major, ``k = (kx * Ky + ky) * Kz + kz``. Under one offset every output row, and
    every input row, occurs at most once.

    Attributes:
        in_rows: ``(P,)`` int32, input row of each pair.
        out_rows: ``(P,)`` int32, output row of each pair; ascending within a kernel offset.
        offsets: ``(K + 1,)`` int64, always on the CPU; ``offsets[k]:offsets[k + 1]`` are the pairs of offset ``k``.
        num_in: input rows.
        num_out: output rows.
        plans: what kernels derive from the pairs once and keep (the inverse map among them).
    """

    in_rows: Tensor
    out_rows: Tensor
    offsets: Tensor
    num_in: int
    num_out: int
    plans: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def kernel_volume(self) -> int:
        """Number of kernel offsets K."""
        return len(self.offsets) - 1

    @property
    def num_pairs(self) -> int:
        """Number of pairs P."""
        return len(self.in_rows)

    def inverse(self) -> KernelMap:
        """The same pairs from output to input, under the same kernel offsets (built once)."""
        if "inverse" not in self.plans:
            pairs = _exchange(self.in_rows, self.out_rows, self.offsets, self.num_in)
            self.plans["inverse"] = KernelMap(*pairs, self.offsets, self.num_out, self.num_in)
        return self.plans["inverse"]


def submanifold_map(coord: Tensor, kernel_size: Sequence[int], dilation: Sequence[int] = (1, 1, 1)) -> KernelMap:
    """Map of a submanifold convolution, ``out[c] = sum_k W_k^T in[c + (k - kernel_size // 2) * dilation]``.

    The output voxels are the input voxels, in the same order.

    Args:
        coord: ``(M, 4)`` int32 rows ``[batch, x, y, z]``, unique, any order; coordinates may be negative.
        kernel_size: three sizes; an even size reaches one voxel further down than up.
        dilation: three spacings of the kernel offsets, in voxels.

    Raises:
        InputError: if coordinates repeat, a batch number is negative or the grid is too large for 63-bit keys.
    """
    kernel, spacing = triple("kernel_size", kernel_size), triple("dilation", dilation)
    kernels = _kernels_for(coord)
    found = None if kernels is None else kernels.submanifold_map(coord.contiguous(), kernel, spacing)
    if found is not None:
        in_rows, out_rows, offsets = found
        return KernelMap(in_rows, out_rows, offsets, len(coord), len(coord))
    return _submanifold_reference(coord, kernel, spacing)


def _submanifold_reference(coord: Tensor, kernel: Triple, spacing: Triple) -> KernelMap:
    reach = [k // 2 * d for k, d in zip(kernel, spacing, strict=True)]
    packing = _Packing.of(coord, reach)
    keys = packing.pack(coord)
    sorted_keys, order = _sort_unique(keys, coord)
    steps = [
        [(o - k // 2) * d for o, k, d in zip(offset, kernel, spacing, strict=True)]
        for offset in _kernel_offsets(kernel)
    ]
    shifts = torch.stack([packing.shift(step) for step in steps])
    some = max(1, _SEARCHED_AT_ONCE // max(1, len(coord)))
    ins, outs, counts = [], [], []
    for part in shifts.split(some):  # one search, and one wait for the device, for many offsets
        rows = _find(sorted_keys, order, (keys + part[:, None]).reshape(-1)).view(len(part), -1)
        kernel_offset, out_row = (rows >= 0).nonzero().unbind(1)
        ins.append(rows[kernel_offset, out_row].to(torch.int32))
        outs.append(out_row.to(torch.int32))
        counts.append(torch.bincount(kernel_offset, minlength=len(part)).cpu())
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(counts).cumsum(0)])
    return KernelMap(torch.cat(ins), torch.cat(outs), offsets, len(coord), len(coord))


def strided_map(
    coord: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    spatial_shape: Sequence[int] | None = None,
) -> tuple[Tensor, KernelMap]:
    """Map of a strided convolution, ``out[o] = sum_k W_k^T in[o * stride - padding + k * dilation]``.

    An output voxel exists where at least one input contributes. With ``spatial_shape`` the outputs are also bounded by
    ``0 <= o < output_shape(...)``, the rule of spconv: inputs beyond the last full window are dropped. Without it
    nothing is ever dropped.

    Args:
        coord: ``(M, 4)`` int32 rows ``[batch, x, y, z]``, unique, any order; coordinates may be negative.
        kernel_size, stride, padding, dilation: three values each, in voxels.
        spatial_shape: extent of the input grid along x, y, z, or None.

    Returns:
        ``(M2, 4)`` int32 output coordinates sorted by (batch, x, y, z), and the map.

    Raises:
        InputError: if coordinates repeat, a batch number is negative or the grid is too large for 63-bit keys.
    """
    kernel, step = triple("kernel_size", kernel_size), triple("stride", stride)
    pad, spacing = triple("padding", padding, least=0), triple("dilation", dilation)
    bound = None if spatial_shape is None else output_shape(spatial_shape, kernel, step, pad, spacing)
    fast = _strided_by_kernels(coord, kernel, step, pad, spacing, bound, transposed=False)
    return fast or _strided_reference(coord, kernel, step, pad, spacing, bound)


def _strided_reference(
    coord: Tensor, kernel: Triple, step: Triple, pad: Triple, spacing: Triple, bound: Triple | None
) -> tuple[Tensor, KernelMap]:
    _sort_unique(_Packing.of(coord).pack(coord), coord)
    wide, steps = coord.long(), torch.tensor(step, device=coord.device)
    rows, cells = [], []
    for offset in _kernel_offsets(kernel):
        shifted = wide[:, 1:] - _window_start(offset, pad, spacing, coord.device)
        cell = shifted.div(steps, rounding_mode="floor")
        inside = (cell * steps == shifted).all(1) & _within(cell, bound)
        rows.append(inside.nonzero().squeeze(1))
        cells.append(torch.cat([wide[:, :1], cell], 1)[rows[-1]])
    return _collect(rows, cells, len(coord))


def transposed_map(
    coord: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    spatial_shape: Sequence[int] | None = None,
) -> tuple[Tensor, KernelMap]:
    """Map of a generative transposed convolution, ``out[i * stride - padding + k * dilation] += W_k^T in[i]``.

    Every voxel that an input reaches is made. With ``spatial_shape`` the outputs are bounded by
    ``0 <= o < transposed_shape(...)``, as in spconv. Arguments, result and errors as in :func:`strided_map`.
    """
    kernel, step = triple("kernel_size", kernel_size), triple("stride", stride)
    pad, spacing = triple("padding", padding, least=0), triple("dilation", dilation)
    bound = None if spatial_shape is None else transposed_shape(spatial_shape, kernel, step, pad, spacing)
    fast = _strided_by_kernels(coord, kernel, step, pad, spacing, bound, transposed=True)
    return fast or _transposed_reference(coord, kernel, step, pad, spacing, bound)


def _transposed_reference(
    coord: Tensor, kernel: Triple, step: Triple, pad: Triple, spacing: Triple, bound: Triple | None
) -> tuple[Tensor, KernelMap]:
    _sort_unique(_Packing.of(coord).pack(coord), coord)
    wide, steps = coord.long(), torch.tensor(step, device=coord.device)
    rows, cells = [], []
    for offset in _kernel_offsets(kernel):
        cell = wide[:, 1:] * steps + _window_start(offset, pad, spacing, coord.device)
        rows.append(_within(cell, bound).nonzero().squeeze(1))
        cells.append(torch.cat([wide[:, :1], cell], 1)[rows[-1]])
    return _collect(rows, cells, len(coord))


def output_shape(
    spatial_shape: Sequence[int], kernel_size: Triple, stride: Triple, padding: Triple, dilation: Triple
) -> Triple:
    """Extent of the grid after a strided convolution, ``floor((shape + 2p - d(k - 1) - 1) / s) + 1`` per axis."""
    x, y, z = (
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(spatial_shape, kernel_size, stride, padding, dilation, strict=True)
    )
    return x, y, z


def transposed_shape(
    spatial_shape: Sequence[int], kernel_size: Triple, stride: Triple, padding: Triple, dilation: Triple
) -> Triple:
    """Extent of the grid after a transposed convolution, ``(shape - 1) * s - 2p + d(k - 1) + 1`` per axis."""
    x, y, z = (
        (size - 1) * s - 2 * p + d * (k - 1) + 1
        for size, k, s, p, d in zip(spatial_shape, kernel_size, stride, padding, dilation, strict=True)
    )
    return x, y, z


def union(coords: Sequence[Tensor]) -> Tensor:
    """Voxels of several sets: those of the first in their order, then the others sorted by (batch, x, y, z).

    Args:
        coords: sets of ``(M, 4)`` int32 rows ``[batch, x, y, z]``, each without duplicates.

    Returns:
        ``(M, 4)`` int32; the very tensor ``coords[0]`` where the others add nothing.

    Raises:
        InputError: as :func:`submanifold_map`.
    """
    packing = _Packing.of(torch.cat(list(coords)))
    keys = [packing.pack(coord) for coord in coords]
    ordered = [_sort_unique(key, coord) for key, coord in zip(keys, coords, strict=True)]
    others = torch.cat(keys[1:]).unique() if len(keys) > 1 else keys[0][:0]
    added = others[_find(*ordered[0], others) < 0]
    return torch.cat([coords[0], packing.unpack(added)]) if len(added) else coords[0]


def locate(coord: Tensor, wanted: Tensor) -> Tensor:
    """``(W,)`` int64: the row of ``coord`` where each voxel of ``wanted`` lies, -1 where it is absent.

    Args:
        coord: ``(M, 4)`` int32 rows ``[batch, x, y, z]``, unique.
        wanted: ``(W, 4)`` int32.

    Raises:
        InputError: as :func:`submanifold_map`.
    """
    packing = _Packing.of(torch.cat([coord, wanted]))
    return _find(*_sort_unique(packing.pack(coord), coord), packing.pack(wanted))


def restrict(kmap: KernelMap, out_rows: Tensor, num_out: int) -> KernelMap:
    """The map to a part of its outputs, or to other rows.

    Args:
        kmap: map to ``kmap.num_out`` outputs.
        out_rows: ``(kmap.num_out,)`` int64, the new row of each output, -1 to drop it; no row twice.
        num_out: number of new rows.
    """
    rows = out_rows[kmap.out_rows.long()]
    kept = rows >= 0
    counts = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)]).cpu()
    offsets = counts[kmap.offsets]
    order = _order_by_offset_and_row(rows[kept], offsets, num_out)
    in_rows, rows = kmap.in_rows[kept][order], rows[kept][order].to(torch.int32)
    return KernelMap(in_rows, rows, offsets, kmap.num_in, num_out)


@dataclass(frozen=True)
class _Packing:
    """Coordinates as one int64 key in raster order: mixed radix over the extent of the grid plus a margin.

    The margin keeps ``key(c + delta) = key(c) + shift(delta)`` true for every neighbour within reach.
    """

    low: Tensor
    radix: Tensor

    @staticmethod
    def of(coord: Tensor, reach: Sequence[int] = (0, 0, 0)) -> _Packing:
        if coord.ndim != 2 or coord.shape[1] != 4 or coord.is_floating_point():
            raise ValueError(
                f"voxel coordinates must be (M, 4) int32 [batch, x, y, z], got {tuple(coord.shape)} {coord.dtype}"
            )
        if len(coord) == 0:
            zero = torch.zeros(4, dtype=torch.int64, device=coord.device)
            return _Packing(zero, zero)
        margin = torch.tensor([0, *reach], device=coord.device)
        low, high = coord.amin(0).long() - margin, coord.amax(0).long() + margin
        (batch, *lowest), (_, *highest) = low.tolist(), high.tolist()
        if batch < 0:
            raise InputError(f"voxel coordinates: field 'batch' holds {batch}; batch numbers start at 0")
        extent = (high - low + 1).tolist()
        if math.prod(extent) >= 2**63 or min(lowest) < -(2**31) or max(highest) >= 2**31:
            raise InputError(
                f"voxel coordinates: {extent[0]} clouds from {lowest} to {highest} are too wide a grid; "
                "crop the clouds or use a larger grid size"
            )
        radix = [extent[1] * extent[2] * extent[3], extent[2] * extent[3], extent[3], 1]
        return _Packing(low, torch.tensor(radix, device=coord.device))

    def pack(self, coord: Tensor) -> Tensor:
        return ((coord.long() - self.low) * self.radix).sum(1)

    def unpack(self, keys: Tensor) -> Tensor:
        columns, rest = [], keys
        for radix in self.radix.tolist():
            columns.append(rest.div(max(radix, 1), rounding_mode="floor"))
            rest = rest - columns[-1] * radix
        return (torch.stack(columns, 1) + self.low).to(torch.int32)

    def shift(self, delta: Sequence[int]) -> Tensor:
        return (torch.tensor([0, *delta], device=self.radix.device) * self.radix).sum()


def _kernels_for(coord: Tensor) -> ModuleType | None:
    """The C++ kernels where they can serve; they answer None to what the reference must decide (or refuse)."""
    if coord.dtype != torch.int32 or coord.ndim != 2 or coord.shape[1] != 4:
        return None
    return cpu_kernels(coord)


def _strided_by_kernels(
    coord: Tensor, kernel: Triple, step: Triple, pad: Triple, spacing: Triple, bound: Triple | None, transposed: bool
) -> tuple[Tensor, KernelMap] | None:
    kernels = _kernels_for(coord)
    if kernels is None:
        return None
    found = kernels.strided_map(coord.contiguous(), kernel, step, pad, spacing, bound, transposed)
    if found is None:
        return None
    out_coord, in_rows, out_rows, offsets = found
    return out_coord, KernelMap(in_rows, out_rows, offsets, len(coord), len(out_coord))


def triple(name: str, value: int | Sequence[int], least: int = 1) -> Triple:
    """One integer for all three axes, or three integers.

    Raises:
        ValueError: if there are not three of them, or one is less than ``least``.
    """
    values = (value,) * 3 if isinstance(value, int) else tuple(value)
    if len(values) != 3 or any(int(v) != v or v < least for v in values):
        raise ValueError(f"{name} must be three integers >= {least}, got {value}")
    x, y, z = (int(v) for v in values)
    return x, y, z


def _kernel_offsets(kernel: Triple) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, kernel))


def _window_start(offset: Sequence[int], padding: Triple, dilation: Triple, device: torch.device) -> Tensor:
    """``k * dilation - padding``: fine coordinate under a kernel offset, from ``stride`` times the coarse one on."""
    return torch.tensor([o * d - p for o, d, p in zip(offset, dilation, padding, strict=True)], device=device)


def _within(cell: Tensor, bound: Triple | None) -> Tensor:
    if bound is None:
        return torch.ones(len(cell), dtype=torch.bool, device=cell.device)
    return ((cell >= 0) & (cell < torch.tensor(bound, device=cell.device))).all(1)


def _sort_unique(keys: Tensor, coord: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted keys and their rows; refuses duplicates."""
    sorted_keys, order = keys.sort()
    repeated = (sorted_keys.diff() == 0).nonzero()
    if len(repeated):
        cell = coord[order[repeated[0, 0]]].tolist()
        raise InputError(
            f"voxel coordinates: {len(repeated)} of {len(coord)} rows repeat another one "
            f"(first [batch, x, y, z] = {cell}); grid-sample the points so that each voxel occurs once"
        )
    return sorted_keys, order


def _find(sorted_keys: Tensor, order: Tensor, wanted: Tensor) -> Tensor:
    """Row of each wanted key, -1 where it is absent."""
    if len(sorted_keys) == 0:
        return torch.full_like(wanted, -1)
    position = torch.searchsorted(sorted_keys, wanted).clamp_(max=len(sorted_keys) - 1)
    return torch.where(sorted_keys[position] == wanted, order[position], -1)


def _borders(groups: Sequence[Tensor]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(len(group) for group in groups)])


def _exchange(in_rows: Tensor, out_rows: Tensor, offsets: Tensor, num_in: int) -> tuple[Tensor, Tensor]:
    """Pairs with input and output exchanged, brought back to ascending output rows."""
    kernels = cpu_kernels(in_rows, out_rows)
    if kernels is not None:
        return kernels.inverse_map(in_rows.contiguous(), out_rows.contiguous(), offsets, num_in)
    order = _order_by_offset_and_row(in_rows, offsets, num_in)
    return out_rows[order], in_rows[order]


def _order_by_offset_and_row(rows: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
    """Order that sorts pairs by kernel offset, then by ``rows``."""
    kernel = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff()).to(rows.device)
    return (kernel * num_rows + rows).argsort()


def _collect(rows: list[Tensor], cells: list[Tensor], num_in: int) -> tuple[Tensor, KernelMap]:
    """Output coordinates and map from the input row and the output cell of every pair."""
    wanted = torch.cat(cells)
    packing = _Packing.of(wanted)
    keys, out_rows = packing.pack(wanted).unique(return_inverse=True)
    out_coord, offsets = packing.unpack(keys), _borders(rows)
    order = _order_by_offset_and_row(out_rows, offsets, len(out_coord))
    in_rows, out_rows = torch.cat(rows)[order].to(torch.int32), out_rows[order].to(torch.int32)
    return out_coord, KernelMap(in_rows, out_rows, offsets, num_in, len(out_coord))
