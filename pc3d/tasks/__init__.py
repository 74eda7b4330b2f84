"""Tasks: what a backbone is trained for, its optimizer, checkpoints and predictions."""

from pc3d.tasks.base import PointTask
from pc3d.tasks.checkpoint import (
    MismatchError,
    card_mismatch_table,
    check_card,
    init_weights,
    load_task,
    read_checkpoint,
    save_export,
)
from pc3d.tasks.classification import Classification, classify
from pc3d.tasks.completion import Completion, complete
from pc3d.tasks.detection import Detection, detect
from pc3d.tasks.heads import (
    CompletionHead,
    DetectionHead,
    InstanceHead,
    InstanceOutput,
    LinearHead,
    OccupancyHead,
    SegmentationHead,
)
from pc3d.tasks.inference import labels_of, predict_cloud
from pc3d.tasks.instances import InstanceSegmentation
from pc3d.tasks.optim import OptimizerConfig, ParameterGroup, ScheduleConfig
from pc3d.tasks.part_segmentation import PartSegmentation
from pc3d.tasks.pretraining import Pretraining, PretrainingMethod, PretrainingOutput
from pc3d.tasks.reconstruction import Reconstruction, reconstruct
from pc3d.tasks.segmentation import SemanticSegmentation

__all__ = [
    "Classification",
    "Completion",
    "CompletionHead",
    "Detection",
    "DetectionHead",
    "InstanceHead",
    "InstanceOutput",
    "InstanceSegmentation",
    "LinearHead",
    "MismatchError",
    "OccupancyHead",
    "OptimizerConfig",
    "ParameterGroup",
    "PartSegmentation",
    "PointTask",
    "Pretraining",
    "PretrainingMethod",
    "PretrainingOutput",
    "Reconstruction",
    "ScheduleConfig",
    "SegmentationHead",
    "SemanticSegmentation",
    "card_mismatch_table",
    "check_card",
    "classify",
    "complete",
    "detect",
    "init_weights",
    "labels_of",
    "load_task",
    "predict_cloud",
    "read_checkpoint",
    "reconstruct",
    "save_export",
]
