"""Metrics, one task per file."""

from pc3d.metrics.segmentation import SegmentationMetrics, SegmentationScores, scores_from_confusion

__all__ = ["SegmentationMetrics", "SegmentationScores", "scores_from_confusion"]
