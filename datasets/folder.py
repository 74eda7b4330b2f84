"""``FolderDataset``: your own clouds, in any format that can be read, with a label map and a split."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pc3d.data.dataset import IGNORE, LabelMap, PointDataset, Split, Unknown, check_split, map_labels, parse_label_map
from pc3d.errors import InputError
from pc3d.io import can_read, read, read_labels
from pc3d.io.numpy_arrays import load_npy
from pc3d.points import Points

Tile = tuple[int, int]
Selection = float | str | list[str]
_ORDER: tuple[Split, ...] = ("test", "val", "train")
# Additive recurrence of the plastic number (Roberts, R2 sequence): neighbouring tiles get values far apart.
_SPREAD = (0.7548776662466927, 0.5698402909980532)


class Unit(NamedTuple):
    """What becomes one cloud: a file, or a square tile of it (column, row of the ground grid)."""

    file: Path
    tile: Tile | None = None


class FolderDataset(PointDataset):
    """The readable clouds below a folder.

    A config needs a root, a label map and how to split::

        class_path: pc3d.datasets.FolderDataset
        init_args:
          root: my_scans
          label_field: classification
          label_map: {2: ground, 3: vegetation, 4: vegetation, 5: vegetation, 6: building, 7: ignore}
          val: ["north/*.laz"]

    Args:
        root: the folder; searched with its sub-folders.
        label_field: attribute that holds the labels.
        label_file: or the file that holds them, beside each cloud: a path with ``{stem}``, e.g.
            ``../labels/{stem}.label`` (``.label`` SemanticKITTI, ``.npy``, else text with one number per line).
        label_map: raw code -> class name: a mapping, a list or a YAML/JSON file, see
            :func:`~pc3d.data.dataset.parse_label_map`. Without one the codes are the class numbers, ``-1`` is ignored.
        class_names: the classes in order; by default in the order of the label map.
        unknown: a code outside the map is an ``error``, or becomes ``ignore``.
        files: which files below it, glob patterns or regular expressions (``re:...``); by default all that can be read.
        train: clouds of the training split; by default those of no other split. A selection is a list of glob
            patterns of paths below the root, or of regular expressions (``re:...``); or a number of 0..1, a share of
            all clouds.
        val: clouds of the validation split.
        test: clouds of the test split; by default those of ``val``. Only explicit test clouds may lack labels.
        tile: cut files into squares of this many metres on the ground; a share then takes tiles, spread over the
            area. The grid is anchored at 0, so where files overlap a place belongs to one split.
        min_points: a tile with fewer points joins its neighbour in the same file.
        columns: names (or number) of columns, for files that do not say; see :func:`pc3d.io.read`.
        invalid: points with coordinates that are not finite: ``error`` or ``drop``.
        seed: of the shares.
    """

    def __init__(
        self,
        root: str | None = None,
        label_field: str = "segment",
        label_file: str | None = None,
        label_map: LabelMap | None = None,
        class_names: list[str] | None = None,
        unknown: Unknown = "error",
        files: str | list[str] = "*",
        train: Selection | None = None,
        val: Selection = 0.2,
        test: Selection | None = None,
        tile: float | None = None,
        min_points: int = 100,
        columns: int | list[str] | None = None,
        invalid: Literal["error", "drop"] | None = None,
        seed: int = 0,
    ) -> None:
        if tile is not None and not tile > 0:
            raise InputError(f"FolderDataset.tile: {tile} must be a length in metres, above 0")
        self.root = None if root is None else Path(root)
        self.files = files
        self.label_field = label_field
        self.label_file = label_file
        self.unknown: Unknown = unknown
        self.selections: dict[Split, Selection | None] = {"train": train, "val": val, "test": test}
        self.tile = tile
        self.min_points = min_points
        self.columns = columns
        self.invalid = invalid
        self.seed = seed
        self.codes, self.class_names = _classes(label_map, class_names)
        self.label_map = self.codes
        self._names: dict[Path, str] = {}
        self._splits: dict[Split, list[Unit]] | None = None
        self._last: tuple[Path, Points] | None = None  # tiles of one file are mostly asked for one after the other

    def relocate(self, root: str | Path) -> None:
        super().relocate(root)
        self._splits = self._last = None

    # Splits ----------------------------------------------------------------------------------------------------------

    def size(self, split: Split) -> int:
        return len(self._units(split))

    def name(self, split: Split, index: int) -> str:
        unit = self._units(split)[index]
        name = self._names[unit.file]
        return name if unit.tile is None else f"{name}_{unit.tile[0]}_{unit.tile[1]}"

    def group(self, split: Split, index: int) -> str:
        return str(self._units(split)[index].file)

    def fingerprint(self, split: Split, index: int) -> str:
        unit = self._units(split)[index]
        files = [unit.file] if self.label_file is None else [unit.file, self._label_path(unit.file)]
        reading = (self.label_field, sorted(self.codes.items()), self.unknown, self.columns, self.invalid)
        return repr(
            (
                "FolderDataset",
                [_stamp(file) for file in files],
                unit.tile,
                self.tile,
                self.min_points,
                reading,
                split == "test",
            )
        )

    def _units(self, split: Split) -> list[Unit]:
        check_split(split)
        if self._splits is None:
            self._splits = self._split()
        if split == "train" and not self._splits["train"]:  # fine for a test on other files, an error in training
            raise InputError(f"{self.root}: nothing left to train on; set 'tile' to cut files, or 'train'")
        return self._splits[split]

    def _split(self) -> dict[Split, list[Unit]]:
        files = self._files()
        self._names = self._name_files(files)
        units = [unit for file in files for unit in self._cut(file)]
        chosen: dict[Split, list[Unit]] = {}
        for split in _ORDER:  # patterns first: a share is taken from what they leave
            selection = self.selections[split]
            if selection is not None and not isinstance(selection, (int, float)):
                matching = self._matching(split, selection, files)
                chosen[split] = [unit for unit in units if unit.file in matching]
        for split in _ORDER:
            selection = self.selections[split]
            if isinstance(selection, (int, float)):
                chosen[split] = self._share(split, float(selection), units, _without(units, chosen.values()))
        chosen.setdefault("train", _without(units, chosen.values()))
        chosen.setdefault("test", chosen["val"])
        for split in _ORDER[:2]:
            shared = set(chosen["train"]) & set(chosen[split])
            if shared:
                raise InputError(
                    f"{min(shared).file}: is in the train and the {split} split; make the patterns disjoint"
                )
        return chosen

    def _files(self) -> list[Path]:
        """Readable files below the root, sorted; hidden ones and label files left out."""
        if self.root is None:
            raise InputError("FolderDataset.root is not set: the folder with your clouds (--data.root DIR)")
        if not self.root.is_dir():
            raise InputError(f"{self.root}: no such folder (FolderDataset.root)")
        files = sorted(path for path in self.root.rglob("*") if can_read(path) and path.is_file())
        files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(self.root).parts)]
        if self.label_file is not None:
            labels = {self._label_path(file).resolve() for file in files}
            files = [file for file in files if file.resolve() not in labels]
        if not files:
            raise InputError(f"{self.root}: no readable point cloud in it or below it")
        return sorted(self._matching("files", self.files, files))

    def _name_files(self, files: Sequence[Path]) -> dict[Path, str]:
        """Names without suffix, with the sub-folder; with the suffix where two files differ in nothing else."""
        assert self.root is not None
        paths = {file: file.relative_to(self.root).as_posix().replace("/", "__") for file in files}
        names = {file: path.removesuffix(file.suffix) for file, path in paths.items()}
        uses = Counter(names.values())
        return {file: name if uses[name] == 1 else paths[file] for file, name in names.items()}

    def _matching(self, option: str, patterns: str | Sequence[str], files: Sequence[Path]) -> set[Path]:
        """The files that fit any of the patterns of an option; each pattern must fit some."""
        assert self.root is not None
        found: set[Path] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            matches = {file for file in files if _matches(file.relative_to(self.root).as_posix(), pattern)}
            if not matches:
                example = files[0].relative_to(self.root).as_posix()
                raise InputError(
                    f"{self.root}: {option} pattern '{pattern}' matches none of {len(files)} files (e.g. {example})"
                )
            found |= matches
        return found

    def _share(self, split: Split, share: float, units: Sequence[Unit], free: list[Unit]) -> list[Unit]:
        if not 0 <= share <= 1:
            raise InputError(f"FolderDataset.{split}: {share} is no share of the clouds (0..1)")
        count = max(1, round(share * len(units))) if share else 0
        return sorted(sorted(free, key=self._rank)[:count])

    def _rank(self, unit: Unit) -> tuple[float, str]:
        """Where the unit stands in line for a share: by its file's name, or spread over the ground."""
        assert self.root is not None
        name = unit.file.relative_to(self.root).as_posix()
        if unit.tile is None:
            digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
            return int.from_bytes(digest[:6], "big") / 2**48, name
        column, row = unit.tile
        return (column * _SPREAD[0] + row * _SPREAD[1] + self.seed * 0.6180339887) % 1, name

    # Tiles -----------------------------------------------------------------------------------------------------------

    def _cut(self, file: Path) -> list[Unit]:
        return [Unit(file)] if self.tile is None else [Unit(file, tile) for tile in sorted(self._tiles(file))]

    def _tiles(self, file: Path) -> dict[Tile, list[Tile]]:
        """The tiles of a file, each with the squares it covers: its own and those nearby with too few points."""
        counts = self._count_tiles(file)
        full = [tile for tile, count in counts.items() if count >= self.min_points] or [
            max(counts, key=lambda t: counts[t])
        ]
        tiles = {tile: [tile] for tile in full}
        for small in counts.keys() - tiles.keys():
            near = min(full, key=lambda tile: ((tile[0] - small[0]) ** 2 + (tile[1] - small[1]) ** 2, tile))
            tiles[near].append(small)
        return tiles

    def _count_tiles(self, file: Path) -> dict[Tile, int]:
        """Number of points in each square of the ground grid."""

        def count() -> list[list[int]]:
            tiles, counts = self._tile_of(self._read(file)).unique(dim=0, return_counts=True)
            return torch.cat([tiles, counts[:, None]], 1).tolist()

        key = ("tiles", _stamp(file), self.tile, self.columns, self.invalid)
        rows = count() if self.cache is None else self.cache.value(key, count)
        return {(column, row): points for column, row, points in rows}

    def _tile_of(self, cloud: Points) -> Tensor:
        """``(N, 2)`` int64 column and row on the ground grid, from the true coordinates."""
        assert self.tile is not None
        origin = torch.tensor(cloud.meta[0].get("origin", (0.0, 0.0, 0.0))[:2], dtype=torch.float64)
        return ((cloud.coord[:, :2].double() + origin) / self.tile).floor().long()

    # Reading ---------------------------------------------------------------------------------------------------------

    def load(self, split: Split, index: int) -> Points:
        unit = self._units(split)[index]
        cloud = self._read(unit.file)
        meta = {**cloud.meta[0], "name": self.name(split, index)}
        if unit.tile is not None:
            squares = torch.tensor(self._tiles(unit.file)[unit.tile])
            cloud = cloud.select((self._tile_of(cloud)[:, None] == squares).all(2).any(1))
            meta.pop("valid_rows", None)
        if cloud.num_points < 2:
            raise InputError(f"{unit.file}: holds {cloud.num_points} point; a cloud needs at least 2")
        if self.label_field not in cloud.attrs and split == "test" and self.selections["test"] is not None:
            segment = torch.full((cloud.num_points,), IGNORE)
        else:
            codes = cloud.get(self.label_field)
            segment = map_labels(codes, self.codes, str(unit.file), self.label_field, self.unknown)
        return cloud.with_attrs(segment=segment).replace(meta=[meta])

    def _read(self, file: Path) -> Points:
        """The file with its raw label codes in ``label_field``."""
        if self._last is not None and self._last[0] == file:
            return self._last[1]
        cloud = read(file, columns=self.columns, invalid=self.invalid)
        if self.label_file is not None and self._label_path(file).exists():
            cloud = cloud.with_attrs(**self._read_label_file(file, cloud))
        if self.tile is not None:
            self._last = file, cloud
        return cloud

    def _label_path(self, file: Path) -> Path:
        assert self.label_file is not None
        return file.parent / self.label_file.replace("{stem}", file.stem)

    def _read_label_file(self, file: Path, cloud: Points) -> dict[str, Tensor]:
        path = self._label_path(file)
        instance = None
        if path.suffix == ".label":
            codes, instance = read_labels(path)
        else:
            codes = torch.from_numpy(_read_numbers(path))
        kept = cloud.meta[0].get("valid_rows")
        count = cloud.num_points if kept is None else int(kept.max()) + 1
        if len(codes) != count if kept is None else len(codes) < count:
            raise InputError(f"{path}: holds {len(codes)} labels for the {count} points of {file.name}")
        labels = {self.label_field: codes} if instance is None else {self.label_field: codes, "instance": instance}
        return labels if kept is None else {name: values[kept] for name, values in labels.items()}


def _classes(label_map: LabelMap | None, class_names: list[str] | None) -> tuple[dict[int, int], list[str]]:
    """Raw code -> class number, and the class names."""
    if label_map is None:
        if not class_names:
            raise InputError(
                "FolderDataset: set label_map (raw code -> class name) or class_names; "
                "`pc3d data check DIR` lists the codes"
            )
        return {IGNORE: IGNORE, **{i: i for i in range(len(class_names))}}, list(class_names)
    codes, names = parse_label_map(label_map)
    if class_names is None:
        return codes, names
    if sorted(names) != sorted(class_names):
        odd = ", ".join(sorted(set(names) ^ set(class_names)))
        raise InputError(f"FolderDataset.class_names: differ from the names in label_map: {odd}")
    order = [class_names.index(name) for name in names]
    return {code: IGNORE if i == IGNORE else order[i] for code, i in codes.items()}, list(class_names)


def _matches(path: str, pattern: str) -> bool:
    """Whether a path below the root fits a glob pattern (``*`` also crosses folders) or a ``re:`` expression."""
    if not pattern.startswith("re:"):
        return fnmatch(path, pattern)
    try:
        return re.search(pattern[3:], path) is not None
    except re.error as error:
        raise InputError(f"FolderDataset: '{pattern}' is no regular expression: {error}") from error


def _without(units: Sequence[Unit], groups: Iterable[Sequence[Unit]]) -> list[Unit]:
    taken = {unit for group in groups for unit in group}
    return [unit for unit in units if unit not in taken]


def _stamp(file: Path) -> list[Any]:
    """Changes with the content of a file."""
    try:
        status = file.stat()
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error
    return [str(file.resolve()), status.st_size, status.st_mtime_ns]


def _read_numbers(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return load_npy(path)
    try:
        return np.loadtxt(path, ndmin=1)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no readable label file: {' '.join(str(error).split())}") from error
