"""Mamba mixers over packed clouds: Mamba-1, its bidirectional form, and Mamba-2.

Tokens are ``(T, width)`` rows of all clouds behind each other, with ``offsets (S + 1,)``. Parameter names and shapes of
:class:`Mamba`, :class:`Mamba2` and :class:`MambaBlock` are those of the mamba-ssm package, whose checkpoints load as
they are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pc3d.ops.scan import causal_conv1d, selective_scan, ssd


class SelectiveSSM(nn.Module):
    """Convolution, input-dependent coefficients and selective scan of one direction (arXiv 2312.00752, figure 3).

    Args:
        channels: inner width D.
        state: states per channel, N.
        kernel: tokens the causal convolution sees.
        rank: width of the bottleneck that the step sizes come from.
        step_range: step sizes start log-uniform in this range, and not below ``step_floor``; None: the bias of
            ``dt_proj`` keeps the default of torch.
        step_init: ``dt_proj.weight`` starts uniform in ``+- step_scale / sqrt(rank)`` ("random") or at it ("constant").
    """

    def __init__(
        self,
        channels: int,
        state: int,
        kernel: int,
        rank: int,
        step_range: tuple[float, float] | None = (1e-3, 0.1),
        step_floor: float = 1e-4,
        step_init: str = "random",
        step_scale: float = 1.0,
        conv_bias: bool = True,
    ) -> None:
        super().__init__()
        if step_init not in ("random", "constant"):
            raise ValueError(f'step_init must be "random" or "constant", got {step_init!r}')
        self.state, self.rank = state, rank
        self.conv1d = nn.Conv1d(channels, channels, kernel, groups=channels, bias=conv_bias)
        self.x_proj = nn.Linear(channels, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, channels)
        self.A_log = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(channels, 1))
        self.D = nn.Parameter(torch.ones(channels))
        if step_range is not None:
            bound = step_scale * rank**-0.5
            if step_init == "random":
                nn.init.uniform_(self.dt_proj.weight, -bound, bound)
            else:
                nn.init.constant_(self.dt_proj.weight, bound)
            with torch.no_grad():
                self.dt_proj.bias.copy_(inverse_softplus(log_uniform(channels, step_range, step_floor)))

    def forward(
        self, x: Tensor, z: Tensor, offsets: Tensor, state: Tensor | None = None, reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Mixed and gated tokens ``(T, D)``, and the last state of each cloud; ``x`` comes before the convolution."""
        x = causal_conv1d(x, self.conv1d.weight[:, 0], self.conv1d.bias, offsets, silu=True, reverse=reverse)
        return self.scan(x, z, offsets, state, reverse)

    def scan(
        self, x: Tensor, z: Tensor, offsets: Tensor, state: Tensor | None = None, reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The part after the convolution."""
        low, b, c = self.x_proj(x).split([self.rank, self.state, self.state], -1)
        step = F.linear(low, self.dt_proj.weight)  # the bias joins inside the scan, in float32
        return selective_scan(
            x,
            step,
            -self.A_log.float().exp() if self.A_log.dtype != torch.float64 else -self.A_log.exp(),
            b[:, None],
            c[:, None],
            offsets,
            self.D,
            z,
            self.dt_proj.bias,
            delta_softplus=True,
            initial_state=state,
            reverse=reverse,
        )


class Mamba(SelectiveSSM):
    """Mamba-1 mixer ``(T, width) -> (T, width)`` (arXiv 2312.00752).

    Args:
        width: of the tokens.
        state, kernel: N and the reach of the convolution.
        expand: inner width is ``int(expand * width)``.
        rank: of the step sizes; None: ``ceil(width / 16)``.
        bias: of the two linear layers around the scan.
        kwargs: initial values, see :class:`SelectiveSSM`.
    """

    def __init__(
        self,
        width: int,
        state: int = 16,
        kernel: int = 4,
        expand: float = 2,
        rank: int | None = None,
        bias: bool = False,
        **kwargs: Any,
    ) -> None:
        channels = int(expand * width)
        super().__init__(channels, state, kernel, rank or math.ceil(width / 16), **kwargs)
        self.in_proj = nn.Linear(width, 2 * channels, bias=bias)
        self.out_proj = nn.Linear(channels, width, bias=bias)

    def forward(self, tokens: Tensor, offsets: Tensor, reverse: bool = False) -> Tensor:  # type: ignore[override]
        x, z = self.in_proj(tokens).chunk(2, -1)
        return self.out_proj(super().forward(x, z, offsets, reverse=reverse)[0])

    def step(self, tokens: Tensor, seen: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One more token of each of S sequences, ``(S, width)``: the same as the parallel pass over all of them.

        Args:
            seen: ``(S, D, kernel)`` inputs of the convolution so far, zeros at first.
            state: ``(S, D, N)``, zeros at first.

        Returns:
            The mixed tokens ``(S, width)``, and ``seen`` and ``state`` for the next call.
        """
        x, z = self.in_proj(tokens).chunk(2, -1)
        seen = torch.cat([seen[..., 1:], x[..., None]], -1)
        x = (seen * self.conv1d.weight[:, 0]).sum(-1)
        x = F.silu(x if self.conv1d.bias is None else x + self.conv1d.bias)
        each = torch.arange(len(tokens) + 1, device=tokens.device)
        y, state = self.scan(x, z, each, state)
        return self.out_proj(y), seen, state


class BidirectionalMamba(Mamba):
    """Mamba-1 with a second scan from the end of each cloud to its start, summed before the output layer.

    The input and output layers are shared, convolution and coefficients are not (Vision Mamba, arXiv 2401.09417, as
    used by Point Cloud Mamba, arXiv 2403.00762). The steps of the second scan start from the default values of torch.
    """

    def __init__(
        self,
        width: int,
        state: int = 16,
        kernel: int = 4,
        expand: float = 2,
        rank: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(width, state, kernel, expand, rank, bias)
        self.backward_ssm = SelectiveSSM(int(expand * width), state, kernel, self.rank, step_range=None)

    def forward(self, tokens: Tensor, offsets: Tensor, reverse: bool = False) -> Tensor:  # type: ignore[override]
        x, z = self.in_proj(tokens).chunk(2, -1)
        forward, _ = SelectiveSSM.forward(self, x, z, offsets, reverse=reverse)
        backward, _ = self.backward_ssm(x, z, offsets, reverse=not reverse)
        return self.out_proj(forward + backward)

    def step(self, tokens: Tensor, seen: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError("a scan in both directions needs the whole cloud")


class Mamba2(nn.Module):
    """Mamba-2 mixer ``(T, width) -> (T, width)`` (arXiv 2405.21060).

    Args:
        width: of the tokens.
        state: N.
        head: channels of a head, P.
        groups: of B and C, and of the norm unless ``norm_groups`` says otherwise.
        kernel: reach of the causal convolution.
        expand: inner width is ``int(expand * width)``.
        scanned: inner channels that pass the scan (all by default); the others are only gated.
        skip_per_channel: D per channel instead of per head.
        rate_range: ``-A`` starts uniform in it.
        step_range, step_floor: as in :class:`SelectiveSSM`.
        step_limit: clamp of the step sizes.
        norm: RMS norm of the gated output; else the gate acts inside the scan.
        norm_before_gate: norm first, gate after.
        norm_groups: groups of channels normalised on their own; 1 for the "simple" layer of mamba-ssm.
        learned_start: the state before the first token is a parameter.
    """

    def __init__(
        self,
        width: int,
        state: int = 128,
        head: int = 64,
        groups: int = 1,
        kernel: int = 4,
        expand: float = 2,
        scanned: int | None = None,
        skip_per_channel: bool = False,
        rate_range: tuple[float, float] = (1.0, 16.0),
        step_range: tuple[float, float] = (1e-3, 0.1),
        step_floor: float = 1e-4,
        step_limit: tuple[float, float] = (0.0, math.inf),
        norm: bool = True,
        norm_before_gate: bool = False,
        norm_groups: int | None = None,
        learned_start: bool = False,
        bias: bool = False,
        conv_bias: bool = True,
    ) -> None:
        super().__init__()
        inner = int(expand * width)
        self.channels = inner if scanned is None else scanned
        if self.channels % head or (self.channels // head) % groups:
            raise ValueError(f"{self.channels} channels do not divide into heads of {head} and {groups} groups")
        self.state, self.head, self.groups, self.step_limit = state, head, groups, step_limit
        self.gated_only, heads = inner - self.channels, self.channels // head
        convolved = self.channels + 2 * groups * state
        self.in_proj = nn.Linear(width, 2 * self.gated_only + self.channels + convolved + heads, bias=bias)
        self.conv1d = nn.Conv1d(convolved, convolved, kernel, groups=convolved, bias=conv_bias)
        self.dt_bias = nn.Parameter(inverse_softplus(log_uniform(heads, step_range, step_floor)))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(*rate_range).log())
        self.D = nn.Parameter(torch.ones(self.channels if skip_per_channel else heads))
        self.init_states = nn.Parameter(torch.zeros(heads, head, state)) if learned_start else None
        self.norm = GatedRMSNorm(self.channels, norm_groups or groups, norm_before_gate) if norm else None
        self.out_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, tokens: Tensor, offsets: Tensor, reverse: bool = False) -> Tensor:
        gated, heads, side = self.gated_only, len(self.A_log), self.groups * self.state
        gate0, x0, z, xbc, dt = self.in_proj(tokens).split(
            [gated, gated, self.channels, self.channels + 2 * side, heads], -1
        )
        xbc = causal_conv1d(xbc, self.conv1d.weight[:, 0], self.conv1d.bias, offsets, silu=True, reverse=reverse)
        x, b, c = xbc.split([self.channels, side, side], -1)
        start = None if self.init_states is None else self.init_states.expand(len(offsets) - 1, -1, -1, -1)
        y, _ = ssd(
            x.unflatten(-1, (heads, self.head)),
            dt,
            -self.A_log.float().exp() if self.A_log.dtype != torch.float64 else -self.A_log.exp(),
            b.unflatten(-1, (self.groups, self.state)),
            c.unflatten(-1, (self.groups, self.state)),
            offsets,
            self.D,
            None if self.norm is not None else z.unflatten(-1, (heads, self.head)),
            self.dt_bias,
            dt_softplus=True,
            dt_limit=self.step_limit,
            initial_state=start,
            reverse=reverse,
        )
        y = y.flatten(1)
        if self.norm is not None:
            y = self.norm(y, z)
        return self.out_proj(torch.cat([F.silu(gate0) * x0, y], -1) if gated else y)


class GatedRMSNorm(nn.Module):
    """``rms(y silu(z)) w``, or ``rms(y) w silu(z)``; groups of channels are normalised on their own."""

    def __init__(self, channels: int, groups: int = 1, norm_first: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.norm_first, self.eps = groups, norm_first, eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        wide = torch.float64 if y.dtype == torch.float64 else torch.float32
        values, gate = y.to(wide), F.silu(z.to(wide))
        if not self.norm_first:
            values = values * gate
        values = values.unflatten(-1, (self.groups, -1))
        values = (values * (values.square().mean(-1, keepdim=True) + self.eps).rsqrt()).flatten(-2) * self.weight
        return (values * gate if self.norm_first else values).to(y.dtype)


class MambaBlock(nn.Module):
    """Add, norm, mixer: ``residual += hidden; hidden = mixer(norm(residual))``.

    The caller adds the two after the last block.

    Args:
        width: of the tokens.
        mixer: ``(tokens, offsets) -> tokens``.
        norm: RMS or layer norm of the residual; ``nn.RMSNorm(width, eps=1e-5)`` by default.
        residual_float: keep the residual in float32.
    """

    def __init__(
        self, width: int, mixer: nn.Module, norm: nn.Module | None = None, residual_float: bool = False
    ) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-5) if norm is None else norm
        self.mixer = mixer
        self.residual_float = residual_float

    def forward(self, hidden: Tensor, residual: Tensor | None, offsets: Tensor) -> tuple[Tensor, Tensor]:
        residual = hidden if residual is None else residual + hidden
        if self.residual_float and residual.dtype in (torch.float16, torch.bfloat16):
            residual = residual.float()
        return self.mixer(self.norm(residual).to(hidden.dtype), offsets), residual


def scale_output_layers(network: nn.Module, layers: int, per_layer: int = 1) -> None:
    """Initial values of a stack of mixers: linear biases 0 but for the step sizes, output layers over ``sqrt(layers)``.

    ``layers * per_layer`` is the number of additions to the residual stream.
    """
    kept = {id(m.dt_proj) for m in network.modules() if isinstance(m, Mamba)}
    for module in network.modules():
        if isinstance(module, nn.Linear) and module.bias is not None and id(module) not in kept:
            nn.init.zeros_(module.bias)
        if isinstance(module, (Mamba, Mamba2)):
            nn.init.kaiming_uniform_(module.out_proj.weight, a=math.sqrt(5))
            with torch.no_grad():
                module.out_proj.weight /= math.sqrt(layers * per_layer)


def log_uniform(count: int, bounds: tuple[float, float], floor: float) -> Tensor:
    """``(count,)`` log-uniform in ``bounds``, not below ``floor``: initial step sizes."""
    low, high = (math.log(bound) for bound in bounds)
    return torch.empty(count).uniform_(low, high).exp().clamp(min=floor)


def inverse_softplus(values: Tensor) -> Tensor:
    """``x`` with ``softplus(x) = values``."""
    return values + torch.log(-torch.expm1(-values))
