"""Predictions that another network left behind, as a backbone."""

from __future__ import annotations

import torch
from torch import Tensor

from pc3d.errors import InputError
from pc3d.nn import Backbone, FeatureInfo
from pc3d.points import Points


class StoredLogits(Backbone):
    """``feat`` beside class logits stored with the points, so that an instance head can fuse any network's predictions.

    Use it with :class:`~pc3d.models.heads.KeepLogits`. Has no parameters.

    Args:
        in_channels: width of ``points.attrs["feat"]``.
        num_classes: K.
        attribute: name of the logits ``(N, K)`` in the files (e.g. a key of an ``.npz``).
        probabilities: the attribute holds probabilities; their log is used.
    """

    def __init__(
        self, in_channels: int, num_classes: int, attribute: str = "logits", probabilities: bool = False
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, in_channels + num_classes
        self.num_classes, self.attribute, self.probabilities = num_classes, attribute, probabilities
        self.feature_info = [FeatureInfo("stored", self.out_channels, 1)]

    def forward(self, points: Points) -> Tensor:
        """``(N, in_channels + K)``.

        Raises:
            InputError: if the attribute is missing or has another width.
        """
        self.check_input(points)
        logits = points.get(self.attribute).float()
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise InputError(
                f"{points.describe()}: field '{self.attribute}' is {tuple(logits.shape)}, "
                f"not (N, {self.num_classes}) for {self.num_classes} classes"
            )
        logits = logits.clamp(min=1e-6).log() if self.probabilities else logits
        return torch.cat([points.get("feat"), logits], 1)

    def forward_features(self, points: Points) -> dict[str, Points]:
        return {"stored": points.with_attrs(feat=self.forward(points))}
