"""LoRA: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022 (arXiv 2106.09685)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from torch import nn

from pc3d.errors import InputError
from pc3d.nn.backbone import Backbone
from pc3d.peft.adaptation import Adaptation, check_patterns, places
from pc3d.peft.weights import LowRank, adapt_weight
from pc3d.sparse import SparseConvolution


class LoRA(Adaptation):
    """``W + alpha / rank * B A`` with ``B = 0`` at the start: the frozen model exactly.

    Works on linear layers, convolutions and sparse convolutions (there ``A_k B_k`` for each kernel offset ``k``).

    Args:
        rank: r of the two matrices.
        alpha: numerator of the factor; None: the rank, a factor of 1.
        targets: regular expressions on names of layers; None: every layer inside the backbone's blocks.
        ranks: other ranks by regular expression, the first that matches holds.
        rank_stabilized: ``alpha / sqrt(rank)`` instead (arXiv 2312.03732).
    """

    mergeable = True

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        targets: Sequence[str] | None = None,
        ranks: Mapping[str, int] | None = None,
        rank_stabilized: bool = False,
    ) -> None:
        for value in (rank, *(ranks or {}).values()):
            if value < 1:
                raise InputError(f"LoRA.rank: {value} must be at least 1")
        check_patterns("LoRA.ranks", ranks or {})
        if alpha is not None and alpha <= 0:
            raise InputError(f"LoRA.alpha: {alpha} must be positive")
        self.rank, self.alpha, self.targets = rank, alpha, targets
        self.ranks, self.rank_stabilized = dict(ranks or {}), rank_stabilized

    def insert(self, backbone: Backbone, name: str) -> None:
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, SparseConvolution)
        found = places(backbone, kinds, self.targets, "LoRA")
        for pattern in self.ranks:
            if not any(re.search(pattern, place) for place, _ in found):
                raise InputError(f"LoRA.ranks: '{pattern}' matches none of the {len(found)} layers that LoRA adapts")
        for place, layer in found:
            rank = next((r for pattern, r in self.ranks.items() if re.search(pattern, place)), self.rank)
            alpha = rank if self.alpha is None else self.alpha
            factor = alpha / (math.sqrt(rank) if self.rank_stabilized else rank)
            adapt_weight(layer, "weight", LowRank(name, layer, rank, factor))
