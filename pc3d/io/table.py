"""The step between files and ``Points``: columns as stored, and their canonical names, dtypes and origin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from pc3d.errors import InputError
from pc3d.points import Points

Array = NDArray[Any]
Invalid = Literal["error", "drop"]

_SPELLINGS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "coord": (("x", "y", "z"),),
    "color": (("red", "green", "blue"), ("r", "g", "b")),
    "normal": (("nx", "ny", "nz"), ("normal_x", "normal_y", "normal_z"), ("normalx", "normaly", "normalz")),
}
_XYZ = ("x", "y", "z")
_LABELS = ("segment", "instance")
_FLOAT32_STEP = 1e-4
"""Largest accepted spacing of float32 coordinates in metres; beyond it an axis gets an origin of its own."""


@dataclass
class Table:
    """One cloud as its file stores it.

    Attributes:
        columns: ``{name: (N,) or (N, ...)}`` in file order; ``x``/``y``/``z`` or ``coord`` among them.
        meta: what the format wants to remember beside the columns.
        skipped: names of what the file holds and ``Points`` cannot (faces, arrays that are not per point).
        organised: an image-like cloud, where non-finite points mark pixels without a measurement.
        step: spacing in metres that coordinates must keep (the scale of a LAS file); None for the usual 0.1 mm.
        origin: origin of the coordinates, for clouds which are parts of one; None chooses it by the coordinates.
        color_scale: stored number per unit of 0..255, for such parts; None tells it by the colours.
    """

    columns: dict[str, Array]
    meta: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    organised: bool = False
    step: float | None = None
    origin: tuple[float, float, float] | None = None
    color_scale: float | None = None


def to_points(table: Table, path: Path, invalid: Invalid | None = None, allow_empty: bool = False) -> Points:
    """One cloud with canonical attributes from the columns of a file; see :func:`pc3d.io.read` for the rules.

    Raises:
        InputError: without coordinates, without points, with coordinates that are not finite or beyond float32.
    """
    columns = group(table.columns)
    if "coord" not in columns:
        raise InputError(
            f"{path}: no coordinates: fields x, y, z are missing (it has: {', '.join(columns) or 'nothing'})"
        )
    stored = columns.pop("coord")
    if invalid not in (None, "error", "drop"):
        raise InputError(f"{path}: invalid='{invalid}' is neither 'error' nor 'drop'")
    meta: dict[str, Any] = {"name": path.stem, "path": str(path), **table.meta, "dtypes": {"coord": stored.dtype.name}}
    if table.skipped:
        meta["skipped"] = list(table.skipped)
    rows = _valid_rows(stored, path, invalid or ("drop" if table.organised else "error"))
    if rows is not None:
        meta["valid_rows"] = torch.from_numpy(rows)
        stored = stored[rows]
        columns = {name: values[rows] for name, values in columns.items()}
    if len(stored) == 0 and not allow_empty:
        raise InputError(f"{path}: holds no {'valid ' if rows is not None else ''}points")
    if table.origin is None:
        coord, meta["origin"] = _split_origin(stored, path, table.step or _FLOAT32_STEP)
    else:
        coord, meta["origin"] = (stored - np.asarray(table.origin)).astype(np.float32), table.origin
    attrs: dict[str, torch.Tensor] = {}
    for name, values in columns.items():
        meta["dtypes"][name] = values.dtype.name
        attrs[name] = _to_tensor(name, values, meta, table.color_scale)
    return Points(torch.from_numpy(coord), attrs=attrs, meta=[meta])


def to_columns(points: Points, family: str) -> dict[str, Array]:
    """The columns of one cloud as a file of ``family`` (``"ply"``, ``"las"``, ...) should store them.

    ``coord`` (N, 3) holds true coordinates (origin added), as float64 where float32 would lose them. ``color`` (N, 3)
    has the integers of the file it came from when that was of the same family, 8 bits otherwise. Other attributes get
    the dtype their file had while it still holds their values, and the dtype of their tensor otherwise.

    Raises:
        InputError: if ``points`` is not exactly one cloud.
    """
    if len(points) != 1:
        raise InputError(f"{points.describe()}: a file holds one cloud, got a batch of {len(points)}")
    meta = points.meta[0]
    dtypes: Mapping[str, str] = meta.get("dtypes", {})
    same_family = meta.get("format") == family
    origin = np.asarray(meta.get("origin", (0.0, 0.0, 0.0)), dtype=np.float64)
    coord = points.coord.detach().cpu().numpy()
    if origin.any():
        coord = coord.astype(np.float64) + origin
    columns = {"coord": restore(coord, dtypes.get("coord") if same_family else None)}
    for name, tensor in points.attrs.items():
        values = (
            tensor.detach().cpu().numpy() if tensor.dtype != torch.bfloat16 else tensor.detach().cpu().float().numpy()
        )
        if name == "color" and values.shape[1:] == (3,):
            dtype, scale = (
                (dtypes.get("color", "uint8"), meta.get("color_scale", 1.0)) if same_family else ("uint8", 1.0)
            )
            columns[name] = stored_color(values, np.dtype(dtype), scale)
        else:
            columns[name] = restore(values, dtypes.get(name))
    return columns


def stored_color(color: Array, dtype: np.dtype[Any], scale: float) -> Array:
    """``(N, 3)`` colours of 0..255 as a file stores them: ``color * scale``, rounded and clipped for integer dtypes."""
    values = color.astype(np.float64) * scale
    if dtype.kind not in "iu":
        return values.astype(dtype)
    return np.nan_to_num(values).round().clip(0, np.iinfo(dtype).max).astype(dtype)


def restore(values: Array, dtype: str | None) -> Array:
    """``values`` as ``dtype`` if that holds each of them exactly (same bits back), unchanged otherwise."""
    if dtype is None or values.dtype.name == dtype:
        return values
    with np.errstate(invalid="ignore", over="ignore"):
        cast = values.astype(dtype)
        same = np.array_equal(cast.astype(values.dtype), values, equal_nan=values.dtype.kind == "f")
    return cast if same else values


def changes(original: Table, columns: Mapping[str, Array], family: str, path: Path, template: Path) -> dict[str, Array]:
    """What ``columns`` changes or adds to the table of the file ``template``, one row per row of that file.

    A column that is what reading ``template`` gives is no change, so that float32 rounding never reaches the new
    file. Rows which reading leaves out (pixels without a measurement) keep their values; in new columns they hold
    NaN, -1 or 0, as their dtype allows.

    Raises:
        InputError: if the cloud does not have the points of ``template``.
    """
    points = to_points(
        replace(original, meta={**original.meta, "format": family}), template, invalid="drop", allow_empty=True
    )
    before = to_columns(points, family)
    if len(columns["coord"]) != len(before["coord"]):
        raise InputError(f"{path}: {len(columns['coord'])} points, but template {template} has {len(before['coord'])}")
    rows = points.meta[0].get("valid_rows")
    changed: dict[str, Array] = {}
    stored = group(original.columns)
    for name, values in columns.items():
        if (
            name in before
            and values.shape == before[name].shape
            and np.array_equal(values, before[name], equal_nan=True)
        ):
            continue
        if name in stored and name != "color":
            values = restore(values, stored[name].dtype.name)
        changed[name] = values if rows is None else _scatter(values, rows.numpy(), stored, name)
    return changed


def _scatter(values: Array, rows: Array, stored: Mapping[str, Array], name: str) -> Array:
    if name in stored and stored[name].shape[1:] == values.shape[1:]:
        full = stored[name].astype(np.result_type(stored[name], values))
    else:
        fill = {"f": np.nan, "i": -1}.get(values.dtype.kind, 0)
        full = np.full((len(stored["coord"]), *values.shape[1:]), fill, values.dtype)
    full[rows] = values
    return full


def narrow(values: Array, name: str, path: Path, wide_integers: bool = False) -> Array:
    """``values`` in a dtype that files know: no half floats, no bool, and no 64-bit integers unless ``wide_integers``.

    Raises:
        InputError: if an integer fits neither 32 bits nor a float64 exactly.
    """
    if values.dtype == np.float16:
        return values.astype(np.float32)
    if values.dtype == bool:
        return values.astype(np.uint8)
    if wide_integers or values.dtype.kind not in "iu" or values.dtype.itemsize < 8:
        return values
    for dtype in (np.int32, np.uint32, np.float64):
        if np.array_equal(values.astype(dtype).astype(values.dtype), values):
            return values.astype(dtype)
    raise InputError(f"{path}: field '{name}' has value {values[np.argmax(np.abs(values))]}, too large for this format")


def flatten(values: Array) -> Array:
    """``(N, C)`` from ``(N,)`` or ``(N, ...)``."""
    return values.reshape(len(values), int(np.prod(values.shape[1:])))


def split(columns: Mapping[str, Array], spelling: Mapping[str, Sequence[str]]) -> dict[str, Array]:
    """One-column fields: ``(N, C)`` becomes ``name_0`` ... or the names in ``spelling``, ``(N, 1)`` keeps its name."""
    fields: dict[str, Array] = {}
    for name, values in columns.items():
        flat = flatten(values)
        width = flat.shape[1]
        names = spelling.get(name, ()) if len(spelling.get(name, ())) == width else ()
        if not names:
            names = [name] if width == 1 else [f"{name}_{i}" for i in range(width)]
        fields.update({label: flat[:, i] for i, label in enumerate(names)})
    return fields


def column_names(
    values: Array, path: Path, names: Sequence[str] | None = None, first: Sequence[str] = _XYZ
) -> list[str]:
    """Names for the columns of an ``(N, C)`` array without a header.

    Columns 0..2 are x, y, z. Of the others, three that hold whole numbers in 0..255 are a colour, three that make
    unit vectors a normal; the rest is ``column_3``, ``column_4`` ...: a guess at anything more would be wrong too
    often.

    Args:
        values: ``(N, C)`` numbers, C >= 3.
        path: for error messages.
        names: the names, when the caller knows them; ``"_"`` marks a column to leave out.
        first: names of the leading columns, when the format fixes more of them.
    """
    width = values.shape[1]
    if names is not None:
        repeated = next((name for name in names if name != "_" and list(names).count(name) > 1), None)
        if len(names) != width or repeated:
            what = f"names '{repeated}' twice" if repeated else f"are {len(names)} names, the file has {width} columns"
            raise InputError(f"{path}: columns {' '.join(names)} {what}")
        return list(names)
    if width < 3:
        raise InputError(f"{path}: has {width} columns, coordinates need at least 3")
    labels = [*first][:width]
    while len(labels) < width:
        at = len(labels)
        labels += _guess_triple(values[:, at : at + 3], taken=labels) or [f"column_{at}"]
    return labels


def _guess_triple(triple: Array, taken: Sequence[str]) -> list[str]:
    if triple.shape[1] < 3 or len(triple) == 0 or not np.isfinite(triple).all():
        return []
    if "red" not in taken and triple.min() >= 0 and 1 < triple.max() <= 255 and not np.any(triple % 1):
        return ["red", "green", "blue"]
    lengths = np.linalg.norm(triple, axis=1)
    if "nx" not in taken and np.mean(np.abs(lengths - 1) < 0.01) > 0.9 and lengths.max() < 1.01:
        return ["nx", "ny", "nz"]
    return []


def group(columns: Mapping[str, Array]) -> dict[str, Array]:
    """``x y z``, ``red green blue`` and ``nx ny nz`` (any case) stacked to ``coord``, ``color`` and ``normal``."""
    lower: dict[str, str] = {}
    for name in columns:
        lower.setdefault(name.lower(), name)
    groups: dict[str, Array] = {}
    used: set[str] = set()
    for group, spellings in _SPELLINGS.items():
        if group in columns and columns[group].shape[1:] == (3,):
            groups[group] = columns[group]
            used.add(group)
            continue
        names = next((s for s in spellings if all(n in lower and columns[lower[n]].ndim == 1 for n in s)), None)
        if names:
            groups[group] = np.stack([columns[lower[n]] for n in names], axis=1)
            used.update(lower[n] for n in names)
    for name, values in columns.items():
        if name not in used:
            # A column which bears the name of a group but is none must not take its place.
            groups[f"{name}_" if name in groups or name == "coord" else name] = values
    return groups


def _valid_rows(coord: Array, path: Path, invalid: Invalid) -> Array | None:
    """Rows with finite coordinates, or None when all are."""
    finite = np.isfinite(coord)
    if finite.all():
        return None
    if invalid == "drop":
        return np.flatnonzero(finite.all(axis=1))
    axis = int(np.argmin(finite.all(axis=0)))
    bad = np.flatnonzero(~finite[:, axis])
    count = f"{len(bad)} non-finite value" + ("s" if len(bad) > 1 else "")
    raise InputError(
        f"{path}: field '{'xyz'[axis]}' holds {count} (first: {coord[bad[0], axis]} at point {bad[0]}); "
        "read with invalid='drop' to leave such points out"
    )


def _split_origin(stored: Array, path: Path, step: float) -> tuple[Array, tuple[float, float, float]]:
    """Coordinates as float32 relative to a float64 origin, zero along each axis where float32 is good enough."""
    exact = stored.astype(np.float64)
    origin = np.zeros(3)
    for axis in range(3) if len(exact) else ():
        values = exact[:, axis]
        with np.errstate(over="ignore"):
            if np.array_equal(values.astype(np.float32), values):
                continue
        low, high = float(values.min()), float(values.max())
        largest = max(abs(low), abs(high))
        if largest > float(np.finfo(np.float32).max):
            raise InputError(f"{path}: field '{'xyz'[axis]}' has value {largest:g}, beyond any metre coordinate")
        origin[axis] = axis_origin(low, high, step)
    coord = (exact - origin).astype(np.float32)
    return coord, (float(origin[0]), float(origin[1]), float(origin[2]))


def axis_origin(low: float, high: float, step: float) -> float:
    """Origin of an axis: 0 where float32 keeps ``step``, or would keep it no better from ``floor(low)``."""
    before, after = np.spacing(np.array([max(abs(low), abs(high)), high - np.floor(low)], np.float32))
    return float(np.floor(low)) if before > max(step, after) else 0.0


def _to_tensor(name: str, values: Array, meta: dict[str, Any], color_scale: float | None = None) -> torch.Tensor:
    if name == "color" and values.shape[1:] == (3,):
        scale = _color_scale(values) if color_scale is None else color_scale
        if scale != 1.0:
            meta["color_scale"] = scale
        return torch.from_numpy((values.astype(np.float64) / scale).astype(np.float32))
    if name == "normal" and values.shape[1:] == (3,):
        return torch.from_numpy(values.astype(np.float32))
    if name == "strength" and values.size == len(values):
        return torch.from_numpy(values.astype(np.float32).reshape(-1, 1))
    if name in _LABELS and values.dtype.kind in "iu" and values.size == len(values):
        return torch.from_numpy(values.astype(np.int64).reshape(-1))
    # Torch computes little on unsigned integers: they get the next signed dtype; 64 bits keep their bits.
    wider = {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64}.get(values.dtype.name, values.dtype)
    return torch.from_numpy(np.ascontiguousarray(values.astype(wider)))


def _color_scale(values: Array) -> float:
    """Stored number per unit of 0..255: 1/255 for floats in 0..1, 257 for 16 bits in use, 1 for 8 bits in any dtype."""
    highest = float(values.max()) if values.size else 0.0
    if values.dtype.kind == "f":
        return 1 / 255 if highest <= 1 else 1.0
    return 257.0 if values.dtype.itemsize > 1 and highest > 255 else 1.0
