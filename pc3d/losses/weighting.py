"""Class weights from how often the classes occur."""

# No postponed annotations here: jsonargparse takes the types of a dataclass's __init__ as they stand.
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from pc3d.config import Configurable
from pc3d.errors import InputError

Scheme = Literal["inverse", "inverse_sqrt", "inverse_cbrt", "effective"]
_POWERS = {"inverse": 1.0, "inverse_sqrt": 0.5, "inverse_cbrt": 1 / 3}
Unit = Literal["points", "clouds"]


@dataclass(frozen=True)
class ClassWeighting(Configurable):
    """How the weight of a class follows from its number ``n``; mean 1 over the classes that occur, 0 for the others.

    Attributes:
        scheme: ``inverse`` = 1 / n; ``inverse_sqrt`` = 1 / sqrt(n); ``inverse_cbrt`` = n ** (-1/3); ``effective`` =
            (1 - beta) / (1 - beta ** n), Cui et al., "Class-balanced loss based on effective number of samples", CVPR
            2019, eq. 2.
        beta: of ``effective``, 0 (all alike) to below 1 (inverse). Counts far above 1 / (1 - beta) are all alike:
            with millions of points take a beta that near 1, or count clouds.
        unit: what n counts: labelled ``points``, or ``clouds`` with at least one of them.
    """

    scheme: Scheme
    beta: float = 0.9999
    unit: Unit = "points"

    def __post_init__(self) -> None:
        if self.scheme not in get_args(Scheme) or self.unit not in get_args(Unit) or not 0 <= self.beta < 1:
            raise InputError(
                f"class weights: scheme '{self.scheme}' is one of {', '.join(get_args(Scheme))}, unit '{self.unit}' of "
                f"{', '.join(get_args(Unit))}, beta {self.beta} in 0 .. below 1"
            )

    def weights(self, counts: Tensor) -> Tensor:
        """``(K,)`` float32 weights of classes that occur ``counts`` ``(K,)`` times."""
        number = counts.double()
        if self.scheme == "effective":
            weight = (1 - self.beta) / -torch.expm1(number * torch.tensor(self.beta, dtype=torch.float64).log())
        else:
            weight = number ** -_POWERS[self.scheme]
        present = number > 0
        return torch.where(present, weight / weight[present].mean(), 0.0).float()
