"""``Pipeline``: the one description of how a raw cloud becomes a model's input, in training, evaluation and testing."""

# No postponed annotations here: jsonargparse takes the types of a dataclass's __init__ as they stand, and would check
# nothing.
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from pc3d.config import Configurable
from pc3d.data.transforms import AssembleFeatures, Compose, GridSample, Transform
from pc3d.errors import InputError
from pc3d.points import Points


@dataclass
class Pipeline(Configurable):
    """Raw points to model input.

    Attributes:
        grid_size: edge of a sampling cell in metres; None keeps every point, for objects.
        features: attributes that make up ``feat``, in order.
        prepare: deterministic steps, first in training and evaluation alike.
        augment: random steps, training only.
        crop: training only, after grid sampling.
        select: evaluation only, in the place of ``crop``: for models of a fixed number of points.
        finish: last steps before the features are assembled, in training and evaluation; they keep every point.
        vote_grid_size: edge in metres, voting only: the prepared cloud is first reduced to the first point of each such
            cell, whose votes all points of the cell get. Published outdoors, with 0.025.

    Raises:
        InputError: if ``vote_grid_size`` is not between 0 and ``grid_size``.
    """

    grid_size: float | None
    features: list[str]
    prepare: list[Transform] = field(default_factory=list)
    augment: list[Transform] = field(default_factory=list)
    crop: list[Transform] = field(default_factory=list)
    select: list[Transform] = field(default_factory=list)
    finish: list[Transform] = field(default_factory=list)
    vote_grid_size: float | None = None

    def __post_init__(self) -> None:
        if self.vote_grid_size is not None and not 0 < self.vote_grid_size < (self.grid_size or 0):
            raise InputError(
                f"pipeline.vote_grid_size {self.vote_grid_size} must lie between 0 and grid_size {self.grid_size}"
            )

    @property
    def in_channels(self) -> int:
        """Width of ``feat``."""
        return AssembleFeatures(self.features).channels

    def train(self, points: Points, generator: torch.Generator | None = None) -> Points:
        """A training sample: prepare, augment, one random point per cell, crop, finish, features."""
        sample = [] if self.grid_size is None else [GridSample(self.grid_size, pick="random")]
        return Compose([*self.prepare, *self.augment, *sample, *self.crop, *self._last()])(points, generator)

    def evaluate(
        self, points: Points, augmentation: Sequence[Transform] = (), generator: torch.Generator | None = None
    ) -> Points:
        """The first point of each cell; ``source`` is the prepared cloud with its labels and inverse map.

        Raises:
            InputError: if a step of ``finish`` removes or reorders points.
        """
        sampled = Compose([*self.prepare, *augmentation])(points, generator)
        if self.grid_size is not None:
            sampled = GridSample(self.grid_size, pick="first", inverse=True)(sampled, generator)
        selected = Compose(self.select)(sampled, generator)
        if selected.source is None:  # what is left stands for itself
            selected = selected.replace(source=_its_own_source(selected))
        finished = Compose(self._last())(selected, generator)
        if finished.source is None:
            raise InputError("pipeline.finish removes or reorders points: move that transform to 'prepare' or 'crop'")
        return finished

    def fragments(
        self, points: Points, augmentation: Sequence[Transform] = (), generator: torch.Generator | None = None
    ) -> Iterator[Points]:
        """Model inputs that together hold every point of a cloud made by :meth:`prepare_vote`, one at a time.

        See :meth:`pc3d.data.transforms.GridSample.fragments`.

        Raises:
            InputError: without a ``grid_size``.
        """
        if self.grid_size is None:
            raise InputError("pipeline.grid_size is null: a cloud of an object is not cut into fragments")
        augmented = Compose(augmentation)(points, generator)
        last = Compose(self._last())
        for fragment in GridSample(self.grid_size).fragments(augmented):
            yield last(fragment, generator)

    def prepare_vote(self, points: Points) -> Points:
        """The points of one raw cloud that vote; where a grid reduced them, ``source`` is the cloud before it.

        ``attrs["index"]`` is the row of each point in ``points``.
        """
        rows = torch.arange(points.num_points, device=points.device)
        sample = [] if self.vote_grid_size is None else [GridSample(self.vote_grid_size, pick="first", inverse=True)]
        return Compose([*self.prepare, *sample])(points.with_attrs(index=rows))

    def _last(self) -> list[Transform]:
        return [*self.finish, AssembleFeatures(self.features)]


def _its_own_source(points: Points) -> Points:
    rows = torch.arange(points.num_points, device=points.device) - points.offsets[:-1][points.batch]
    return points.with_attrs(inverse=rows)
