"""Text clouds: one point per line, with or without a line of column names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pc3d.errors import InputError
from pc3d.io.ascii import parse_numbers, write_rows
from pc3d.io.table import Array, Table, column_names, split

SUFFIXES = (".txt", ".xyz", ".pts", ".csv", ".asc")
_NAMES = {"color": ("red", "green", "blue"), "coord": ("x", "y", "z"), "normal": ("nx", "ny", "nz")}
_PTS_NAMES = ("x", "y", "z", "intensity")
_DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+")


def read(path: Path, columns: int | Sequence[str] | None = None) -> Table:
    """Columns of a text file; comment lines start with ``#`` or ``//``, the delimiter is white space, ``,`` or ``;``.

    A first line (commented or not) with a word for each column names them; a first line with a single number is the
    point count of ``.pts`` files. Without names see :func:`pc3d.io.table.column_names`.

    Raises:
        InputError: naming the line that is not made of numbers; for decimal commas; for a wrong point count.
    """
    if isinstance(columns, int):
        raise InputError(f"{path}: columns={columns}: text shows its number of columns, give their names")
    data = path.read_bytes()
    if b"\0" in data[:4096]:
        raise InputError(f"{path}: is not text")
    lines = data.decode("utf-8-sig", errors="replace").splitlines()
    start, comment = _skip_comments(lines)
    count: int | None = None
    if start < len(lines) and re.fullmatch(r"\s*\d{1,15}\s*", lines[start]):
        count = int(lines[start])
        start, _ = _skip_comments(lines, start + 1)
    names: list[str] | None = None
    if start < len(lines) and not _is_numeric(lines[start]):
        names = _tokens(lines[start])
        start, _ = _skip_comments(lines, start + 1)
    if start >= len(lines):
        return Table({name: np.zeros(0, np.float32) for name in names or "xyz"})
    delimiter = _delimiter(lines[start], path, start + 1)
    # Comments become blank lines, so that errors name the right line.
    body = ["" if line.lstrip().startswith(("#", "//")) else line for line in lines[start:]]
    values = parse_numbers(body, path, start + 1, delimiter)
    if count is not None and count != len(values):
        raise InputError(f"{path}: line 1 promises {count} points, the file has {len(values)}")
    names = names or _names_in_comment(comment, values.shape[1])
    first = _PTS_NAMES if path.suffix.lower() == ".pts" and values.shape[1] in (4, 7) else _NAMES["coord"]
    labels = column_names(values, path, columns or names, first)
    tokens = [token.strip() for token in body[0].split(delimiter)]
    fields = zip(labels, values.T, tokens, strict=True)
    return Table({name: _as_written(numbers, token, name) for name, numbers, token in fields if name != "_"})


def write(out: Path, columns: Mapping[str, Array]) -> None:
    """Columns with a line of names; ``.csv`` with commas, else with blanks and the names behind ``#``."""
    fields = split(columns, _NAMES)
    delimiter = "," if out.suffix.lower() == ".csv" else " "
    names = [re.sub(r"[\s,;]+", "_", name) for name in fields]
    with out.open("w", encoding="utf-8") as file:
        file.write(("" if delimiter == "," else "# ") + delimiter.join(names) + "\n")
        write_rows(file, fields.values(), delimiter)


def _as_written(numbers: Array, token: str, name: str) -> Array:
    """Whole numbers written without a point (``token``: the first of them) are integers of 32 or 64 bits."""
    whole = re.fullmatch(r"[-+]?\d+", token) and np.isfinite(numbers).all() and not np.any(numbers % 1)
    if not whole or name.lower() in _NAMES["coord"]:
        return numbers
    return numbers.astype(np.int32 if np.abs(numbers).max() < 2**31 else np.int64)


def _skip_comments(lines: Sequence[str], start: int = 0) -> tuple[int, str]:
    """Line number of the first line with content at or after ``start``, and the last comment before it."""
    comment = ""
    for number in range(start, len(lines)):
        text = lines[number].strip()
        if text.startswith(("#", "//")):
            comment = text.lstrip("#/ ")
        elif text:
            return number, comment
    return len(lines), comment


def _tokens(line: str) -> list[str]:
    return [token.strip("\"'") for token in re.split(r"\s*[,;]\s*|\s+", line.strip())]


def _is_numeric(line: str) -> bool:
    return all(_number(token) for token in _tokens(line)[:3])


def _number(token: str) -> bool:
    try:
        float(token)
    except ValueError:
        return False
    return True


def _names_in_comment(comment: str, width: int) -> list[str] | None:
    names = _tokens(comment)
    return names if len(names) == width and {"x", "y", "z"} <= {name.lower() for name in names} else None


def _delimiter(line: str, path: Path, number: int) -> str | None:
    words = line.split()
    blank = len(words) > 1 or ";" in line
    if blank and any(_DECIMAL_COMMA.fullmatch(word) for word in re.split(r"[\s;]+", line.strip())):
        raise InputError(f"{path}: line {number}: {words[0]!r} has a decimal comma; write numbers with a decimal point")
    return next((mark for mark in ";," if mark in line), None)
