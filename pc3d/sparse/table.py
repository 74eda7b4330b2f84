"""The dataflow table: which flow serves a layer, looked up by the sparsity of its kernel map in constant time.

``pc3d dataflow calibrate`` fills a table for the machine it runs on; another one comes with the package. The first of
these is used: ``PC3D_DATAFLOW_TABLE=FILE``, the newest ``dataflow-<device>-*.json`` in :func:`cache_folder`, the one in
the package. ``PC3D_DATAFLOW`` (or :func:`use_dataflow`) forces flows: ``ws`` everywhere, or ``fwd=os@128,wgrad=ws``.
"""

from __future__ import annotations

import contextlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pc3d.errors import InputError
from pc3d.ops.flows import Way, Window
from pc3d.ops.kernel_map import KernelMap
from pc3d.sparse.dataflow import Pass

VERSION = 1
ARF_EDGES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 27)
LEAST_LOG2, MOST_LOG2 = 8, 22
_OUTPUT_FLOWS = ("os", "fod", "ws")
FLOW_NAMES = {Pass.FORWARD: _OUTPUT_FLOWS, Pass.INPUT_GRAD: _OUTPUT_FLOWS, Pass.WEIGHT_GRAD: ("fod", "ws")}

_shipped = Path(__file__).with_name("tables")


@dataclass(frozen=True)
class Choice:
    """How one pass of a layer runs.

    Attributes:
        flow: ``os`` (outputs stay), ``ws`` (a kernel offset's weights stay: gather, product, scatter) or ``fod`` (the
            same in one fused pass).
        tile: outputs of a tile; 0 where the flow has none, or leaves it to the kernel.
        window, splits: sorting by masks, see :class:`pc3d.sparse.dataflow.Tiling`.
        microseconds: modelled time; 0 for a forced flow.
        second_best: the name of the runner-up; empty if there is none.
        margin: how much longer the runner-up takes, as a share; below 0 where the usual flow was kept in a near tie.
    """

    flow: str
    tile: int = 0
    window: Window = None
    splits: int = 1
    microseconds: float = 0.0
    second_best: str = ""
    margin: float = 0.0

    @property
    def name(self) -> str:
        """As in :mod:`pc3d.ops.flows`."""
        return Way(self.flow, self.tile, self.window, self.splits).name

    def to_json(self) -> dict[str, Any]:
        return {
            "flow": self.flow,
            "T": self.tile,
            "W": self.window,
            "split": self.splits,
            "t_us": self.microseconds,
            "second_best": self.second_best,
            "margin": self.margin,
        }

    @staticmethod
    def from_json(entry: Mapping[str, Any]) -> Choice:
        return Choice(*(entry[key] for key in ("flow", "T", "W", "split", "t_us", "second_best", "margin")))


# One kernel offset is a plain product: these kernels are one, and give the same bits with any number of threads.
_PRODUCTS = {
    device: {Pass.FORWARD: tiles, Pass.INPUT_GRAD: tiles, Pass.WEIGHT_GRAD: Choice("fod")}
    for device, tiles in (("cpu", Choice("os", 512)), ("cuda", Choice("os")))
}


def field_bin(receptive_field: float) -> int:
    """Bin of an ARF: 0 from 1 (or less) to 2, 1 from 2 to 3, and so on along ``ARF_EDGES``."""
    return min(max(bisect_right(ARF_EDGES, receptive_field) - 1, 0), len(ARF_EDGES) - 2)


def size_bin(voxels: int) -> int:
    """Bin of a number of voxels: its logarithm to base 2, rounded down, 8 to 22."""
    return min(max(voxels.bit_length() - 1, LEAST_LOG2), MOST_LOG2)


@dataclass(frozen=True)
class Key:
    """What a choice depends on; as text ``<op>|<K>|<ci>|<co>|<dtype>|<arf_bin>|<log2N>``."""

    op: str
    volume: int
    in_channels: int
    out_channels: int
    dtype: str
    field_bin: int
    size_bin: int

    def __str__(self) -> str:
        return "|".join(str(part) for part in vars(self).values())

    @staticmethod
    def parse(text: str) -> Key:
        op, volume, cin, cout, dtype, fields, size = text.split("|")
        return Key(op, int(volume), int(cin), int(cout), dtype, int(fields), int(size))


@dataclass
class DataflowTable:
    """Rates of a machine, and the choice for every bin.

    Attributes:
        device: ``cpu`` or ``cuda``, with the name of the processor.
        library: versions the times were taken with.
        dtype: element types covered.
        caches: bytes of the ``l1``, ``l2`` and ``llc`` caches.
        rates: measured rates, see :mod:`pc3d.sparse.calibrate`.
        table: the choices.
        fitted_error: ``median`` and ``p95`` of ``|modelled / measured - 1|`` over the calibration runs.
    """

    device: str
    library: str
    dtype: list[str]
    caches: dict[str, int]
    rates: dict[str, Any]
    table: dict[Key, Choice]
    fitted_error: dict[str, float]
    path: Path | None = None
    _axes: dict[tuple[object, ...], list[int]] = field(default_factory=dict, repr=False)
    _found: dict[Key, tuple[Choice, bool] | None] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for key in self.table:
            branch: tuple[object, ...] = (key.dtype, key.op)
            for value in (key.volume, key.in_channels, key.out_channels, key.field_bin, key.size_bin):
                values = self._axes.setdefault(branch, [])
                if value not in values:
                    values.append(value)
                branch = (*branch, value)

    def look_up(self, key: Key) -> tuple[Choice, bool] | None:
        """The choice of the nearest bin, and whether it is the very bin; None if the table lacks the pass or dtype.

        Goes down one axis after the other (kernel, widths, ARF, voxels), each time to the nearest value there is; what
        was found is remembered.
        """
        if key not in self._found:
            self._found[key] = self._nearest(key)
        return self._found[key]

    def _nearest(self, key: Key) -> tuple[Choice, bool] | None:
        branch: tuple[object, ...] = (key.dtype, key.op)
        exact = True
        for place, wanted in enumerate((key.volume, key.in_channels, key.out_channels, key.field_bin, key.size_bin)):
            known = self._axes.get(branch)
            if known is None:
                return None
            # Widths are compared as ratios.
            nearest = min(
                known, key=lambda v: abs(v - wanted) if place > 2 else max(v, wanted) / max(min(v, wanted), 1)
            )
            # Widths of a layer are free; a missing kernel or bin is worth a warning.
            exact &= nearest == wanted or place in (1, 2)
            branch = (*branch, nearest)
        dtype, op, volume, cin, cout, fields, size = branch
        return self.table[Key(op, volume, cin, cout, dtype, fields, size)], exact  # type: ignore[arg-type]

    def to_text(self) -> str:
        """As JSON."""
        content = {"version": VERSION} | {
            name: getattr(self, name) for name in ("device", "library", "dtype", "caches", "rates", "fitted_error")
        }
        content["table"] = {str(key): choice.to_json() for key, choice in self.table.items()}
        return json.dumps(content, separators=(",", ":")) + "\n"

    @staticmethod
    def load(path: Path) -> DataflowTable:
        """Read a table.

        Raises:
            InputError: if the file is missing, not a table, or of another version.
        """
        try:
            content = json.loads(path.read_text())
            if content["version"] != VERSION:
                raise InputError(
                    f"{path}: dataflow table of version {content['version']}, this program reads {VERSION}: "
                    "run `pc3d dataflow calibrate` again"
                )
            table = {Key.parse(text): Choice.from_json(entry) for text, entry in content["table"].items()}
            names = ("device", "library", "dtype", "caches", "rates", "fitted_error")
            return DataflowTable(table=table, path=path, **{name: content[name] for name in names})
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a dataflow table ({error!r}); run `pc3d dataflow calibrate`") from error


def cache_folder() -> Path:
    """``$PC3D_CACHE_DIR``, else ``$XDG_CACHE_HOME/pc3d``, else ``~/.cache/pc3d``."""
    if given := os.environ.get("PC3D_CACHE_DIR"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pc3d"


def current_table(device: str) -> DataflowTable | None:
    """The table in use for ``cpu`` or ``cuda``, read once per process; None if there is none for the device."""
    return _current(device, os.environ.get("PC3D_DATAFLOW_TABLE", ""), str(cache_folder()))


@cache
def _current(device: str, given: str, folder: str) -> DataflowTable | None:
    if given:
        table = DataflowTable.load(Path(given))
        if table.device.split(":")[0] == device:
            return table
    pattern = f"dataflow-{device}-*.json"
    own = sorted(Path(folder).glob(pattern), key=lambda path: path.stat().st_mtime)
    found = own[-1:] or sorted(_shipped.glob(pattern))[-1:]
    return DataflowTable.load(found[0]) if found else None


# Forced flows -------------------------------------------------------------------------------------------------------


def parse_flows(text: str) -> dict[Pass, Choice]:
    """Flows named by a user: ``ws`` for all passes, or ``fwd=os@128,wgrad=ws``; empty or ``auto`` for none.

    Raises:
        InputError: if a pass or a flow does not exist.
    """
    forced: dict[Pass, Choice] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        op, _, name = part.rpartition("=")
        if name == "auto":
            continue
        way = None
        with contextlib.suppress(ValueError):
            way = Way.parse(name)
        passes = [p for p in Pass if op in ("", p.value) and way and way.flow in FLOW_NAMES[p]]
        if way is None or not passes:
            known = "; ".join(f"{p.value}: {', '.join(names)}" for p, names in FLOW_NAMES.items())
            raise InputError(
                f"dataflow '{part}': expected FLOW or PASS=FLOW ({known}), os@ROWS for tiles of a multiple of 128 "
                "rows, on a GPU of 16, 32, 64 or 128"
            )
        forced |= {p: Choice(*way) for p in passes}
    return forced


_forced: dict[Pass, Choice] = parse_flows(os.environ.get("PC3D_DATAFLOW", ""))


@contextlib.contextmanager
def use_dataflow(flows: str) -> Iterator[None]:
    """Inside a block, layers run the flows named, as in :func:`parse_flows`; ``auto`` is the table."""
    global _forced
    before, _forced = _forced, parse_flows(flows)
    try:
        yield
    finally:
        _forced = before


# Choices of a layer -------------------------------------------------------------------------------------------------


def choose(
    kernel_map: KernelMap, in_channels: int, out_channels: int, dtype: torch.dtype, device: str
) -> dict[Pass, Choice]:
    """The choice for each pass of a layer; a pass that neither the user nor the table decides is left out.

    Asked once per map, widths and dtype; kept in the map's ``plans``.
    """
    slot = ("dataflow", "choice", in_channels, out_channels, dtype, device, tuple(_forced.items()))
    if slot not in kernel_map.plans:
        kernel_map.plans[slot] = {
            op: choice for op, choice, _ in decide(kernel_map, in_channels, out_channels, dtype, device) if choice
        }
    return kernel_map.plans[slot]


def decide(
    kernel_map: KernelMap, in_channels: int, out_channels: int, dtype: torch.dtype, device: str
) -> Iterable[tuple[Pass, Choice | None, bool]]:
    """For each pass the choice, and whether the table had the very bin (True for forced flows)."""
    table = None if len(_forced) == len(Pass) else current_table(device)
    for op in Pass:
        if op in _forced:
            yield op, _forced[op], True
        elif kernel_map.kernel_volume == 1:
            yield op, _PRODUCTS[device][op], True
        elif table is None:
            yield op, None, False
        else:
            found = table.look_up(key_of(op, kernel_map, in_channels, out_channels, dtype))
            yield op, *(found or (None, False))


def key_of(op: Pass, kernel_map: KernelMap, in_channels: int, out_channels: int, dtype: torch.dtype) -> Key:
    """The bins of one pass of a layer; the input gradient is a layer from the outputs to the inputs."""
    outputs, widths = kernel_map.num_out, (in_channels, out_channels)
    if op is Pass.INPUT_GRAD:
        outputs, widths = kernel_map.num_in, (out_channels, in_channels)
    fields = kernel_map.num_pairs / max(outputs, 1)
    name = str(dtype).removeprefix("torch.")
    return Key(op.value, kernel_map.kernel_volume, *widths, name, field_bin(fields), size_bin(outputs))
