"""Numbers as text: parsing and printing shared by text files and the ascii kinds of PLY and PCD."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from pc3d.errors import InputError
from pc3d.io.table import Array

_CHUNK = 1 << 16


def parse_numbers(lines: Sequence[str], path: Path, first_line: int, delimiter: str | None = None) -> Array:
    """``(N, C)`` float64 from lines of C numbers each.

    Args:
        lines: text lines; blank ones are skipped.
        path: for error messages.
        first_line: number of ``lines[0]`` in the file, counted from 1, for error messages.
        delimiter: None for any white space.

    Raises:
        InputError: naming the line of the first thing which is no number, or of a row with another number of columns.
    """
    if not any(line.strip() for line in lines):
        return np.zeros((0, 0))
    try:
        return np.loadtxt(lines, dtype=np.float64, comments=None, delimiter=delimiter, ndmin=2)
    except ValueError as error:
        raise InputError(f"{path}: {_locate(lines, first_line, delimiter) or _first_sentence(error)}") from error


def _locate(lines: Sequence[str], first_line: int, delimiter: str | None) -> str | None:
    """The offending line in words; only run after parsing has failed."""
    width = None
    for number, line in enumerate(lines, start=first_line):
        tokens = [token.strip() for token in line.split(delimiter)] if line.strip() else []
        if not tokens:
            continue
        for column, token in enumerate(tokens, start=1):
            try:
                float(token)
            except ValueError:
                return f"line {number}, column {column}: {token[:40]!r} is not a number"
        width = width or len(tokens)
        if len(tokens) != width:
            return f"line {number} has {len(tokens)} columns, the lines before it {width}"
    return None


def _first_sentence(error: ValueError) -> str:
    return re.split(r"[;\n]", str(error))[0]


def write_rows(out: IO[str], fields: Iterable[Array], delimiter: str = " ") -> None:
    """One line per point with the shortest text that gives the same number back."""
    columns = [values.astype(np.uint8) if values.dtype == bool else values for values in fields]
    for start in range(0, len(columns[0]) if columns else 0, _CHUNK):
        texts = [values[start : start + _CHUNK].astype(str).tolist() for values in columns]
        out.writelines(delimiter.join(row) + "\n" for row in zip(*texts, strict=True))


def to_dtype(values: Array, dtype: np.dtype, path: Path, name: str) -> Array:
    """Parsed float64 numbers as the dtype a header declares.

    Raises:
        InputError: if an integer field holds something else.
    """
    if dtype.kind not in "iu":
        with np.errstate(over="ignore"):
            return values.astype(dtype)
    info = np.iinfo(dtype)
    bad = ~((values >= info.min) & (values <= info.max) & (np.floor(values) == values))
    if bad.any():
        at = int(np.argmax(bad))
        raise InputError(f"{path}: field '{name}' has value {values[at]:g} at point {at}, but its type is {dtype.name}")
    return values.astype(dtype)
