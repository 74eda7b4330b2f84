"""PCD 0.7 (Point Cloud Library): ascii, binary and binary_compressed, organised clouds, packed colours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pc3d.errors import InputError
from pc3d.io import lzf
from pc3d.io.ascii import parse_numbers, to_dtype, write_rows
from pc3d.io.table import Array, Table, changes, flatten, group, narrow

_ENCODINGS = ("ascii", "binary", "binary_compressed")
_KINDS = {"I": "i", "U": "u", "F": "f"}
_SPELLING = {
    "coord": ("x", "y", "z"),
    "color": ("red", "green", "blue"),
    "normal": ("normal_x", "normal_y", "normal_z"),
}
_MAX_COUNT = 1 << 20
_IDENTITY = [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]


@dataclass
class _Field:
    name: str
    dtype: np.dtype[Any]
    count: int


@dataclass
class _Header:
    fields: list[_Field]
    width: int
    height: int
    viewpoint: list[float]
    encoding: str
    lines: int
    size: int


def read(path: Path) -> Table:
    """Fields of the cloud; ``rgb``/``rgba`` unpacked to red, green, blue (and alpha), padding ``_`` left out.

    ``meta["viewpoint"]`` holds the sensor pose (translation, quaternion w x y z) when it is not the identity; points
    are not moved by it.

    Raises:
        InputError: for a damaged header or truncated data.
    """
    data = path.read_bytes()
    header = _parse_header(data, path)
    columns: dict[str, Array] = {}
    for item, values in zip(header.fields, _values(data, header, path), strict=True):
        if item.name in ("rgb", "rgba") and values.ndim == 1 and item.dtype.itemsize == 4:
            columns.update(_unpack_color(values, alpha=item.name == "rgba"))
        elif item.name != "_":
            columns[item.name] = values
    meta = {} if header.viewpoint == _IDENTITY else {"viewpoint": header.viewpoint}
    return Table(columns, meta=meta, organised=header.height > 1)


def write(
    out: Path,
    columns: Mapping[str, Array],
    meta: Mapping[str, Any],
    path: Path,
    template: Path | None = None,
    encoding: str | None = None,
) -> None:
    """Write the cloud; with a template in its layout (width, height, viewpoint), with the fields ``columns`` lacks.

    Raises:
        InputError: for an unknown encoding.
    """
    if encoding is not None and encoding not in _ENCODINGS:
        raise InputError(f"{path}: encoding='{encoding}' is none of {', '.join(_ENCODINGS)}")
    width, height, viewpoint = len(columns["coord"]), 1, meta.get("viewpoint", _IDENTITY)
    merged = dict(columns)
    if template is not None:
        table = read(template)
        merged = {**group(table.columns), **changes(table, columns, "pcd", path, template)}
        header = _parse_header(template.read_bytes(), template)
        width, height, viewpoint = header.width, header.height, header.viewpoint
        encoding = encoding or header.encoding
    encoding = encoding or "binary"
    fields = _fields(merged, path)
    lines = [
        "# .PCD v0.7 - Point Cloud Data file format",
        "VERSION 0.7",
        "FIELDS " + " ".join(fields),
        "SIZE " + " ".join(str(values.dtype.itemsize) for values in fields.values()),
        "TYPE " + " ".join(values.dtype.kind.upper() for values in fields.values()),
        "COUNT " + " ".join(str(values.shape[1]) for values in fields.values()),
        f"WIDTH {width}",
        f"HEIGHT {height}",
        "VIEWPOINT " + " ".join(f"{value:.17g}" for value in viewpoint),
        f"POINTS {width * height}",
        f"DATA {encoding}",
    ]
    head = "".join(f"{line}\n" for line in lines)
    if encoding == "ascii":
        with out.open("w", encoding="utf-8") as text:
            text.write(head)
            write_rows(text, [values[:, i] for values in fields.values() for i in range(values.shape[1])])
        return
    out.write_bytes(head.encode() + (_pack(fields) if encoding == "binary" else _compress(fields)))


def _fields(columns: Mapping[str, Array], path: Path) -> dict[str, Array]:
    """``(N, count)`` little-endian fields under the names of PCL; colours packed."""
    fields: dict[str, Array] = {}
    rest = dict(columns)
    packed_color = "color" in rest and rest["color"].dtype == np.uint8
    color = rest.pop("color") if packed_color else None
    for name, values in rest.items():
        if name == "alpha" and color is not None and values.dtype == np.uint8:
            continue
        flat = narrow(flatten(values), name, path, wide_integers=True)
        if name in _SPELLING:
            fields.update({label: flat[:, i : i + 1] for i, label in enumerate(_SPELLING[name])})
        else:
            fields[re.sub(r"\s+", "_", name)] = flat
        if name == "coord" and color is not None:
            alpha = rest.get("alpha")
            packed = _pack_color(color, alpha if alpha is not None and alpha.dtype == np.uint8 else None)
            fields["rgb" if packed.dtype.kind == "f" else "rgba"] = packed[:, None]
    return {name: values.astype(values.dtype.newbyteorder("<")) for name, values in fields.items()}


def _pack_color(color: Array, alpha: Array | None) -> Array:
    red, green, blue = color.astype(np.uint32).T
    word = red << 16 | green << 8 | blue
    # `rgb` is a float bit pattern by PCL's convention; the top byte stays 0 so that it is never a NaN.
    return word.view(np.float32) if alpha is None else word | alpha.astype(np.uint32).reshape(-1) << 24


def _unpack_color(values: Array, alpha: bool) -> dict[str, Array]:
    word = np.ascontiguousarray(values).view(np.uint32)
    columns = {"red": word >> 16 & 255, "green": word >> 8 & 255, "blue": word & 255}
    if alpha:
        columns["alpha"] = word >> 24
    return {name: values.astype(np.uint8) for name, values in columns.items()}


def _pack(fields: Mapping[str, Array]) -> bytes:
    rows = np.empty(len(next(iter(fields.values()))), [(name, v.dtype, (v.shape[1],)) for name, v in fields.items()])
    for name, values in fields.items():
        rows[name] = values
    return rows.tobytes()


def _compress(fields: Mapping[str, Array]) -> bytes:
    raw = b"".join(values.tobytes() for values in fields.values())
    packed = lzf.compress(raw)
    return np.array([len(packed), len(raw)], "<u4").tobytes() + packed


def _parse_header(data: bytes, path: Path) -> _Header:
    end = re.search(rb"(?:^|\n)DATA[ \t]+(\w+)[ \t]*\r?\n", data[: 1 << 16])
    if end is None:
        raise InputError(f"{path}: no PCD header (no 'DATA' line)")
    lines = data[: end.end()].decode("latin-1").splitlines()
    entries = {
        words[0].upper(): words[1:] for words in (line.split() for line in lines) if words and words[0][0] != "#"
    }
    encoding = end[1].decode().lower()
    if encoding not in _ENCODINGS:
        raise InputError(f"{path}: PCD data '{encoding}' is none of {', '.join(_ENCODINGS)}")
    try:
        names = entries.get("FIELDS") or entries["COLUMNS"]
        sizes, kinds = [int(size) for size in entries["SIZE"]], [_KINDS[kind.upper()] for kind in entries["TYPE"]]
        counts = [int(count) for count in entries.get("COUNT", ["1"] * len(names))]
        dtypes = [np.dtype(f"<{kind}{size}") for kind, size in zip(kinds, sizes, strict=True)]
        fields = [_Field(*item) for item in zip(names, dtypes, counts, strict=True)]
        width = int(entries["WIDTH"][0]) if "WIDTH" in entries else int(entries["POINTS"][0])
        height = int(entries.get("HEIGHT", ["1"])[0])
        points = int(entries.get("POINTS", [str(width * height)])[0])
        viewpoint = [float(value) for value in entries.get("VIEWPOINT", _IDENTITY)]
    except KeyError as error:
        raise InputError(f"{path}: PCD header has no usable {error.args[0]} line") from error
    except (ValueError, TypeError, IndexError) as error:
        raise InputError(f"{path}: PCD header not understood: {' '.join(str(error).split())}") from error
    named = [item.name for item in fields if item.name != "_"]
    if (
        len(set(named)) < len(named)
        or min(width, height, min(counts) - 1) < 0
        or max(counts) > _MAX_COUNT
        or len(viewpoint) != 7
    ):
        raise InputError(
            f"{path}: PCD header not understood: repeated fields, impossible sizes or a viewpoint without 7 numbers"
        )
    if points != width * height:
        raise InputError(f"{path}: PCD header has POINTS {points}, but WIDTH {width} x HEIGHT {height}")
    return _Header(fields, width, height, viewpoint, encoding, len(lines), end.end())


def _values(data: bytes, header: _Header, path: Path) -> list[Array]:
    """``(N,)`` or ``(N, count)`` values of each field."""
    read_body = {"ascii": _read_ascii, "binary": _read_binary, "binary_compressed": _read_compressed}[header.encoding]
    values = read_body(data[header.size :], header, path)
    return [v[:, 0] if item.count == 1 else v for item, v in zip(header.fields, values, strict=True)]


def _read_ascii(body: bytes, header: _Header, path: Path) -> list[Array]:
    count = header.width * header.height
    lines = [line for line in body.decode("latin-1").splitlines() if line.strip()]
    numbers = parse_numbers(lines, path, header.lines + 1)
    width = sum(item.count for item in header.fields)
    if len(numbers) < count or (count and numbers.shape[1] != width):
        raise InputError(
            f"{path}: header promises {count} points of {width} numbers, "
            f"the file has {len(numbers)} of {numbers.shape[1]}"
        )
    numbers = numbers[:count] if count else np.zeros((0, width))
    ends = np.cumsum([item.count for item in header.fields])
    return [
        to_dtype(numbers[:, end - item.count : end], item.dtype, path, item.name)
        for item, end in zip(header.fields, ends, strict=True)
    ]


def _read_binary(body: bytes, header: _Header, path: Path) -> list[Array]:
    count = header.width * header.height
    record = np.dtype([(f"f{i}", item.dtype, (item.count,)) for i, item in enumerate(header.fields)])
    if len(body) < count * record.itemsize:
        raise InputError(
            f"{path}: truncated: {count} points need {count * record.itemsize} bytes, the file has {len(body)}"
        )
    rows = np.frombuffer(body, record, count=count)
    return [rows[name].astype(rows[name].dtype.newbyteorder("=")) for name in record.names or ()]


def _read_compressed(body: bytes, header: _Header, path: Path) -> list[Array]:
    count = header.width * header.height
    expected = count * sum(item.dtype.itemsize * item.count for item in header.fields)
    packed_size, size = np.frombuffer(body[:8], "<u4").tolist() if len(body) >= 8 else (0, -1)
    if size != expected or len(body) < 8 + packed_size:
        what = "truncated" if size == expected or size < 0 else f"holds {size} bytes, its header describes {expected}"
        raise InputError(f"{path}: compressed data: {what}")
    try:
        raw = lzf.decompress(body[8 : 8 + packed_size], size)
    except ValueError as error:
        raise InputError(f"{path}: compressed data are damaged") from error
    values, at = [], 0
    for item in header.fields:
        part = np.frombuffer(raw, item.dtype, count=count * item.count, offset=at).reshape(count, item.count)
        values.append(part.astype(item.dtype.newbyteorder("=")))
        at += part.nbytes
    return values
