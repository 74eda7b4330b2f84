"""The fields of LAS points: from records as a file stores them to named columns, and back for single fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pc3d.errors import InputError
from pc3d.io.las_header import EXTRA_BYTES, RECORD_SIZES, LasHeader
from pc3d.io.table import Array

EXTRA_BYTES_ENTRY = np.dtype(
    [
        ("reserved", "V2"),
        ("type", "u1"),
        ("options", "u1"),
        ("name", "S32"),
        ("unused", "V4"),
        ("no_data", "V24"),
        ("min", "V24"),
        ("max", "V24"),
        ("scale", "<f8", 3),
        ("offset", "<f8", 3),
        ("description", "S32"),
    ]
)
"""An entry of the extra-bytes record (LAS 1.4 R15, table 24)."""

_EXTRA_TYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")
_HAS_SCALE, _HAS_OFFSET = 8, 16
_MAX_NAME = 31
_OLD_FIELDS = "intensity:u2 return_number:3 number_of_returns:3 scan_direction_flag:1 edge_of_flight_line:1 \
classification:5 synthetic:1 key_point:1 withheld:1 scan_angle_rank:i1 user_data:u1 point_source_id:u2"
_NEW_FIELDS = "intensity:u2 return_number:4 number_of_returns:4 synthetic:1 key_point:1 withheld:1 overlap:1 \
scanner_channel:2 scan_direction_flag:1 edge_of_flight_line:1 classification:u1 user_data:u1 scan_angle:i2 \
point_source_id:u2 gps_time:f8"
_TIME, _COLOR, _NIR = " gps_time:f8", " red:u2 green:u2 blue:u2", " nir:u2"
_WAVE = (
    " wavepacket_index:u1 wavepacket_offset:u8 wavepacket_size:u4 return_point_wave_location:f4 x_t:f4 y_t:f4 z_t:f4"
)
_FORMATS = (
    _OLD_FIELDS,
    _OLD_FIELDS + _TIME,
    _OLD_FIELDS + _COLOR,
    _OLD_FIELDS + _TIME + _COLOR,
    _OLD_FIELDS + _TIME + _WAVE,
    _OLD_FIELDS + _TIME + _COLOR + _WAVE,
    _NEW_FIELDS,
    _NEW_FIELDS + _COLOR,
    _NEW_FIELDS + _COLOR + _NIR,
    _NEW_FIELDS + _WAVE,
    _NEW_FIELDS + _COLOR + _NIR + _WAVE,
)


@dataclass(frozen=True)
class Field:
    """Where a field is in a record.

    Attributes:
        start: first byte.
        dtype: of one value.
        width: values side by side.
        shift, bits: place of a field that shares its byte; 0 bits for all others.
        scale, offset: of a scaled extra field, ``(width,)``; None as stored.
    """

    start: int
    dtype: np.dtype
    width: int = 1
    shift: int = 0
    bits: int = 0
    scale: Array | None = None
    offset: Array | None = None

    def get(self, records: NDArray[np.uint8]) -> Array:
        """``(n,)`` or ``(n, width)`` values of ``(n, record_length)`` records."""
        size = self.dtype.itemsize * self.width
        values = np.ascontiguousarray(records[:, self.start : self.start + size]).view(self.dtype)
        if self.bits:
            values = values >> self.shift & ((1 << self.bits) - 1)
        if self.scale is not None:
            values = values * self.scale + self.offset
        return values[:, 0] if self.width == 1 else values

    def set(self, records: NDArray[np.uint8], values: Array) -> None:
        """Store ``(n,)`` values; the other bits of a shared byte stay."""
        stored = np.ascontiguousarray(values).astype(self.dtype)
        if self.bits:
            mask = ((1 << self.bits) - 1) << self.shift
            stored = (stored << self.shift & mask) | (records[:, self.start] & ~np.uint8(mask))
        size = self.dtype.itemsize
        records[:, self.start : self.start + size] = stored.reshape(-1, 1).view(np.uint8)

    @property
    def highest(self) -> int:
        """Largest whole number it can hold."""
        return (1 << self.bits) - 1 if self.bits else int(np.iinfo(self.dtype).max)


def record_fields(header: LasHeader) -> dict[str, Field]:
    """The fields of a file's points except x, y, z, in the order and under the names that laspy gives them.

    Raises:
        InputError: if the extra fields need more bytes than a point has.
    """
    fields: dict[str, Field] = {}
    start, bit = 12, 0
    for entry in _FORMATS[header.point_format].split():
        name, kind = entry.split(":")
        if kind.isdigit():
            fields[name] = Field(start, np.dtype("u1"), shift=bit, bits=int(kind))
            bit += int(kind)
            start, bit = (start + 1, 0) if bit == 8 else (start, bit)
        else:
            fields[name] = Field(start, np.dtype(f"<{kind}"))
            start += fields[name].dtype.itemsize
    return fields | _extra_fields(header, RECORD_SIZES[header.point_format])


def columns_of(header: LasHeader, fields: dict[str, Field], records: NDArray[np.uint8]) -> dict[str, Array]:
    """Columns of ``(n, record_length)`` records by name, without the coordinates."""
    return {name: field.get(records) for name, field in fields.items()}


def _extra_fields(header: LasHeader, start: int) -> dict[str, Field]:
    if start == header.record_length:
        return {}
    fields: dict[str, Field] = {}
    for entry in _entries(header.records.get(EXTRA_BYTES, b"")):
        kind, options, name = int(entry["type"]), int(entry["options"]), entry["name"].decode("utf-8", "replace")
        if kind > 3 * len(_EXTRA_TYPES):
            raise InputError(f"{header.path}: extra field '{name}' has type {kind}, which is not known")
        dtype, width = _extra_type(entry)
        scaled = kind != 0 and options & (_HAS_SCALE | _HAS_OFFSET)
        scale = np.where(options & _HAS_SCALE, entry["scale"], 1.0)[:width] if scaled else None
        offset = np.where(options & _HAS_OFFSET, entry["offset"], 0.0)[:width] if scaled else None
        fields[name] = Field(start, dtype, width, scale=scale, offset=offset)
        start += dtype.itemsize * width
    if start > header.record_length:
        raise InputError(f"{header.path}: damaged: extra fields up to byte {start} of {header.record_length}")
    if start < header.record_length:
        fields["ExtraBytes"] = Field(start, np.dtype("u1"), header.record_length - start)
    return fields


def _entries(content: bytes) -> Array:
    return np.frombuffer(content, EXTRA_BYTES_ENTRY, len(content) // EXTRA_BYTES_ENTRY.itemsize)


def _extra_type(entry: Array) -> tuple[np.dtype, int]:
    """Type of one value, and values per point."""
    kind = int(entry["type"])
    if kind == 0:
        return np.dtype("u1"), int(entry["options"])
    return np.dtype(f"<{_EXTRA_TYPES[(kind - 1) % 10]}"), (kind - 1) // 10 + 1


def described_bytes(content: bytes) -> int:
    """Bytes of a point that the entries of an extra-bytes record describe."""
    types = [_extra_type(entry) for entry in _entries(content)]
    return sum(dtype.itemsize * width for dtype, width in types)


def extra_bytes_entry(name: str, dtype: np.dtype, count: int | None = None) -> bytes:
    """The entry that describes one more extra field; with a ``count``, that many bytes of no known type.

    Raises:
        InputError: if the name is longer than 31 bytes.
    """
    if len(name.encode()) > _MAX_NAME:
        raise InputError(f"field '{name}' has a name of more than {_MAX_NAME} bytes, the most a LAS dimension can have")
    entry = np.zeros(1, EXTRA_BYTES_ENTRY)
    entry["name"] = name.encode()
    if count is None:
        entry["type"] = _EXTRA_TYPES.index(dtype.str[1:]) + 1
    else:
        entry["options"] = count
    return entry.tobytes()


def with_fields(
    records: NDArray[np.uint8], fields: dict[str, Field], columns: dict[str, Array], extra: Sequence[str]
) -> NDArray[np.uint8]:
    """A copy of records with some fields set, and the columns named in ``extra`` behind them as extra bytes."""
    changed = records.copy()
    for name, values in columns.items():
        if name not in extra:
            fields[name].set(changed, values)
    more = [np.ascontiguousarray(columns[name]).reshape(len(records), 1).view(np.uint8) for name in extra]
    return np.concatenate([changed, *more], 1)
