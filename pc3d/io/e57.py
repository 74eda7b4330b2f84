"""E57 through ``pye57``: all scans of the file in its common frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pc3d.errors import InputError
from pc3d.io.table import Array, Table

_CARTESIAN = ("cartesianX", "cartesianY", "cartesianZ")
_SPHERICAL = ("sphericalRange", "sphericalAzimuth", "sphericalElevation")
_NORMAL = ("nor:normalX", "nor:normalY", "nor:normalZ")
_COLORS = {"colorRed": "red", "colorGreen": "green", "colorBlue": "blue"}
_INVALID = ("cartesianInvalidState", "sphericalInvalidState")


def read(path: Path) -> Table:
    """Valid points of every scan, moved by the scan's pose; ``scan`` numbers the scans where there are several.

    Raises:
        InputError: without ``pye57``, or if the file is damaged or its scans have different fields.
    """
    try:
        import pye57
    except ImportError as error:
        raise InputError(f"{path}: E57 is not supported without pye57: pip install pye57") from error
    try:
        file = pye57.libe57.ImageFile(str(path), "r")
        scans = [_scan(pye57, file, node) for node in file.root()["data3D"]]
    except (pye57.libe57.E57Exception, KeyError, ValueError, RuntimeError) as error:
        # The library appends pages of its own source positions: the first line says it all.
        raise InputError(f"{path}: no readable E57 file: {str(error).strip().splitlines()[0]}") from error
    if not scans:
        raise InputError(f"{path}: holds no scans")
    common = [name for name in scans[0] if all(name in scan for scan in scans)]
    columns = {name: np.concatenate([scan[name] for scan in scans]) for name in common}
    if len(scans) > 1:
        columns["scan"] = np.repeat(np.arange(len(scans), dtype=np.int32), [len(scan["x"]) for scan in scans])
    return Table(columns, skipped=sorted({name for scan in scans for name in scan} - set(common)))


def _scan(pye57: Any, file: Any, node: Any) -> dict[str, Array]:
    header = pye57.ScanHeader(node)
    raw = _fields(pye57.libe57, file, header)
    valid = np.ones(header.point_count, dtype=bool)
    for name in _INVALID:
        if name in raw:
            valid &= raw.pop(name) == 0
    raw = {name: values[valid] for name, values in raw.items()}
    if all(name in raw for name in _CARTESIAN):
        coord = np.stack([raw.pop(name) for name in _CARTESIAN], axis=1).astype(np.float64)
    else:
        distance, azimuth, elevation = (raw.pop(name).astype(np.float64) for name in _SPHERICAL)
        flat = distance * np.cos(elevation)
        coord = np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), distance * np.sin(elevation)], axis=1)
    normal = np.stack([raw.pop(name) for name in _NORMAL], axis=1) if all(name in raw for name in _NORMAL) else None
    if header.has_pose():
        coord = coord @ header.rotation_matrix.T + header.translation
        normal = None if normal is None else normal @ header.rotation_matrix.T
    columns = dict(zip("xyz", coord.T, strict=True))
    if normal is not None:
        columns.update(zip(("nx", "ny", "nz"), normal.T, strict=True))
    return {**columns, **{_COLORS.get(name, name): values for name, values in raw.items()}}


def _fields(libe57: Any, file: Any, header: Any) -> dict[str, Array]:
    """All fields of one scan in the smallest dtype that holds the range they declare; scaled integers as float64."""
    prototype = libe57.StructureNode(header.points.prototype())
    buffers, fields = libe57.VectorSourceDestBuffer(), {}
    dtypes: dict[str, Any] = {}
    for name in header.point_fields:
        node = prototype[name]
        if isinstance(node, libe57.IntegerNode):
            dtypes[name] = np.promote_types(np.min_scalar_type(node.minimum()), np.min_scalar_type(node.maximum()))
        elif isinstance(node, libe57.FloatNode) and node.precision() == libe57.FloatPrecision.E57_SINGLE:
            dtypes[name] = np.dtype(np.float32)
        else:
            dtypes[name] = np.dtype(np.float64)
        # The library mistakes the stride of 64-bit integer arrays; float64 holds every integer that scanners write.
        fields[name] = np.zeros(header.point_count)
        convert = scale = True
        buffers.append(libe57.SourceDestBuffer(file, name, fields[name], header.point_count, convert, scale))
    header.points.reader(buffers).read()
    return {name: values.astype(dtypes[name]) for name, values in fields.items()}
