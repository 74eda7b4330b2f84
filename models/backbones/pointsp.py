"""PointSP: any backbone of points behind a sampling protocol for corrupted clouds.

Li et al. 2024, "PointSP" (arXiv 2408.12062). The cloud is resampled, the backbone sees all of it, and only the features
of its key points enter the maximum that stands for the cloud, as published for PointNet, DGCNN, GDANet and RPC. There
are no parameters.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pc3d.errors import InputError
from pc3d.nn import Backbone
from pc3d.nn.robust_sampling import FullPointResampler, KeyPoints, KeyPointSampler, resampled
from pc3d.ops.segment import segment_max
from pc3d.points import Points
from pc3d.voxels import Voxels


class PointSP(Backbone):
    """Features of whole clouds, ``(B, out_channels)``, from the key points of a backbone.

    Args:
        in_channels: width of ``points.attrs["feat"]``, whose first three columns are the coordinates.
        backbone: with one row per point, from coordinates alone (no ``grid_coord``), of as many ``in_channels``.
        key_points: points that enter the maximum: 512, 768 for DGCNN.
        training_rule, inference_rule, random_start, ignore_origin: see
            :class:`~pc3d.nn.robust_sampling.KeyPointSampler`.
        resample: vary the number of points in training.
        least_points, cut: of a cloud in inference, see :class:`~pc3d.nn.robust_sampling.FullPointResampler`.

    With ``training_rule`` and ``inference_rule`` "farthest", ``resample=False`` and ``least_points=0`` this is the
    baseline without the protocol.
    """

    def __init__(
        self,
        in_channels: int,
        backbone: Backbone,
        key_points: int = 512,
        training_rule: KeyPoints = "weighted",
        inference_rule: KeyPoints = "filtered",
        random_start: bool = False,
        ignore_origin: bool = False,
        resample: bool = True,
        least_points: int = 1024,
        cut: bool = False,
    ) -> None:
        super().__init__()
        if in_channels < 3 or backbone.in_channels != in_channels:
            raise InputError(
                f"PointSP.in_channels: {in_channels}, its backbone has {backbone.in_channels}; they must agree, the "
                "first three are the coordinates"
            )
        self.backbone = backbone
        self.sampler = KeyPointSampler(
            key_points,
            training_rule,
            inference_rule,
            random_start=random_start,
            ignore_origin=ignore_origin,
        )
        self.resampler = FullPointResampler(least_points, cut, resample)
        self.in_channels, self.out_channels = in_channels, backbone.out_channels
        self.feature_info = backbone.feature_info

    def forward(self, points: Points) -> Tensor:
        """``(B, out_channels)``, the largest value of each feature among the key points; an empty cloud gives zeros.

        Raises:
            InputError: if the backbone gives one row per cloud, or the points come in cells.
        """
        points = self._resampled(points)
        features = self.backbone(points)
        if len(features) != points.num_points:
            raise InputError(
                f"PointSP: {type(self.backbone).__name__} gives {len(features)} rows for {points.num_points} points; "
                "it must give one per point (a decoder, for instance)"
            )
        rows, borders = self.sampler(points.coord, points.offsets)
        return segment_max(features[rows], borders)

    def forward_features(self, points: Points) -> Mapping[str, Points | Voxels]:
        """What the stages of the backbone give for the resampled clouds."""
        return self.backbone.forward_features(self._resampled(points))

    def _resampled(self, points: Points) -> Points:
        self.check_input(points)
        return resampled(points, self.resampler)
