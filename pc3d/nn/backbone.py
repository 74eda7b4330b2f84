"""The contract between a backbone and everything that is built on it."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from pc3d.config import Configurable
from pc3d.errors import InputError
from pc3d.ops.segment import segment_max
from pc3d.points import Points
from pc3d.voxels import Voxels


@dataclass(frozen=True)
class FeatureInfo:
    """One stage of a backbone: its name in ``forward_features``, width in channels and stride in input voxels."""

    name: str
    channels: int
    stride: int


class PointNetwork(nn.Module, Configurable, abc.ABC):
    """A network that takes points: what features of points and maps from above have in common.

    Attributes:
        in_channels: width of ``points.attrs["feat"]``.
        out_channels: width of what ``forward`` returns.
    """

    in_channels: int
    out_channels: int
    kept_in_eval: Sequence[nn.Module] = ()
    """Modules that stay in eval mode, whatever mode the rest is in: see :func:`pc3d.peft.attach`."""
    task_layers: Sequence[str] = ()
    """Names of submodules that no pre-training brings, a decoder for one: they train beside an adapter."""

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.kept_in_eval:
            module.eval()
        return self

    @abc.abstractmethod
    def forward(self, points: Points) -> Tensor: ...

    def check_input(self, points: Points) -> None:
        """Check the width of the input features.

        Raises:
            InputError: names the cloud, the width found and the width expected.
        """
        feat = points.get("feat")
        if feat.ndim != 2 or feat.shape[1] != self.in_channels:
            raise InputError(
                f"{points.describe()}: field 'feat' is {tuple(feat.shape)}, {type(self).__name__} takes "
                f"(N, {self.in_channels}); make the pipeline's features and the backbone's in_channels agree"
            )


class Backbone(PointNetwork):
    """A network from points to features of points, or of whole clouds.

    Attributes:
        feature_info: the stages of ``forward_features``, in order of execution.
    """

    feature_info: list[FeatureInfo]

    @abc.abstractmethod
    def forward(self, points: Points) -> Tensor:
        """Features ``(N, out_channels)``, one row per point in input order.

        A backbone that was asked for features of whole clouds returns ``(B, out_channels)``, one row per cloud.

        Raises:
            InputError: if ``points.attrs["feat"]`` is missing or not ``(N, in_channels)``.
        """

    @abc.abstractmethod
    def forward_features(self, points: Points) -> Mapping[str, Points | Voxels]:
        """What every stage gives, by the names of ``feature_info``; errors as :meth:`forward`."""

    def latent(self, points: Points) -> tuple[Tensor, Tensor | None]:
        """``(B, out_channels)`` features of whole clouds, and a condition ``(B, D)`` for decoders that want one.

        Features of points are reduced to the largest of each cloud.
        """
        features = self(points)
        return (features if len(features) == len(points) else segment_max(features, points.offsets)), None
