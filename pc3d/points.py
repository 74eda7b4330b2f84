"""``Points``: a packed batch of point clouds, the one data type between files, transforms, models and viewers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pc3d.errors import InputError

if TYPE_CHECKING:
    from pc3d.voxels import Reduce, VoxelOrder, Voxels


class Points:
    """A batch of point clouds, packed row after row without padding.

    Attributes:
        coord: ``(N, 3)`` float32, metres, relative to the cloud's origin (``meta[i]["origin"]``, float64, zeros if
            absent).
        offsets: ``(B + 1,)`` int64; rows ``offsets[i]:offsets[i + 1]`` are cloud ``i``. Empty clouds are allowed.
        attrs: per-point attributes ``{name: (N, ...)}``. Names used throughout: ``color`` (N, 3) float32 in 0..255,
            ``normal`` (N, 3) unit float32, ``strength`` (N, 1) float32, ``segment`` (N,) int64 (class), ``instance``
            (N,) int64, ``grid_coord`` (N, 3) int32, ``feat`` (N, C) float32, ``inverse`` (N,) int64.
        meta: one dict per cloud (``name``, ``path``, ``origin``, whatever a reader keeps).
        source: the clouds before grid sampling, or None. Its ``attrs["inverse"]`` holds, for each of its points, the
            row of the sampled cloud (counted from that cloud's first row) which stands for it.

    Raises:
        ValueError: if shapes or dtypes do not fit together.
    """

    def __init__(
        self,
        coord: Tensor,
        offsets: Tensor | None = None,
        attrs: dict[str, Tensor] | None = None,
        meta: Sequence[dict[str, Any]] | None = None,
        source: Points | None = None,
    ) -> None:
        if coord.ndim != 2 or coord.shape[1] != 3:
            raise ValueError(f"coord must be (N, 3), got {tuple(coord.shape)}")
        if offsets is None:
            offsets = torch.tensor([0, len(coord)], dtype=torch.int64, device=coord.device)
        check_offsets(offsets, rows=len(coord))
        self.coord = coord
        self.offsets = offsets
        self.attrs: dict[str, Tensor] = {}
        for name, value in (attrs or {}).items():
            self._set(name, value)
        self.meta: list[dict[str, Any]] = [{} for _ in range(len(self))] if meta is None else list(meta)
        if len(self.meta) != len(self):
            raise ValueError(f"meta has {len(self.meta)} entries for {len(self)} clouds")
        if source is not None and len(source) != len(self):
            raise ValueError(f"source has {len(source)} clouds, the sampled batch {len(self)}")
        self.source = source

    def _set(self, name: str, value: Tensor) -> None:
        if name == "coord":
            raise ValueError("'coord' is not an attribute: pass it as coord=")
        if len(value) != len(self.coord):
            raise ValueError(f"attribute '{name}' has {len(value)} rows for {len(self.coord)} points")
        if value.device != self.coord.device:
            raise ValueError(f"attribute '{name}' is on {value.device}, coord on {self.coord.device}")
        self.attrs[name] = value

    # Shape -----------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of clouds B."""
        return len(self.offsets) - 1

    @property
    def num_points(self) -> int:
        """Number of points N over all clouds."""
        return len(self.coord)

    @property
    def counts(self) -> Tensor:
        """``(B,)`` int64, points per cloud."""
        return self.offsets.diff()

    @property
    def batch(self) -> Tensor:
        """``(N,)`` int64, the cloud each point belongs to."""
        clouds = torch.arange(len(self), device=self.device)
        return torch.repeat_interleave(clouds, self.counts, output_size=self.num_points)

    @property
    def device(self) -> torch.device:
        return self.coord.device

    # Attributes ------------------------------------------------------------------------------------------------------

    def __contains__(self, name: str) -> bool:
        return name == "coord" or name in self.attrs

    def get(self, name: str) -> Tensor:
        """An attribute, or ``coord``, by name.

        Raises:
            InputError: if there is no such attribute; names the cloud and the attributes it has.
        """
        if name == "coord":
            return self.coord
        if name not in self.attrs:
            have = ", ".join(["coord", *self.attrs])
            raise InputError(f"{self.describe()}: field '{name}' is missing (it has: {have})")
        return self.attrs[name]

    def describe(self) -> str:
        """How error messages name this batch: the file or name of the first cloud."""
        first = self.meta[0] if self.meta else {}
        name = str(first.get("path") or first.get("name") or "point cloud")
        return name if len(self) <= 1 else f"{name} and {len(self) - 1} more"

    def replace(self, **changes: Any) -> Points:
        """A new batch with ``coord``, ``offsets``, ``attrs``, ``meta`` or ``source`` replaced; tensors are shared."""
        fields = {
            "coord": self.coord,
            "offsets": self.offsets,
            "attrs": self.attrs,
            "meta": self.meta,
            "source": self.source,
        }
        return Points(**{**fields, **changes})

    def with_attrs(self, **attrs: Tensor) -> Points:
        """A new batch with attributes added or replaced; ``coord=`` replaces the coordinates."""
        coord = attrs.pop("coord", self.coord)
        return self.replace(coord=coord, attrs={**self.attrs, **attrs})

    def without_attrs(self, *names: str) -> Points:
        """A new batch without the named attributes (absent ones are ignored)."""
        return self.replace(attrs={k: v for k, v in self.attrs.items() if k not in names})

    # Rows and clouds -------------------------------------------------------------------------------------------------

    def __getitem__(self, key: int | slice | Sequence[int]) -> Points:
        """Cloud ``key`` (views, nothing copied), or the clouds of a slice or a list of cloud numbers."""
        if not isinstance(key, int):
            numbers = range(*key.indices(len(self))) if isinstance(key, slice) else key
            clouds = [self[int(i)] for i in numbers]
            return Points.cat(clouds) if clouds else self._no_clouds()
        index = key + len(self) if key < 0 else key
        if not 0 <= index < len(self):
            raise IndexError(f"cloud {key} of a batch of {len(self)}")
        start, end = self.offsets[index : index + 2].tolist()
        return Points(
            self.coord[start:end],
            attrs={name: value[start:end] for name, value in self.attrs.items()},
            meta=[self.meta[index]],
            source=None if self.source is None else self.source[index],
        )

    def _no_clouds(self) -> Points:
        """A batch of no clouds, with the attributes of this one."""
        attrs = {name: value[:0] for name, value in self.attrs.items()}
        source = None if self.source is None else self.source._no_clouds()
        return Points(self.coord[:0], self.offsets[:1], attrs, [], source)

    def __iter__(self) -> Iterator[Points]:
        return (self[i] for i in range(len(self)))

    def select(self, rows: Tensor) -> Points:
        """The points at ``rows``: an ``(N,)`` bool mask or an int64 index.

        An index of a batch of several clouds must keep the clouds in order; of one cloud it may be any order, with
        repeats. ``source`` is dropped when rows change (its inverse map would no longer fit).

        Raises:
            ValueError: if an index mixes clouds, or a mask does not have one entry per point.
        """
        if rows.dtype == torch.bool:
            if rows.shape != (self.num_points,):
                raise ValueError(f"select: a mask of shape {tuple(rows.shape)} for {self.num_points} points")
            rows = rows.nonzero()[:, 0]
        batch = self.batch.index_select(0, rows)  # index_select is two to three times as fast as indexing
        if len(self) > 1 and bool((batch.diff() < 0).any()):
            raise ValueError("select: the index mixes the points of several clouds; keep clouds in order")
        counts = torch.bincount(batch, minlength=len(self))
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        attrs = {name: value.index_select(0, rows) for name, value in self.attrs.items()}
        return Points(self.coord.index_select(0, rows), offsets, attrs, self.meta)

    @staticmethod
    def cat(clouds: Sequence[Points]) -> Points:
        """Pack batches one after the other: the collate function of every loader.

        The result has a ``source`` if all of them have one.

        Raises:
            InputError: if the clouds do not have the same attributes, of the same width.
            ValueError: if the list is empty.
        """
        if not clouds:
            raise ValueError("Points.cat of an empty list")
        names = list(clouds[0].attrs)
        for cloud in clouds[1:]:
            if set(cloud.attrs) != set(names):
                odd = ", ".join(sorted(set(names) ^ set(cloud.attrs)))
                raise InputError(f"{clouds[0].describe()} and {cloud.describe()} differ in fields: {odd}")
            for name in names:
                first, other = clouds[0].attrs[name].shape[1:], cloud.attrs[name].shape[1:]
                if first != other:
                    widths = f"{tuple(first)} and {tuple(other)} per point"
                    raise InputError(
                        f"{clouds[0].describe()} and {cloud.describe()} differ in field '{name}': {widths}"
                    )
        counts = torch.cat([cloud.counts for cloud in clouds])
        sources = [cloud.source for cloud in clouds if cloud.source is not None]
        return Points(
            torch.cat([cloud.coord for cloud in clouds]),
            torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
            {name: torch.cat([cloud.attrs[name] for cloud in clouds]) for name in names},
            [entry for cloud in clouds for entry in cloud.meta],
            Points.cat(sources) if len(sources) == len(clouds) else None,
        )

    def source_rows(self) -> Tensor:
        """``(N_source,)`` int64: for every point of ``source`` the row of this batch that stands for it.

        Raises:
            ValueError: without a ``source``.
        """
        if self.source is None:
            raise ValueError("these points have no source: they were not grid-sampled with an inverse map")
        return self.source.get("inverse") + self.offsets[:-1][self.source.batch]

    # Devices and memory ----------------------------------------------------------------------------------------------

    def apply(self, function: Callable[[Tensor], Tensor]) -> Points:
        """A new batch with ``function`` applied to every tensor (coord, offsets, attributes, source)."""
        return Points(
            function(self.coord),
            function(self.offsets),
            {name: function(value) for name, value in self.attrs.items()},
            self.meta,
            None if self.source is None else self.source.apply(function),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Points:
        return self.apply(lambda t: t.to(device, non_blocking=non_blocking))

    def cpu(self) -> Points:
        return self.to("cpu")

    def pin_memory(self) -> Points:
        return self.apply(lambda t: t.pin_memory())

    def clone(self) -> Points:
        return self.apply(lambda t: t.clone())

    def detach(self) -> Points:
        return self.apply(lambda t: t.detach())

    # Voxels ----------------------------------------------------------------------------------------------------------

    def voxelize(
        self,
        size: float,
        reduce: Reduce = "mean",
        order: VoxelOrder = "raster",
        generator: torch.Generator | None = None,
    ) -> Voxels:
        """Group the points into cubic cells of edge ``size`` metres; see :func:`pc3d.voxels.voxelize`."""
        from pc3d.voxels import voxelize

        return voxelize(self, size, reduce, order, generator)

    def voxels(self) -> Voxels:
        """The cells named by ``attrs["grid_coord"]`` with ``attrs["feat"]``; see :func:`pc3d.voxels.from_grid`."""
        from pc3d.voxels import from_grid

        return from_grid(self)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}{tuple(value.shape[1:])}" for name, value in self.attrs.items())
        return f"Points({len(self)} clouds, {self.num_points} points, [{fields}], {self.device})"


def check_offsets(offsets: Tensor, rows: int) -> None:
    """Check that ``offsets`` are the int64 cloud borders of ``rows`` rows.

    Raises:
        ValueError: if they do not start at 0, are not sorted or do not end at ``rows``.
    """
    if offsets.ndim != 1 or len(offsets) < 1 or offsets.dtype != torch.int64:
        raise ValueError(f"offsets must be (B + 1,) int64, got {tuple(offsets.shape)} {offsets.dtype}")
    if offsets.device.type != "cpu":
        return  # checking the values would wait for the device; they were checked where they were made
    if offsets[0] != 0 or offsets[-1] != rows or bool((offsets.diff() < 0).any()):
        raise ValueError(f"offsets must rise from 0 to {rows}, got {offsets.tolist()[:8]}")
