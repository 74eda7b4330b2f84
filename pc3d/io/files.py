"""One front for all formats: ``read`` and ``write`` choose the format by the suffix of the path."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from pc3d.errors import InputError
from pc3d.io import e57, kitti, las, numpy_arrays, pcd, ply, text
from pc3d.io.atomic import atomic_write
from pc3d.io.table import Invalid, Table, to_columns, to_points
from pc3d.points import Points

Columns = int | Sequence[str]

_READERS: dict[str, Callable[[Path], Table]] = {
    ".ply": ply.read,
    ".pcd": pcd.read,
    ".las": las.read,
    ".laz": las.read,
    ".e57": e57.read,
}
_ARRAY_READERS: dict[str, Callable[[Path, Columns | None], Table]] = {
    ".bin": kitti.read,
    ".npy": numpy_arrays.read_npy,
    ".npz": numpy_arrays.read_npz,
    **dict.fromkeys(text.SUFFIXES, text.read),
}
READABLE: tuple[str, ...] = (*_READERS, *_ARRAY_READERS)
"""Suffixes that :func:`read` opens."""
WRITABLE: tuple[str, ...] = tuple(suffix for suffix in READABLE if suffix != ".e57")
"""Suffixes that :func:`write` writes."""


def can_read(path: str | os.PathLike[str]) -> bool:
    """Whether the suffix of ``path`` is one that :func:`read` opens; the file itself is not looked at."""
    return Path(path).suffix.lower() in READABLE


def read(
    path: str | os.PathLike[str],
    *,
    columns: Columns | None = None,
    invalid: Invalid | None = None,
    allow_empty: bool = False,
) -> Points:
    """Read one point cloud.

    Args:
        path: ``.ply .pcd .las .laz .e57 .bin .npy .npz .txt .xyz .pts .csv .asc``.
        columns: what the columns are, for files which do not say (``.bin``, ``.npy``, text): their number (``.bin``)
            or their names, with ``"_"`` for a column to leave out.
        invalid: points with coordinates that are not finite: ``"error"`` or ``"drop"``. Default: error, but organised
            clouds (PCD of height > 1), where they mark pixels without a measurement, drop them.
            ``meta[0]["valid_rows"]`` is then the ``(N,)`` int64 rows that were kept.
        allow_empty: accept a file without points.

    Returns:
        One cloud. ``coord`` is float32 relative to ``meta[0]["origin"]`` (float64; zero along an axis where float32
        is good enough, the floor of the minimum elsewhere). Red, green and blue become ``color`` (float32, 0..255),
        nx, ny, nz ``normal``, the fourth column of a KITTI ``.bin`` ``strength``; ``segment`` and ``instance`` become
        int64. Every other field keeps its name and dtype (uint16 as int32, uint32 as int64, uint64 as int64 with the
        same bits). ``meta[0]`` holds ``name``, ``path``, ``format``, ``origin``, ``dtypes`` (numpy dtype each
        attribute is stored as), ``color_scale`` where the file stores colours in another range, and ``skipped``
        (names of what is not per point).

    Raises:
        InputError: one line that names the file and what is wrong with it.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if path.is_dir():
        raise InputError(f"{path}: is a folder, not a point cloud")
    if suffix not in READABLE:
        raise InputError(f"{path}: unknown suffix '{suffix}' (readable: {' '.join(READABLE)})")
    if columns is not None and suffix not in _ARRAY_READERS:
        raise InputError(f"{path}: columns= is for {' '.join(_ARRAY_READERS)}; a {suffix} file names its fields itself")
    try:
        table = _ARRAY_READERS[suffix](path, columns) if suffix in _ARRAY_READERS else _READERS[suffix](path)
    except (OSError, MemoryError) as error:
        raise InputError(
            f"{path}: cannot be read: {getattr(error, 'strerror', None) or error or 'out of memory'}"
        ) from error
    table.meta["format"] = _family(suffix)
    return to_points(table, path, invalid, allow_empty)


def write(
    path: str | os.PathLike[str],
    points: Points,
    template: str | os.PathLike[str] | None = None,
    *,
    encoding: str | None = None,
) -> Path:
    """Write one cloud, with all its attributes; the format follows the suffix of ``path``.

    The file appears complete or not at all. A ``.bin`` holds its columns only (x, y, z, strength; or those of the
    ``.bin`` the cloud was read from); every other format holds every attribute.

    Args:
        path: ``.ply .pcd .las .laz .bin .npy .npz .txt .xyz .pts .csv .asc``.
        points: one cloud.
        template: the file the cloud was read from, of the same kind as ``path`` (``.las``/``.laz``, ``.ply`` or
            ``.pcd``). The new file keeps its header (coordinate system, comments, viewpoint), its points in their
            order, faces and every field that ``points`` does not have; fields that differ are changed, new ones added.
        encoding: ``ascii``, ``binary_little_endian`` (default) or ``binary_big_endian`` for PLY; ``ascii``,
            ``binary`` (default) or ``binary_compressed`` for PCD. With a template, its own encoding is the default.

    Returns:
        The path.

    Raises:
        InputError: if the file cannot be written or cannot hold the cloud; an older file of that name is left as it
            was.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in WRITABLE:
        raise InputError(f"{path}: cannot write a '{suffix}' file (writable: {' '.join(WRITABLE)})")
    family = _family(suffix)
    original = None if template is None else Path(template)
    if original is not None and (family not in ("las", "ply", "pcd") or _family(original.suffix.lower()) != family):
        raise InputError(f"{path}: template {original} must be a file of the same kind (.las/.laz, .ply or .pcd)")
    if original is not None and not original.is_file():
        raise InputError(f"{original}: no such file (template of {path})")
    if encoding is not None and family not in ("ply", "pcd"):
        raise InputError(f"{path}: encoding='{encoding}' is for .ply and .pcd")
    columns = to_columns(points, family)
    meta = points.meta[0]
    with atomic_write(path) as temporary:
        if family == "ply":
            ply.write(temporary, columns, path, original, encoding)
        elif family == "pcd":
            pcd.write(temporary, columns, meta, path, original, encoding)
        elif family == "las":
            las.write(temporary, columns, meta, path, original)
        elif family == "bin":
            kitti.write(temporary, columns, meta, path)
        elif family == "npy":
            numpy_arrays.write_npy(temporary, columns)
        elif family == "npz":
            numpy_arrays.write_npz(temporary, columns)
        else:
            text.write(temporary, columns)
    return path


def _family(suffix: str) -> str:
    """Files of one family store the same things in the same way."""
    if suffix in text.SUFFIXES:
        return "text"
    return "las" if suffix == ".laz" else suffix.lstrip(".")
