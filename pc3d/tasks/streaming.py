"""``StreamingPredictor``: class probabilities for every point of a scan larger than memory, tile by tile."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pc3d.data.tile_plan import Tile, TilePlan
from pc3d.errors import InputError
from pc3d.io.atomic import atomic_write
from pc3d.io.chunk_cache import ChunkCache, Records
from pc3d.io.las_header import colors, coordinates
from pc3d.io.las_index import LasFile, LasIndex, in_threads
from pc3d.io.las_records import Field, record_fields
from pc3d.io.table import Array, Table, axis_origin, to_points
from pc3d.points import Points

Predict = Callable[[Points, torch.Generator], Tensor]
"""``(n, K)`` probabilities of one cloud; the generator is seeded by the tile."""

_COARSEST = 1e-3  # metres that float32 coordinates may lose


@dataclass(frozen=True)
class ChunkResult:
    """What is known about the points of one chunk, in their order.

    Attributes:
        label: ``(n,)`` int64 class, -1 for points that the pipeline leaves out.
        confidence: ``(n,)`` float32 probability of that class.
        probabilities: ``(n, K)`` float32, None if they are not kept.
    """

    label: NDArray[np.int64]
    confidence: NDArray[np.float32]
    probabilities: NDArray[np.float32] | None


class Output(Protocol):
    """Where results go: each chunk is turned into bytes when it is complete, each file is put together at the end."""

    def encode(self, number: int, records: Records, result: ChunkResult) -> bytes:
        """What is kept of a chunk until its file is written."""

    def write(self, file: int, blobs: Iterator[tuple[int, bytes]]) -> None:
        """Write one file from its chunks: points and encoded bytes of each, in their order."""


class ScanPoints:
    """Points of a scan from records of its files, with the origin, fields and colours that the whole scan would have.

    Args:
        index: the scan.

    Attributes:
        origin: of all coordinates, None if the scan is too wide for one; every tile has its own then.
    """

    def __init__(self, index: LasIndex) -> None:
        self._index = index
        self._fields = [record_fields(file.header) for file in index.files]
        used = [fields for fields, file in zip(self._fields, index.files, strict=True) if len(file)]
        self._names = [name for name in used[0] if all(_same(used[0][name], other.get(name)) for other in used)]
        self._color_scale = [257.0 if wide else 1.0 for wide in in_threads(_sixteen_bits, index.files)]
        boxes = index.boxes
        self._low, high = boxes[:, :3].min(0), boxes[:, 3:].max(0)
        step = min(float(file.header.scale.min()) for file in index.files)
        origin = [axis_origin(*ends, step) for ends in zip(self._low.tolist(), high.tolist(), strict=True)]
        farthest = np.maximum(np.abs(self._low - origin), np.abs(high - origin)).astype(np.float32)
        fine = bool((np.spacing(farthest) <= max(step, _COARSEST)).all())
        self.origin = (origin[0], origin[1], origin[2]) if fine else None

    def cloud(self, parts: list[tuple[int, Records]], name: str, corner: NDArray[np.float64]) -> Points:
        """One cloud of records of several files.

        Args:
            parts: number of a file, and some of its points.
            name: for messages.
            corner: ``(2,)`` lowest x and y of the cloud, its origin where the scan has none.
        """
        origin = self.origin or (float(np.floor(corner[0])), float(np.floor(corner[1])), float(np.floor(self._low[2])))
        clouds = [self._points(file, records, origin) for file, records in parts]
        low = tuple((self._low - origin).tolist())
        return Points(
            torch.cat([cloud.coord for cloud in clouds]),
            attrs={key: torch.cat([cloud.attrs[key] for cloud in clouds]) for key in clouds[0].attrs},
            meta=[{**clouds[0].meta[0], "name": name, "grid_low": low}],
        )

    def _points(self, file: int, records: Records, origin: tuple[float, float, float]) -> Points:
        source, fields = self._index.files[file], self._fields[file]
        columns: dict[str, Array] = {"coord": coordinates(source.header, records)}
        columns |= {name: fields[name].get(records) for name in self._names}
        table = Table(columns, {"format": "las"}, origin=origin, color_scale=self._color_scale[file])
        return to_points(table, source.path)


def _same(one: Field, other: Field | None) -> bool:
    return other is not None and (one.dtype, one.width) == (other.dtype, other.width)


def _sixteen_bits(file: LasFile) -> bool:
    """Whether some colours are above 255. The first points of chunks may be black, so one chunk is asked as a whole."""
    firsts = colors(file.header, file.first_records)
    if firsts is None or len(firsts) == 0:
        return False
    if firsts.max() > 255:
        return True
    whole = colors(file.header, file.records(int(file.chunks.counts.argmax())))
    return whole is not None and int(whole.max()) > 255


@dataclass
class Progress:
    """Figures of a run.

    Attributes:
        points: points with a result so far, of ``total``.
        total: points of the scan.
        tiles: tiles done, of ``tiles_total`` known so far.
        repeated: tiles done again because a chunk reached further than its neighbours told.
        decoded: chunks decoded.
    """

    total: int
    points: int = 0
    tiles: int = 0
    tiles_total: int = 0
    repeated: int = 0
    decoded: int = 0


@dataclass
class _Done:
    """A finished tile: which rows of its result file belong to which chunk."""

    rows: dict[int, tuple[int, int]]
    listed: set[int] = field(default_factory=set)


class StreamingPredictor:
    """Predicts tile after tile along a Hilbert curve, and goes on where an earlier run was stopped.

    Every point gets the result of the one tile it lies in, made with the halo around it; or, blended, the mean over
    all tiles whose halo it lies in, of their log-probabilities (softmax forgets the rest of the logits), weighted by a
    cosine. The folder keeps a journal, the result of each tile and each finished chunk; the files are written at the
    end, and the folder may then be removed.

    Args:
        index: the scan.
        predict: the model, see :data:`Predict`.
        plan: the tiles.
        output: where results go.
        folder: for what an interrupted run needs.
        identity: plain values that must not change between the runs that share a folder (model, options).
        cache_bytes: for decoded chunks.
        blend: average over halos.
        keep_probabilities: of all classes, for the output.
        priority: tiles with a higher value come first; may be replaced while running, so all tiles are compared again
            for every next one. Default: the Hilbert curve.

    Raises:
        InputError: if the folder belongs to a run of something else.
    """

    def __init__(
        self,
        index: LasIndex,
        predict: Predict,
        plan: TilePlan,
        output: Output,
        folder: Path,
        identity: dict[str, Any],
        cache_bytes: int,
        blend: bool = False,
        keep_probabilities: bool = False,
        priority: Callable[[Tile], float] | None = None,
    ) -> None:
        self._index, self._predict, self.plan, self._output = index, predict, plan, output
        self._folder, self._cache_bytes = folder, cache_bytes
        self._blend, self._keep = blend, keep_probabilities
        self.priority = priority
        self.progress = Progress(index.num_points)
        self._points = ScanPoints(index)
        self._done: dict[Tile, _Done] = {}
        self._finished: set[int] = set()  # chunks
        self._learned: set[int] = set()  # chunks whose true place is known
        self._pending: dict[Tile, int] = {}  # and their places on the curve
        self._queue: list[tuple[int, Tile]] = []  # a heap of all that is or was pending
        (folder / "tiles").mkdir(parents=True, exist_ok=True)
        (folder / "chunks").mkdir(exist_ok=True)
        self._journal = Journal(folder / "journal.jsonl", identity)
        for entry in self._journal.entries:
            self._replay(entry)

    def run(self, report: Callable[[Progress], None] | None = None) -> Progress:
        """Predict what is left and write the files.

        Args:
            report: called after each tile.

        Raises:
            InputError: if a chunk is damaged, or a file cannot be written.
        """
        with ChunkCache(self._index, self._cache_bytes) as cache, self._journal:
            self._pending.clear()  # of tiles that an earlier run has added and done
            self._add(self.plan.leaves - self._done.keys())
            self._finish_chunks(set(range(len(self._index.file))) - self._finished, cache)
            while (tile := self._next()) is not None:
                self._do(tile, cache)
                self.progress.decoded = cache.decoded
                self.progress.tiles, self.progress.tiles_total = len(self._done), len(self.plan.leaves)
                if report is not None:
                    report(self.progress)
        self._write_files()
        return self.progress

    # Tiles -----------------------------------------------------------------------------------------------------------

    def _add(self, tiles: Iterable[Tile]) -> None:
        """Tiles that are to be done."""
        for tile in tiles:
            self._pending[tile] = self.plan.curve(tile)
            heapq.heappush(self._queue, (self._pending[tile], tile))

    def _next(self) -> Tile | None:
        """The tile to do next."""
        if self.priority is not None:
            priority = self.priority
            return min(self._pending, key=lambda tile: (-priority(tile), self._pending[tile]), default=None)
        while self._queue and self._queue[0][1] not in self._pending:
            heapq.heappop(self._queue)
        return self._queue[0][1] if self._queue else None

    def _do(self, tile: Tile, cache: ChunkCache) -> None:
        del self._pending[tile]
        gathered = self._gather(tile, cache)
        if gathered is None:
            self._journal.add({"halved": [tile.level, tile.column, tile.row]})
            self._add(self.plan.halve(tile))
            return
        parts, listed = gathered
        following = self._next()
        if following is not None:
            cache.decode_ahead(self.plan.chunks(following).tolist(), keep=listed)
        rows = self._store(tile, parts)
        spans = [[number, *span] for number, span in rows.items()]
        entry = {"tile": [tile.level, tile.column, tile.row], "rows": spans, "listed": sorted(listed)}
        self._journal.add({**entry, "bytes": _size(self._tile_file(tile)) if rows else 0})
        self._take_tile(tile, _Done(rows, listed))
        self._finish_chunks(rows.keys() | listed, cache)

    def _gather(self, tile: Tile, cache: ChunkCache) -> tuple[list[tuple[int, NDArray, Records]], set[int]] | None:
        """Rows and records in the window of a tile, chunk by chunk; None if they are too many and it can be halved."""
        parts: dict[int, tuple[int, NDArray, Records]] = {}
        listed: set[int] = set()
        count, can_halve = 0, self.plan.can_halve(tile)
        while new := set(self.plan.chunks(tile).tolist()) - listed:  # a chunk may show that others reach further
            # What is in memory comes first, or it would make room for the others before its turn.
            for number in sorted(new, key=lambda number: (number not in cache, number)):
                records = cache.get(number)
                header = self._index.files[self._index.file[number]].header
                xy = coordinates(header, records)[:, :2]
                self._learn(number, xy)
                rows = np.flatnonzero(self.plan.in_window(self.plan.place(xy), tile))
                count += len(rows)
                if count > self.plan.max_points and can_halve:
                    return None
                if len(rows):
                    parts[number] = (number, rows, records[rows])
            listed |= new
        return [parts[number] for number in sorted(parts)], listed

    def _learn(self, number: int, xy: NDArray[np.float64]) -> None:
        """Take the true place of a chunk; tiles that were done without it are done again."""
        if number in self._learned:
            return
        outline = self.plan.outline(xy)
        self._journal.add({"learned": number, "at": outline.tolist()})
        self._take_place(number, outline)

    def _take_place(self, number: int, outline: NDArray[np.float64]) -> None:
        self._learned.add(number)
        self._add(self.plan.learn(number, outline))
        for leaf in self.plan.leaves_at(self.plan.bounds[number], self.plan.halo):
            if leaf in self._done and number not in self._done[leaf].listed:
                self._reopen(leaf)

    def _reopen(self, tile: Tile) -> None:
        self.progress.repeated += 1
        self._unfinish(self._done.pop(tile).rows)
        self._add([tile])

    def _take_tile(self, tile: Tile, done: _Done) -> None:
        """A tile is done; one found late may blend into chunks that were thought to be finished."""
        self._unfinish(done.rows)
        self._done[tile] = done

    def _unfinish(self, numbers: Iterable[int]) -> None:
        for number in self._finished.intersection(numbers):
            self._finished.remove(number)
            self.progress.points -= int(self._index.counts[number])

    def _store(self, tile: Tile, parts: list[tuple[int, NDArray, Records]]) -> dict[int, tuple[int, int]]:
        """Predict the points of a tile and write their results; rows of the file for each chunk."""
        core = []
        for number, _, records in parts:
            header = self._index.files[self._index.file[number]].header
            place = self.plan.place(coordinates(header, records)[:, :2])
            core.append((self.plan.in_tile(place, tile), self.plan.blend_weight(place, tile)))
        if not any(own.any() for own, _ in core):
            return {}
        box = self.plan.box(tile)
        grouped = [(int(self._index.file[number]), records) for number, _, records in parts]
        cloud = self._points.cloud(_joined(grouped), f"tile {tile}", box[:2] - self.plan.halo)
        generator = torch.Generator().manual_seed(self.plan.curve(tile))
        probabilities = self._predict(cloud, generator).float().cpu().numpy()
        del cloud
        spans: dict[int, tuple[int, int]] = {}
        blocks, start, row = [], 0, 0
        for (number, rows, _), (own, weight) in zip(parts, core, strict=True):
            values = probabilities[row : row + len(rows)]
            row += len(rows)
            used = weight > 0 if self._blend else own
            if used.any():
                blocks.append(_result_rows(rows[used], values[used], weight[used], self._blend, self._keep))
                spans[number] = (start, start + len(blocks[-1]))
                start += len(blocks[-1])
        with atomic_write(self._tile_file(tile)) as temporary, temporary.open("wb") as file:
            np.save(file, np.concatenate(blocks))
        return spans

    def _tile_file(self, tile: Tile) -> Path:
        return self._folder / "tiles" / f"{tile}.npy"

    # Chunks ----------------------------------------------------------------------------------------------------------

    def _finish_chunks(self, numbers: Iterable[int], cache: ChunkCache) -> None:
        """Encode the chunks whose tiles are all done, while they are in memory."""
        for number in sorted(numbers):
            if number in self._finished or number not in self._learned:
                continue
            margin = self.plan.halo if self._blend else 0.0
            tiles = self.plan.leaves_at(self.plan.bounds[number], margin)
            if all(tile in self._done for tile in tiles):
                result = self._combine(number, [tile for tile in sorted(tiles) if number in self._done[tile].rows])
                blob = self._output.encode(number, cache.get(number), result)
                with atomic_write(self._chunk_file(number)) as temporary:
                    temporary.write_bytes(blob)
                self._journal.add({"chunk": number, "bytes": len(blob)})
                self._finished.add(number)
                self.progress.points += int(self._index.counts[number])
                if all(tile in self._done for tile in self.plan.leaves_at(self.plan.bounds[number], self.plan.halo)):
                    cache.drop(number)

    def _combine(self, number: int, tiles: list[Tile]) -> ChunkResult:
        """Results of all points of a chunk from the tiles it lies in."""
        count = int(self._index.counts[number])
        pieces = []
        for tile in tiles:
            start, end = self._done[tile].rows[number]
            pieces.append(np.array(np.load(self._tile_file(tile), mmap_mode="r")[start:end]))
        rows = np.concatenate([piece["row"] for piece in pieces])
        seen = np.bincount(rows, minlength=count)
        if len(seen) != count or seen.min() < 1 or (not self._blend and seen.max() > 1):
            raise RuntimeError(f"chunk {number}: {int((seen != 1).sum())} of {count} points do not have one result")
        return _blended(pieces, count, self._keep) if self._blend else _placed(pieces, count, self._keep)

    def _chunk_file(self, number: int) -> Path:
        return self._folder / "chunks" / f"{number}.bin"

    def _write_files(self) -> None:
        starts = np.searchsorted(self._index.file, np.arange(len(self._index.files) + 1))
        for file in range(len(self._index.files)):
            numbers = range(int(starts[file]), int(starts[file + 1]))
            blobs = ((int(self._index.counts[number]), self._chunk_file(number).read_bytes()) for number in numbers)
            self._output.write(file, blobs)

    # The journal -----------------------------------------------------------------------------------------------------

    def _replay(self, entry: dict[str, Any]) -> None:
        if "learned" in entry:
            self._take_place(entry["learned"], np.array(entry["at"]))
        elif "halved" in entry:
            self.plan.halve(Tile(*entry["halved"]))
        elif "chunk" in entry:
            number = entry["chunk"]
            if number not in self._finished and _size(self._chunk_file(number)) == entry["bytes"]:
                self._finished.add(number)
                self.progress.points += int(self._index.counts[number])
        else:
            tile = Tile(*entry["tile"])
            rows = {number: (start, end) for number, start, end in entry["rows"]}
            if not rows or _size(self._tile_file(tile)) == entry["bytes"]:
                self._take_tile(tile, _Done(rows, set(entry["listed"])))


def read_identity(folder: Path) -> dict[str, Any] | None:
    """What the run that was left in a folder is a run of; None if there is none."""
    path = folder / "journal.jsonl"
    if not path.is_file():
        return None
    with path.open("rb") as file:
        first = file.readline()
    return json.loads(first) if first.endswith(b"\n") else None


def _size(path: Path) -> int:
    """Bytes of a file, -1 if there is none."""
    return path.stat().st_size if path.is_file() else -1


class Journal:
    """Lines of JSON that say what has been done; a line cut short by a crash is forgotten.

    Args:
        path: the file.
        identity: of the run; what an existing journal must have begun with.

    Attributes:
        entries: what an earlier run has done.

    Raises:
        InputError: if the journal is of another run.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.entries: list[dict[str, Any]] = []
        first = json.dumps(identity, sort_keys=True)
        whole = path.read_bytes() if path.is_file() else b""
        lines = whole[: whole.rfind(b"\n") + 1].splitlines()
        if lines:
            if lines[0].decode() != first:
                raise InputError(
                    f"{path.parent}: belongs to a run with another input, model or option: repeat that one or remove it"
                )
            self.entries = [json.loads(line) for line in lines[1:]]
        self._file = path.open("ab")
        self._file.truncate(whole.rfind(b"\n") + 1)
        if not lines:
            self._line(first)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, entry: dict[str, Any]) -> None:
        """Append an entry."""
        self._line(json.dumps(entry))

    def _line(self, text: str) -> None:
        self._file.write(text.encode() + b"\n")
        self._file.flush()


# Results of a tile ---------------------------------------------------------------------------------------------------


def _joined(parts: list[tuple[int, Records]]) -> list[tuple[int, Records]]:
    """Chunks of one file after each other become one piece."""
    joined: list[tuple[int, list[Records]]] = []
    for file, records in parts:
        if joined and joined[-1][0] == file:
            joined[-1][1].append(records)
        else:
            joined.append((file, [records]))
    return [(file, np.concatenate(pieces)) for file, pieces in joined]


def _result_rows(rows: NDArray, probabilities: NDArray, weight: NDArray, blend: bool, keep: bool) -> NDArray:
    """What is kept of the points of a tile until their chunk is complete."""
    classes = probabilities.shape[1]
    if blend:
        stored = np.zeros(len(rows), [("row", "<u4"), ("weight", "<f4"), ("value", "<f4", (classes,))])
        stored["weight"] = weight * (probabilities.max(1) > 0)
        stored["value"] = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
    elif keep:
        stored = np.zeros(len(rows), [("row", "<u4"), ("value", "<f4", (classes,))])
        stored["value"] = probabilities
    else:
        stored = np.zeros(len(rows), [("row", "<u4"), ("label", "<i2"), ("confidence", "<f4")])
        stored["label"], stored["confidence"] = _best(probabilities)
    stored["row"] = rows
    return stored


def _best(probabilities: NDArray) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Class and probability; -1 where a row is zero (see :func:`pc3d.tasks.labels_of`)."""
    label, confidence = probabilities.argmax(1), probabilities.max(1)
    return np.where(confidence > 0, label, -1), confidence.astype(np.float32)


def _placed(pieces: list[NDArray], count: int, keep: bool) -> ChunkResult:
    everything = np.empty(count, pieces[0].dtype)
    for piece in pieces:
        everything[piece["row"]] = piece
    if keep:
        return ChunkResult(*_best(everything["value"]), np.ascontiguousarray(everything["value"]))
    label, confidence = (np.ascontiguousarray(everything[name]) for name in ("label", "confidence"))
    return ChunkResult(label.astype(np.int64), confidence, None)


def _blended(pieces: list[NDArray], count: int, keep: bool) -> ChunkResult:
    classes = pieces[0]["value"].shape[1]
    total, weights = np.zeros((count, classes)), np.zeros(count)
    for piece in pieces:
        total[piece["row"]] += piece["weight"][:, None].astype(np.float64) * piece["value"]
        weights[piece["row"]] += piece["weight"]
    logits = total / np.maximum(weights, 1e-30)[:, None]
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    probabilities = np.where(weights[:, None] > 0, probabilities, 0).astype(np.float32)
    return ChunkResult(*_best(probabilities), probabilities if keep else None)
