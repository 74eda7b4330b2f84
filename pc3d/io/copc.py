"""The octree of a COPC file: its info record and hierarchy (COPC 1.0, copc.io)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pc3d.errors import InputError
from pc3d.io.las_header import COPC_INFO, ByteReader, LasHeader

_INFO = struct.Struct("<5d2Q")
_ENTRY = np.dtype([("key", "<i4", 4), ("start", "<u8"), ("size", "<i4"), ("count", "<i4")])
_PAGE = -1
_MAX_LEVEL = 30


@dataclass(frozen=True)
class Octree:
    """Nodes that hold points, ordered by their place in the file.

    Attributes:
        key: ``(M, 4)`` int32 level, x, y, z; the root is 0, 0, 0, 0.
        start, size, count: ``(M,)`` int64 first byte, bytes and points.
        low, high: ``(M, 3)`` float64 corners of the nodes' cubes.
    """

    key: NDArray[np.int32]
    start: NDArray[np.int64]
    size: NDArray[np.int64]
    count: NDArray[np.int64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def read_octree(reader: ByteReader, header: LasHeader) -> Octree | None:
    """The octree of a file, None if it is no COPC file.

    Raises:
        InputError: if the hierarchy is damaged.
    """
    info = header.records.get(COPC_INFO)
    if info is None:
        return None
    if len(info) < _INFO.size:
        raise InputError(f"{header.path}: damaged: COPC info of {len(info)} bytes")
    *center, half, _spacing, start, size = _INFO.unpack_from(info)
    if not (np.isfinite([*center, half]).all() and half > 0):
        raise InputError(f"{header.path}: damaged: COPC cube with centre {center} and half size {half}")
    entries = _entries(reader, start, size)
    entries = entries[entries["count"] > 0]
    entries = entries[np.argsort(entries["start"], kind="stable")]
    key = entries["key"]
    if len(entries) and not (key.min() >= 0 and (key[:, 0] <= _MAX_LEVEL).all()):
        raise InputError(f"{header.path}: damaged: COPC hierarchy with keys from {key.min(0)} to {key.max(0)}")
    edge = 2 * half / 2.0 ** key[:, :1]
    low = np.array(center) - half + key[:, 1:] * edge
    starts, sizes, counts = (entries[name].astype(np.int64) for name in ("start", "size", "count"))
    return Octree(key, starts, sizes, counts, low, low + edge)


def _entries(reader: ByteReader, start: int, size: int) -> NDArray[np.void]:
    pages, seen, found = [(start, size)], set(), []
    while pages:
        start, size = pages.pop()
        if start in seen or size % _ENTRY.itemsize:
            raise InputError(f"{reader.path}: damaged: COPC hierarchy page of {size} bytes at {start}")
        seen.add(start)
        page = np.frombuffer(reader.read(start, size, "a page of the COPC hierarchy"), _ENTRY)
        below = page["count"] == _PAGE
        pages += [(int(entry["start"]), int(entry["size"])) for entry in page[below]]
        found.append(page[~below])
    return np.concatenate(found)
