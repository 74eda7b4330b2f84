"""LZF, the byte compression of ``DATA binary_compressed`` PCD files: in C++ when built, in plain Python otherwise."""

from __future__ import annotations

import numpy as np

from pc3d.ops.backend import cpu_kernels

_MAX_LITERALS = 32
_DAMAGED = "LZF data are damaged"
MAX_RATIO = 88
"""No stream grows by more than this: three bytes give at most 264."""


def decompress(data: bytes, size: int) -> bytes:
    """The ``size`` bytes that an LZF stream holds.

    Raises:
        ValueError: if the stream is damaged or holds another number of bytes.
    """
    if size > MAX_RATIO * len(data):
        raise ValueError(_DAMAGED)
    kernels = cpu_kernels()
    return _decompress(data, size) if kernels is None else kernels.lzf_decompress(data, size)


def compress(data: bytes) -> bytes:
    """An LZF stream of ``data``. The plain-Python path stores literal runs only: valid, 1/32 longer than the data."""
    kernels = cpu_kernels()
    return _store(data) if kernels is None else kernels.lzf_compress(data)


def _decompress(data: bytes, size: int) -> bytes:
    out = bytearray()
    at, end = 0, len(data)
    while at < end and len(out) <= size:
        control = data[at]
        at += 1
        if control < _MAX_LITERALS:
            out += data[at : at + control + 1]
            at += control + 1
            continue
        extra = 1 if control >> 5 == 7 else 0
        if at + extra >= end:
            raise ValueError(_DAMAGED)
        length = (control >> 5) + (data[at] if extra else 0) + 2
        distance = ((control & 31) << 8 | data[at + extra]) + 1
        at += extra + 1
        start = len(out) - distance
        if start < 0:
            raise ValueError(_DAMAGED)
        copied = out[start : start + length]
        # A copy that reaches into its own output repeats the bytes since its start.
        out += (copied * (length // distance + 1))[:length] if distance < length else copied
    if len(out) != size or at != end:
        raise ValueError(_DAMAGED)
    return bytes(out)


def _store(data: bytes) -> bytes:
    whole = len(data) // _MAX_LITERALS * _MAX_LITERALS
    runs = np.frombuffer(data, np.uint8, count=whole).reshape(-1, _MAX_LITERALS)
    controls = np.full((len(runs), 1), _MAX_LITERALS - 1, np.uint8)
    rest = data[whole:]
    return np.hstack([controls, runs]).tobytes() + (bytes([len(rest) - 1]) + rest if rest else b"")
