"""``ChunkCache``: decoded chunks of a scan, kept within a budget of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from pc3d.io.las_index import LasIndex

Records = NDArray[np.uint8]


class ChunkCache:
    """Least recently used chunks leave when the budget is exceeded; chunks are decoded ahead in a thread.

    Args:
        index: the scan.
        budget: bytes of decoded chunks to keep; the one in use may exceed it.

    Attributes:
        decoded: chunks decoded so far.
    """

    def __init__(self, index: LasIndex, budget: int) -> None:
        lengths = np.array([file.header.record_length for file in index.files], np.int64)
        self._index, self._budget = index, budget
        self._bytes = index.counts * lengths[index.file] if len(index.file) else np.zeros(0, np.int64)
        self._kept: OrderedDict[int, Future[Records]] = OrderedDict()
        self._used = 0
        self._pool = ThreadPoolExecutor(1)
        self.decoded = 0

    def __enter__(self) -> ChunkCache:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __contains__(self, number: int) -> bool:
        return number in self._kept

    def get(self, number: int) -> Records:
        """``(n, record_length)`` points of a chunk; not to be changed.

        Raises:
            InputError: if the chunk is damaged.
        """
        if number not in self._kept:
            self._start(number)
        self._kept.move_to_end(number)
        future = self._kept[number]
        self._shrink({number})
        return future.result()

    def decode_ahead(self, numbers: Iterable[int], keep: Iterable[int]) -> None:
        """Start decoding chunks that will be asked for next, as far as the budget goes beside those to keep."""
        kept = set(keep)
        room = self._budget - int(self._bytes[list(kept)].sum())
        for number in numbers:
            if number in kept:
                continue
            room -= int(self._bytes[number])
            if room < 0:
                break
            kept.add(number)
            if number in self._kept:
                self._kept.move_to_end(number)
            else:
                self._start(number)
        self._shrink(kept)

    def drop(self, number: int) -> None:
        """Forget a chunk that is not needed again."""
        if number in self._kept:
            self._kept.pop(number).cancel()
            self._used -= int(self._bytes[number])

    def _start(self, number: int) -> None:
        self._used += int(self._bytes[number])
        self._kept[number] = self._pool.submit(self._decode, number)

    def _decode(self, number: int) -> Records:
        self.decoded += 1
        return self._index.records(number)

    def _shrink(self, keep: set[int]) -> None:
        for number in list(self._kept):
            if self._used <= self._budget:
                return
            if number not in keep:
                self.drop(number)
