"""LAS, LAZ and COPC through ``laspy`` and ``lazrs``: every dimension, exact coordinates, headers kept."""

from __future__ import annotations

import base64
import io
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pc3d.errors import InputError
from pc3d.io.table import Array, Table, changes

_COLOR = ("red", "green", "blue")
_COPC = "copc"
_WAVEFORM_FORMATS = (4, 5, 9, 10)
_RECORD_SIZE, _EXTENDED_RECORD_SIZE = 54, 60
_VARIABLE_CHUNKS = 0xFFFFFFFF
_MOST_POINTS_PER_BYTE = 1000
_MAX_NAME = 31
_MAX_STEP = 1e-3


def read(path: Path) -> Table:
    """All dimensions of the points, extra bytes included; scaled extra dimensions as float64.

    ``meta["las_header"]`` (base64 of the bytes before the points) lets :func:`write` keep scales, offsets, coordinate
    system and variable-length records also without a template.

    Raises:
        InputError: without ``laspy``/``lazrs``, or if the file is damaged.
    """
    laspy = _laspy(path)
    data = _open(laspy, path)
    header = data.header
    columns: dict[str, Array] = {
        "coord": np.stack([np.asarray(data.x), np.asarray(data.y), np.asarray(data.z)], axis=1)
    }
    for name in header.point_format.dimension_names:
        if name not in ("X", "Y", "Z"):
            columns[name] = np.asarray(data[name])
    with path.open("rb") as file:
        head = file.read(header.offset_to_point_data)
    meta = {"las_header": base64.b64encode(head).decode()}
    return Table(columns, meta=meta, step=float(np.min(header.scales)))


def write(
    out: Path, columns: Mapping[str, Array], meta: Mapping[str, Any], path: Path, template: Path | None = None
) -> None:
    """Write points; with a template, that file with the dimensions which ``columns`` changes or adds.

    Without one, the header is that of the file the cloud was read from, or LAS 1.4 with a scale as fine as float32
    coordinates. Attributes which are no standard dimension, or whose values it cannot hold, become extra dimensions.

    Raises:
        InputError: without ``laspy``/``lazrs``, for a COPC name, or if a dimension of the template cannot hold its
            new values.
    """
    laspy = _laspy(path)
    if path.name.lower().endswith(".copc.laz"):
        raise InputError(f"{path}: COPC files cannot be written (no octree): name it .laz")
    if template is None:
        data = _new(laspy, columns, meta)
        changed = dict(columns)
    else:
        data = _open(laspy, template)
        changed = changes(read(template), columns, "las", path, template)
    _assign(laspy, data, changed, path, keep_dimensions=template is not None)
    _drop_stale_records(data)
    try:
        with out.open("wb") as file:
            data.write(file, do_compress=path.suffix.lower() == ".laz")
    except (laspy.errors.LaspyException, RuntimeError) as error:
        # lazrs reports a full disk through an error of its own.
        raise InputError(f"{path}: cannot be written: {' '.join(str(error).split())}") from error


def _laspy(path: Path) -> Any:
    try:
        import laspy
        import lazrs  # noqa: F401
    except ImportError as error:
        raise InputError(f"{path}: LAS and LAZ need laspy and lazrs: pip install pc3d[las]") from error
    return laspy


def _check_header(path: Path) -> None:
    """Refuse counts and places beyond the end of the file: laspy would loop over as many records as they say."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(375)
    if len(head) < 227 or head[:4] != b"LASF":
        raise InputError(f"{path}: no LAS/LAZ header")
    header_size, offset, records = struct.unpack_from("<HII", head, 94)
    if offset > size or header_size + records * _RECORD_SIZE > offset:
        raise InputError(
            f"{path}: truncated or damaged: {records} records before byte {offset}, the file has {size} bytes"
        )
    if head[25] >= 4 and len(head) == 375:
        start, extended = struct.unpack_from("<QI", head, 235)
        if extended and start + extended * _EXTENDED_RECORD_SIZE > size:
            raise InputError(
                f"{path}: truncated or damaged: {extended} records at byte {start}, the file has {size} bytes"
            )


def _check_count(header: Any, path: Path) -> None:
    """Refuse more points than the file can hold, before memory and time are spent on them."""
    size, record = path.stat().st_size, header.point_format.size
    most = (size - header.offset_to_point_data) // record
    if header.are_points_compressed:
        most = _most_compressed(header, path, size, record)
    if header.point_count > most:
        raise InputError(f"{path}: truncated or damaged: {header.point_count} points, the file has room for {most}")


def _most_compressed(header: Any, path: Path, size: int, record: int) -> int:
    with path.open("rb") as file:
        file.seek(header.offset_to_point_data)
        (table,) = struct.unpack("<q", file.read(8))
        if table == -1:  # written to a stream: the place of the chunk table is at the end
            file.seek(-8, os.SEEK_END)
            (table,) = struct.unpack("<q", file.read(8))
        file.seek(max(table, 0))
        _, chunks = struct.unpack("<II", file.read(8))
    if chunks * record > size:  # every chunk starts with one point as it is
        return 0
    (chunk_size,) = struct.unpack_from("<I", header.vlrs.get("LasZipVlr")[0].record_data, 12)
    return chunks * chunk_size if chunk_size != _VARIABLE_CHUNKS else size * _MOST_POINTS_PER_BYTE


def _open(laspy: Any, path: Path) -> Any:
    _check_header(path)
    try:
        with laspy.open(path) as reader:
            header = reader.header
            _check_count(header, path)
            data = reader.read()
    except InputError:
        raise
    except Exception as error:  # damaged files make laspy and lazrs fail in many ways
        raise InputError(
            f"{path}: no readable LAS/LAZ file: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error
    if len(data.points) != header.point_count:
        raise InputError(
            f"{path}: truncated: header promises {header.point_count} points, the file has {len(data.points)}"
        )
    if not (np.isfinite(header.scales).all() and np.isfinite(header.offsets).all() and np.all(header.scales > 0)):
        raise InputError(f"{path}: header has scales {header.scales.tolist()} and offsets {header.offsets.tolist()}")
    return data


def _new(laspy: Any, columns: Mapping[str, Array], meta: Mapping[str, Any]) -> Any:
    coord = columns["coord"].astype(np.float64)
    low, high = (coord.min(0), coord.max(0)) if len(coord) else (np.zeros(3), np.zeros(3))
    extent = float((high - low).max()) or 1.0
    # A power of ten just below what float32 can tell apart; above a millimetre only where 32 bits reach no further.
    step = 10.0 ** np.floor(np.log10(extent * 2.0**-24))
    fine = np.full(3, min(step, _MAX_STEP) if extent < _MAX_STEP * 2.0**31 else step)
    if "las_header" in meta:
        header = laspy.LasHeader.read_from(io.BytesIO(base64.b64decode(meta["las_header"])))
        header.evlrs = None
        header.number_of_evlrs = 0
        limits = np.abs([(low - header.offsets) / header.scales, (high - header.offsets) / header.scales]).max(0)
        if np.any(limits >= 2**31):
            header.offsets, header.scales = np.floor(low), fine
    else:
        header = laspy.LasHeader(version="1.4", point_format=7 if "color" in columns else 6)
        header.offsets, header.scales = np.floor(low), fine
    data = laspy.LasData(header, points=laspy.ScaleAwarePointRecord.zeros(len(coord), header=header))
    if "las_header" not in meta:
        data.return_number[:] = 1
        data.number_of_returns[:] = 1
    return data


def _assign(laspy: Any, data: Any, columns: Mapping[str, Array], path: Path, keep_dimensions: bool) -> None:
    names = set(data.point_format.dimension_names)
    extra: dict[str, Array] = {}
    for name, column in columns.items():
        values = column[:, 0] if column.shape[1:] == (1,) else column
        if name == "coord":
            _set_coord(data, values.astype(np.float64), path)
        elif name == "color" and set(_COLOR) <= names:
            _set_color(data, values)
        elif name in names and _fits(data, name, values):
            data[name] = values
        elif name in names and keep_dimensions:
            dtype = np.asarray(data[name][:0]).dtype
            raise InputError(
                f"{path}: field '{name}' has values from {values.min()} to {values.max()}: more than its dimension "
                f"({dtype.name}) can hold"
            )
        else:
            extra.update(_extra_fields(f"{name}_{values.dtype.name}" if name in names else name, values))
    for name in extra:
        if len(name.encode()) > _MAX_NAME:
            raise InputError(
                f"{path}: field '{name}' has a name of more than {_MAX_NAME} bytes, the most a LAS dimension can have"
            )
    width = {name: f"{values.shape[1]}" if values.ndim > 1 else "" for name, values in extra.items()}
    data.add_extra_dims(
        [
            laspy.ExtraBytesParams(name=name, type=f"{width[name]}{values.dtype.str[1:]}")
            for name, values in extra.items()
        ]
    )
    for name, values in extra.items():
        data[name] = values


def _set_coord(data: Any, coord: Array, path: Path) -> None:
    try:
        data.x, data.y, data.z = coord.T
    except OverflowError as error:
        scales, offsets = data.header.scales.tolist(), data.header.offsets.tolist()
        raise InputError(
            f"{path}: coordinates do not fit the scales {scales} and offsets {offsets} of the header"
        ) from error


def _set_color(data: Any, color: Array) -> None:
    # 8-bit colours use the whole 16-bit range, as the LAS specification asks.
    stored = color if color.dtype == np.uint16 else color.astype(np.uint16) * 257
    data.red, data.green, data.blue = stored.T


def _fits(data: Any, name: str, values: Array) -> bool:
    """Whether dimension ``name`` can hold every value exactly."""
    current = np.asarray(data[name])
    if current.shape != values.shape:
        return False
    info = data.point_format.dimension_by_name(name)
    if info.is_scaled or current.dtype.kind == "f":
        return True
    # Bit fields share a byte: their range is that of their bits.
    low, high = (
        (0, 2**info.num_bits - 1) if info.num_bits < 8 else (np.iinfo(current.dtype).min, np.iinfo(current.dtype).max)
    )
    with np.errstate(invalid="ignore"):
        return bool(np.all((values >= low) & (values <= high) & (values == np.floor(values))))


def _extra_fields(name: str, values: Array) -> dict[str, Array]:
    """LAS knows scalars and vectors of 2 or 3; wider ones become ``name_0`` ..."""
    kinds = {np.dtype(bool): np.uint8, np.dtype(np.float16): np.float32}
    values = values.astype(kinds.get(values.dtype, values.dtype))
    flat = values.reshape(len(values), int(np.prod(values.shape[1:])))
    if flat.shape[1] == 1:
        return {name: flat[:, 0]}
    if flat.shape[1] <= 3:
        return {name: flat}
    return {f"{name}_{i}": flat[:, i] for i in range(flat.shape[1])}


def _drop_stale_records(data: Any) -> None:
    """Records that describe bytes at fixed places of the old file: the COPC octree, embedded waveforms."""
    header = data.header
    header.vlrs[:] = [record for record in header.vlrs if record.user_id != _COPC]
    if header.evlrs is not None:
        header.evlrs[:] = [record for record in header.evlrs if record.user_id != _COPC]
    if header.point_format.id in _WAVEFORM_FORMATS:
        header.start_of_waveform_data_packet_record = 0
