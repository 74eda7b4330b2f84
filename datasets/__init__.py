"""Datasets, one per file: what they yield is documented in :class:`pc3d.data.dataset.PointDataset`."""

from pc3d.datasets.folder import FolderDataset
from pc3d.datasets.kitti_object import KITTIObject
from pc3d.datasets.mosd import MOSD
from pc3d.datasets.nuscenes import NuScenes
from pc3d.datasets.s3dis import S3DIS
from pc3d.datasets.scannet import ScanNet
from pc3d.datasets.semantic_kitti import SemanticKITTI
from pc3d.datasets.synthetic_rooms import SyntheticRooms
from pc3d.datasets.waymo import Waymo

__all__ = [
    "MOSD",
    "S3DIS",
    "FolderDataset",
    "KITTIObject",
    "NuScenes",
    "ScanNet",
    "SemanticKITTI",
    "SyntheticRooms",
    "Waymo",
]
