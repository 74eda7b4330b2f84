"""Normalisation of packed point features, also with one set of parameters per dataset."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.points import Points


class PointBatchNorm(nn.BatchNorm1d):
    """Batch normalisation over points, with the constants of the Pointcept models; in float32 under autocast.

    Raises:
        InputError: in training mode with fewer than two points, which have no variance.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3, momentum=0.01)

    def forward(self, feat: Tensor) -> Tensor:
        if self.training and len(feat) < 2:
            raise InputError(
                f"batch normalisation cannot train on a batch with {len(feat)} points in a stage, it needs two; "
                "use larger crops, a larger batch or a smaller grid size"
            )
        return super().forward(feat.to(self.weight.dtype))


class PointLayerNorm(nn.LayerNorm):
    """Layer normalisation whose result has the dtype of its parameters: residual sums stay exact under autocast."""

    def forward(self, feat: Tensor) -> Tensor:
        return super().forward(feat.to(self.weight.dtype))


class ConditionalNorm(nn.Module):
    """One norm per dataset ("prompt-driven normalisation", Wu et al. 2024, PPT, arXiv 2308.09718, without modulation).

    Args:
        norm: makes the norm of one dataset.
        channels: width.
        conditions: number of datasets.
    """

    def __init__(self, norm: Callable[[int], nn.Module], channels: int, conditions: int) -> None:
        super().__init__()
        self.norm = nn.ModuleList(norm(channels) for _ in range(conditions))

    def forward(self, feat: Tensor, condition: int) -> Tensor:
        return self.norm[condition](feat)


class ConditionalSequential(nn.Sequential):
    """Layers on ``(N, C)`` rows, one after the other; a :class:`ConditionalNorm` among them gets the condition."""

    def forward(self, feat: Tensor, condition: int | None = None) -> Tensor:
        for layer in self:
            feat = apply_layer(layer, feat, condition)
        return feat


def apply_layer(layer: nn.Module, feat: Tensor, condition: int | None) -> Tensor:
    """A layer on ``(N, C)`` rows; a :class:`ConditionalNorm` gets the condition."""
    return layer(feat, condition) if isinstance(layer, ConditionalNorm) else layer(feat)


def condition_of(points: Points, conditions: Sequence[str]) -> int:
    """Place of the batch's dataset, ``meta["condition"]`` of its clouds, in ``conditions``.

    Raises:
        InputError: if a cloud does not say, names another dataset, or the clouds of the batch differ.
    """
    found = {str(meta.get("condition")) for meta in points.meta}
    if len(found) != 1 or not found <= set(conditions):
        raise InputError(
            f"{points.describe()}: meta 'condition' is {', '.join(sorted(found)) or 'missing'}; this network needs one "
            f"of {', '.join(conditions)}, the same for all clouds of a batch"
        )
    return list(conditions).index(found.pop())
