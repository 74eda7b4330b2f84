"""Names of the dataflows of sparse convolution: ``os@64w1024s2``, ``fod``, ``ws``.

``os`` keeps a tile of outputs, ``@`` so many rows of it; on a GPU ``w`` sorts the outputs by the set of their kernel
offsets inside windows of so many rows, or ``wall`` of them, and ``s`` does so for parts of the kernel offsets. ``fod``
(fetch on demand) gathers, multiplies and scatters the pairs of a kernel offset in one pass, ``ws`` in three.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Window = int | Literal["all"] | None

_NAME = re.compile(r"(os|fod|ws)(?:@([1-9]\d*))?(?:w([1-9]\d*|all))?(?:s([1-9]\d*))?")
CPU_ROWS = 128  # tiles of the C++ kernels are multiples of it
GPU_TILES = (16, 32, 64, 128)
GPU_SPLITS = 3


class Way(NamedTuple):
    """How one product of a layer runs.

    Attributes:
        flow: ``os``, ``fod`` or ``ws``.
        tile: outputs of a tile; 0 leaves it, and the sorting, to the kernels.
        window: outputs are sorted by their kernel offsets inside windows of so many rows, or all; None: not sorted.
        splits: parts of the kernel offsets that are sorted each on its own.
    """

    flow: str
    tile: int = 0
    window: Window = None
    splits: int = 1

    @staticmethod
    def parse(name: str) -> Way:
        """The way of a name.

        Raises:
            ValueError: if there is no such flow.
        """
        found = _NAME.fullmatch(name)
        if found is None:
            raise ValueError(f"no flow {name!r}: expected os, os@ROWS, fod or ws")
        flow, tile, window, splits = found.groups()
        way = Way(flow, int(tile or 0), _window(window), int(splits or 1))
        if not (way.on_cpu or way.on_gpu):
            raise ValueError(
                f"no flow {name!r}: only os has tiles, of a multiple of {CPU_ROWS} rows on the CPU; on a GPU of "
                f"{', '.join(map(str, GPU_TILES))}, perhaps sorted in windows and in up to {GPU_SPLITS} parts"
            )
        return way

    @property
    def name(self) -> str:
        tile = f"@{self.tile}" if self.tile else ""
        window = "" if self.window is None else f"w{self.window}"
        return self.flow + tile + window + (f"s{self.splits}" if self.splits > 1 else "")

    @property
    def on_cpu(self) -> bool:
        """Whether the C++ kernels, or plain PyTorch, can run it."""
        plain = self.window is None and self.splits == 1
        return plain and self.tile % CPU_ROWS == 0 and (self.flow == "os" or self.tile == 0)

    @property
    def on_gpu(self) -> bool:
        """Whether the Triton kernels, or plain PyTorch, can run it."""
        if self.tile == 0:
            return self.window is None and self.splits == 1
        sorted_ = self.window is not None or self.splits == 1
        return self.flow == "os" and self.tile in GPU_TILES and sorted_ and self.splits <= GPU_SPLITS


def _window(text: str | None) -> Window:
    if text is None or text == "all":
        return text  # type: ignore[return-value]
    return int(text)
