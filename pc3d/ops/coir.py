"""COIR: kernel maps as one record per voxel, a bit mask of kernel offsets and the partners of the set bits.

CORF (compressed output response field) has a record per output voxel and lists the inputs it needs; CIRF (compressed
input response field) one per input voxel and lists the outputs it feeds. The tile-local form replaces the partners of
``tile`` consecutive records by 8 or 16 bit positions in one list of the tile's distinct partners: the closer the order
of the voxels keeps neighbours, the shorter these lists. Idea: AccSS3D (arXiv 2011.12669); the layout is ours. The
Triton kernels read the records (:mod:`pc3d.ops.conv_triton`): CORF in the forward pass, CIRF in the input gradient.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from pc3d.ops.kernel_map import KernelMap

_WORD = 32  # mask bits per int32


class Field(enum.Enum):
    """Which voxels the records belong to."""

    CORF = "output"
    CIRF = "input"


@dataclass(frozen=True, eq=False)
class Coir:
    """The records of M voxels.

    Attributes:
        field: whether records are outputs (CORF) or inputs (CIRF).
        masks: ``(M, ceil(K / 32))`` int32; bit ``k % 32`` of word ``k // 32`` is set where a partner exists under
            kernel offset ``k``.
        partners: ``(P,)`` int32, record after record, in each by ascending kernel offset.
        kernel_volume: kernel offsets K.
        num_partners: rows on the other side of the map.
    """

    field: Field
    masks: Tensor
    partners: Tensor
    kernel_volume: int
    num_partners: int

    @property
    def starts(self) -> Tensor:
        """``(M, ceil(K / 32))``, int32 where P allows: place in ``partners`` of the first partner under each word."""
        counts = _popcount(self.masks.long() & (1 << _WORD) - 1).flatten()
        starts = counts.cumsum(0) - counts
        return starts.view(self.masks.shape).to(torch.int32 if len(self.partners) < 2**31 else torch.int64)

    def part(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """``(M,)`` int32 masks of the kernel offsets from ``first`` up to ``last``, and where their partners start.

        At most 32 offsets; bit 0 is ``first``.
        """
        word, bit = divmod(first, _WORD)
        words = self.masks.long() & (1 << _WORD) - 1
        bits = words[:, word] >> bit
        if last > (word + 1) * _WORD:
            bits |= words[:, word + 1] << (_WORD - bit)
        starts = self.starts[:, word] + _popcount(words[:, word] & (1 << bit) - 1)
        return _signed(bits & (1 << (last - first)) - 1), starts.to(self.starts.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of masks and partners."""
        return self.masks.nbytes + self.partners.nbytes


@dataclass(frozen=True, eq=False)
class TileLocalCoir:
    """The records of M voxels, in tiles with a list of partners each.

    Attributes:
        field, masks, kernel_volume, num_partners: as in :class:`Coir`.
        tile: records of a tile T; the last tile may be shorter.
        listed: ``(U,)`` int32, the distinct partners of each tile, ascending, tile after tile.
        starts: ``(tiles + 1,)`` int32 or int64, the list of tile ``t`` is ``listed[starts[t]:starts[t + 1]]``.
        positions: ``(P,)`` uint8 or uint16, place of each partner in its tile's list.
    """

    field: Field
    masks: Tensor
    tile: int
    listed: Tensor
    starts: Tensor
    positions: Tensor
    kernel_volume: int
    num_partners: int

    @property
    def nbytes(self) -> int:
        """Bytes of all four arrays."""
        return self.masks.nbytes + self.listed.nbytes + self.starts.nbytes + self.positions.nbytes

    def expand(self) -> Coir:
        """The same records with global partners."""
        records, _ = _set_bits(self.masks, self.kernel_volume)
        partners = self.listed[self.starts.long()[records // self.tile] + self.positions.long()]
        return Coir(self.field, self.masks, partners, self.kernel_volume, self.num_partners)


def encode(kmap: KernelMap, field: Field) -> Coir:
    """The records of a kernel map; :func:`decode` gives the map back."""
    owners, partners, count, others = kmap.out_rows, kmap.in_rows, kmap.num_out, kmap.num_in
    if field is Field.CIRF:
        owners, partners, count, others = partners, owners, others, count
    volume = kmap.kernel_volume
    counts = kmap.offsets.diff().to(owners.device)
    offset = torch.repeat_interleave(torch.arange(volume, device=owners.device), counts, output_size=len(owners))
    word, bit = owners.long() * _words(volume) + offset // _WORD, offset % _WORD
    masks = torch.zeros(count * _words(volume), dtype=torch.int64, device=owners.device)
    masks.index_add_(0, word, 1 << bit)
    coir = Coir(field, _signed(masks).view(count, _words(volume)), torch.empty_like(partners), volume, others)
    coir.partners[coir.starts.flatten()[word] + _popcount(masks[word] & (1 << bit) - 1)] = partners
    return coir


def decode(coir: Coir) -> KernelMap:
    """The kernel map of some records: the very pairs, in the very order, that :func:`encode` was given."""
    records, offset = _set_bits(coir.masks, coir.kernel_volume)
    owners = records.to(torch.int32)
    count = len(coir.masks)
    corf = coir.field is Field.CORF
    in_rows, out_rows = (coir.partners, owners) if corf else (owners, coir.partners)
    num_in, num_out = (coir.num_partners, count) if corf else (count, coir.num_partners)
    order = (offset * max(num_out, 1) + out_rows).argsort()
    pairs = torch.bincount(offset, minlength=coir.kernel_volume).cpu()
    offsets = torch.cat([pairs.new_zeros(1), pairs.cumsum(0)])
    return KernelMap(in_rows[order], out_rows[order], offsets, num_in, num_out)


def compress(coir: Coir, tile: int) -> TileLocalCoir:
    """The tile-local form, with 8-bit positions where no tile has more than 256 distinct partners.

    Args:
        coir: records.
        tile: records of a tile.

    Raises:
        ValueError: if ``tile`` is not positive, or a tile has more than 65,536 distinct partners.
    """
    if tile < 1:
        raise ValueError(f"tile must be 1 record or more, got {tile}")
    records, _ = _set_bits(coir.masks, coir.kernel_volume)
    width = max(coir.num_partners, 1)
    distinct, place = (records // tile * width + coir.partners).unique(return_inverse=True)
    tiles = -(-len(coir.masks) // tile)
    lengths = torch.bincount(distinct // width, minlength=tiles)
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    longest = int(lengths.max()) if tiles else 0
    if longest > 2**16:
        raise ValueError(f"a tile of {tile} records has {longest} distinct partners, 65,536 is the most: use less")
    positions = (place - starts[records // tile]).to(torch.uint8 if longest <= 2**8 else torch.uint16)
    narrow = torch.int32 if len(distinct) < 2**31 else torch.int64
    listed = (distinct % width).to(torch.int32)
    return TileLocalCoir(
        coir.field, coir.masks, tile, listed, starts.to(narrow), positions, coir.kernel_volume, coir.num_partners
    )


def bytes_per_voxel(kmap: KernelMap, tile: int = 64) -> dict[str, float]:
    """Memory of the forms of a map, per output voxel: dense table, pair list, CORF and tile-local CORF."""
    corf = encode(kmap, Field.CORF)
    forms = {
        "dense": 4 * kmap.kernel_volume * kmap.num_out,
        "pairs": kmap.in_rows.nbytes + kmap.out_rows.nbytes,
        "corf": corf.nbytes,
        "tile_local": compress(corf, tile).nbytes,
    }
    return {name: size / max(kmap.num_out, 1) for name, size in forms.items()}


def _words(volume: int) -> int:
    return -(-volume // _WORD)


def _signed(words: Tensor) -> Tensor:
    """Int64 values below 2^32 as the int32 of the same bits."""
    return torch.where(words >= 1 << (_WORD - 1), words - (1 << _WORD), words).to(torch.int32)


def _popcount(words: Tensor) -> Tensor:
    """Set bits of int64 values below 2^32."""
    pairs = words - (words >> 1 & 0x55555555)
    fours = (pairs & 0x33333333) + (pairs >> 2 & 0x33333333)
    return ((fours + (fours >> 4) & 0x0F0F0F0F) * 0x01010101 & 0xFFFFFFFF) >> 24


def _set_bits(masks: Tensor, volume: int) -> tuple[Tensor, Tensor]:
    """``(P,)`` int64 record and kernel offset of every set bit, by record, then offset."""
    bits = masks[:, :, None] >> torch.arange(_WORD, dtype=torch.int32, device=masks.device) & 1
    records, offset = bits.view(len(masks), _words(volume) * _WORD).nonzero().unbind(1)
    return records, offset
