"""Where the chunks of a LAZ file are: its chunk table, or a walk through the file where there is none.

The table is coded with the arithmetic coder of A. Said ("Introduction to Arithmetic Coding", HP Labs report
HPL-2004-76, 2004) and LASzip's integer compressor (Isenburg, "LASzip: lossless compression of LiDAR data", 2013).
"""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pc3d.errors import InputError
from pc3d.io.las_header import LASZIP, ByteReader, LasHeader

VARIABLE = 0xFFFFFFFF
_POINTWISE_CHUNKED, _LAYERED = 2, 3
_LAYERS = {10: 9, 11: 1, 12: 2, 13: 1}  # layers of items point14, rgb14, rgbnir14, wavepacket14
_EXTRA_BYTES_ITEM = 14  # one layer per byte

_MIN_LENGTH = 1 << 24
_BIT_SHIFT, _SYMBOL_SHIFT = 13, 15
_WORD = 1 << 32


@dataclass(frozen=True)
class Chunks:
    """The chunks of a file, in its order.

    Attributes:
        counts: ``(C,)`` int64 points.
        starts: ``(C,)`` int64 first byte.
        sizes: ``(C,)`` int64 bytes.
    """

    counts: NDArray[np.int64]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]


@dataclass(frozen=True)
class LazRecord:
    """LASzip's variable-length record.

    Attributes:
        data: its bytes, for the decompressor.
        layered: LAS 1.4 compression, whose chunks tell their own size.
        chunk_size: points per chunk, :data:`VARIABLE` if the table has them.
        layers: layers of a layered chunk.
    """

    data: bytes
    layered: bool
    chunk_size: int
    layers: int


def laz_record(header: LasHeader) -> LazRecord:
    """LASzip's record of a compressed file.

    Raises:
        InputError: if it is missing or damaged, or names a compression without chunks.
    """
    data = header.records.get(LASZIP)
    if data is None or len(data) < 34:
        raise InputError(f"{header.path}: compressed, but has no LASzip record")
    compressor, chunk_size, num_items = (
        struct.unpack_from("<H", data, 0)[0],
        struct.unpack_from("<I", data, 12)[0],
        struct.unpack_from("<H", data, 32)[0],
    )
    if compressor not in (_POINTWISE_CHUNKED, _LAYERED):
        raise InputError(
            f"{header.path}: LASzip compressor {compressor} has no chunks: write the file anew with a LASzip of 2011 "
            "or later"
        )
    if len(data) < 34 + 6 * num_items or chunk_size == 0:
        raise InputError(f"{header.path}: damaged: LASzip record with {num_items} items, chunks of {chunk_size} points")
    items = [struct.unpack_from("<HHH", data, 34 + 6 * i) for i in range(num_items)]
    if sum(size for _, size, _ in items) != header.record_length:
        raise InputError(f"{header.path}: damaged: LASzip items of {items} for points of {header.record_length} bytes")
    layers = sum(size if kind == _EXTRA_BYTES_ITEM else _LAYERS.get(kind, 0) for kind, size, _ in items)
    return LazRecord(data, compressor == _LAYERED, chunk_size, layers)


def find_chunks(reader: ByteReader, header: LasHeader, laz: LazRecord) -> Chunks:
    """The chunks of a compressed file.

    Without a usable table (a writer was interrupted) the chunks are found one after the other, with a warning: those
    of LAS 1.4 formats by the sizes they start with, others by decompressing the file with lazrs.

    Raises:
        InputError: if the chunks cannot be found, or do not hold the points that the header promises.
    """
    if header.num_points == 0:
        return Chunks(*(np.zeros(0, np.int64) for _ in range(3)))
    try:
        return _from_table(reader, header, laz)
    except InputError as error:
        warnings.warn(f"{error}; its chunks are looked for from the start", stacklevel=2)
    return _layered_walk(reader, header, laz) if laz.layered else _pointwise_walk(reader, header, laz)


def _from_table(reader: ByteReader, header: LasHeader, laz: LazRecord) -> Chunks:
    start = header.points_start + 8
    (place,) = struct.unpack("<q", reader.read(header.points_start, 8, "the place of the chunk table"))
    if place == -1:  # written to a stream: the place is at the end
        (place,) = struct.unpack("<q", reader.read(reader.size - 8, 8, "the place of the chunk table"))
    if not start <= place <= reader.size - 8:
        raise InputError(f"{header.path}: no chunk table")
    version, count = struct.unpack("<II", reader.read(place, 8, "the chunk table"))
    # Every chunk starts with a point as it is, so a damaged count cannot ask for more than the file could hold.
    if version != 0 or not 0 < count <= (place - start) // header.record_length:
        raise InputError(f"{header.path}: damaged chunk table (version {version}, {count} chunks)")
    size = min(reader.size - place - 8, 64 + 16 * count)  # what the coder may use; it may end before
    try:
        counts, sizes = decode_table(reader.read(place + 8, size, "the chunk table"), count, laz.chunk_size == VARIABLE)
    except IndexError:
        raise InputError(f"{header.path}: the chunk table is truncated") from None
    if laz.chunk_size != VARIABLE and _num_fixed(header, laz) == count:
        counts = _fixed_counts(header, laz)
    if counts.sum() != header.num_points or sizes.sum() != place - start:
        raise InputError(
            f"{header.path}: damaged chunk table ({len(sizes)} chunks of {sizes.sum()} bytes and {counts.sum()} points "
            f"for {place - start} bytes and {header.num_points} points)"
        )
    used = counts > 0  # some writers end with an empty chunk
    return Chunks(counts[used], (start + np.cumsum(sizes) - sizes)[used], sizes[used])


def _num_fixed(header: LasHeader, laz: LazRecord) -> int:
    return -(-header.num_points // laz.chunk_size)


def _fixed_counts(header: LasHeader, laz: LazRecord) -> NDArray[np.int64]:
    firsts = np.arange(_num_fixed(header, laz), dtype=np.int64) * laz.chunk_size
    return np.minimum(header.num_points - firsts, laz.chunk_size)


def _layered_walk(reader: ByteReader, header: LasHeader, laz: LazRecord) -> Chunks:
    rows: list[tuple[int, int, int]] = []
    start, left, lead = header.points_start + 8, header.num_points, header.record_length + 4 + 4 * laz.layers
    while left > 0:
        count, size = _layered_size(reader.read(start, lead, f"chunk {len(rows)}"), header, laz)
        if not 0 < count <= left or start + size > header.points_end:
            raise InputError(f"{header.path}: truncated or damaged: chunk {len(rows)} at byte {start}")
        rows.append((count, start, size))
        start, left = start + size, left - count
    return Chunks(*np.array(rows, np.int64).T)


def _layered_size(data: bytes, header: LasHeader, laz: LazRecord) -> tuple[int, int]:
    """Points and bytes of a layered chunk: behind its first point stand their number and the sizes of the layers."""
    words = np.frombuffer(data, "<u4", 1 + laz.layers, header.record_length)
    return int(words[0]), header.record_length + words.nbytes + int(words[1:].sum(dtype=np.int64))


def _pointwise_walk(reader: ByteReader, header: LasHeader, laz: LazRecord) -> Chunks:
    if laz.chunk_size == VARIABLE:
        raise InputError(f"{header.path}: no chunk table, and chunks of any size: their borders cannot be found")
    start = header.points_start + 8
    if _num_fixed(header, laz) * header.record_length > header.points_end - start:
        raise InputError(f"{header.path}: truncated or damaged: no room for {header.num_points} points")
    source = _Trickle(reader, start)
    decompressor = lazrs_of(header).LasZipDecompressor(source, laz.data)
    counts = _fixed_counts(header, laz)
    ends = []
    for number, count in enumerate(counts):
        records = np.empty(int(count) * header.record_length, np.uint8)
        run_lazrs(lambda records=records: decompressor.decompress_many(records), header, number)
        ends.append(source.tell() - 8 + start)
    starts = np.array([start, *ends[:-1]], np.int64)
    return Chunks(counts, starts, np.array(ends, np.int64) - starts)


class _Trickle(io.RawIOBase):
    """The compressed points with an empty table, given out byte by byte: its position is what was really needed."""

    _PIECE = 1 << 20

    def __init__(self, reader: ByteReader, start: int) -> None:
        super().__init__()
        self._reader, self._start, self._end = reader, start, reader.size - start + 8
        self._place = 0
        self._piece, self._piece_start = b"", 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = offset + (0, self._place, self._end + 24)[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        data = self._bytes(1 if 8 <= self._place < self._end else len(buffer))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def _bytes(self, size: int) -> bytes:
        if self._place < 8:
            return struct.pack("<q", self._end)[self._place : self._place + size]
        if self._place >= self._end:
            return bytes(24)[self._place - self._end :][:size]
        at = self._place - 8
        if not self._piece_start <= at < self._piece_start + len(self._piece):
            length = min(self._PIECE, self._end - self._place)
            self._piece, self._piece_start = self._reader.read(self._start + at, length, "the points"), at
        return self._piece[at - self._piece_start : at - self._piece_start + size]


def decompress(header: LasHeader, laz: LazRecord, data: bytes, count: int, number: int) -> NDArray[np.uint8]:
    """``(count, record_length)`` points of one chunk.

    Raises:
        InputError: without lazrs, or if the chunk is damaged.
    """
    lazrs = lazrs_of(header)
    # lazrs believes the sizes of layers and would ask for as much memory.
    lead = header.record_length + 4 + 4 * laz.layers
    if laz.layered and (len(data) < lead or _layered_size(data, header, laz) != (count, len(data))):
        raise InputError(f"{header.path}: chunk {number} is damaged (sizes of its layers)")
    records = np.empty(count * header.record_length, np.uint8)
    table = [(count, len(data))]
    run_lazrs(
        lambda: lazrs.decompress_points_with_chunk_table(np.frombuffer(data, np.uint8), laz.data, records, table),
        header,
        number,
    )
    return records.reshape(count, header.record_length)


def lazrs_of(header: LasHeader) -> Any:
    """The lazrs package.

    Raises:
        InputError: if it is not installed.
    """
    try:
        import lazrs
    except ImportError as error:
        raise InputError(f"{header.path}: LAZ needs lazrs: pip install pc3d[las]") from error
    return lazrs


def run_lazrs(call: Any, header: LasHeader, number: int) -> None:
    """Run a call of lazrs on chunk ``number``, whose errors (and panics) become one clear error."""
    try:
        call()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic is no Exception
        raise InputError(f"{header.path}: chunk {number} is damaged ({' '.join(str(error).split())})") from error


# The chunk table's code ----------------------------------------------------------------------------------------------


def decode_table(data: bytes, count: int, with_counts: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Points (zeros unless ``with_counts``) and bytes of ``count`` chunks from the coded part of a table.

    Raises:
        IndexError: if the data end too early.
    """
    integers = _Integers(_Decoder(data))
    counts, sizes = np.zeros(count, np.int64), np.zeros(count, np.int64)
    points = size = 0
    for i in range(count):
        if with_counts:
            counts[i] = points = integers.decode(points, context=0)
        sizes[i] = size = integers.decode(size, context=1)
    return counts, sizes


class _Symbols:
    """Adaptive frequencies of symbols 0 to ``size - 1``."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.counts = [1] * size
        self.total, self.cycle = 0, size
        self.update()
        self.cycle = self.left = (size + 6) >> 1

    def update(self) -> None:
        self.total += self.cycle
        if self.total > 1 << _SYMBOL_SHIFT:
            self.counts = [(count + 1) >> 1 for count in self.counts]
            self.total = sum(self.counts)
        scale, before = (1 << 31) // self.total, 0
        self.cumulative = []
        for count in self.counts:
            self.cumulative.append((scale * before) >> (31 - _SYMBOL_SHIFT))
            before += count
        self.cycle = self.left = min(5 * self.cycle >> 2, (self.size + 6) << 3)


class _Bit:
    """Adaptive frequency of a zero."""

    def __init__(self) -> None:
        self.zeros, self.total = 1, 2
        self.probability = 1 << (_BIT_SHIFT - 1)
        self.cycle = self.left = 4

    def update(self) -> None:
        self.total += self.cycle
        if self.total > 1 << _BIT_SHIFT:
            self.total, self.zeros = (self.total + 1) >> 1, (self.zeros + 1) >> 1
            self.total += self.zeros == self.total
        self.probability = (self.zeros * ((1 << 31) // self.total)) >> (31 - _BIT_SHIFT)
        self.cycle = self.left = min(5 * self.cycle >> 2, 64)


class _Decoder:
    """Said's range decoder on bytes."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 4
        if len(data) < 4:
            raise IndexError
        self._value, self._length = int.from_bytes(data[:4], "big"), _WORD - 1

    def bit(self, model: _Bit) -> int:
        border = model.probability * (self._length >> _BIT_SHIFT)
        if self._value < border:
            self._length, bit = border, 0
            model.zeros += 1
        else:
            self._value, self._length, bit = self._value - border, self._length - border, 1
        self._renormalise()
        model.left -= 1
        if model.left == 0:
            model.update()
        return bit

    def symbol(self, model: _Symbols) -> int:
        step, symbol = self._length >> _SYMBOL_SHIFT, 0
        end = model.size
        while end - symbol > 1:
            middle = (symbol + end) >> 1
            if step * model.cumulative[middle] > self._value:
                end = middle
            else:
                symbol = middle
        low = step * model.cumulative[symbol]
        high = step * model.cumulative[end] if end < model.size else self._length
        self._value, self._length = self._value - low, high - low
        self._renormalise()
        model.counts[symbol] += 1
        model.left -= 1
        if model.left == 0:
            model.update()
        return symbol

    def bits(self, count: int) -> int:
        if count > 19:  # in two parts, as the coder's 32 bits ask for
            low = self.bits(16)
            return low | self.bits(count - 16) << 16
        self._length >>= count
        value = self._value // self._length
        self._value -= self._length * value
        self._renormalise()
        return value

    def _renormalise(self) -> None:
        while self._length < _MIN_LENGTH:
            self._value = (self._value << 8 | self._data[self._place]) & (_WORD - 1)
            self._length <<= 8
            self._place += 1


class _Integers:
    """LASzip's compressor of 32-bit integers in two contexts: the difference to a prediction, by its bit length."""

    _HIGH_BITS = 8

    def __init__(self, decoder: _Decoder) -> None:
        self._decoder = decoder
        self._lengths = [_Symbols(33), _Symbols(33)]
        self._zero_length = _Bit()
        self._high = [_Symbols(1 << min(bits, self._HIGH_BITS)) for bits in range(1, 33)]

    def decode(self, prediction: int, context: int) -> int:
        """The unsigned integer."""
        return (prediction + self._difference(self._lengths[context])) % _WORD

    def _difference(self, lengths: _Symbols) -> int:
        bits = self._decoder.symbol(lengths)
        if bits == 0:
            return self._decoder.bit(self._zero_length)
        if bits == 32:
            return -(1 << 31)
        value = self._decoder.symbol(self._high[bits - 1])
        if bits > self._HIGH_BITS:
            low = bits - self._HIGH_BITS
            value = value << low | self._decoder.bits(low)
        return value + 1 if value >= 1 << (bits - 1) else value - (1 << bits) + 1
