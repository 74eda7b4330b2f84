"""``KITTIObject``: frames of the KITTI object benchmark with their boxes."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from pc3d.data.dataset import IGNORE, Split
from pc3d.data.object_database import is_database, write_objects_of
from pc3d.datasets.kitti_frames import CLASSES, KittiFrames
from pc3d.datasets.objects import read_list
from pc3d.datasets.scenes import Scene, SceneDataset
from pc3d.errors import InputError
from pc3d.io import read
from pc3d.io.kitti_object import (
    Calibration,
    KittiFrame,
    KittiObjects,
    difficulty_levels,
    read_objects,
)
from pc3d.ops.boxes import points_in_boxes
from pc3d.points import Points

_VERSION = 2  # raise when a frame is read in another way: cached ones are then read again
_IMAGE = (375, 1242)  # height and width of most frames, where the picture itself is not there


class KITTIObject(SceneDataset, KittiFrames):
    """LiDAR frames with 3D boxes, 3712 / 3769 / 7518 (Geiger et al., CVPR 2012).

    ``{training,testing}/{velodyne,calib,label_2}`` with ``ImageSets/{train,val,test}.txt`` beside them; without
    ``ImageSets`` all training frames are trained, validated and tested on, with one warning. Attributes: ``strength``,
    ``segment`` (the class whose box a point lies in, -1 outside) and ``instance`` (number of the box). ``meta`` holds
    ``boxes`` (list of ``x y z dx dy dz heading`` in the LiDAR frame, centre and size in metres), ``box_names``,
    ``plane`` (a, b, c, d of the ground in the camera frame) where ``planes/`` has it, and ``kitti``: calibration, size
    of the image and labels as the files have them (:class:`~pc3d.io.kitti_object.KittiFrame`). Of ``image_2`` only the
    size is read. ``pc3d prepare`` writes the training objects, for :class:`~pc3d.data.transforms.PasteObjects`.

    Args:
        root: folder that holds ``training``.
        in_view: keep only points that the camera sees, as the benchmark's detectors do.
        background: make points in no box a class of their own, to find the points of objects (those in boxes of other
            kinds, as vans, stay ignored).
        classes: those of Car, Pedestrian and Cyclist to look for; None: all.
    """

    layouts = "training/{velodyne,calib,label_2}, and ImageSets/*.txt"
    writes = False

    def __init__(
        self,
        root: str | None = None,
        in_view: bool = True,
        background: bool = False,
        classes: list[str] | None = None,
    ) -> None:
        super().__init__(root)
        self.in_view = in_view
        self.background = background
        self.classes = list(CLASSES) if classes is None else classes
        unknown = [name for name in self.classes if name not in CLASSES]
        if unknown or not self.classes or len(set(self.classes)) < len(self.classes):
            raise InputError(f"KITTIObject.classes: {self.classes} must be some of {', '.join(CLASSES)}, each once")
        self.class_names = [*self.classes, "background"] if background else self.classes

    def list_raw(self, split: Split) -> list[Scene] | None:
        assert self.root is not None
        if not (self.root / "training" / "velodyne").is_dir():
            return None
        listing = self.root / "ImageSets" / f"{split}.txt"
        folder = self.root / ("testing" if split == "test" and listing.is_file() else "training")
        if listing.is_file():
            names = read_list(listing)
        elif (self.root / "ImageSets").is_dir():
            return []
        else:
            names = sorted(path.stem for path in (folder / "velodyne").glob("*.bin"))
        return [Scene(name, f"{folder.name}/{name}", folder / "velodyne" / f"{name}.bin") for name in names]

    def list_prepared(self, split: Split) -> list[Scene] | None:
        return None

    def files(self, scene: Scene) -> Iterable[Path]:
        assert scene.raw is not None
        folder, name = scene.raw.parent.parent, scene.raw.stem
        places = {"calib": "txt", "label_2": "txt", "image_2": "png", "planes": "txt"}
        return [scene.raw, *(folder / kind / f"{name}.{suffix}" for kind, suffix in places.items())]

    def fingerprint(self, split: Split, index: int) -> str:
        return f"{super().fingerprint(split, index)} {_VERSION} {' '.join(self.classes)}"

    def finish(self, out: Path) -> None:
        """Write the objects of the training frames to ``out/objects``, if they are not there."""
        if is_database(out / "objects"):
            return
        whole = KITTIObject(str(self.root), in_view=False)

        def frames() -> Iterator[tuple[Points, list[int]]]:
            for index in range(whole.size("train")):
                labels = KittiFrame.of((cloud := whole.load("train", index)).meta[0]).labels
                assert labels is not None
                kept = labels.take(np.array([name != "DontCare" for name in labels.names], dtype=bool))
                yield cloud, difficulty_levels(kept).tolist()

        write_objects_of(out / "objects", frames())

    def calibration(self, scene: Scene) -> Calibration:
        _, calibration, *_ = self.files(scene)
        return Calibration.read(calibration)

    def labels(self, split: Split, index: int) -> KittiObjects | None:
        return self.objects(self.scenes(split)[index])

    def objects(self, scene: Scene) -> KittiObjects | None:
        """The labels of a frame; None for frames of the test set."""
        _, _, labels, *_ = self.files(scene)
        return None if scene.place.startswith("testing/") else read_objects(labels)

    def load_raw(self, scene: Scene) -> Points:
        assert scene.raw is not None
        points = read(scene.raw, columns=4)
        *_, picture, plane = self.files(scene)
        calibration, objects, size = self.calibration(scene), self.objects(scene), image_size(picture)
        frame = KittiFrame(calibration, size, objects)
        if self.in_view:
            seen = calibration.in_view(points.coord.double().numpy(), *size)
            points = points.select(torch.from_numpy(seen).nonzero()[:, 0])
        meta = dict(points.meta[0])
        meta["kitti"] = frame.to_plain()
        labelled = self.background and objects is not None
        segment = torch.full((points.num_points,), len(self.classes) if labelled else IGNORE)
        instance = torch.full_like(segment, IGNORE)
        if objects is not None:
            objects = objects.take(np.array([name != "DontCare" for name in objects.names], dtype=bool))
            boxes = calibration.boxes_to_lidar(objects)
            meta |= {"boxes": boxes.tolist(), "box_names": objects.names}
            inside = points_in_boxes(points.coord, torch.from_numpy(boxes))
            for number, name in enumerate(objects.names):
                instance[inside[:, number]] = number
                segment[inside[:, number]] = self.classes.index(name) if name in self.classes else IGNORE
        if plane.is_file():
            meta["plane"] = read_plane(plane)
        return points.with_attrs(segment=segment, instance=instance).replace(meta=[meta])


def image_size(path: Path) -> tuple[int, int]:
    """Height and width in the header of a PNG; those of most frames if there is no file."""
    if not path.is_file():
        return _IMAGE
    with path.open("rb") as file:
        header = file.read(24)
    if len(header) < 24 or header[:8] != b"\x89PNG\r\n\x1a\n":
        raise InputError(f"{path}: is not a PNG picture")
    width, height = struct.unpack(">II", header[16:24])
    return height, width


def read_plane(path: Path) -> tuple[float, float, float, float]:
    """Ground plane ``a x + b y + c z + d = 0`` in the camera frame, of unit normal, pointing up (b <= 0)."""
    try:
        a, b, c, d = (float(value) for value in path.read_text().splitlines()[3].split())
    except (IndexError, ValueError) as error:
        raise InputError(f"{path}: line 4 is not four numbers a b c d") from error
    sign = -1.0 if b > 0 else 1.0
    length = sign * (a * a + b * b + c * c) ** 0.5
    return a / length, b / length, c / length, d / length
