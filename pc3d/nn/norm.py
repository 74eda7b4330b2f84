"""Normalisation of packed point features, also with one set of parameters per dataset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.points import Points
from pc3d.sparse.sequence import VoxelBatchNorm


class PointBatchNorm(VoxelBatchNorm):
    """The same batch normalisation over points, in float32 under autocast."""

    rows = "points"

    def forward(self, feat: Tensor) -> Tensor:
        return super().forward(feat.to(self.weight.dtype))


class PointLayerNorm(nn.LayerNorm):
    """Layer normalisation whose result has the dtype of its parameters: residual sums stay exact under autocast."""

    def forward(self, feat: Tensor) -> Tensor:
        return super().forward(feat.to(self.weight.dtype))


@dataclass(frozen=True, eq=False)
class Condition:
    """Which dataset a batch comes from.

    Attributes:
        index: place of the dataset among those of the network.
        context: ``(1, D)`` learned vector of the dataset, for networks that modulate with it.
    """

    index: int
    context: Tensor | None = None


class ConditionalNorm(nn.Module):
    """One norm per dataset: prompt-driven normalisation of Wu et al. 2024, "PPT" (arXiv 2308.09718).

    ``norm_i(x)``, and where there is a context ``c``, ``norm_i(x) * (1 + scale(c)) + shift(c)`` with one linear layer
    after a SiLU for both.

    Args:
        norm: makes the norm of one dataset.
        channels: width.
        conditions: number of datasets.
        context_channels: width D of the context; None: no modulation.
    """

    def __init__(
        self,
        norm: Callable[[int], nn.Module],
        channels: int,
        conditions: int,
        context_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.norm = nn.ModuleList(norm(channels) for _ in range(conditions))
        self.modulation = None
        if context_channels is not None:
            self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(context_channels, 2 * channels))

    def forward(self, feat: Tensor, condition: Condition) -> Tensor:
        feat = self.norm[condition.index](feat)
        if self.modulation is None:
            return feat
        assert condition.context is not None
        shift, scale = self.modulation(condition.context).chunk(2, dim=1)
        return feat * (1 + scale) + shift


class ConditionalSequential(nn.Sequential):
    """Layers on ``(N, C)`` rows, one after the other; a :class:`ConditionalNorm` among them gets the condition."""

    def forward(self, feat: Tensor, condition: Condition | None = None) -> Tensor:
        for layer in self:
            feat = apply_layer(layer, feat, condition)
        return feat


def apply_layer(layer: nn.Module, feat: Tensor, condition: Condition | None) -> Tensor:
    """A layer on ``(N, C)`` rows; a :class:`ConditionalNorm` gets the condition."""
    return layer(feat, condition) if isinstance(layer, ConditionalNorm) else layer(feat)


def check_default(default: str | None, names: Sequence[str]) -> None:
    """Raises InputError if the dataset of clouds that name none is not among those of the network."""
    if default is not None and default not in names:
        raise InputError(f"condition {default!r} of clouds that name none is not one of {', '.join(names) or 'none'}")


def condition_of(
    points: Points, names: Sequence[str], default: str | None = None, table: nn.Embedding | None = None
) -> Condition:
    """The dataset of a batch: ``meta["condition"]`` of its clouds.

    Args:
        points: the batch.
        names: datasets of the network.
        default: dataset of clouds that name none.
        table: context of each dataset.

    Raises:
        InputError: if a cloud does not say, names another dataset, or the clouds of the batch differ.
    """
    found = {str(meta.get("condition", default)) for meta in points.meta}
    if len(found) != 1 or not found <= set(names):
        raise InputError(
            f"{points.describe()}: meta 'condition' is {', '.join(sorted(found)) or 'missing'}; this network needs one "
            f"of {', '.join(names)}, the same for all clouds of a batch"
        )
    index = list(names).index(found.pop())
    return Condition(index, None if table is None else table.weight[index : index + 1])
