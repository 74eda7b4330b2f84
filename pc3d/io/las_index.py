"""``LasIndex``: what LAS, LAZ and COPC files hold and where, without reading their points."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pc3d.errors import InputError
from pc3d.io.atomic import visible_files
from pc3d.io.copc import Octree, read_octree
from pc3d.io.las_header import ByteReader, coordinates, read_header
from pc3d.io.laz_chunks import Chunks, decompress, find_chunks, laz_record

CHUNK_POINTS = 50_000
"""Points per piece of an uncompressed file, and LASzip's default."""
SUFFIXES = (".las", ".laz")
_THREADS = 8

T = TypeVar("T")
S = TypeVar("S")


class LasFile:
    """One file: its header and where its chunks are.

    Attributes:
        path: the file.
        header: see :class:`~pc3d.io.las_header.LasHeader`.
        chunks: points and bytes of each chunk; those of an uncompressed file are runs of :data:`CHUNK_POINTS` points.
        first_rows: ``(C,)`` int64 row of the first point of each chunk.
        octree: of a COPC file.
        node_chunks: ``(M,)`` int64 chunk of each node of the octree.
        bytes_read: bytes read so far, of headers, tables and points.

    Raises:
        InputError: if the file is no LAS or LAZ, truncated or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with ByteReader(self.path) as reader:
            self.header = read_header(reader)
            self.laz = laz_record(self.header) if self.header.compressed else None
            self.octree = read_octree(reader, self.header)
            self.chunks = self._runs() if self.laz is None else find_chunks(reader, self.header, self.laz)
            self.bytes_read = reader.bytes_read
        self.first_rows = np.cumsum(self.chunks.counts) - self.chunks.counts
        self.node_chunks = None if self.octree is None else self._chunks_of(self.octree)

    def __len__(self) -> int:
        """Number of chunks."""
        return len(self.chunks.counts)

    def _runs(self) -> Chunks:
        header = self.header
        room = (header.points_end - header.points_start) // header.record_length
        if header.num_points > room:
            raise InputError(
                f"{self.path}: truncated or damaged: {header.num_points} points, the file has room for {room}"
            )
        firsts = np.arange(0, header.num_points, CHUNK_POINTS, dtype=np.int64)
        counts = np.minimum(header.num_points - firsts, CHUNK_POINTS)
        return Chunks(counts, header.points_start + firsts * header.record_length, counts * header.record_length)

    def records(self, chunk: int) -> NDArray[np.uint8]:
        """``(n, record_length)`` points of one chunk, as stored in a LAS file.

        Raises:
            InputError: if the chunk is damaged, or compressed and lazrs is not installed.
        """
        count, start, size = (
            int(column[chunk]) for column in (self.chunks.counts, self.chunks.starts, self.chunks.sizes)
        )
        with ByteReader(self.path) as reader:
            data = reader.read(start, size, f"chunk {chunk}")
        self.bytes_read += size
        if self.laz is None:
            return np.frombuffer(data, np.uint8).reshape(count, self.header.record_length)
        return decompress(self.header, self.laz, data, count, chunk)

    @cached_property
    def first_records(self) -> NDArray[np.uint8]:
        """``(C, record_length)`` first point of each chunk, which is stored as it is even in LAZ files."""
        length = self.header.record_length
        with ByteReader(self.path) as reader:
            data = b"".join(reader.read(int(start), length, "a chunk") for start in self.chunks.starts)
        self.bytes_read += len(data)
        return np.frombuffer(data, np.uint8).reshape(-1, length)

    def _chunks_of(self, octree: Octree) -> NDArray[np.int64]:
        chunk = np.searchsorted(self.chunks.starts, octree.start)
        found = np.flatnonzero(np.isin(octree.start, self.chunks.starts))
        wrong = np.ones(len(chunk), bool)
        wrong[found] = octree.count[found] != self.chunks.counts[chunk[found]]
        if wrong.any():
            node = int(wrong.argmax())
            raise InputError(
                f"{self.path}: damaged: COPC node {octree.key[node].tolist()} has {octree.count[node]} points at byte "
                f"{octree.start[node]}, which is no chunk of the file"
            )
        return chunk

    @cached_property
    def chunk_bounds(self) -> NDArray[np.float64]:
        """``(C, 6)`` lowest and highest x, y, z of each chunk: octree cubes of a COPC file, NaN where not known."""
        bounds = np.full((len(self), 6), np.nan)
        if self.octree is not None:
            bounds[self.node_chunks] = np.concatenate([self.octree.low, self.octree.high], 1)
        return bounds


class LasIndex:
    """The files of one scan, which may be larger than memory.

    Attributes:
        files: the files, in the order of their paths.
        file, chunk: ``(C,)`` int64 number of the file, and of the chunk in it, of every chunk.
        counts: ``(C,)`` int64 points of every chunk.
    """

    def __init__(self, files: Sequence[LasFile]) -> None:
        self.files = list(files)
        lengths = [len(file) for file in files]
        self.file = np.repeat(np.arange(len(lengths)), lengths)
        self.chunk = np.concatenate([np.arange(length) for length in [0, *lengths]])
        self.counts = np.concatenate([np.zeros(0, np.int64), *(file.chunks.counts for file in files)])

    @staticmethod
    def open(paths: str | Path | Iterable[str | Path]) -> LasIndex:
        """Read the headers and chunk tables of files, or of all LAS and LAZ files below a folder.

        Raises:
            InputError: if there are none, or one is damaged.
        """
        names = [paths] if isinstance(paths, (str, Path)) else list(paths)
        found: list[Path] = []
        for name in map(Path, names):
            if name.is_dir():
                found += sorted(path for path in visible_files(name) if path.suffix.lower() in SUFFIXES)
            else:
                found.append(name)
        if not found:
            raise InputError(f"{', '.join(map(str, names)) or 'no paths'}: no LAS or LAZ file in it")
        return LasIndex(in_threads(LasFile, found))

    @property
    def num_points(self) -> int:
        """Points of all files."""
        return sum(file.header.num_points for file in self.files)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.path.stat().st_size for file in self.files)

    @property
    def bytes_read(self) -> int:
        """Bytes read of all files so far."""
        return sum(file.bytes_read for file in self.files)

    @property
    def boxes(self) -> NDArray[np.float64]:
        """``(F, 6)`` bounding boxes of the files with points: lowest x, y, z, highest x, y, z."""
        headers = [file.header for file in self.files if file.header.num_points]
        return np.array([[*header.low, *header.high] for header in headers]).reshape(-1, 6)

    def records(self, number: int) -> NDArray[np.uint8]:
        """``(n, record_length)`` points of chunk ``number``, counted over all files."""
        return self.files[self.file[number]].records(int(self.chunk[number]))

    def first_points(self) -> NDArray[np.float64]:
        """``(C, 3)`` true coordinates of the first point of every chunk."""
        parts = in_threads(lambda file: coordinates(file.header, file.first_records), self.files)
        return np.concatenate([np.zeros((0, 3)), *parts])


def in_threads(function: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """``function`` of every item, several at a time: reading small pieces is waiting for the disk."""
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, items))
