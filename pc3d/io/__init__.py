"""Readers and writers of point-cloud files: PLY, PCD, LAS/LAZ/COPC, KITTI ``.bin``, ``.npy``/``.npz``, text and E57."""

from pc3d.io.atomic import atomic_write
from pc3d.io.files import READABLE, WRITABLE, can_read, read, write
from pc3d.io.labels import read_labels, write_labels
from pc3d.io.las_index import LasIndex

__all__ = [
    "READABLE",
    "WRITABLE",
    "LasIndex",
    "atomic_write",
    "can_read",
    "read",
    "read_labels",
    "write",
    "write_labels",
]
