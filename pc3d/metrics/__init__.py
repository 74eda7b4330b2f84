"""Metrics, one protocol per file."""

from pc3d.metrics.instances import Instances
from pc3d.metrics.part_errors import PartErrors, PartMisclassification
from pc3d.metrics.s3dis_instances import CoverageScores, InstanceCoverage
from pc3d.metrics.scannet_instances import InstanceAveragePrecision, InstanceScores
from pc3d.metrics.segmentation import SegmentationMetrics, SegmentationScores, scores_from_confusion

__all__ = [
    "CoverageScores",
    "InstanceAveragePrecision",
    "InstanceCoverage",
    "InstanceScores",
    "Instances",
    "PartErrors",
    "PartMisclassification",
    "SegmentationMetrics",
    "SegmentationScores",
    "scores_from_confusion",
]
