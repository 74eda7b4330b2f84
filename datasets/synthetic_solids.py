"""``SyntheticSolids``: spheres, boxes, tori and unions of them, with exact insides; nothing to download."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pc3d.data.dataset import SPLITS, PointDataset, Split, check_split
from pc3d.datasets.occupancy import occupancy_cloud
from pc3d.datasets.synthetic.solids import SOLIDS, fitted, surface_and_space
from pc3d.errors import InputError
from pc3d.points import Points

_VERSION = 1  # raise when the generator changes: cached clouds are then built again


class SyntheticSolids(PointDataset):
    """Solids to reconstruct, drawn from (seed, split, number), turned at random, in ``[-0.5, 0.5]^3``.

    Attributes: ``occupancy`` -1 on the surface, 1 inside, 0 outside; ``normal``, zeros off the surface; ``segment``.

    Args:
        train, val, test: solids of the splits; classes take turns.
        surface: points on a surface, exact.
        space: points in the cube around it, of edge 1.1.
        seed: of all solids.
    """

    def __init__(
        self,
        train: int = 400,
        val: int = 20,
        test: int = 20,
        surface: int = 20_000,
        space: int = 40_000,
        seed: int = 0,
    ) -> None:
        if min(train, val, test) < 0 or min(surface, space) < 1:
            raise InputError(
                f"SyntheticSolids: train {train}, val {val}, test {test} must not be negative, surface {surface} and "
                f"space {space} be at least 1"
            )
        self.counts = dict(zip(SPLITS, (train, val, test), strict=True))
        self.surface, self.space, self.seed = surface, space, seed
        self.class_names = list(SOLIDS)

    def relocate(self, root: str | Path) -> None:
        raise InputError(f"data.root: {root} is of no use, SyntheticSolids has no files; leave it out")

    def size(self, split: Split) -> int:
        check_split(split)
        return self.counts[split]

    def name(self, split: Split, index: int) -> str:
        return f"{self.class_names[index % self.num_classes]}_{split}_{index:04d}"

    def cloud_class(self, split: Split, index: int) -> int:
        return index % self.num_classes

    def fingerprint(self, split: Split, index: int) -> str:
        return f"SyntheticSolids {_VERSION} {(self.seed, split, index, self.surface, self.space)}"

    def load(self, split: Split, index: int) -> Points:
        rng = np.random.default_rng([17, self.seed, SPLITS.index(split), index])
        label = self.cloud_class(split, index)
        solid = fitted(SOLIDS[self.class_names[label]](rng), rng)
        name = self.name(split, index)
        return occupancy_cloud(*surface_and_space(solid, self.surface, self.space, rng), label, name, name)
