"""``PointDataset``: what a dataset has to say about itself, and how raw label codes become class numbers."""

from __future__ import annotations

import colorsys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from pc3d.config import Configurable
from pc3d.data.prediction import Prediction, read_prediction, write_prediction
from pc3d.errors import InputError
from pc3d.points import Points

if TYPE_CHECKING:
    from pc3d.data.cache import CloudCache

Split = Literal["train", "val", "test"]
Unknown = Literal["error", "ignore"]
LabelMap = str | list[str] | dict[int, str | None]
SPLITS: tuple[Split, ...] = get_args(Split)
IGNORE = -1
IGNORED_NAMES = (None, "", "ignore", "ignored")


class PointDataset(Configurable, ABC):
    """Clouds in three splits, with their classes. It yields raw clouds; transforms and sampling are the pipeline's.

    Attributes:
        root: folder of the files, or None for a dataset without files.
        class_names: name of class 0, 1, ...
        label_map: raw label code -> class number (``-1`` = ignored), or None if files hold class numbers already.
        things: per class, whether it has instances; None if the data set has none.
        categories: of a part segmentation, name of each category -> its classes; else None.
        palette: one (red, green, blue) of 0..255 per class.
        cache: set by the data module; a dataset may keep expensive indices in it (:meth:`CloudCache.value`).
    """

    root: Path | None = None
    class_names: list[str]
    label_map: dict[int, int] | None = None
    things: list[bool] | None = None
    categories: dict[str, list[int]] | None = None
    cache: CloudCache | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def palette(self) -> list[tuple[int, int, int]]:
        return distinct_colors(self.num_classes)

    def relocate(self, root: str | Path) -> None:
        """Look for the files under another folder (also in :meth:`to_config`)."""
        self.root = Path(root)
        self._init_args["root"] = str(root)

    @abstractmethod
    def size(self, split: Split) -> int:
        """Number of clouds of a split.

        Raises:
            InputError: if the files are not where they should be.
        """

    @abstractmethod
    def name(self, split: Split, index: int) -> str:
        """Short unique name of a cloud, usable as a file name."""

    def group(self, split: Split, index: int) -> str:
        """The place that a cloud shows; scans of one place (a room, a drive) share it. By default its own name."""
        return self.name(split, index)

    def cloud_class(self, split: Split, index: int) -> int:
        """Class of a cloud all of whose points have one; quicker than :meth:`load` where the files allow it."""
        return int(self.load(split, index).get("segment")[0])

    @abstractmethod
    def load(self, split: Split, index: int) -> Points:
        """One raw cloud with ``segment`` in class numbers (``-1`` ignored), its ``name`` and ``origin`` in ``meta``.

        Raises:
            InputError: if the cloud cannot be read or its labels do not fit the label map.
        """

    @abstractmethod
    def fingerprint(self, split: Split, index: int) -> str:
        """Text that changes whenever :meth:`load` would return something else: the key of the cache."""

    def save_prediction(self, folder: Path, cloud: Points, prediction: Prediction) -> Path:
        """Keep the prediction for a raw cloud below a folder, as the data set's benchmark takes it if it has one."""
        return write_prediction(folder / f"{cloud.meta[0]['name']}.npz", prediction)

    def load_prediction(self, folder: Path, cloud: Points) -> Prediction:
        """The prediction saved for a raw cloud.

        Raises:
            InputError: if it is missing, damaged, or of another cloud.
        """
        return read_prediction(folder / f"{cloud.meta[0]['name']}.npz", cloud.num_points)


def check_split(split: str) -> None:
    """Raises InputError unless ``split`` is one of :data:`SPLITS`."""
    if split not in SPLITS:
        raise InputError(f"split '{split}' is none of {', '.join(SPLITS)}")


def parse_label_map(source: LabelMap) -> tuple[dict[int, int], list[str]]:
    """Raw code -> class number, and the class names, from what a user writes.

    Args:
        source: a mapping ``raw code -> class name`` (several codes may share a name; ``ignore`` or null leaves a code
            out of training and scores), a list of names of the codes 0, 1, ..., or the path of a YAML or JSON file
            that holds either. Classes are numbered in the order of their first mention.

    Raises:
        InputError: if the file is missing or unreadable, or a code is not a whole number.
    """
    where = f"label map {source}" if isinstance(source, str) else "label_map"
    entries = _read_mapping(source) if isinstance(source, str) else source
    if isinstance(entries, list):
        entries = dict(enumerate(entries))
    if not isinstance(entries, Mapping) or not entries:
        raise InputError(f"{where}: expected 'code: class name' lines, got {str(entries)[:80]!r}")
    label_map: dict[int, int] = {}
    numbers: dict[str, int] = {}
    for code, name in entries.items():
        try:
            label_map[int(code)] = IGNORE if name in IGNORED_NAMES else numbers.setdefault(str(name), len(numbers))
        except (TypeError, ValueError) as error:
            raise InputError(f"{where}: code {code!r} is not a whole number") from error
    if not numbers:
        raise InputError(f"{where}: every code is ignored; name at least one class")
    return label_map, list(numbers)


def _read_mapping(path: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise InputError(f"label map {path}: {reason}") from error
    except yaml.YAMLError as error:
        raise InputError(f"label map {path}: {' '.join(str(error).split())}") from error


def map_labels(
    codes: Tensor, label_map: Mapping[int, int], where: str, field: str, unknown: Unknown = "error"
) -> Tensor:
    """Translate raw label codes into class numbers.

    Args:
        codes: ``(N,)`` or ``(N, 1)`` codes, of any integer or float dtype.
        label_map: raw code -> class number, ``-1`` = ignored.
        where: file named in errors.
        field: attribute named in errors.
        unknown: what a code outside the map does.

    Returns:
        ``(N,)`` int64 class numbers.

    Raises:
        InputError: if codes are not whole numbers, or some are not in the map; lists them with their counts.
    """
    values, inverse, counts = integer_codes(codes, where, field).unique(return_inverse=True, return_counts=True)
    missing = [i for i, code in enumerate(values.tolist()) if code not in label_map]
    if missing and unknown == "error":
        found = ", ".join(f"{values[i].item()} ({counts[i].item()} points)" for i in missing)
        known = ", ".join(map(str, sorted(label_map)))
        raise InputError(
            f"{where}: field '{field}' has codes outside the label map: {found}; the map covers {known} "
            "(add them to label_map, or set unknown: ignore)"
        )
    table = torch.tensor([label_map.get(code, IGNORE) for code in values.tolist()], dtype=torch.int64)
    return table[inverse]


def integer_codes(codes: Tensor, where: str, field: str) -> Tensor:
    """``(N,)`` int64 from an ``(N,)`` or ``(N, 1)`` label field of any dtype.

    Raises:
        InputError: for several columns or values that are not whole numbers.
    """
    if codes.numel() != len(codes):
        raise InputError(
            f"{where}: field '{field}' has {tuple(codes.shape[1:])} values per point; a label is one number"
        )
    codes = codes.reshape(-1)
    if codes.is_floating_point():
        bad = (codes != codes.round()) | ~codes.isfinite()
        if bad.any():
            row = int(bad.nonzero()[0])
            raise InputError(
                f"{where}: field '{field}' holds {int(bad.sum())} labels that are not whole numbers "
                f"(first at point {row}: {codes[row].item()})"
            )
    return codes.to(torch.int64)


def distinct_colors(count: int) -> list[tuple[int, int, int]]:
    """``count`` well separated colours (hues a golden angle apart, alternating brightness), 0..255."""
    colors = []
    for i in range(count):
        red, green, blue = colorsys.hsv_to_rgb(i * 0.61803398875 % 1, (0.65, 0.9, 0.45)[i % 3], (0.95, 0.75)[i % 2])
        colors.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colors
