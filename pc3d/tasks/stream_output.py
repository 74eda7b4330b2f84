"""Where a streamed prediction goes: LAS and LAZ files as they were, with labels; or arrays beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pc3d.errors import InputError
from pc3d.io.atomic import atomic_write
from pc3d.io.chunk_cache import Records
from pc3d.io.las_header import LasHeader
from pc3d.io.las_index import CHUNK_POINTS, LasFile, LasIndex
from pc3d.io.las_records import Field, extra_bytes_entry, record_fields, with_fields
from pc3d.io.las_write import LasWriter, encode_chunk, head_of
from pc3d.io.laz_chunks import VARIABLE
from pc3d.io.table import Array
from pc3d.tasks.streaming import ChunkResult

_CODE_TYPES = (np.uint8, np.uint16, np.uint32)


class LasOutput:
    """The input files with labels: header, records, points and their order stay as they are.

    Args:
        index: the scan.
        targets: a ``.las`` or ``.laz`` path per file.
        codes: ``(K + 1,)`` label code of each class, last of points without a label; none negative.
        label_field: field that gets the codes. A file that has no such field, or one too small for the codes, gets a
            new one of extra bytes.
        probability_fields: names of the fields of all classes; empty for none.

    Raises:
        InputError: for a label field that has the name of another one.
    """

    def __init__(
        self,
        index: LasIndex,
        targets: Sequence[Path],
        codes: NDArray[np.int64],
        label_field: str = "classification",
        probability_fields: Sequence[str] = (),
    ) -> None:
        self._index, self._codes = index, codes
        self._probabilities = list(probability_fields)
        taken = [*"xyz", *self._columns()]
        if not label_field or label_field.lower() in taken:
            raise InputError(f"label_field '{label_field}': give a name that is not taken ({', '.join(taken)})")
        self._files = [
            _LasTarget(file, target, self._columns(), label_field, int(codes.max()))
            for file, target in zip(index.files, targets, strict=True)
        ]

    def _columns(self) -> dict[str, np.dtype]:
        return {name: np.dtype("<f4") for name in ["confidence", *self._probabilities]}

    def encode(self, number: int, records: Records, result: ChunkResult) -> bytes:
        columns: dict[str, Array] = {"": self._codes[result.label], "confidence": result.confidence}
        if result.probabilities is not None:
            columns |= {name: result.probabilities[:, i] for i, name in enumerate(self._probabilities)}
        return self._files[self._index.file[number]].encode(records, columns)

    def write(self, file: int, blobs: Iterator[tuple[int, bytes]]) -> None:
        self._files[file].write(blobs)


class _LasTarget:
    """One output file: where each new column goes in its records."""

    def __init__(
        self, file: LasFile, target: Path, columns: dict[str, np.dtype], label_field: str, highest: int
    ) -> None:
        self._target, self._compressed = target, target.suffix.lower() == ".laz"
        self._fields = record_fields(file.header)
        self._names: dict[str, str] = {}  # of each column in the file, the labels' being ""
        self._extra: dict[str, np.dtype] = {}
        code_type = next(np.dtype(kind) for kind in _CODE_TYPES if highest <= np.iinfo(kind).max)
        self._place("", label_field, code_type, _holds(self._fields.get(label_field), highest))
        for name, dtype in columns.items():
            self._place(name, name, dtype, _is_float(self._fields.get(name)))
        entries = b"".join(extra_bytes_entry(name, dtype) for name, dtype in self._extra.items())
        size = sum(dtype.itemsize for dtype in self._extra.values())
        self._head = head_of(file.header).with_extra_bytes(entries, size)
        self._chunk_size = _chunk_size(file)

    def _place(self, column: str, name: str, dtype: np.dtype, fits: bool) -> None:
        if not fits:
            name = f"{name}_{dtype.name}" if name in self._fields else name
            self._extra[name] = dtype.newbyteorder("<")
        self._names[column] = name

    def encode(self, records: Records, columns: dict[str, Array]) -> bytes:
        named = {self._names[column]: values for column, values in columns.items()}
        named |= {name: named[name].astype(dtype) for name, dtype in self._extra.items()}
        changed = with_fields(records, self._fields, named, list(self._extra))
        return encode_chunk(self._target, self._head, changed, self._compressed)

    def write(self, blobs: Iterator[tuple[int, bytes]]) -> None:
        with (
            atomic_write(self._target) as temporary,
            LasWriter(temporary, self._head, self._compressed, self._chunk_size, encoded=True) as writer,
        ):
            for count, data in blobs:
                writer.write_encoded(count, data)


def _holds(field: Field | None, highest: int) -> bool:
    plain = field is not None and field.dtype.kind in "iu" and field.width == 1 and field.scale is None
    return plain and field is not None and highest <= field.highest


def _is_float(field: Field | None) -> bool:
    return field is not None and field.dtype.kind == "f" and field.width == 1 and field.scale is None


def _chunk_size(file: LasFile) -> int | None:
    if file.laz is None:
        return CHUNK_POINTS
    return None if file.laz.chunk_size == VARIABLE else file.laz.chunk_size


class ArrayOutput:
    """A ``.npy`` file per input: fields ``label`` (code), ``confidence`` and one per class, in the order of the points.

    Args:
        index, codes, probability_fields: see :class:`LasOutput`; codes may be negative.
        targets: a ``.npy`` path per file.
    """

    def __init__(
        self,
        index: LasIndex,
        targets: Sequence[Path],
        codes: NDArray[np.int64],
        probability_fields: Sequence[str] = (),
    ) -> None:
        self._index, self._targets, self._codes = index, list(targets), codes
        self._dtype = np.dtype(
            [("label", "<i4"), ("confidence", "<f4"), *((name, "<f4") for name in probability_fields)]
        )

    def encode(self, number: int, records: Records, result: ChunkResult) -> bytes:
        rows = np.zeros(len(records), self._dtype)
        rows["label"], rows["confidence"] = self._codes[result.label], result.confidence
        if result.probabilities is not None:
            for i, name in enumerate(self._dtype.names[2:] if self._dtype.names else ()):
                rows[name] = result.probabilities[:, i]
        return rows.tobytes()

    def write(self, file: int, blobs: Iterator[tuple[int, bytes]]) -> None:
        header: LasHeader = self._index.files[file].header
        description = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (header.num_points,),
        }
        with atomic_write(self._targets[file]) as temporary, temporary.open("wb") as out:
            np.lib.format.write_array_header_1_0(out, description)
            for _, data in blobs:
                out.write(data)
