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
_NAMES = {"colorRed": "red", "colorGreen": "green", "colorBlue": "blue"}
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
        file = pye57.E57(str(path))
        scans = [_scan(file, number) for number in range(file.scan_count)]
    except InputError:
        raise
    except Exception as error:  # pye57 raises whatever its C++ library threw
        raise InputError(f"{path}: no readable E57 file: {' '.join(str(error).split())}") from error
    if not scans:
        raise InputError(f"{path}: holds no scans")
    common = [name for name in scans[0] if all(name in scan for scan in scans)]
    columns = {name: np.concatenate([scan[name] for scan in scans]) for name in common}
    if len(scans) > 1:
        columns["scan"] = np.repeat(np.arange(len(scans), dtype=np.int32), [len(scan["x"]) for scan in scans])
    return Table(columns, skipped=sorted({name for scan in scans for name in scan} - set(common)))


def _scan(file: Any, number: int) -> dict[str, Array]:
    raw: dict[str, Array] = file.read_scan_raw(number)
    header = file.get_header(number)
    valid = np.ones(len(next(iter(raw.values()))), dtype=bool)
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
    return {**columns, **{_NAMES.get(name, name): values for name, values in raw.items()}}
