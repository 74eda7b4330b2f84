"""``SyntheticShapes``: furniture, vehicles and vessels, built by procedure; nothing to download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pc3d.data.dataset import SPLITS, PointDataset, Split, check_split
from pc3d.datasets.synthetic.shapes import SHAPES, scan
from pc3d.errors import InputError
from pc3d.points import Points

_VERSION = 1  # raise when the generator changes: cached clouds are then built again


class SyntheticShapes(PointDataset):
    """Objects to classify, drawn from (seed, split, number): sizes and details vary, they stand z up, turned at random.

    Attributes: ``segment``, the class on every point; ``normal``; ``instance``, number of the object's part.

    Args:
        train, val, test: clouds of the splits; classes take turns.
        points: of a cloud.
        noise: standard deviation along the normals, in metres; objects are about 1 m large.
        occlusion: share of the points missing, in a cut from a random direction.
        seed: of all clouds.
        classes: names to keep, default all of them.
    """

    def __init__(
        self,
        train: int = 560,
        val: int = 140,
        test: int = 140,
        points: int = 2048,
        noise: float = 0.005,
        occlusion: float = 0.2,
        seed: int = 0,
        classes: list[str] | None = None,
    ) -> None:
        unknown = sorted(set(classes or ()) - set(SHAPES))
        if unknown:
            raise InputError(f"SyntheticShapes.classes: {', '.join(unknown)} unknown; there are {', '.join(SHAPES)}")
        if min(train, val, test) < 0 or points < 16 or noise < 0 or not 0 <= occlusion < 1:
            raise InputError(
                f"SyntheticShapes: train {train}, val {val}, test {test}, noise {noise} must not be negative, points "
                f"{points} at least 16, occlusion {occlusion} a share below 1"
            )
        self.counts = dict(zip(SPLITS, (train, val, test), strict=True))
        self.points, self.noise, self.occlusion, self.seed = points, noise, occlusion, seed
        self.class_names = [name for name in SHAPES if classes is None or name in classes]

    def relocate(self, root: str | Path) -> None:
        raise InputError(f"data.root: {root} is of no use, SyntheticShapes has no files; leave it out")

    def size(self, split: Split) -> int:
        check_split(split)
        return self.counts[split]

    def name(self, split: Split, index: int) -> str:
        return f"{self.class_names[index % self.num_classes]}_{split}_{index:04d}"

    def fingerprint(self, split: Split, index: int) -> str:
        arguments = (self.seed, split, index, self.points, self.noise, self.occlusion, self.class_names)
        return f"SyntheticShapes {_VERSION} {arguments}"

    def load(self, split: Split, index: int) -> Points:
        rng = np.random.default_rng([11, self.seed, SPLITS.index(split), index])
        label = index % self.num_classes
        pieces = SHAPES[self.class_names[label]](rng)
        whole = round(self.points / (1 - self.occlusion))
        coord, normal, part = scan(pieces, whole, rng, self.noise)
        turn = rng.uniform(0, 2 * np.pi)
        rotation = np.array([[np.cos(turn), np.sin(turn), 0], [-np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
        coord, normal = coord @ rotation, normal @ rotation
        direction = rng.standard_normal(3)
        kept = np.sort(np.argsort(coord @ direction, kind="stable")[: self.points])
        return Points(
            torch.from_numpy(coord[kept].astype(np.float32)),
            attrs={
                "normal": torch.from_numpy(normal[kept].astype(np.float32)),
                "instance": torch.from_numpy(part[kept]),
                "segment": torch.full((len(kept),), label),
            },
            meta=[{"name": self.name(split, index), "origin": (0.0, 0.0, 0.0)}],
        )
