"""The contract of a segmentation loss."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from pc3d.config import Configurable
from pc3d.errors import InputError
from pc3d.losses.weighting import ClassWeighting


class Loss(nn.Module, Configurable, ABC):
    """``loss_weight`` times a scalar of logits and classes, in float32; 0 with zero gradient if every point is ignored.

    Args:
        loss_weight: factor on the result.
        ignore_index: class value of points that do not count.
    """

    per_cloud = False
    """Whether the loss is defined for one cloud: :meth:`of_clouds` then takes the mean over the clouds of a batch."""

    def __init__(self, loss_weight: float = 1.0, ignore_index: int = -1) -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self.ignore_index = ignore_index

    def of_clouds(self, logits: Tensor, target: Tensor, offsets: Tensor) -> Tensor:
        """Scalar loss of ``(N, K)`` logits of packed clouds with ``(B + 1,)`` borders."""
        if not self.per_cloud:
            return self(logits, target)
        sizes = offsets.diff().tolist()
        return torch.stack([self(*pair) for pair in zip(logits.split(sizes), target.split(sizes), strict=True)]).mean()

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Scalar loss.

        Args:
            logits: ``(N, K)`` floating point.
            target: ``(N,)`` int64, classes ``0 .. K - 1`` or ``ignore_index``.

        Raises:
            ValueError: if the shapes do not fit.
            InputError: if a class is outside ``0 .. K - 1`` (checked on the CPU only: a GPU check would wait for it).
        """
        if logits.ndim != 2 or target.shape != logits.shape[:1]:
            raise ValueError(
                f"logits must be (N, K) and target (N,), got {tuple(logits.shape)} and {tuple(target.shape)}"
            )
        if target.device.type == "cpu":
            self._check_classes(target, logits.shape[1])
        return self.loss_weight * self.compute(logits.float(), target)

    @abstractmethod
    def compute(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss before ``loss_weight``; ``logits`` are float32."""

    def _check_classes(self, target: Tensor, num_classes: int) -> None:
        wrong = target[((target < 0) | (target >= num_classes)) & (target != self.ignore_index)]
        if len(wrong):
            raise InputError(
                f"target holds class {wrong[0].item()} ({len(wrong)} points outside 0..{num_classes - 1}, "
                f"ignore {self.ignore_index}): map the labels or raise the number of classes"
            )


class WeightedLoss(Loss):
    """A loss with a factor per class, given or made of the training clouds' class counts.

    Args:
        loss_weight, ignore_index: see :class:`Loss`.
        weight: one factor per class; or how to make them, which a task does when training starts.
    """

    weight: Tensor | None

    def __init__(
        self, loss_weight: float = 1.0, ignore_index: int = -1, weight: list[float] | ClassWeighting | None = None
    ) -> None:
        super().__init__(loss_weight, ignore_index)
        self.weighting = weight if isinstance(weight, ClassWeighting) else None
        given = torch.tensor(weight, dtype=torch.float32) if isinstance(weight, list) else None
        self.register_buffer("weight", given, persistent=False)

    def class_weights(self, num_classes: int) -> Tensor | None:
        """``(num_classes,)`` factors, None without.

        Raises:
            InputError: if there is another number of them, or none was made yet.
        """
        if self.weight is None and self.weighting is not None:
            raise InputError(f"{type(self).__name__}: the weights of '{self.weighting.scheme}' need training clouds")
        if self.weight is not None and len(self.weight) != num_classes:
            raise InputError(f"{len(self.weight)} class weights for {num_classes} classes")
        return self.weight


class FeatureLoss(nn.Module, Configurable, ABC):
    """``loss_weight`` times a scalar of point features, used while training only.

    A task calls :meth:`build` once, when it knows the backbone and the classes.

    Args:
        loss_weight: factor on the result.
        ignore_index: class value of points that do not count.
    """

    def __init__(self, loss_weight: float = 1.0, ignore_index: int = -1) -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self.ignore_index = ignore_index

    @abstractmethod
    def build(self, in_channels: int, num_classes: int) -> None:
        """Make parameters and buffers for ``(N, in_channels)`` features of ``num_classes`` classes."""

    def forward(self, features: Tensor, target: Tensor, prediction: Tensor) -> Tensor:
        """Scalar loss.

        Args:
            features: ``(N, C)`` floating point.
            target: ``(N,)`` int64, classes or ``ignore_index``.
            prediction: ``(N,)`` int64 classes predicted.
        """
        return self.loss_weight * self.compute(features, target, prediction)

    @abstractmethod
    def compute(self, features: Tensor, target: Tensor, prediction: Tensor) -> Tensor:
        """The loss before ``loss_weight``."""
