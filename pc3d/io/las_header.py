"""Headers and variable-length records of LAS 1.0 to 1.4 and LAZ, from a few kilobytes of the file."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pc3d.errors import InputError

RECORD_SIZES = (20, 28, 26, 34, 57, 63, 30, 36, 38, 59, 67)
"""Bytes of a point of formats 0 to 10, without extra bytes."""
EXTRA_BYTES, LASZIP, COPC_INFO = ("LASF_Spec", 4), ("laszip encoded", 22204), ("copc", 1)

_SMALLEST, _LARGEST = 227, 375
_HEAD = 4096
_VLR, _EVLR = struct.Struct("<2x16sHH32x"), struct.Struct("<2x16sHQ32x")
_WANTED = (EXTRA_BYTES, LASZIP, COPC_INFO)
_COMPRESSED, _OLD_COMPRESSED, _FORMAT_BITS = 0x80, 0x40, 0x3F


class ByteReader:
    """Reads pieces of one file, and counts them.

    Attributes:
        path: the file.
        size: its bytes.
        bytes_read: bytes read so far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
        self.size = os.fstat(self._file.fileno()).st_size
        self.bytes_read = 0

    def __enter__(self) -> ByteReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, start: int, size: int, what: str) -> bytes:
        """``size`` bytes from ``start``.

        Raises:
            InputError: if the file ends before, or cannot be read; ``what`` names the piece.
        """
        if start < 0 or size < 0 or start + size > self.size:
            raise InputError(
                f"{self.path}: truncated or damaged: {what} should be bytes {start} to {start + size}, "
                f"the file has {self.size}"
            )
        parts = []
        try:
            self._file.seek(start)
            while size > 0 and (part := self._file.read(size)):
                parts.append(part)
                size -= len(part)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        data = b"".join(parts)
        self.bytes_read += len(data)
        if size:
            raise InputError(f"{self.path}: truncated while it was read ({what})")
        return data


@dataclass(frozen=True)
class LasHeader:
    """What the header of a LAS or LAZ file says.

    Attributes:
        path: the file.
        version: such as ``(1, 4)``.
        point_format: 0 to 10.
        record_length: bytes of a point, extra bytes included.
        compressed: LAZ.
        num_points: points.
        scale, offset: ``(3,)`` float64; a true coordinate is ``stored * scale + offset``.
        low, high: ``(3,)`` float64 corners of the bounding box, as the header has them.
        points_start: first byte of the point data.
        points_end: where they must end at the latest: the extended records, or the end of the file.
        records: contents of the variable-length records this package needs, by ``(user, id)``; the first of
            each, as laspy takes them.
    """

    path: Path
    version: tuple[int, int]
    point_format: int
    record_length: int
    compressed: bool
    num_points: int
    scale: NDArray[np.float64]
    offset: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    points_start: int
    points_end: int
    records: dict[tuple[str, int], bytes]


def read_header(reader: ByteReader) -> LasHeader:
    """The header of a file.

    Raises:
        InputError: if it is no LAS or LAZ file, or its header cannot be true.
    """
    path, size = reader.path, reader.size
    head = reader.read(0, min(size, _HEAD), "the header")
    if len(head) < _SMALLEST or head[:4] != b"LASF":
        raise InputError(f"{path}: no LAS/LAZ header")
    version, code = (head[24], head[25]), head[104]
    header_size, points_start, num_records = struct.unpack_from("<HII", head, 94)
    (record_length,) = struct.unpack_from("<H", head, 105)
    (num_points,) = struct.unpack_from("<I", head, 107)
    extended_start, num_extended = 0, 0
    if version >= (1, 4):
        if len(head) < _LARGEST or header_size < _LARGEST:
            raise InputError(f"{path}: truncated or damaged: LAS 1.4 with a header of {min(header_size, size)} bytes")
        extended_start, num_extended = struct.unpack_from("<QI", head, 235)
        (num_points,) = struct.unpack_from("<Q", head, 247)
    point_format, compressed = code & _FORMAT_BITS, bool(code & (_COMPRESSED | _OLD_COMPRESSED))
    if version[0] != 1 or version[1] > 4 or point_format >= len(RECORD_SIZES):
        raise InputError(f"{path}: LAS {version[0]}.{version[1]} with point format {point_format} is not known")
    if record_length < RECORD_SIZES[point_format]:
        raise InputError(
            f"{path}: damaged: points of {record_length} bytes, those of format {point_format} have "
            f"{RECORD_SIZES[point_format]} or more"
        )
    if header_size < _SMALLEST or points_start > size or header_size + num_records * _VLR.size > points_start:
        raise InputError(
            f"{path}: truncated or damaged: {num_records} records before byte {points_start}, the file has {size} bytes"
        )
    if num_extended and not points_start <= extended_start <= size - num_extended * _EVLR.size:
        raise InputError(
            f"{path}: truncated or damaged: {num_extended} records at byte {extended_start}, the file has {size} bytes"
        )
    doubles = np.frombuffer(head, "<f8", 12, 131)
    scale, offset, high, low = doubles[:3], doubles[3:6], doubles[6::2], doubles[7::2]
    if not (np.isfinite(scale).all() and np.isfinite(offset).all() and (scale > 0).all()):
        raise InputError(f"{path}: header has scales {scale.tolist()} and offsets {offset.tolist()}")
    if num_points and not (np.isfinite(low).all() and np.isfinite(high).all() and (low <= high).all()):
        raise InputError(f"{path}: header has a bounding box from {low.tolist()} to {high.tolist()}")
    return LasHeader(
        path,
        version,
        point_format,
        record_length,
        compressed,
        num_points,
        scale,
        offset,
        low,
        high,
        points_start,
        extended_start if num_extended else size,
        _records(reader, head, header_size, num_records, points_start),
    )


def _records(reader: ByteReader, head: bytes, start: int, count: int, end: int) -> dict[tuple[str, int], bytes]:
    def piece(at: int, size: int) -> bytes:
        if at + size > end:
            raise InputError(f"{reader.path}: damaged: a variable-length record reaches into the points")
        return head[at : at + size] if at + size <= len(head) else reader.read(at, size, "a variable-length record")

    found: dict[tuple[str, int], bytes] = {}
    for _ in range(count):
        user, number, size = _VLR.unpack(piece(start, _VLR.size))
        key = (user.split(b"\0")[0].decode("ascii", "replace"), number)
        start += _VLR.size
        if key in _WANTED:
            found.setdefault(key, piece(start, size))
        start += size
    return found


def coordinates(header: LasHeader, records: NDArray[np.uint8]) -> NDArray[np.float64]:
    """``(n, 3)`` true coordinates of ``(n, record_length)`` points."""
    stored = np.ascontiguousarray(records[:, :12]).view("<i4")
    return stored * header.scale + header.offset


def colors(header: LasHeader, records: NDArray[np.uint8]) -> NDArray[np.uint16] | None:
    """``(n, 3)`` red, green and blue as stored, None if the format has none."""
    at = {2: 20, 3: 28, 5: 28, 7: 30, 8: 30, 10: 30}.get(header.point_format)
    return None if at is None else np.ascontiguousarray(records[:, at : at + 6]).view("<u2")
