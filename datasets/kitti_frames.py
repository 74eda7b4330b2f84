"""What data sets of KITTI's form share: labels of whole frames, and result files."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

from pc3d.data.boxes import kitti_results
from pc3d.data.dataset import PointDataset, Split
from pc3d.data.prediction import Prediction
from pc3d.io.kitti_object import KittiFrame, KittiObjects, write_objects
from pc3d.points import Points

CLASSES = ("Car", "Pedestrian", "Cyclist")


class KittiFrames(PointDataset):
    """Frames with boxes, calibration and image size in ``meta["kitti"]``."""

    @abstractmethod
    def labels(self, split: Split, index: int) -> KittiObjects | None:
        """The labels of a frame; None for frames of a test set."""

    def save_prediction(self, folder: Path, cloud: Points, prediction: Prediction) -> Path:
        """Boxes as a result file of the benchmark, ``<frame>.txt``; classes of points as any data set does."""
        if prediction.boxes is None:
            return super().save_prediction(folder, cloud, prediction)
        objects = kitti_results(prediction.boxes, KittiFrame.of(cloud.meta[0]), self.class_names)
        return write_objects(folder / f"{cloud.meta[0]['name']}.txt", objects)
