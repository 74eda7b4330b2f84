"""Heads that look at whole clouds, and one that looks at nothing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pc3d.ops.segment import segment_max, segment_mean
from pc3d.points import Points
from pc3d.tasks.heads import SegmentationHead


class GlobalContextHead(SegmentationHead):
    """Each point beside the largest and mean features of its cloud, one hidden layer, then the classes.

    Args:
        in_channels: width of the features.
        num_classes: K.
        dropout: rate before the last layer.
    """

    def __init__(self, in_channels: int, num_classes: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.in_channels, self.num_classes = in_channels, num_classes
        width = 3 * in_channels
        self.hidden = nn.Sequential(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU())
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, features: Tensor, points: Points) -> Tensor:
        cloud = torch.repeat_interleave(points.offsets.diff(), output_size=len(features))
        whole = torch.cat([pool(features, points.offsets) for pool in (segment_max, segment_mean)], -1)
        return self.linear(self.dropout(self.hidden(torch.cat([features, whole[cloud]], -1))))


class MLPHead(SegmentationHead):
    """Hidden layers with batch norm and dropout, then the classes; for features of points or of whole clouds.

    ``bias`` gives the hidden layers one before their batch norm, as some published heads have it; others have no
    ``batch_norm``, or let negative values ``leak`` by this factor.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        widths: Sequence[int] = (512, 256),
        dropout: float = 0.5,
        bias: bool = False,
        batch_norm: bool = True,
        leak: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_channels, self.num_classes = in_channels, num_classes
        sizes = [in_channels, *widths]
        self.hidden = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Linear(a, b, bias),
                    *([nn.BatchNorm1d(b)] if batch_norm else []),
                    nn.LeakyReLU(leak) if leak else nn.ReLU(),
                    nn.Dropout(dropout),
                )
                for a, b in itertools.pairwise(sizes)
            )
        )
        self.linear = nn.Linear(sizes[-1], num_classes)

    def forward(self, features: Tensor, points: Points) -> Tensor:
        return self.linear(self.hidden(features))


class KeepLogits(SegmentationHead):
    """The last ``num_classes`` features are the logits already; see :class:`~pc3d.models.StoredLogits`."""

    num_classes: int

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, features: Tensor, points: Points) -> Tensor:
        return features[:, -self.num_classes :]
