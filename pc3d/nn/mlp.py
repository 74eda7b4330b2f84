"""The channel-mixing half of a transformer block, and what is put on its residual branches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.nn.adaptable import Adaptable


class MLP(Adaptable, nn.Module):
    """``W2 GELU(W1 x + b1) + b2`` on ``(N, C)`` rows."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.make_adaptable(channels)
        self.fc1 = nn.Linear(channels, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, channels)

    def run(self, feat: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(feat)))


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al. 2021, "CaiT", arXiv 2103.17239)."""

    def __init__(self, channels: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), init))

    def forward(self, feat: Tensor) -> Tensor:
        return feat * self.gamma


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, arXiv 1603.09382), drawn for every row of ``(N, C)``.

    In training a row is zeroed with probability ``p``, and divided by ``1 - p`` otherwise. In a packed batch a row is
    a point, as in the published point transformers.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise InputError(f"drop_path: {p:g} is no probability")
        self.p = p

    def forward(self, feat: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return feat
        keep = 1 - self.p
        mask = feat.new_empty(len(feat), *[1] * (feat.ndim - 1)).bernoulli_(keep)
        return feat * (mask / keep if keep else mask)

    def extra_repr(self) -> str:
        return f"p={self.p:.3g}"
