"""``SyntheticStreets``: streets with traffic, built and scanned by procedure; nothing to download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pc3d.data.dataset import IGNORE, SPLITS, Split, check_split
from pc3d.datasets.kitti_frames import CLASSES, KittiFrames
from pc3d.datasets.synthetic.traffic import Sweep, sweep
from pc3d.errors import InputError
from pc3d.io.kitti_object import Calibration, KittiFrame, KittiObjects
from pc3d.ops.boxes import points_in_boxes
from pc3d.points import Points

_VERSION = 1  # raise when the generator changes: cached frames are then built again
IMAGE_SIZE = (375, 1242)
CALIBRATION = Calibration(
    p2=np.array([[721.5, 0, 609.6, 44.86], [0, 721.5, 172.9, 0.2164], [0, 0, 1, 0.002746]]),
    r0=np.eye(3),
    velo_to_cam=np.array([[0, -1, 0, 0], [0, 0, -1, -0.08], [1, 0, 0, -0.27]]),
)
_LEAST_POINTS = 3  # of an object with a label; others are left to "DontCare"
_LEAST_SHOWN = 0.2  # share of an object's image box that lies in the image
_VISIBLE = (0.75, 0.4)  # least visible share of an object that is not, or partly, occluded


class SyntheticStreets(KittiFrames):
    """Frames like KITTI's: a street ahead with cars, pedestrians and cyclists; vans are there too, and no class.

    A frame is drawn from (seed, split, number): objects on road and sidewalks, houses, poles, trees and bins; rays of
    64 beams are cast over what the camera sees: objects are occluded, get sparse with distance and carry range
    noise. Attributes and ``meta`` are those of :class:`~pc3d.datasets.KITTIObject`.

    Args:
        train_frames, val_frames, test_frames: of the splits.
        seed: of all frames; the same seed gives the same frames, bit for bit.
    """

    def __init__(self, train_frames: int = 100, val_frames: int = 25, test_frames: int = 25, seed: int = 0) -> None:
        if min(train_frames, val_frames, test_frames) < 0:
            raise InputError("SyntheticStreets: a number of frames is negative")
        self.frames = dict(zip(SPLITS, (train_frames, val_frames, test_frames), strict=True))
        self.seed = seed
        self.class_names = list(CLASSES)

    def relocate(self, root: str | Path) -> None:
        raise InputError(f"data.root: {root} is of no use, SyntheticStreets has no files; leave it out")

    def size(self, split: Split) -> int:
        check_split(split)
        return self.frames[split]

    def name(self, split: Split, index: int) -> str:
        return f"street_{split}_{index:06d}"

    def fingerprint(self, split: Split, index: int) -> str:
        return f"SyntheticStreets {_VERSION} {self.seed} {split} {index}"

    def labels(self, split: Split, index: int) -> KittiObjects | None:
        return label(self.scan(split, index))

    def load(self, split: Split, index: int) -> Points:
        scan = self.scan(split, index)
        coord = torch.from_numpy(scan.coord.astype(np.float32))
        seen = torch.from_numpy(CALIBRATION.in_view(coord.double().numpy(), *IMAGE_SIZE))
        coord, strength = coord[seen], torch.from_numpy(scan.strength.astype(np.float32))[seen]
        objects = label(scan)
        objects = objects.take(np.array([name != "DontCare" for name in objects.names], dtype=bool))
        boxes = CALIBRATION.boxes_to_lidar(objects)
        instance = torch.full((len(coord),), IGNORE)
        segment = instance.clone()
        for number, inside in enumerate(points_in_boxes(coord, torch.from_numpy(boxes)).unbind(1)):
            instance[inside] = number
            segment[inside] = CLASSES.index(objects.names[number]) if objects.names[number] in CLASSES else IGNORE
        frame = KittiFrame(CALIBRATION, IMAGE_SIZE, label(scan))
        meta = {"name": self.name(split, index), "origin": (0.0, 0.0, 0.0), "kitti": frame.to_plain()}
        meta |= {"boxes": boxes.tolist(), "box_names": objects.names}
        return Points(
            coord, attrs={"strength": strength[:, None], "segment": segment, "instance": instance}, meta=[meta]
        )

    def scan(self, split: Split, index: int) -> Sweep:
        """A whole turn, beyond what the camera sees, with the objects it has met."""
        return sweep(np.random.default_rng([self.seed, SPLITS.index(split), index]))


def label(scan: Sweep) -> KittiObjects:
    """Labels as people would write them: of what the image shows, with what is cut off and hidden."""
    location, dimensions, rotation = CALIBRATION.boxes_to_camera(scan.boxes)
    whole = CALIBRATION.image_boxes(location, dimensions, rotation)
    height, width = IMAGE_SIZE
    clipped = whole.clip(0, [width - 1, height - 1, width - 1, height - 1])
    area, shown = (np.prod(box[:, 2:] - box[:, :2], axis=1) for box in (whole, clipped))
    truncated = 1 - shown / area
    occluded = np.select([scan.visible >= share for share in _VISIBLE], [0.0, 1.0], 2.0)
    alpha = -np.arctan2(-scan.boxes[:, 1], scan.boxes[:, 0]) + rotation
    known = scan.hits >= _LEAST_POINTS
    names = [name if sure else "DontCare" for name, sure in zip(scan.names, known, strict=True)]
    truncated[~known] = occluded[~known] = -1
    alpha[~known] = rotation[~known] = -10
    dimensions[~known], location[~known] = -1, -1000
    objects = KittiObjects(names, truncated, occluded, alpha, clipped, dimensions, location, rotation)
    rows = np.argsort(~known, kind="stable")  # what nobody cares for comes last
    return objects.take(rows[shown[rows] > _LEAST_SHOWN * area[rows]])
