"""Datasets, one per file: what they yield is documented in :class:`pc3d.data.dataset.PointDataset`."""

from pc3d.datasets.corrupted_modelnet40 import CorruptedModelNet40
from pc3d.datasets.few_shot import FewShot, ModelNetFewShot
from pc3d.datasets.folder import FolderDataset
from pc3d.datasets.kitti_object import KITTIObject
from pc3d.datasets.medpoints import MedPointS
from pc3d.datasets.modelnet40 import ModelNet40
from pc3d.datasets.mosd import MOSD
from pc3d.datasets.nuscenes import NuScenes
from pc3d.datasets.occupancy import OccupancyRooms, ShapeNetOccupancy
from pc3d.datasets.s3dis import S3DIS
from pc3d.datasets.scannet import ScanNet
from pc3d.datasets.scanobjectnn import ScanObjectNN
from pc3d.datasets.semantic_kitti import SemanticKITTI
from pc3d.datasets.shapenet55 import ShapeNet55
from pc3d.datasets.shapenet_part import ShapeNetPart
from pc3d.datasets.synthetic_rooms import SyntheticRooms
from pc3d.datasets.synthetic_shapes import SyntheticShapes
from pc3d.datasets.synthetic_solids import SyntheticSolids
from pc3d.datasets.synthetic_streets import SyntheticStreets
from pc3d.datasets.waymo import Waymo

__all__ = [
    "MOSD",
    "S3DIS",
    "CorruptedModelNet40",
    "FewShot",
    "FolderDataset",
    "KITTIObject",
    "MedPointS",
    "ModelNet40",
    "ModelNetFewShot",
    "NuScenes",
    "OccupancyRooms",
    "ScanNet",
    "ScanObjectNN",
    "SemanticKITTI",
    "ShapeNet55",
    "ShapeNetOccupancy",
    "ShapeNetPart",
    "SyntheticRooms",
    "SyntheticShapes",
    "SyntheticSolids",
    "SyntheticStreets",
    "Waymo",
]
