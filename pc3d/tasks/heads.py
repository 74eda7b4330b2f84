"""From features to class logits, instances and boxes."""

# No postponed annotations here: jsonargparse takes the types of a dataclass's __init__ as they stand, and would check
# nothing.
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from pc3d.config import Configurable
from pc3d.data.boxes import Boxes
from pc3d.errors import InputError
from pc3d.metrics import Instances
from pc3d.nn.backbone import FeatureInfo
from pc3d.nn.bev import BevGrid
from pc3d.nn.point_grid import GridPyramid
from pc3d.ops.boxes import rotated_nms
from pc3d.points import Points
from pc3d.voxels import Voxels


class SegmentationHead(nn.Module, Configurable, ABC):
    """``head(features, points)``: ``(N, C)`` features of ``points`` to ``(N, K)`` logits.

    Attributes:
        in_channels: C; ``num_classes``: K; a task checks those that are not None.
    """

    in_channels: int | None = None
    num_classes: int | None = None

    @abstractmethod
    def forward(self, features: Tensor, points: Points) -> Tensor: ...


class LinearHead(SegmentationHead):
    """One linear layer."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.in_channels, self.num_classes = in_channels, num_classes
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, features: Tensor, points: Points) -> Tensor:
        return self.linear(features)


class CompletionHead(nn.Module, Configurable, ABC):
    """From features of whole clouds to their points.

    Attributes:
        in_channels: width of the features.
    """

    in_channels: int

    @abstractmethod
    def forward(self, latent: Tensor, condition: Tensor | None = None) -> Tensor:
        """``(B, M, 3)`` points from ``(B, in_channels)``."""


class OccupancyHead(nn.Module, Configurable, ABC):
    """From grids to the occupancy of any point of space.

    Attributes:
        in_channels: widths of the grids, level by level.
    """

    in_channels: list[int]

    @abstractmethod
    def forward(self, pyramid: GridPyramid, query: Tensor, offsets: Tensor) -> Tensor:
        """``(Q,)`` logits of packed points ``(Q, 3)`` with ``(B + 1,)`` borders; positive is inside."""


@dataclass
class InstanceOutput:
    """What an instance head makes of a batch.

    Attributes:
        logits: ``(N, K)`` class logits, those of the semantic head or better ones.
        variants: other ``(N, K)`` logits worth a score of their own, by name.
    """

    logits: Tensor
    variants: dict[str, Tensor] = field(default_factory=dict, kw_only=True)


Output = TypeVar("Output", bound=InstanceOutput)


class InstanceHead(nn.Module, Configurable, ABC, Generic[Output]):
    """From features and class logits to instances. A task calls :meth:`build` once, before anything else."""

    @abstractmethod
    def build(self, in_channels: int, num_classes: int, things: list[bool]) -> None:
        """Make the layers for ``(N, in_channels)`` features; ``things`` are the classes that have instances."""

    @abstractmethod
    def forward(self, features: Tensor, logits: Tensor, points: Points) -> Output: ...

    @abstractmethod
    def losses(self, output: Output, points: Points) -> dict[str, Tensor]:
        """Named, weighted losses against ``segment`` and ``instance`` of the points."""

    @abstractmethod
    def instances(self, output: Output, points: Points) -> list[Instances]:
        """Instances of every cloud of the batch, rows counted from its first point."""

    def baseline(self, output: Output, points: Points) -> list[Instances] | None:
        """Instances without what the head learned, to compare with; None if there is no such thing."""
        return None


@dataclass(frozen=True)
class Suppression(Configurable):
    """Which of many boxes of a cloud are kept.

    Attributes:
        candidates: the best so many are compared.
        overlap: of two boxes of any classes that overlap more, seen from above, the worse goes.
        kept: the best so many of those left stay.
    """

    candidates: int
    overlap: float
    kept: int

    def __post_init__(self) -> None:
        check_counts("suppression", candidates=self.candidates, kept=self.kept)
        if not 0 <= self.overlap <= 1:
            raise InputError(f"suppression.overlap is {self.overlap}: it must lie between 0 and 1")

    def __call__(self, found: Boxes) -> Boxes:
        assert found.scores is not None
        found = found.take(found.scores.sort(descending=True, stable=True).indices[: self.candidates])
        assert found.scores is not None
        return found.take(rotated_nms(found.boxes, found.scores, self.overlap, limit=self.kept))


Predicted = TypeVar("Predicted")


class DetectionHead(nn.Module, Configurable, ABC, Generic[Predicted]):
    """From a map seen from above to boxes. A task calls :meth:`build` once, before anything else."""

    @abstractmethod
    def build(self, in_channels: int, class_names: list[str], grid: BevGrid, stride: int) -> None:
        """Make the layers for ``(B, in_channels, H, W)`` maps of ``stride`` voxels of ``grid`` per cell."""

    @abstractmethod
    def forward(self, features: Tensor) -> Predicted: ...

    @abstractmethod
    def losses(self, output: Predicted, truth: list[Boxes]) -> dict[str, Tensor]:
        """Named, weighted losses against the true boxes of every cloud."""

    @abstractmethod
    def detections(self, output: Predicted) -> list[Boxes]:
        """Boxes of every cloud with scores, overlapping ones removed, best first; float32."""


class ProposalHead(DetectionHead[Predicted]):
    """A :class:`DetectionHead` that gives a second stage something to correct."""

    @abstractmethod
    def proposals(self, output: Predicted, rule: Suppression) -> list[Boxes]:
        """Boxes of every cloud, however unlikely, best first; without gradients."""


class RefinementHead(nn.Module, Configurable, ABC):
    """A second stage: corrects the boxes of a :class:`ProposalHead` by the voxels around them.

    A task calls :meth:`build` once, before anything else.

    Attributes:
        suppression: makes the boxes that are corrected; ``training_suppression``, those it learns from.
    """

    suppression: Suppression
    training_suppression: Suppression

    @abstractmethod
    def build(self, grid: BevGrid, levels: Sequence[FeatureInfo]) -> None:
        """Make the layers for the levels of a backbone; InputError if one is missing."""

    @abstractmethod
    def losses(self, levels: Mapping[str, Voxels], proposals: list[Boxes], truth: list[Boxes]) -> dict[str, Tensor]:
        """Named, weighted losses against the true boxes of every cloud."""

    @abstractmethod
    def detections(self, levels: Mapping[str, Voxels], proposals: list[Boxes]) -> list[Boxes]:
        """The corrected boxes of every cloud with new scores, overlapping ones removed, best first; float32."""


def check_counts(part: str, **counts: int) -> None:
    """Raises InputError for an option of a part of a task, by name, that is below 1."""
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{part}.{name} is {count}: it must be at least 1")


def instance_targets(points: Points, things: Tensor) -> tuple[Tensor, Tensor]:
    """``(N,)`` int64 instance of every point, numbered through the batch, -1 for none; and ``(N, 3)`` its centre.

    Args:
        points: with ``segment`` and ``instance``.
        things: ``(K,)`` bool classes that have instances.
    """
    segment, instance = points.get("segment"), points.get("instance").reshape(-1)
    valid = (instance >= 0) & (segment >= 0) & things.to(segment.device)[segment.clamp(min=0)]
    span = int(instance.max()) + 1 if len(instance) else 1
    names, inverse = (points.batch * span + instance)[valid].unique(return_inverse=True)
    group = torch.full_like(segment, -1)
    group[valid] = inverse
    total = points.coord.new_zeros(len(names), 3).index_add(0, inverse, points.coord[valid])
    center = points.coord.clone()
    center[valid] = (total / torch.bincount(inverse, minlength=len(names))[:, None])[inverse]
    return group, center
