"""State-space blocks of the hierarchical point network for medical clouds (arXiv 2504.13015), over packed sequences.

Tokens are ``(T, C)`` rows with ``offsets (S + 1,)``. A *vanilla* block scans a sequence as it comes, a *group* block
scans it along K orders at once and adds the results.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pc3d.nn.mamba import Mamba, Mamba2, inverse_softplus, log_uniform
from pc3d.ops.scan import causal_conv1d, selective_scan, ssd
from pc3d.ops.segment import segment_mean


def sequence_of_row(offsets: Tensor, rows: int) -> Tensor:
    """``(T,)`` the sequence each row belongs to."""
    return torch.repeat_interleave(offsets.diff(), output_size=rows)


class SequenceGroupNorm(nn.GroupNorm):
    """Group norm over the tokens of a sequence and the channels of a group."""

    def forward(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        if offsets is None:  # every row is a sequence of its own
            return super().forward(x)
        groups = x.unflatten(-1, (self.num_groups, -1))
        row = sequence_of_row(offsets, len(x))
        centred = groups - segment_mean(groups.mean(-1), offsets)[row][..., None]
        variance = segment_mean(centred.square().mean(-1), offsets)
        normed = (centred * (variance + self.eps).rsqrt()[row][..., None]).flatten(-2)
        return normed * self.weight + self.bias


class ConditionInjection(nn.Module):
    """``x (1 + W_g c + b_g) + W_b c`` with one condition ``c`` per sequence."""

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        self.gate = nn.Linear(condition, channels)
        self.bias = nn.Linear(condition, channels, bias=False)

    def forward(self, x: Tensor, condition: Tensor, offsets: Tensor | None) -> Tensor:
        gate, bias = self.gate(condition), self.bias(condition)
        if offsets is not None:
            row = sequence_of_row(offsets, len(x))
            gate, bias = gate[row], bias[row]
        return x * (1 + gate) + bias


class DenseBlock(nn.Module):
    """Linear, group norm, LeakyReLU, and the condition if there is one; on tokens or on one row per sequence."""

    def __init__(self, in_channels: int, channels: int, groups: int = 8, condition: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, channels)
        self.norm = SequenceGroupNorm(groups, channels)
        self.inject = ConditionInjection(channels, condition) if condition else None

    def forward(self, x: Tensor, offsets: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        x = F.leaky_relu(self.norm(self.linear(x), offsets))
        return x if self.inject is None or condition is None else self.inject(x, condition, offsets)


class ChannelAttention(nn.Module):
    """ECA: a convolution over the channels of the mean token gates them."""

    def __init__(self, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        gate = self.conv(segment_mean(x, offsets)[:, None])[:, 0].sigmoid()
        return x * gate[sequence_of_row(offsets, len(x))]


class GroupScan(nn.Module):
    """Selective scans along K orders, each with coefficients of its own, added up; gate and convolution use LeakyReLU.

    The convolution runs over the tokens in the order they have, before any scan reorders them.

    Args:
        width: of the tokens, C.
        scans: orders K.
        state: N.
        head: channels of a head if the scans are those of Mamba-2 (one rate per head, learned initial states);
            None: of Mamba-1.
    """

    def __init__(self, width: int, scans: int, state: int, head: int | None = None, expand: int = 2) -> None:
        super().__init__()
        channels = expand * width
        self.scans, self.state, self.head, self.channels = scans, state, head, channels
        self.rank = math.ceil(width / 16) if head is None else channels // head
        self.in_proj = nn.Linear(width, 2 * channels, bias=False)
        self.conv = nn.Conv1d(channels, channels, 4, groups=channels)
        bound = channels**-0.5
        self.x_proj_weight = nn.Parameter(torch.empty(scans, self.rank + 2 * state, channels).uniform_(-bound, bound))
        if head is None:
            bound = self.rank**-0.5
            self.dt_projs_weight = nn.Parameter(torch.empty(scans, channels, self.rank).uniform_(-bound, bound))
            steps = inverse_softplus(log_uniform(scans * channels, (1e-3, 0.1), 1e-4))
            self.dt_projs_bias = nn.Parameter(steps.view(scans, channels))
            self.A_logs = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(scans * channels, 1))
            self.Ds = nn.Parameter(torch.ones(scans * channels))
        else:
            heads = scans * self.rank
            self.A_logs = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
            self.Ds = nn.Parameter(torch.ones(heads))
            self.dt_bias = nn.Parameter(inverse_softplus(log_uniform(heads, (1e-3, 0.1), 1e-4)))
            self.init_states = nn.Parameter(torch.zeros(heads, head, state))
        self.out_proj = nn.Linear(channels, width, bias=False)

    def forward(self, tokens: Tensor, offsets: Tensor, orders: Sequence[Tensor]) -> Tensor:
        """``orders``: K times ``(T,)`` int64, the rows of each scan, sequence after sequence."""
        if len(orders) != self.scans:
            raise ValueError(f"{len(orders)} orders for {self.scans} scans")
        x, z = self.in_proj(tokens).chunk(2, -1)
        x = F.leaky_relu(causal_conv1d(x, self.conv.weight[:, 0], self.conv.bias, offsets))
        rows = torch.stack(list(orders), 1)
        x = x[rows]  # (T, K, D)
        y = self._mamba(x, offsets) if self.head is None else self._mamba2(x, offsets)
        out = torch.zeros_like(z).index_add(0, rows.flatten(), y.reshape(-1, self.channels))
        return self.out_proj(out * F.leaky_relu(z))

    def _mamba(self, x: Tensor, offsets: Tensor) -> Tensor:
        low, b, c = torch.einsum("tkd,krd->tkr", x, self.x_proj_weight).split([self.rank, self.state, self.state], -1)
        step = torch.einsum("tkr,kdr->tkd", low, self.dt_projs_weight)
        y, _ = selective_scan(
            x.flatten(1),
            step.flatten(1),
            -self.A_logs.exp(),
            b,
            c,
            offsets,
            self.Ds,
            delta_bias=self.dt_projs_bias.flatten(),
            delta_softplus=True,
        )
        return y

    def _mamba2(self, x: Tensor, offsets: Tensor) -> Tensor:
        b, c, dt = torch.einsum("tkd,krd->tkr", x, self.x_proj_weight).split([self.state, self.state, self.rank], -1)
        assert self.head is not None
        y, _ = ssd(
            x.reshape(len(x), -1, self.head),
            dt.reshape(len(x), -1),
            -self.A_logs.exp(),
            b,
            c,
            offsets,
            self.Ds,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            initial_state=self.init_states.expand(len(offsets) - 1, -1, -1, -1),
        )
        return y


class PointSSMBlock(nn.Module):
    """A mixer with its norm, residual and change of width.

    Without ``ffn``: ``act(norm(Lin(x + mixer(x))))``. With it: ``x = x + mixer(norm(x))``, then
    ``Lin(x) + MLP(norm(x))``, every layer of the MLP activated. ``Lin`` only where the width changes.

    Args:
        in_channels, channels: widths.
        mixer: ``(tokens, offsets, *orders) -> tokens``, of the input width.
        groups: of the group norms.
        ffn: hidden widths of the MLP as multiples of the input width; None for the block without one.
        condition: width of a condition per sequence, injected at the end, or before the MLP.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        mixer: nn.Module,
        groups: int = 8,
        ffn: Sequence[float] | None = None,
        condition: int = 0,
    ) -> None:
        super().__init__()
        self.mixer = mixer
        self.dense = nn.Identity() if in_channels == channels else nn.Linear(in_channels, channels)
        self.inject = ConditionInjection(channels if ffn is None else in_channels, condition) if condition else None
        self.mlp: nn.Sequential | None = None
        if ffn is None:
            self.norm = SequenceGroupNorm(groups, channels)
            return
        self.norm1, self.norm2 = (SequenceGroupNorm(groups, in_channels) for _ in range(2))
        widths = [in_channels, *(int(ratio * in_channels) for ratio in ffn), channels]
        layers = (nn.Sequential(nn.Linear(a, b), nn.LeakyReLU()) for a, b in itertools.pairwise(widths))
        self.mlp = nn.Sequential(*layers)

    def forward(self, x: Tensor, offsets: Tensor, *orders: Sequence[Tensor], condition: Tensor | None = None) -> Tensor:
        if self.mlp is None:
            x = self.dense(x + self.mixer(x, offsets, *orders))
            return self._injected(F.leaky_relu(self.norm(x, offsets)), offsets, condition)
        x = x + self.mixer(self.norm1(x, offsets), offsets, *orders)
        x = self._injected(x, offsets, condition)
        return self.dense(x) + self.mlp(self.norm2(x, offsets))

    def _injected(self, x: Tensor, offsets: Tensor, condition: Tensor | None) -> Tensor:
        return x if self.inject is None or condition is None else self.inject(x, condition, offsets)


def vanilla_mixer(width: int, state: int = 64, head: int | None = None) -> nn.Module:
    """Mamba-1, or Mamba-2 with heads of ``head`` channels."""
    return Mamba(width, state) if head is None else Mamba2(width, state, head)
