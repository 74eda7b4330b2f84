"""``LasWriter``: LAS and LAZ files written chunk after chunk, so that they may be larger than memory."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pc3d.errors import InputError
from pc3d.io.las_header import COPC_INFO, EXTRA_BYTES, LASZIP, RECORD_SIZES, ByteReader, LasHeader
from pc3d.io.las_records import described_bytes, extra_bytes_entry
from pc3d.io.laz_chunks import VARIABLE

_VLR, _EVLR = struct.Struct("<H16sHH32s"), struct.Struct("<H16sHQ32s")
_WAVEFORM_FORMATS = (4, 5, 9, 10)
_HEADER_SIZES = {(1, 2): 227, (1, 3): 235, (1, 4): 375}
_BLOCK = 1 << 20


@dataclass(frozen=True)
class LasHead:
    """What stands before and behind the points.

    Attributes:
        header: the header's bytes.
        records: variable-length records, ``(user, id, description, content)``.
        tail: byte ranges of extended records in ``source`` to be copied behind the points.
        source: file of the tail.
        measured: the header's counts and box are to be taken from the points when they have been written.
    """

    header: bytes
    records: list[tuple[str, int, bytes, bytes]] = field(default_factory=list)
    tail: list[tuple[int, int]] = field(default_factory=list)
    source: Path | None = None
    measured: bool = False

    @property
    def point_format(self) -> int:
        return self.header[104] & 0x3F

    @property
    def record_length(self) -> int:
        return int(struct.unpack_from("<H", self.header, 105)[0])

    def with_extra_bytes(self, entries: bytes, size: int) -> LasHead:
        """The head of points that are ``size`` bytes longer, with the entries that describe these."""
        if not size:
            return self
        described = next((content for *key, _, content in self.records if tuple(key) == EXTRA_BYTES), b"")
        rest = self.record_length - RECORD_SIZES[self.point_format] - described_bytes(described)
        if rest > 0:  # bytes without a description get one, or the new fields would be taken for them
            entries = extra_bytes_entry("ExtraBytes", np.dtype("u1"), rest) + entries
        records = [record for record in self.records if record[:2] != EXTRA_BYTES]
        records.append((*EXTRA_BYTES, b"", described + entries))
        header = bytearray(self.header)
        struct.pack_into("<H", header, 105, self.record_length + size)
        return replace(self, header=bytes(header), records=records)


def new_head(point_format: int, scale: Sequence[float], offset: Sequence[float]) -> LasHead:
    """The head of a new file: LAS 1.2, or 1.4 for formats 6 and up; 1.3 for those with waveforms."""
    version = (1, 4) if point_format >= 6 else (1, 3) if point_format in _WAVEFORM_FORMATS else (1, 2)
    size = _HEADER_SIZES[version]
    header = bytearray(size)
    header[:4] = b"LASF"
    header[24:26] = bytes(version)
    header[58:62] = b"pc3d"
    struct.pack_into("<H", header, 94, size)
    header[104] = point_format
    struct.pack_into("<H", header, 105, RECORD_SIZES[point_format])
    struct.pack_into("<6d", header, 131, *scale, *offset)
    if point_format >= 6:
        struct.pack_into("<H", header, 6, 1 << 4)  # the coordinate system, if any, is in WKT
    return LasHead(bytes(header), measured=True)


def head_of(header: LasHeader) -> LasHead:
    """The head of an existing file, without what describes fixed places in it: chunks, octree, waveforms."""
    path = header.path
    with ByteReader(path) as reader:
        (size, _, count) = struct.unpack("<HII", reader.read(94, 10, "the header"))
        raw = bytearray(reader.read(0, size, "the header"))
        records, start = [], size
        for _ in range(count):
            _, user, number, length, text = _VLR.unpack(reader.read(start, _VLR.size, "a record"))
            content = reader.read(start + _VLR.size, length, "a record")
            records.append((user.split(b"\0")[0].decode("ascii", "replace"), number, text.rstrip(b"\0"), content))
            start += _VLR.size + length
        tail = _extended(reader, raw)
    raw[104] &= 0x3F
    if header.point_format in _WAVEFORM_FORMATS and len(raw) >= 235:
        struct.pack_into("<Q", raw, 227, 0)
    dropped = (LASZIP, COPC_INFO)
    kept = [record for record in records if record[:2] not in dropped and record[0] != COPC_INFO[0]]
    return LasHead(bytes(raw), kept, tail, path)


def _extended(reader: ByteReader, header: bytearray) -> list[tuple[int, int]]:
    if header[25] < 4 or len(header) < 375:
        return []
    start, count = struct.unpack_from("<QI", header, 235)
    ranges = []
    for _ in range(count):
        _, user, _, length, _ = _EVLR.unpack(reader.read(start, _EVLR.size, "an extended record"))
        if user.split(b"\0")[0].decode("ascii", "replace") != COPC_INFO[0]:
            ranges.append((start, _EVLR.size + length))
        start += _EVLR.size + length
    return ranges


class LasWriter:
    """Writes points chunk after chunk; a context manager, the file is complete when it ends.

    Args:
        out: the file to write, see :func:`pc3d.io.atomic.atomic_write`.
        head: header and records.
        compressed: LAZ.
        chunk_size: points per LAZ chunk; None makes every :meth:`write` a chunk of its own.
        encoded: the points come as :func:`encode_chunk` made them, by :meth:`write_encoded`.

    Raises:
        InputError: if LAZ is wanted without lazrs.
    """

    def __init__(
        self, out: Path, head: LasHead, compressed: bool, chunk_size: int | None = 50_000, encoded: bool = False
    ) -> None:
        self._head, self._variable = head, chunk_size is None
        self._count, self._returns = 0, np.zeros(16, np.int64)
        self._low, self._high = np.full(3, np.iinfo(np.int64).max), np.full(3, np.iinfo(np.int64).min)
        self._laz = _laz_record(out, head, chunk_size) if compressed else None
        self._file = out.open("w+b")
        self._write_head()
        self._compressor = self._start() if compressed and not encoded else None
        self._table: list[tuple[int, int]] = []
        self._points_start = self._file.tell()
        if compressed and encoded:
            self._file.write(bytes(8))

    def __enter__(self) -> LasWriter:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()

    def write(self, records: NDArray[np.uint8]) -> None:
        """Append ``(n, record_length)`` points."""
        if len(records) == 0:
            return
        data = np.ascontiguousarray(records)
        self._measure(data)
        if self._compressor is None:
            data.tofile(self._file)
        elif self._variable:
            self._compressor.compress_chunks([data.reshape(-1)])
        else:
            self._compressor.compress_many(data.reshape(-1))

    def write_encoded(self, count: int, data: bytes) -> None:
        """Append a chunk of ``count`` points; all but the last have ``chunk_size`` of them."""
        self._table.append((count, len(data)))
        self._file.write(data)

    def _measure(self, records: NDArray[np.uint8]) -> None:
        self._count += len(records)
        stored = np.ascontiguousarray(records[:, :12]).view("<i4")
        self._low, self._high = np.minimum(self._low, stored.min(0)), np.maximum(self._high, stored.max(0))
        numbers = records[:, 14] & (15 if self._head.point_format >= 6 else 7)
        self._returns += np.bincount(numbers, minlength=16)

    def _start(self) -> Any:
        import lazrs

        return lazrs.LasZipCompressor(self._file, lazrs.LazVlr(self._laz))

    def _write_head(self) -> None:
        records = list(self._head.records)
        if self._laz is not None:
            records.append((*LASZIP, b"lazrs", self._laz))
        body = b"".join(
            _VLR.pack(0, user.encode(), number, len(content), text) + content for user, number, text, content in records
        )
        header = bytearray(self._head.header)
        struct.pack_into("<II", header, 96, len(header) + len(body), len(records))
        header[104] = self._head.point_format | (0x80 if self._laz is not None else 0)
        self._file.write(bytes(header) + body)

    def _finish(self) -> None:
        if self._compressor is not None:
            self._compressor.done()
        elif self._laz is not None:
            self._write_table()
        self._file.seek(0, 2)
        version = tuple(self._head.header[24:26])
        if version >= (1, 4):
            start = self._file.tell() if self._head.tail else 0
            self._copy_tail()
            self._patch("<QI", 235, start, len(self._head.tail))
        if self._head.measured:
            self._write_counts(version)

    def _write_table(self) -> None:
        import lazrs

        place = self._file.tell()
        lazrs.write_chunk_table(self._file, self._table, lazrs.LazVlr(self._laz))
        self._patch("<q", self._points_start, place)

    def _copy_tail(self) -> None:
        if not self._head.tail:
            return
        assert self._head.source is not None
        with ByteReader(self._head.source) as reader:
            for start, size in self._head.tail:
                for at in range(0, size, _BLOCK):
                    self._file.write(reader.read(start + at, min(_BLOCK, size - at), "an extended record"))

    def _write_counts(self, version: tuple[int, ...]) -> None:
        if self._head.point_format < 6:
            self._patch("<I5I", 107, self._count, *self._returns[1:6])
        if version >= (1, 4):
            self._patch("<Q15Q", 247, self._count, *self._returns[1:])
        scale, offset = np.frombuffer(self._head.header, "<f8", 6, 131).reshape(2, 3)
        if self._count:
            low, high = self._low * scale + offset, self._high * scale + offset
            self._patch("<6d", 179, *np.stack([high, low], 1).reshape(-1))

    def _patch(self, layout: str, place: int, *values: Any) -> None:
        self._file.seek(place)
        self._file.write(struct.pack(layout, *values))
        self._file.seek(0, 2)


def encode_chunk(path: Path, head: LasHead, records: NDArray[np.uint8], compressed: bool) -> bytes:
    """The bytes of one chunk in a file with this head, see :meth:`LasWriter.write_encoded`.

    Raises:
        InputError: if LAZ is wanted without lazrs.
    """
    data = np.ascontiguousarray(records)
    if not compressed:
        return data.tobytes()
    record = _laz_record(path, head, len(data))
    import lazrs

    whole = lazrs.compress_points(lazrs.LazVlr(record), data.reshape(-1), False)
    (end,) = struct.unpack_from("<q", whole)
    return bytes(whole[8:end])


def _laz_record(path: Path, head: LasHead, chunk_size: int | None) -> bytes:
    try:
        import lazrs
    except ImportError as error:
        raise InputError(f"{path}: LAZ needs lazrs: pip install pc3d[las]") from error
    extra = head.record_length - RECORD_SIZES[head.point_format]
    data = bytearray(lazrs.LazVlr.new_for_compression(head.point_format, extra, chunk_size is None).record_data())
    struct.pack_into("<I", data, 12, VARIABLE if chunk_size is None else chunk_size)
    return bytes(data)
