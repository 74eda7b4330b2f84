"""``.npy`` (one structured or plain array) and ``.npz`` (one array per attribute); nothing is ever unpickled."""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pc3d.errors import InputError
from pc3d.io.table import Array, Table, column_names

_DAMAGE = (ValueError, EOFError, SyntaxError, TypeError, OverflowError, tokenize.TokenError)
_COORD_KEYS = ("coord", "coords", "xyz", "points", "point", "pos", "positions", "position", "pc", "vertices", "data")


def read_npy(path: Path, columns: int | Sequence[str] | None = None) -> Table:
    """A structured array by its field names, or an ``(N, C)`` array that starts with x, y, z (or ``columns``)."""
    names = _names(columns, path)
    array = load_npy(path)
    if array.dtype.names:
        if names is not None:
            raise InputError(
                f"{path}: columns= is for plain arrays; this one has fields: {', '.join(array.dtype.names)}"
            )
        rows = array.reshape(-1)
        fields = {name: rows[name] for name in array.dtype.names}
        kept = {name: _native(values) for name, values in fields.items() if _is_numeric(values)}
        return Table(kept, skipped=[name for name in fields if name not in kept])
    return Table(_plain(array, path, "the array", names))


def read_npz(path: Path, columns: int | Sequence[str] | None = None) -> Table:
    """Arrays by key; coordinates have the key ``coord`` (or ``xyz``, ``points``, ``pos`` ...) or are the only array."""
    names = _names(columns, path)
    arrays = load_npz(path)
    if {"x", "y", "z"} <= {key.lower() for key in arrays}:
        coord, count = {}, len(np.atleast_1d(next(values for key, values in arrays.items() if key.lower() == "x")))
    else:
        coord_key = _coord_key(arrays, path)
        coord = _plain(arrays.pop(coord_key), path, f"key '{coord_key}'", names)
        count = len(next(iter(coord.values())))
    fields = {k: _native(v) for k, v in arrays.items() if _is_numeric(v) and v.ndim and len(v) == count}
    skipped = [key for key in arrays if key not in fields]
    aliases = {"colors": "color", "rgb": "color", "normals": "normal"}
    renamed = {
        aliases.get(key, key) if aliases.get(key) not in fields else key: values for key, values in fields.items()
    }
    return Table({**coord, **renamed}, skipped=skipped)


def write_npy(out: Path, columns: Mapping[str, Array]) -> None:
    """One structured array with a field per attribute: ``coord`` (3,), ``color`` (3,), ..."""
    dtype = np.dtype([(name, values.dtype, values.shape[1:]) for name, values in columns.items()])
    array = np.empty(len(columns["coord"]), dtype)
    for name, values in columns.items():
        array[name] = values
    np.save(out, array, allow_pickle=False)


def write_npz(out: Path, columns: Mapping[str, Array]) -> None:
    """One array per attribute; ``coord`` (N, 3) holds true coordinates."""
    # Not numpy's own function: it takes names as keyword arguments, so that a field could not be called "file".
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, values in columns.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.ascontiguousarray(values), allow_pickle=False)


def load_npy(path: Path, mmap_mode: Literal["r", "c"] = "r") -> Array:
    """The array of an ``.npy`` file, memory-mapped read-only or copy-on-write.

    Raises:
        InputError: if the file is missing or damaged, or holds Python objects.
    """
    try:
        # A memory map refuses a file shorter than its header says before any memory is taken.
        array = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or _one_line(error)}") from error
    except _DAMAGE as error:
        raise InputError(f"{path}: no readable .npy array: {_one_line(error)}") from error
    if isinstance(array, np.lib.npyio.NpzFile):
        raise InputError(f"{path}: is an .npz archive with the suffix .npy: rename it")
    return array


def load_npz(path: Path) -> dict[str, Array]:
    """The arrays of an ``.npz`` file by key.

    Raises:
        InputError: if the file is missing or damaged, or holds Python objects.
    """
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.lib.npyio.NpzFile):
            with archive:
                return {key: archive[key] for key in archive.files}
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or _one_line(error)}") from error
    except (*_DAMAGE, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError, struct.error) as error:
        raise InputError(f"{path}: no readable .npz archive: {_one_line(error)}") from error
    raise InputError(f"{path}: is an .npy array with the suffix .npz: rename it")


def _plain(array: Array, path: Path, what: str, names: Sequence[str] | None) -> dict[str, Array]:
    if not _is_numeric(array) or array.ndim != 2:
        raise InputError(f"{path}: {what} must be (N, 3 + C) numbers, got {_describe(array)}")
    array = _native(array)
    if array.shape[1] == 3 and names is None:
        return {"coord": array}
    labels = column_names(array, path, names)
    return {name: array[:, i] for i, name in enumerate(labels) if name != "_"}


def _describe(array: Any) -> str:
    return f"{array.shape} {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__


def _coord_key(arrays: Mapping[str, Array], path: Path) -> str:
    key = next((key for key in _COORD_KEYS if key in arrays), None)
    if key is not None:
        return key
    if len(arrays) == 1:
        return next(iter(arrays))
    keys = ", ".join(arrays) or "nothing"
    raise InputError(f"{path}: no coordinates: none of the keys {', '.join(_COORD_KEYS)} (it has: {keys})")


def _names(columns: int | Sequence[str] | None, path: Path) -> Sequence[str] | None:
    if isinstance(columns, int):
        raise InputError(f"{path}: columns={columns}: this format knows its number of columns, give their names")
    return columns


def _is_numeric(array: Any) -> bool:
    """Numbers that a tensor can hold; entries of an archive that are no arrays come as bytes."""
    return isinstance(array, np.ndarray) and array.dtype.kind in "biuf" and array.dtype.itemsize <= 8


def _native(array: Array) -> Array:
    return np.asarray(array, dtype=array.dtype.newbyteorder("="))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
