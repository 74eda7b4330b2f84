"""Spiking neurons: integers in training, trains of unit spikes at deployment.

Qiu et al. 2025, "Efficient 3D Recognition with Event-driven Spike Sparse Convolution" (arXiv 2412.07360). A neuron
fires an integer 0..D; on event-driven hardware this is that many unit spikes in D time steps (:func:`spike_train`), and
the products of the layer behind it become additions. Activity and energy are counted by :class:`SpikeMeter`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.ops.kernel_map import KernelMap
from pc3d.sparse import SparseConv3d, SparseConvolution, SparseInverseConv3d, SubMConv3d, maps
from pc3d.voxels import Voxels

Surrogate = Literal["rectangular", "triangular", "sigmoid"]
"""Derivative that stands for that of a step: 1 within half a step of it; falling linearly to 0 a whole step away; that
of a sigmoid of slope 4."""

MAC_PICOJOULE, ADD_PICOJOULE = 4.6, 0.9  # 45 nm, float32: Horowitz 2014, "Computing's energy problem"


class SpikingNeuron(nn.Module):
    """``floor(clamp(x / threshold, 0, D) + 1/2)``, an integer; ties go up.

    With ``decay``, the count of a leaky integrate-and-fire neuron instead: its membrane begins at half the threshold,
    takes ``x / D`` and loses ``1 - decay`` of itself in each of D steps, and falls by the threshold when it fires (soft
    reset). Without leak, ``decay=1``, this is the same integer, up to rounding at ties.

    Args:
        levels: D, the most spikes.
        surrogate: gradient of the steps; "rectangular" is as published, 1 for ``0 < x < D`` and 0 elsewhere.
        learn_threshold: make the threshold a parameter, from 1.
        decay: None for the integer neuron, as published; else in (0, 1].

    Raises:
        InputError: for a value out of range.
    """

    def __init__(
        self,
        levels: int = 4,
        surrogate: Surrogate = "rectangular",
        learn_threshold: bool = False,
        decay: float | None = None,
    ) -> None:
        super().__init__()
        if levels < 1 or (decay is not None and not 0 < decay <= 1):
            raise InputError(f"spiking neuron: levels {levels} must be at least 1, decay {decay} in (0, 1] or null")
        if surrogate not in _DERIVATIVES:
            raise InputError(f"spiking neuron: surrogate {surrogate!r} is not one of {', '.join(_DERIVATIVES)}")
        self.levels, self.surrogate, self.decay = levels, surrogate, decay
        self.threshold = nn.Parameter(torch.ones(())) if learn_threshold else None

    def forward(self, x: Tensor) -> Tensor:
        """Spikes of the shape and dtype of ``x``; computed in float32 at least."""
        potential = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.threshold is not None:
            potential = potential / self.threshold
        if self.decay is None:
            return _Staircase.apply(potential, self.levels, self.surrogate).to(x.dtype)
        return self._integrate(potential, self.decay).to(x.dtype)

    def _integrate(self, current: Tensor, decay: float) -> Tensor:
        membrane = torch.full_like(current, 0.5)
        fired = torch.zeros_like(current)
        for _ in range(self.levels):
            membrane = decay * membrane + current / self.levels
            spike = _Step.apply(membrane - 1, self.surrogate)
            membrane, fired = membrane - spike, fired + spike
        return fired

    def extra_repr(self) -> str:
        return f"levels={self.levels}, surrogate={self.surrogate}, decay={self.decay}"


def spike_train(spikes: Tensor, levels: int) -> Tensor:
    """``(D, ...)`` zeros and ones whose sum over the D steps is ``spikes``: a count n fires in the first n steps."""
    steps = torch.arange(levels, device=spikes.device).view(-1, *[1] * spikes.ndim)
    return (spikes[None] > steps).to(spikes.dtype)


class _Staircase(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, levels: int, surrogate: Surrogate) -> Tensor:
        return (x.clamp(0, levels) + 0.5).floor()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.levels, ctx.surrogate = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if ctx.surrogate == "rectangular":
            return torch.where((x > 0) & (x < ctx.levels), grad, 0), None, None
        steps = [_DERIVATIVES[ctx.surrogate](x - level - 0.5) for level in range(ctx.levels)]
        return grad * torch.stack(steps).sum(0), None, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, surrogate: Surrogate) -> Tensor:
        return (x >= 0).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.surrogate = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * _DERIVATIVES[ctx.surrogate](ctx.saved_tensors[0]), None


def _rectangular(x: Tensor) -> Tensor:
    return (x.abs() < 0.5).to(x.dtype)


def _triangular(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _sigmoid(x: Tensor) -> Tensor:
    rise = torch.sigmoid(4 * x)
    return 4 * rise * (1 - rise)


_DERIVATIVES = {"rectangular": _rectangular, "triangular": _triangular, "sigmoid": _sigmoid}


# Activity and energy --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerActivity:
    """One call of a convolution or linear layer.

    Attributes:
        name: of the layer.
        macs: multiply-accumulate operations of a network without spikes: pairs of voxels, or of pixels, x Cin x Cout.
        rate: mean of its inputs over D if these are spikes; None for real inputs.
        levels: D.
    """

    name: str
    macs: int
    rate: float | None
    levels: int = 1

    @property
    def additions(self) -> float:
        """Accumulate operations of its spikes: ``D x rate x macs``; 0 for real inputs."""
        return 0.0 if self.rate is None else self.levels * self.rate * self.macs

    @property
    def picojoules(self) -> float:
        return MAC_PICOJOULE * self.macs if self.rate is None else ADD_PICOJOULE * self.additions


class SpikeMeter:
    """Firing rates, operations and energy of what runs inside a ``with`` block.

    Attributes:
        rates: ``(name, mean(spikes) / D)`` of every call of a neuron, in order.
        layers: every call of a layer with spikes or real inputs, in order.

    Args:
        network: whose neurons, convolutions (sparse, or on maps) and linear layers are watched.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.rates: list[tuple[str, float]] = []
        self.layers: list[LayerActivity] = []
        self._handles: list[Any] = []

    def __enter__(self) -> SpikeMeter:
        for name, module in self.network.named_modules():
            if isinstance(module, SpikingNeuron):
                self._handles.append(module.register_forward_hook(self._neuron(name)))
            elif isinstance(module, (SparseConvolution, nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                self._handles.append(module.register_forward_hook(self._layer(name)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def millijoules(self) -> float:
        """Multiply-accumulates of layers with real inputs and additions of the others, priced in 45 nm."""
        return sum(layer.picojoules for layer in self.layers) * 1e-9

    @property
    def rate(self) -> float:
        """Mean over the calls of neurons; 0 without any."""
        return sum(rate for _, rate in self.rates) / max(len(self.rates), 1)

    def _neuron(self, name: str) -> Any:
        def hook(neuron: SpikingNeuron, inputs: tuple[Tensor], spikes: Tensor) -> None:
            rate = _mean(spikes) / neuron.levels
            self.rates.append((name, rate))
            spikes.levels = neuron.levels  # type: ignore[attr-defined]  # tells the layer behind it what it gets

        return hook

    def _layer(self, name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            given = inputs[0]
            feat = given.feat if isinstance(layer, SparseConvolution) else given
            if isinstance(layer, SparseConvolution):
                macs = _pairs(layer, given).num_pairs * layer.in_channels * layer.out_channels
            elif isinstance(layer, nn.Linear):
                macs = given.numel() * layer.out_features
            else:  # borders count as if there were pixels beyond them
                assert isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
                pixels = given if isinstance(layer, nn.ConvTranspose2d) else output
                macs = pixels.numel() // pixels.shape[1] * layer.weight.numel()
            levels = getattr(feat, "levels", None)
            rate = None if levels is None else _mean(feat) / levels
            self.layers.append(LayerActivity(name, macs, rate, levels or 1))

        return hook


def _mean(values: Tensor) -> float:
    return float(values.detach().double().mean()) if values.numel() else 0.0


def _pairs(conv: SparseConvolution, voxels: Voxels) -> KernelMap:
    """The map of a layer that has just run on a grid: it is in the grid's context."""
    if isinstance(conv, SubMConv3d):
        return maps.submanifold(voxels, conv.kernel_size, conv.dilation)
    if isinstance(conv, SparseConv3d):
        return maps.strided(voxels, conv.window).kernel_map
    made = maps.derivation(voxels)
    if not isinstance(conv, SparseInverseConv3d) or made is None:
        raise TypeError(f"SpikeMeter does not know the kernel map of {type(conv).__name__}")
    return made.kernel_map
