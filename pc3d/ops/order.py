"""Orders of voxels: raster, Morton and Hilbert curves, SOAR, which follows the surfaces, and windows seen from above.

An order gives a permutation: the row of ``coord`` visited at each position. Batch items stay together, in ascending
order. Voxels are unique, so every order is one definite sequence of voxels, whatever the order they came in.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from pc3d.ops.backend import cpu_kernels
from pc3d.ops.kernel_map import KernelMap, submanifold_map
from pc3d.ops.serialize import MAX_DEPTH, curve_codes, sort_codes
from pc3d.ops.voxelize import UniqueVoxels, unique_voxels

Curve = Literal["raster", "morton", "hilbert"]
_CURVES: tuple[Curve, ...] = ("raster", "morton", "hilbert")

_WORD_BITS = 21  # bits per axis that interleave into one int64


@dataclass(frozen=True)
class CurveOrder:
    """Voxels along a space-filling curve.

    Attributes:
        curve: ``raster`` is lexicographic, x slowest. ``morton`` interleaves the bits of x, y and z, x first.
            ``hilbert`` is Skilling's curve ("Programming the Hilbert curve", 2004) over as many bits as the largest
            coordinate has. Coordinates count from the lowest one of the batch on each axis.
    """

    curve: Curve
    follows_neighbours: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.curve not in _CURVES:
            raise ValueError(f"curve must be one of {', '.join(_CURVES)}, got {self.curve!r}")

    def rows(self, coord: Tensor, kernel_map: KernelMap | None = None) -> Tensor:
        """``(M,)`` int64 rows of ``coord`` ``(M, 4)`` int32 in visiting order; no ``kernel_map`` is needed."""
        return _along(coord, self.curve).rows


@dataclass(frozen=True)
class SoarOrder:
    """Surface-orientation-aware order: voxels in chunks that grow breadth first over their 26 neighbours.

    A chunk starts at the rim of the one before it, so chunks follow the surface; none mixes batch items. With ``outer``
    there are two levels: chunks of ``outer`` voxels for the larger cache, each cut up into chunks of ``chunk``. The
    idea is AccSS3D's (arXiv 2011.12669). Linear in the number of voxels, on the CPU: GPU tensors make the trip.

    Attributes:
        chunk: voxels of a chunk; the tile size of the convolution serves best.
        outer: voxels of a chunk of the upper level, more than ``chunk``; None for one level.
    """

    chunk: int = 64
    outer: int | None = None
    follows_neighbours: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.chunk < 1 or (self.outer is not None and self.outer <= self.chunk):
            raise ValueError(f"chunk must be positive and outer larger, got chunk={self.chunk}, outer={self.outer}")

    def rows(self, coord: Tensor, kernel_map: KernelMap | None = None) -> Tensor:
        """``(M,)`` int64 rows of ``coord`` in visiting order.

        Args:
            coord: ``(M, 4)`` int32 rows ``[batch, x, y, z]``, unique, any order.
            kernel_map: the 3x3x3 submanifold map of ``coord`` where there is one already.

        Raises:
            ValueError: if the map does not fit.
            InputError: if coordinates repeat, a batch number is negative or the grid is too wide.
        """
        raster = _along(coord, "raster").rows
        clouds = _run_borders(coord[raster, :1])
        chunks = [self.chunk] if self.outer is None else [self.outer, self.chunk]
        return _soar(coord, raster, clouds, clouds, chunks, kernel_map, fewest_first=True)


@dataclass(frozen=True)
class BlockSoarOrder:
    """SOAR inside blocks of the Hilbert curve, which do not depend on one another and are grown in parallel.

    Neighbours across blocks count as absent, and fresh starts follow the curve; that costs 1 to 3 % of the locality of
    :class:`SoarOrder`. Blocks of 1,000 to 8,000 voxels serve best.

    Attributes:
        chunk: voxels of a chunk; chunks are counted through the blocks of a cloud, so that they stay aligned.
        block_bits: bits of the Hilbert key inside a block; 18 are 64 cells along each axis.
    """

    chunk: int = 64
    block_bits: int = 18
    follows_neighbours: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.chunk < 1 or not 0 <= self.block_bits <= _WORD_BITS * 3:
            raise ValueError(f"chunk must be positive and block_bits 0 to 63, got {self}")

    def rows(self, coord: Tensor, kernel_map: KernelMap | None = None) -> Tensor:
        """``(M,)`` int64 rows of ``coord`` in visiting order; arguments and errors as in :meth:`SoarOrder.rows`."""
        hilbert = _along(coord, "hilbert")
        batch = coord[hilbert.rows, :1].long()
        lowest, *higher = hilbert.keys
        blocks = _run_borders(torch.cat([batch, torch.stack([*higher, lowest >> self.block_bits], 1)], 1))
        return _soar(coord, hilbert.rows, _run_borders(batch), blocks, [self.chunk], kernel_map, fewest_first=False)


@dataclass(frozen=True)
class WindowOrder:
    """Voxels in square windows seen from above, of the grid's full height: raster order of windows, and inside them.

    Windows are sorted by (batch, y // side, x // side), so the voxels of each are a run of rows.

    Attributes:
        side: edge of a window, in voxels.
    """

    side: int
    follows_neighbours: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.side < 1:
            raise ValueError(f"side must be positive, got {self.side}")

    def rows(self, coord: Tensor, kernel_map: KernelMap | None = None) -> Tensor:
        """``(M,)`` int64 rows of ``coord`` ``(M, 4)`` int32 in visiting order; no ``kernel_map`` is needed."""
        raster = _along(coord, "raster").rows
        return raster[self._cells(coord[raster]).order_rows]

    def offsets(self, coord: Tensor) -> Tensor:
        """``(W + 1,)`` int64, the rows ``offsets[w]:offsets[w + 1]`` of each window of a ``coord`` in this order."""
        return self._cells(coord).row_offsets

    def _cells(self, coord: Tensor) -> UniqueVoxels:
        y, x = (coord[:, axis].div(self.side, rounding_mode="floor") for axis in (2, 1))
        clouds = _run_borders(coord[:, :1]).to(coord.device)
        return unique_voxels(torch.stack([y, x, torch.zeros_like(x)], 1), clouds)


Order = CurveOrder | SoarOrder | BlockSoarOrder | WindowOrder


def inverse_permutation(rows: Tensor) -> Tensor:
    """``(M,)`` int64: the position at which a permutation visits each row."""
    positions = torch.empty_like(rows)
    positions[rows] = torch.arange(len(rows), device=rows.device)
    return positions


def permute_map(kernel_map: KernelMap, in_rows: Tensor | None = None, out_rows: Tensor | None = None) -> KernelMap:
    """The map after its voxels were put in another order.

    Args:
        kernel_map: map between the voxels in their old order.
        in_rows, out_rows: ``(num_in,)`` and ``(num_out,)`` int64, the old row at each new position; None where the
            order stays.
    """
    ins = kernel_map.in_rows if in_rows is None else _renumbered(kernel_map.in_rows, in_rows)
    outs = kernel_map.out_rows if out_rows is None else _renumbered(kernel_map.out_rows, out_rows)
    if out_rows is None:
        return KernelMap(ins, outs, kernel_map.offsets, kernel_map.num_in, kernel_map.num_out)
    # Inverting brings the pairs of each kernel offset to ascending order of the rows that become its outputs.
    return KernelMap(outs, ins, kernel_map.offsets, kernel_map.num_out, kernel_map.num_in).inverse()


def lru_misses(kernel_map: KernelMap, capacities: Sequence[int]) -> list[int]:
    """Input rows fetched through a least-recently-used cache, outputs in order and kernel offsets ascending.

    Args:
        kernel_map: map of the convolution.
        capacities: sizes of the cache, in rows.

    Returns:
        The number of misses for each capacity.
    """
    if any(capacity < 1 for capacity in capacities):
        raise ValueError(f"a cache holds at least one row, got capacities {list(capacities)}")
    in_rows, out_rows = kernel_map.in_rows.cpu(), kernel_map.out_rows.cpu()
    kernels = cpu_kernels(in_rows)
    if kernels is not None:
        pairs = in_rows.contiguous(), out_rows.contiguous(), kernel_map.offsets.contiguous()
        return kernels.lru_misses(*pairs, kernel_map.num_in, kernel_map.num_out, list(capacities))
    accesses = in_rows[out_rows.argsort(stable=True)].tolist()
    return [_lru_misses_reference(accesses, capacity) for capacity in capacities]


def _lru_misses_reference(accesses: list[int], capacity: int) -> int:
    cache: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for row in accesses:
        if row in cache:
            cache.move_to_end(row)
            continue
        misses += 1
        cache[row] = None
        if len(cache) > capacity:
            cache.popitem(last=False)
    return misses


class _Along(NamedTuple):
    """Rows along a curve and their sorted keys, one word per 21 bits of an axis, the least significant word first."""

    rows: Tensor
    keys: list[Tensor]


def _along(coord: Tensor, curve: Curve) -> _Along:
    if coord.ndim != 2 or coord.shape[1] != 4 or coord.is_floating_point():
        raise ValueError(f"coord must be (M, 4) int32 [batch, x, y, z], got {tuple(coord.shape)} {coord.dtype}")
    if len(coord) == 0:
        return _Along(coord.new_zeros(0, dtype=torch.int64), [coord.new_zeros(0, dtype=torch.int64)])
    low, high = coord.aminmax(dim=0)
    clouds, *extent = (high.long() - low).tolist()
    bits = max(extent).bit_length()
    batch, cell = (coord.long() - low).split([1, 3], 1)
    if bits > MAX_DEPTH or 3 * bits + clouds.bit_length() > 63:
        return _along_wide(batch.squeeze(1), cell, bits, curve)
    if curve == "raster":
        x, y, z = cell.unbind(1)
        place = (x << bits | y) << bits | z
    else:
        one_cloud = torch.tensor([0, len(coord)], device=coord.device)
        place = curve_codes(cell, one_cloud, bits, ["z" if curve == "morton" else "hilbert"])[0]
    keys = batch.squeeze(1) << 3 * bits | place
    rows = sort_codes(keys)[0]
    return _Along(rows, [keys[rows]])


def _along_wide(batch: Tensor, cell: Tensor, bits: int, curve: Curve) -> _Along:
    """Keys of any width: stable sorts, from the least significant word to the batch number."""
    x, y, z = cell.unbind(1)
    if curve == "raster":
        keys = [z, y, x]
    else:
        axes = _hilbert_axes([x, y, z], bits) if curve == "hilbert" else [x, y, z]
        keys = [_interleave(axes, low) for low in range(0, bits, _WORD_BITS)]
    rows = torch.arange(len(cell), device=cell.device)
    for key in (*keys, batch):
        rows = rows[key[rows].argsort(stable=True)]
    return _Along(rows, [key[rows] for key in keys])


def _interleave(axes: Sequence[Tensor], low: int) -> Tensor:
    """Bits ``low .. low + 20`` of three axes as one word, x most significant in each triple."""
    x, y, z = (_spread(axis >> low & (1 << _WORD_BITS) - 1) for axis in axes)
    return x << 2 | y << 1 | z


def _spread(v: Tensor) -> Tensor:
    """Bits of a 21-bit number moved to every third position."""
    v = (v | v << 32) & 0x001F00000000FFFF
    v = (v | v << 16) & 0x001F0000FF0000FF
    v = (v | v << 8) & 0x100F00F00F00F00F
    v = (v | v << 4) & 0x10C30C30C30C30C3
    return (v | v << 2) & 0x1249249249249249


def _hilbert_axes(cell: Sequence[Tensor], bits: int) -> list[Tensor]:
    """Skilling's transposed Hilbert index: three axes whose interleaved bits are the place along the curve."""
    x = list(cell)
    planes = [1 << bit for bit in range(bits - 1, 0, -1)]
    for plane in planes:
        for i in range(3):
            is_set = x[i] & plane != 0
            exchanged = ((x[0] ^ x[i]) & (plane - 1)).masked_fill(is_set, 0)
            x[0] = x[0] ^ torch.where(is_set, plane - 1, exchanged)
            if i:  # axis 0 has nothing to exchange with itself
                x[i] = x[i] ^ exchanged
    x[1] = x[1] ^ x[0]
    x[2] = x[2] ^ x[1]
    flips = torch.zeros_like(x[0])
    for plane in planes:
        flips = flips ^ torch.where(x[2] & plane != 0, plane - 1, 0)
    return [axis ^ flips for axis in x]


def _run_borders(values: Tensor) -> Tensor:
    """``(R + 1,)`` int64 on the CPU: where each run of equal rows of ``(M, C)`` begins, and the end."""
    changed = (values[1:] != values[:-1]).any(1).nonzero().squeeze(1) + 1
    ends = [] if len(values) == 0 else [len(values)]
    return torch.cat([torch.tensor([0]), changed.cpu(), torch.tensor(ends, dtype=torch.int64)])


def _renumbered(rows: Tensor, order: Tensor) -> Tensor:
    return inverse_permutation(order).to(torch.int32).index_select(0, rows)


def _soar(
    coord: Tensor,
    rows: Tensor,
    clouds: Tensor,
    groups: Tensor,
    chunks: list[int],
    kernel_map: KernelMap | None,
    fewest_first: bool,
) -> Tensor:
    """SOAR of voxels that lie group after group in ``rows``, neighbours across groups cut off."""
    kmap = submanifold_map(coord, (3, 3, 3)) if kernel_map is None else kernel_map
    if (kmap.num_in, kmap.num_out, kmap.kernel_volume) != (len(coord), len(coord), 27):
        raise ValueError(
            f"kernel_map must be the 3x3x3 submanifold map of {len(coord)} voxels, got {kmap.kernel_volume} kernel "
            f"offsets from {kmap.num_in} to {kmap.num_out} voxels"
        )
    pairs = kmap.in_rows.cpu().contiguous(), kmap.out_rows.cpu().contiguous(), kmap.offsets.contiguous()
    kernels = cpu_kernels(*pairs)
    if kernels is not None:
        order = kernels.soar_order(*pairs, rows.cpu().contiguous(), clouds, groups, chunks, fewest_first)
    else:
        order = _soar_reference(*pairs, rows.cpu(), clouds, groups, chunks, fewest_first)
    return order.to(coord.device)


def _soar_reference(
    in_rows: Tensor,
    out_rows: Tensor,
    offsets: Tensor,
    rows: Tensor,
    clouds: Tensor,
    groups: Tensor,
    chunks: list[int],
    fewest_first: bool,
) -> Tensor:
    neighbours: list[list[int]] = [[] for _ in range(len(rows))]
    centre = (len(offsets) - 1) // 2
    for k, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        if k != centre:
            for voxel, neighbour in zip(out_rows[begin:end].tolist(), in_rows[begin:end].tolist(), strict=True):
                neighbours[voxel].append(neighbour)
    starts, borders = rows.tolist(), groups.tolist()
    cloud_of = torch.searchsorted(clouds, torch.arange(len(rows)), right=True) - 1
    origin = clouds[cloud_of].tolist()
    for level, chunk in enumerate(chunks):
        neighbours = _cut(neighbours, starts, borders)
        order: list[int] = []
        for begin, end in pairwise(borders):
            fresh = starts[begin:end]
            if fewest_first and level == 0:
                fresh.sort(key=lambda voxel: len(neighbours[voxel]))
            order += _grow(neighbours, fresh, chunk - (begin - origin[begin]) % chunk, chunk)
        starts = order
        borders = sorted({*borders, *(i for i in range(len(rows)) if (i - origin[i]) % chunk == 0)})
    return torch.tensor(starts, dtype=torch.int64)


def _cut(neighbours: list[list[int]], order: list[int], borders: list[int]) -> list[list[int]]:
    """The neighbours that lie in the voxel's own group."""
    group = [0] * len(order)
    for g, (begin, end) in enumerate(pairwise(borders)):
        for voxel in order[begin:end]:
            group[voxel] = g
    return [[n for n in found if group[n] == group[voxel]] for voxel, found in enumerate(neighbours)]


def _grow(neighbours: list[list[int]], fresh: list[int], first: int, chunk: int) -> list[int]:
    """Chunks grown breadth first over one group; ``fresh`` are its voxels in the order of fresh starts."""
    order: list[int] = []
    placed: set[int] = set()
    rim: list[int] = []
    left_behind: deque[int] = deque()  # rim voxels, each once in its life
    entered: set[int] = set()
    never_reached = deque(fresh)

    def next_start() -> int:
        open_rim = [voxel for voxel in rim if voxel not in placed]
        if open_rim:
            return min(open_rim, key=lambda voxel: sum(n not in placed for n in neighbours[voxel]))
        waiting = left_behind
        while not waiting or waiting[0] in placed:
            if waiting:
                waiting.popleft()
            else:
                waiting = never_reached
        return waiting[0]

    while len(order) < len(fresh):
        end = min(len(fresh), len(order) + chunk if order else first)
        queue: list[int] = []
        seen: set[int] = set()
        head = 0
        while len(order) < end:
            if head == len(queue):
                queue.append(next_start())
                seen.add(queue[-1])
            voxel = queue[head]
            head += 1
            placed.add(voxel)
            order.append(voxel)
            for neighbour in neighbours[voxel]:
                if neighbour not in placed and neighbour not in seen:
                    seen.add(neighbour)
                    queue.append(neighbour)
        rim = queue[head:]
        left_behind += [voxel for voxel in rim if voxel not in entered]
        entered.update(rim)
    return order
