"""``MOSD``: the modified Object Segmentation Database, table-top scenes of an RGB-D camera with object labels."""

from __future__ import annotations

from pathlib import Path

import torch

from pc3d.data.dataset import PointDataset, Split, check_split, integer_codes
from pc3d.errors import InputError
from pc3d.io import read
from pc3d.points import Points


class MOSD(PointDataset):
    """Real table-top scenes for instance segmentation: 45 to learn from and 65 to test on.

    Richtsfeld et al., "Segmentation of unknown objects in indoor environments", IROS 2012; the modified set is
    ``segmentation/mOSD`` of github.com/PointCloudLibrary/data. Files are organised PCD clouds in the camera frame (z
    forward, y down), fields ``label x y z rgba``; pixels without depth are left out. Labels 1-9 are parts of the
    table, 20-29 parts of the first object, 30-39 of the second, and so on: parts of one object are one instance.

    Args:
        root: folder with ``learn/*.pcd`` and, if there is one, ``test/*.pcd``; without, validation scenes are tested.
        val: share of the learning scenes kept for validation, rounded: of two scenes 0.2 keeps none.
    """

    def __init__(self, root: str | None = None, val: float = 0.2) -> None:
        if not 0 <= val < 1:
            raise InputError(f"MOSD.val: {val} is not a share below 1")
        self.root = None if root is None else Path(root)
        self.val = val
        self.class_names = ["table", "object"]
        self._files: dict[Split, list[Path]] | None = None

    def relocate(self, root: str | Path) -> None:
        super().relocate(root)
        self._files = None

    def size(self, split: Split) -> int:
        check_split(split)
        return len(self._split()[split])

    def name(self, split: Split, index: int) -> str:
        return self._split()[split][index].stem

    def fingerprint(self, split: Split, index: int) -> str:
        status = (path := self._split()[split][index]).stat()
        return f"MOSD 1 {path.resolve()} {status.st_size} {status.st_mtime_ns}"

    def load(self, split: Split, index: int) -> Points:
        path = self._split()[split][index]
        points = read(path, invalid="drop")
        field = next((name for name in ("segment", "label") if name in points), None)
        if field is None:
            raise InputError(f"{path}: field 'label' is missing (it has: {', '.join(points.attrs)})")
        codes = integer_codes(points.get(field), str(path), "label")
        wrong = (codes < 0) | ((codes >= 10) & (codes < 20))
        if bool(wrong.any()):
            raise InputError(f"{path}: field 'label' holds {int(codes[wrong][0])}: 0 to 9 and from 20 on are known")
        segment = torch.where(codes >= 20, 1, torch.where(codes > 0, 0, -1))
        instance = torch.where(codes >= 20, codes.div(10, rounding_mode="floor") - 2, -1)
        meta = {**points.meta[0], "name": path.stem}
        attrs = {"color": points.get("color"), "segment": segment, "instance": instance}
        return Points(points.coord, attrs=attrs, meta=[meta])

    def _split(self) -> dict[Split, list[Path]]:
        if self._files is None:
            if self.root is None or not (self.root / "learn").is_dir():
                where = "is not set" if self.root is None else f"{self.root} has no folder 'learn'"
                raise InputError(f"MOSD.root: {where}: --data.root DIR, the folder with learn/*.pcd")
            learn, test = (sorted((self.root / name).glob("*.pcd")) for name in ("learn", "test"))
            train = learn[: max(len(learn) - round(self.val * len(learn)), 1)]
            self._files = {"train": train, "val": learn[len(train) :], "test": test or learn[len(train) :]}
        return self._files
