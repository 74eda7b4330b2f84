"""Datasets, one per file: what they yield is documented in :class:`pc3d.data.dataset.PointDataset`."""

from pc3d.datasets.folder import FolderDataset
from pc3d.datasets.mosd import MOSD
from pc3d.datasets.synthetic_rooms import SyntheticRooms

__all__ = ["MOSD", "FolderDataset", "SyntheticRooms"]
