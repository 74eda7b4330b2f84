"""KITTI, nuScenes and similar ``.bin`` scans: little-endian float32 rows without a header."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pc3d.errors import InputError
from pc3d.io.table import Array, Table

_NAMES: dict[int, tuple[str, ...]] = {
    3: ("x", "y", "z"),
    4: ("x", "y", "z", "strength"),
    5: ("x", "y", "z", "strength", "ring"),
    6: ("x", "y", "z", "red", "green", "blue"),
}
_DETECTED = (4, 5, 6)


def read(path: Path, columns: int | Sequence[str] | None = None) -> Table:
    """Columns of a ``.bin`` file.

    Without ``columns`` the number is found only where just one layout fits both the size of the file and its values:
    KITTI (4, reflectance in 0..1), nuScenes (5, whole ring numbers) or coloured points (6).

    Raises:
        InputError: if the file is no whole number of rows, or its layout is not clear.
    """
    values = np.fromfile(path, dtype="<f4") if path.stat().st_size % 4 == 0 else None
    if values is None:
        raise InputError(
            f"{path}: {path.stat().st_size} bytes are not a whole number of float32: the file is truncated"
        )
    names = _NAMES[_detect(values, path) if len(values) else 4] if columns is None else _given(columns, path)
    if len(values) % len(names):
        raise InputError(
            f"{path}: {len(values)} float32 numbers are not whole rows of {len(names)} columns ({', '.join(names)}): "
            "the file is truncated or has another number of columns"
        )
    rows = values.astype(np.float32).reshape(-1, len(names))
    kept = {name: rows[:, i] for i, name in enumerate(names) if name != "_"}
    return Table(kept, meta={"columns": list(names)})


def write(out: Path, columns: Mapping[str, Array], meta: Mapping[str, Any], path: Path) -> None:
    """Write x, y, z and strength (zeros if the cloud has none), or the columns of the ``.bin`` the cloud was read from.

    Raises:
        InputError: if float32 would lose more than a millimetre of the coordinates, or a column is missing.
    """
    coord = np.asarray(columns["coord"])
    lost = np.abs(coord.astype(np.float32).astype(np.float64) - coord).max(initial=0)
    if lost > 1e-3:
        raise InputError(
            f"{path}: .bin files hold float32, which would move points by {lost:.3g} m so far from the origin; "
            "write .ply, .laz or .npz, or subtract the origin first"
        )
    fields = {"x": coord[:, 0], "y": coord[:, 1], "z": coord[:, 2], **columns}
    if "color" in columns:
        fields.update(zip(("red", "green", "blue"), np.asarray(columns["color"]).T, strict=True))
    fields.setdefault("strength", np.zeros(len(coord)))
    names = meta["columns"] if meta.get("format") == "bin" else _NAMES[4]
    missing = [name for name in names if name != "_" and name not in fields]
    if missing:
        raise InputError(f"{path}: field '{missing[0]}' is missing (the columns of this .bin are {', '.join(names)})")
    rows = [np.zeros(len(coord)) if name == "_" else fields[name].reshape(-1) for name in names]
    np.stack(rows, axis=1).astype("<f4").tofile(out)


def _given(columns: int | Sequence[str], path: Path) -> tuple[str, ...]:
    if not isinstance(columns, int):
        return tuple(columns)
    if columns not in _NAMES:
        raise InputError(f"{path}: columns={columns}: give 3, 4, 5 or 6, or the names of the columns")
    return _NAMES[columns]


def _detect(values: Array, path: Path) -> int:
    fitting = [count for count in _DETECTED if len(values) % count == 0]
    if not fitting:
        raise InputError(
            f"{path}: {len(values)} float32 numbers are no whole rows of 4, 5 or 6 columns: truncated? or pass columns="
        )
    if len(fitting) == 1:
        return fitting[0]
    plausible = [count for count in fitting if len(values) and _plausible(values.reshape(-1, count))]
    if len(plausible) == 1:
        return plausible[0]
    choices = " or ".join(map(str, fitting))
    raise InputError(f"{path}: cannot tell whether rows have {choices} columns: pass columns= (a number or the names)")


def _plausible(rows: Array) -> bool:
    extra = rows[:, 3:]
    extra = extra[np.isfinite(extra).all(axis=1)]
    if len(extra) == 0 or extra.min() < 0:
        return False
    if rows.shape[1] == 4:
        return bool(extra.max() <= 1)
    whole = extra[:, 1:] if rows.shape[1] == 5 else extra
    return bool(extra.max() <= 255 and not np.any(whole % 1)) or bool(rows.shape[1] == 6 and extra.max() <= 1)
