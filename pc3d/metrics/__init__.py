"""Metrics, one protocol per file."""

from pc3d.metrics.classification import ClassificationMetrics, ClassificationScores
from pc3d.metrics.completion import CompletionMetrics, CompletionScores
from pc3d.metrics.few_shot import FewShotScore, few_shot_score
from pc3d.metrics.instances import Instances
from pc3d.metrics.panoptic import PanopticQuality, PanopticScores
from pc3d.metrics.part_errors import PartErrors, PartMisclassification
from pc3d.metrics.reconstruction import ReconstructionMetrics, SurfaceScores, mesh_scores, occupancy_iou, point_scores
from pc3d.metrics.robustness import RobustnessScores
from pc3d.metrics.s3dis_instances import CoverageScores, InstanceCoverage
from pc3d.metrics.scannet_instances import InstanceAveragePrecision, InstanceScores
from pc3d.metrics.segmentation import SegmentationMetrics, SegmentationScores, scores_from_confusion
from pc3d.metrics.shape_parts import ShapePartIoU, ShapePartScores

__all__ = [
    "ClassificationMetrics",
    "ClassificationScores",
    "CompletionMetrics",
    "CompletionScores",
    "CoverageScores",
    "FewShotScore",
    "InstanceAveragePrecision",
    "InstanceCoverage",
    "InstanceScores",
    "Instances",
    "PanopticQuality",
    "PanopticScores",
    "PartErrors",
    "PartMisclassification",
    "ReconstructionMetrics",
    "RobustnessScores",
    "SegmentationMetrics",
    "SegmentationScores",
    "ShapePartIoU",
    "ShapePartScores",
    "SurfaceScores",
    "few_shot_score",
    "mesh_scores",
    "occupancy_iou",
    "point_scores",
    "scores_from_confusion",
]
