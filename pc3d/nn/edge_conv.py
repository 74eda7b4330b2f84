"""Edge convolution on given graphs (Wang et al. 2019, "Dynamic Graph CNN", arXiv 1801.07829)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class EdgeConv(nn.Module):
    """Largest of ``LeakyReLU(GroupNorm(W [g_j - f_i, f_i]))`` over the neighbours j of each token i."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * in_channels, channels, bias=False)
        self.norm = nn.GroupNorm(4, channels)

    def forward(self, feat: Tensor, graph: Tensor, source: Tensor | None = None) -> Tensor:
        """``(B, G, channels)``.

        Args:
            feat: ``(B, G, in_channels)`` f.
            graph: ``(B, G, k)`` int64 neighbours, rows of their cloud.
            source: ``(B, H, in_channels)`` g, which the rows are of; None: f itself.
        """
        # The layer in two parts: each is computed once per node, not once per edge.
        near, own = self.linear.weight.chunk(2, 1)
        there, here = F.linear(feat if source is None else source, near), F.linear(feat, own - near)
        batch = torch.arange(len(feat), device=feat.device)[:, None, None]
        edges = there[batch, graph] + here[:, :, None]
        return F.leaky_relu(self.norm(edges.permute(0, 3, 1, 2)), 0.2).amax(-1).transpose(1, 2)
