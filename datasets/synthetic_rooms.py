"""``SyntheticRooms``: furnished rooms, built and scanned by procedure; nothing to download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pc3d.data.dataset import SPLITS, PointDataset, Split, check_split
from pc3d.datasets.synthetic.room import CLASSES, STRUCTURE, Room
from pc3d.errors import InputError
from pc3d.points import Points

_VERSION = 2  # raise when the generator changes: cached rooms are then built again


class SyntheticRooms(PointDataset):
    """Rooms with furniture, as a hand-held scanner sees them.

    A room is drawn from (seed, split, number): shell with door, windows, sometimes a corner or column that stands out;
    beds, sofas, tables with chairs, bookcases, cabinets and lamps. Rays are cast from several places on a walk through
    the room, so that points are occluded, lie denser near the path (1/r^2) and carry range noise; glass and grazing
    rays often return nothing.
    Attributes: ``color`` (textured, lit), ``normal`` (true, towards the scanner), ``segment``, ``instance`` (walls,
    floor and ceiling are instances too). Colours overlap between classes: wood, white paint and fabrics each occur on
    several.

    Args:
        train_rooms: rooms of the training split.
        val_rooms: rooms of the validation split.
        test_rooms: rooms of the test split.
        points: rays per room; about 92 % of them become points.
        seed: of all rooms; the same seed gives the same rooms, bit for bit.
        classes: names to keep, a subset of :data:`CLASSES`; furniture not named is not there, structure not named is
            ignored.
    """

    def __init__(
        self,
        train_rooms: int = 40,
        val_rooms: int = 6,
        test_rooms: int = 8,
        points: int = 40_000,
        seed: int = 0,
        classes: list[str] | None = None,
    ) -> None:
        unknown = sorted(set(classes or ()) - set(CLASSES))
        if unknown:
            raise InputError(f"SyntheticRooms.classes: {', '.join(unknown)} unknown; there are {', '.join(CLASSES)}")
        if points < 1000 or min(train_rooms, val_rooms, test_rooms) < 0:
            raise InputError(f"SyntheticRooms: points {points} (at least 1000) or a negative number of rooms")
        self.rooms = dict(zip(SPLITS, (train_rooms, val_rooms, test_rooms), strict=True))
        self.points = points
        self.seed = seed
        self.class_names = [name for name in CLASSES if classes is None or name in classes]

    def relocate(self, root: str | Path) -> None:
        raise InputError(f"data.root: {root} is of no use, SyntheticRooms has no files; leave it out")

    def size(self, split: Split) -> int:
        check_split(split)
        return self.rooms[split]

    def name(self, split: Split, index: int) -> str:
        return f"room_{split}_{index:04d}"

    def fingerprint(self, split: Split, index: int) -> str:
        return f"SyntheticRooms {_VERSION} {self.seed} {split} {index} {self.points} {self.class_names}"

    def load(self, split: Split, index: int) -> Points:
        rng = np.random.default_rng([self.seed, SPLITS.index(split), index])
        furniture = [name for name in self.class_names if name not in STRUCTURE]
        scan = Room(rng, furniture).scan(self.points)
        numbers = [self.class_names.index(name) if name in self.class_names else -1 for name in CLASSES]
        return Points(
            torch.from_numpy(scan.coord.astype(np.float32)),
            attrs={
                "color": torch.from_numpy(scan.color.astype(np.float32)),
                "normal": torch.from_numpy(scan.normal.astype(np.float32)),
                "segment": torch.tensor(numbers)[torch.from_numpy(scan.label)],
                "instance": torch.from_numpy(scan.instance),
            },
            meta=[{"name": self.name(split, index), "origin": (0.0, 0.0, 0.0)}],
        )
