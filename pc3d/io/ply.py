"""PLY (Stanford polygon files): ascii and binary of both byte orders, any vertex properties."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pc3d.errors import InputError
from pc3d.io.ascii import parse_numbers, to_dtype, write_rows
from pc3d.io.table import Array, Table, changes, group, narrow, split

_TYPES = {
    **dict.fromkeys(("char", "int8"), "i1"),
    **dict.fromkeys(("uchar", "uint8"), "u1"),
    **dict.fromkeys(("short", "int16"), "i2"),
    **dict.fromkeys(("ushort", "uint16"), "u2"),
    **dict.fromkeys(("int", "int32"), "i4"),
    **dict.fromkeys(("uint", "uint32"), "u4"),
    **dict.fromkeys(("float", "float32"), "f4"),
    **dict.fromkeys(("double", "float64"), "f8"),
}
_NAMES = {
    "i1": "char",
    "u1": "uchar",
    "i2": "short",
    "u2": "ushort",
    "i4": "int",
    "u4": "uint",
    "f4": "float",
    "f8": "double",
}
_ORDERS: dict[str, Literal["=", "<", ">"]] = {"ascii": "=", "binary_little_endian": "<", "binary_big_endian": ">"}
_SPELLING = {"coord": ("x", "y", "z"), "color": ("red", "green", "blue"), "normal": ("nx", "ny", "nz")}
_VECTOR = "pc3d_vector"
"""Comment that names an attribute of several columns: PLY has scalar properties only."""


@dataclass
class _Property:
    name: str
    dtype: str
    count_dtype: str | None = None


@dataclass
class _Element:
    name: str
    count: int
    properties: list[_Property] = field(default_factory=list)


@dataclass
class _Header:
    encoding: str
    elements: list[_Element]
    comments: list[str]
    lines: int
    size: int


def read(path: Path) -> Table:
    """Vertex properties. Other elements (faces) are skipped: :func:`read_faces`.

    Raises:
        InputError: for a damaged header, an unknown type, truncated data.
    """
    data = path.read_bytes()
    header = _parse_header(data, path)
    columns, _, _ = _vertices(data, header, path)
    for name, width in _vectors(header.comments):
        parts = [name] if width == 1 else [f"{name}_{i}" for i in range(width)]
        if all(part in columns for part in parts) and (width == 1 or name not in columns):
            columns[name] = np.stack([columns.pop(part) for part in parts], axis=1)
    return Table(
        columns, skipped=[element.name for element in header.elements if element.name != "vertex" and element.count]
    )


def read_faces(path: Path) -> Array:
    """``(F, 3)`` int64 vertex numbers of the triangles of a mesh.

    Raises:
        InputError: if the file has no faces or not only triangles.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    header = _parse_header(data, path)
    at = next((i for i, element in enumerate(header.elements) if element.name == "face" and element.count), None)
    if at is None:
        raise InputError(f"{path}: has no faces")
    columns, _, _ = _element(data, header, at, path)
    faces = next((columns[name] for name in ("vertex_indices", "vertex_index") if name in columns), None)
    if faces is None or faces.shape[1:] != (3,):
        raise InputError(f"{path}: element 'face' does not hold triangles")
    return faces.astype(np.int64)


def write(
    out: Path,
    columns: Mapping[str, Array],
    path: Path,
    template: Path | None = None,
    encoding: str | None = None,
) -> None:
    """Write vertices; with a template also its comments, its other elements and the properties ``columns`` lacks.

    Raises:
        InputError: for an unknown encoding, or one which is not that of the faces to keep.
    """
    if encoding is not None and encoding not in _ORDERS:
        raise InputError(f"{path}: encoding='{encoding}' is none of {', '.join(_ORDERS)}")
    comments: list[str] = []
    before, after, elements = b"", b"", []
    merged = dict(columns)
    if template is not None:
        table = read(template)
        merged = {**group(table.columns), **changes(table, columns, "ply", path, template)}
        data = template.read_bytes()
        header = _parse_header(data, template)
        _, start, end = _vertices(data, header, template)
        before, after = data[header.size : start], data[end:]
        elements = [element for element in header.elements]
        comments = [line for line in header.comments if not line.startswith(f"comment {_VECTOR} ")]
        others = [element.name for element in elements if element.name != "vertex"]
        if others and encoding not in (None, header.encoding):
            raise InputError(
                f"{path}: encoding='{encoding}' would lose element '{others[0]}' of {template}: use {header.encoding}"
            )
        encoding = encoding or header.encoding
    encoding = encoding or "binary_little_endian"
    for name, values in merged.items():
        if name not in (*_SPELLING, "strength") and values.ndim > 1:
            comments.append(f"comment {_VECTOR} {_word(name)} {int(np.prod(values.shape[1:]))}")
    fields = {_word(name): narrow(values, name, path) for name, values in split(merged, _SPELLING).items()}
    vertex = _Element("vertex", len(merged["coord"]), [_Property(name, v.dtype.str[1:]) for name, v in fields.items()])
    elements = [vertex if element.name == "vertex" else element for element in elements] or [vertex]
    lines = [
        "ply",
        f"format {encoding} 1.0",
        *comments,
        *(line for element in elements for line in _declare(element)),
        "end_header",
    ]
    with out.open("wb") as file:
        file.write("".join(f"{line}\n" for line in lines).encode() + before)
        if encoding != "ascii":
            file.write(_pack(fields, _ORDERS[encoding]).tobytes())
    if encoding == "ascii":
        with out.open("a", encoding="utf-8") as text:
            write_rows(text, fields.values())
    with out.open("ab") as file:
        file.write(after)


def _pack(fields: Mapping[str, Array], order: Literal["=", "<", ">"]) -> Array:
    rows = np.empty(
        len(next(iter(fields.values()))), [(name, values.dtype.newbyteorder(order)) for name, values in fields.items()]
    )
    for name, values in fields.items():
        rows[name] = values
    return rows


def _declare(element: _Element) -> list[str]:
    lines = [f"element {element.name} {element.count}"]
    for item in element.properties:
        kind = f"list {_NAMES[item.count_dtype]} " if item.count_dtype else ""
        lines.append(f"property {kind}{_NAMES[item.dtype]} {item.name}")
    return lines


def _word(name: str) -> str:
    return re.sub(r"\s+", "_", name)


def _vectors(comments: list[str]) -> list[tuple[str, int]]:
    found = (re.fullmatch(rf"comment {_VECTOR} (\S+) (\d+)", line) for line in comments)
    return [(match[1], int(match[2])) for match in found if match]


def _parse_header(data: bytes, path: Path) -> _Header:
    end = re.search(rb"(?:^|\n|\r)end_header[ \t]*(\r\n|\n|\r)", data[: 1 << 20])
    if not data.startswith(b"ply") or end is None:
        raise InputError(f"{path}: no PLY header ('ply' ... 'end_header')")
    lines = re.split(r"\r\n|\n|\r", data[: end.start(1)].decode("utf-8", errors="replace"))
    encoding, elements, comments = "", [], []
    for line in lines[1:-1]:
        words = line.split()
        if not words:
            continue
        try:
            if words[0] == "format":
                encoding = words[1]
            elif words[0] == "element":
                elements.append(_Element(words[1], int(words[2])))
            elif words[0] == "property":
                elements[-1].properties.append(_parse_property(words))
            elif words[0] in ("comment", "obj_info"):
                comments.append(line.strip())
            else:
                raise ValueError
        except (ValueError, IndexError, KeyError) as error:
            raise InputError(f"{path}: PLY header line not understood: {line.strip()[:60]!r}") from error
    if encoding not in _ORDERS:
        raise InputError(f"{path}: PLY format '{encoding}' is none of {', '.join(_ORDERS)}")
    for element in elements:
        names = [item.name for item in element.properties]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if element.count < 0 or repeated:
            what = f"property '{repeated}' twice" if repeated else f"count {element.count}"
            raise InputError(f"{path}: PLY element '{element.name}' has {what}")
    return _Header(encoding, elements, comments, len(lines), end.end())


def _parse_property(words: list[str]) -> _Property:
    if words[1] == "list":
        if _TYPES[words[2]][0] == "f":
            raise ValueError
        return _Property(words[4], _TYPES[words[3]], _TYPES[words[2]])
    return _Property(words[2], _TYPES[words[1]])


def _vertices(data: bytes, header: _Header, path: Path) -> tuple[dict[str, Array], int, int]:
    at = next((i for i, element in enumerate(header.elements) if element.name == "vertex"), None)
    if at is None:
        raise InputError(
            f"{path}: no element 'vertex' (it has: {', '.join(e.name for e in header.elements) or 'none'})"
        )
    return _element(data, header, at, path)


def _element(data: bytes, header: _Header, at: int, path: Path) -> tuple[dict[str, Array], int, int]:
    """Columns of element number ``at``, and where its data start and end in the file."""
    if not header.elements[at].properties:
        raise InputError(f"{path}: element '{header.elements[at].name}' has no properties")
    if header.encoding == "ascii":
        return _element_ascii(data, header, at, path)
    start = header.size
    for element in header.elements[:at]:
        start += _layout(data, start, element, header, path).itemsize * element.count
    element = header.elements[at]
    dtype = _layout(data, start, element, header, path)
    rows = np.frombuffer(data, dtype, count=element.count, offset=start) if element.count else np.empty(0, dtype)
    columns = {}
    for i, item in enumerate(element.properties):
        if item.count_dtype and np.any(rows[f"n{i}"] != rows[f"n{i}"][:1]):
            raise InputError(
                f"{path}: the lists '{item.name}' of element '{element.name}' differ in length: not supported"
            )
        columns[item.name] = rows[f"v{i}"].astype(rows[f"v{i}"].dtype.newbyteorder("="))
    return columns, start, start + dtype.itemsize * element.count


def _layout(data: bytes, start: int, element: _Element, header: _Header, path: Path) -> np.dtype:
    """Record dtype of a binary element; its lists have the lengths of the first record."""
    order = _ORDERS[header.encoding]
    fields: list[tuple[Any, ...]] = []
    offset = start
    for i, item in enumerate(element.properties):
        dtype = np.dtype(order + item.dtype)
        if item.count_dtype is None:
            fields.append((f"v{i}", dtype))
            offset += dtype.itemsize
            continue
        count_dtype = np.dtype(order + item.count_dtype)
        _check_size(data, offset + count_dtype.itemsize if element.count else 0, element, path)
        length = int(np.frombuffer(data, count_dtype, count=1, offset=offset)[0]) if element.count else 0
        if length < 0:
            raise InputError(f"{path}: list '{item.name}' of element '{element.name}' has length {length}")
        _check_size(data, offset + count_dtype.itemsize + length * dtype.itemsize, element, path)
        fields += [(f"n{i}", count_dtype), (f"v{i}", dtype, (length,))]
        offset += count_dtype.itemsize + length * dtype.itemsize
    record = np.dtype(fields)
    _check_size(data, start + record.itemsize * element.count, element, path)
    return record


def _check_size(data: bytes, end: int, element: _Element, path: Path) -> None:
    if end > len(data):
        raise InputError(
            f"{path}: truncated: element '{element.name}' ({element.count} rows) needs {end} bytes, "
            f"the file has {len(data)}"
        )


def _element_ascii(data: bytes, header: _Header, at: int, path: Path) -> tuple[dict[str, Array], int, int]:
    first = sum(element.count for element in header.elements[:at])
    element = header.elements[at]
    body = data[header.size :]
    breaks = np.flatnonzero(np.frombuffer(body, np.uint8) == ord("\n")) + 1
    ends = np.concatenate([[0], breaks, [len(body)] if not body.endswith(b"\n") else []]).astype(np.int64)
    if first + element.count >= len(ends):
        have = max(0, len(ends) - 1 - first)
        raise InputError(
            f"{path}: truncated: element '{element.name}' promises {element.count} rows, the file has {have}"
        )
    start, end = int(ends[first]), int(ends[first + element.count])
    lines = body[start:end].decode("latin-1").splitlines()
    values = parse_numbers(lines, path, header.lines + first, None)
    columns, column = {}, 0
    for item in element.properties:
        width = 1
        if item.count_dtype and element.count:
            lengths = values[:, column] if column < values.shape[1] else np.zeros(1)
            width = int(lengths[0]) if np.all(lengths == lengths[0]) and 0 <= lengths[0] < np.inf else -1
            if width < 0:
                raise InputError(
                    f"{path}: the lists '{item.name}' of element '{element.name}' differ in length: not supported"
                )
            column += 1
        part = values[:, column : column + width]
        if element.count and part.shape != (element.count, width):
            raise InputError(
                f"{path}: element '{element.name}' has {len(values)} rows of {values.shape[1]} numbers: "
                "too few for its header"
            )
        part = part if item.count_dtype else part.reshape(-1)
        columns[item.name] = to_dtype(part, np.dtype(item.dtype), path, item.name)
        column += width
    if element.count and column != values.shape[1]:
        raise InputError(
            f"{path}: element '{element.name}' has rows of {values.shape[1]} numbers, its header describes {column}"
        )
    return columns, header.size + start, header.size + end
