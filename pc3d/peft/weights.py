"""Adapters of weights: an adapted module gives its adapted weight, and keeps the original under its name.

Everything that reads ``module.weight`` sees the adapted one, fused kernels too. Unlike with
:mod:`torch.nn.utils.parametrize`, names in the state dict stay, and copies of a module can be restored one by one.
"""

from __future__ import annotations

import abc
import math
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from pc3d.config import Configurable
from pc3d.errors import InputError
from pc3d.nn.adaptable import AdapterPart
from pc3d.sparse import SparseConvolution


class WeightPart(AdapterPart, abc.ABC):
    """``weight -> weight``; the identity while it is not active."""

    @abc.abstractmethod
    def adapted(self, weight: Tensor) -> Tensor:
        """The weight while the part is active."""

    def forward(self, weight: Tensor) -> Tensor:
        return self.adapted(weight) if self.active else weight


class LowRank(WeightPart):
    """``W + factor * up(down)``, one pair of matrices for each kernel offset of a sparse convolution."""

    def __init__(self, adapter: str, module: nn.Module, rank: int, factor: float) -> None:
        super().__init__(adapter)
        weight = cast(Tensor, module.weight)
        self.factor, self.rows_out = factor, not isinstance(module, SparseConvolution)
        shapes: tuple[tuple[int, ...], tuple[int, ...]]
        if self.rows_out:  # (out, in, ...)
            fan = math.prod(weight.shape[1:])
            shapes = (rank, fan), (weight.shape[0], rank)
        else:  # (K, in, out)
            offsets, channels, width = weight.shape
            fan = offsets * channels
            shapes = (offsets, channels, rank), (offsets, rank, width)
        self.down, self.up = (nn.Parameter(weight.new_empty(shape, dtype=torch.float32)) for shape in shapes)
        nn.init.uniform_(self.down, -1 / math.sqrt(fan), 1 / math.sqrt(fan))
        nn.init.zeros_(self.up)

    def adapted(self, weight: Tensor) -> Tensor:
        delta = self.up @ self.down if self.rows_out else self.down @ self.up
        # Added in float32: a half-precision weight would lose small differences.
        return (weight.float() + self.factor * delta.reshape(weight.shape)).to(weight.dtype)


class Difference(WeightPart):
    """``W + delta``: a weight that trains, kept apart from what it started from."""

    def __init__(self, adapter: str, weight: Tensor) -> None:
        super().__init__(adapter)
        self.delta = nn.Parameter(torch.zeros_like(weight))

    def adapted(self, weight: Tensor) -> Tensor:
        return weight + self.delta


class Scale(WeightPart):
    """``gamma * W``, a factor per output channel."""

    def __init__(self, adapter: str, module: nn.Module) -> None:
        super().__init__(adapter)
        weight = cast(Tensor, module.weight)
        last = isinstance(module, SparseConvolution)
        self.shape = [-1] if last else [-1, *[1] * (weight.ndim - 1)]
        self.gamma = nn.Parameter(weight.new_ones(weight.shape[-1] if last else weight.shape[0]))

    def adapted(self, weight: Tensor) -> Tensor:
        return self.gamma.view(self.shape) * weight


class Shift(WeightPart):
    """``gamma * b + beta``; ``beta`` where the layer has no bias."""

    def __init__(self, adapter: str, scale: Scale) -> None:
        super().__init__(adapter)
        self.scale = (scale,)  # in a tuple: the factors belong to the weight's part
        self.beta = nn.Parameter(torch.zeros_like(scale.gamma))

    def adapted(self, weight: Tensor | None) -> Tensor:
        return self.beta if weight is None else self.scale[0].gamma * weight + self.beta


def adapt_weight(module: nn.Module, tensor: str, part: WeightPart) -> None:
    """Let ``module.<tensor>`` give what the part makes of it; several parts follow each other.

    Raises:
        InputError: if the module is a configurable network itself, whose class must stay what it is.
    """
    if isinstance(module, Configurable):
        raise InputError(f"peft: '{tensor}' of a {type(module).__name__} cannot be adapted as a weight")
    if not is_adapted(module):
        module.adapted = nn.ModuleDict()
    lists = cast(nn.ModuleDict, module.adapted)
    if tensor not in lists:
        lists[tensor] = nn.ModuleDict()
        module.__class__ = _adapted_class(cast(Any, _plain_class(module)), *sorted(lists))
    parts = cast(nn.ModuleDict, lists[tensor])
    mine = sum(cast(AdapterPart, other).adapter == part.adapter for other in parts.values())
    parts[f"{part.adapter}-{mine}" if mine else part.adapter] = part


def is_adapted(module: nn.Module) -> bool:
    return isinstance(module, _Adapted)


def lies_on_another(module: nn.Module, adapter: str) -> bool:
    """Whether parts of another adapter come before those of this one in an adapted module."""
    orders = ([cast(AdapterPart, part).adapter for part in parts.values()] for parts in _lists(module).values())
    return any(adapter in order and set(order[: order.index(adapter)]) - {adapter} for order in orders)


def restore_weight(module: nn.Module, adapter: str, keep: bool = False) -> None:
    """Take an adapter's parts off an adapted module; with ``keep`` what they make of the weights becomes these."""
    lists = _lists(module)
    for tensor, parts in list(lists.items()):
        mine = [key for key, part in parts.items() if cast(AdapterPart, part).adapter == adapter]
        if keep:
            _keep(module, tensor, [cast(WeightPart, parts[key]) for key in mine])
        for key in mine:
            del parts[key]
        if not parts:
            del cast(nn.ModuleDict, module.adapted)[tensor]
    plain = _plain_class(module)
    if left := cast(nn.ModuleDict, module.adapted):
        module.__class__ = _adapted_class(cast(Any, plain), *sorted(left))
    else:
        module.__class__ = plain
        del module.adapted


@torch.no_grad()
def _keep(module: nn.Module, tensor: str, parts: list[WeightPart]) -> None:
    original = _original(module, tensor)
    value = original
    for part in parts:
        value = part.adapted(value)
    if original is not None:
        original.copy_(value)
    elif parts:
        module.__dict__.pop(tensor, None)  # a plain None, in place of a parameter
        module._parameters[tensor] = nn.Parameter(value.clone(), requires_grad=False)


def _original(module: nn.Module, tensor: str) -> Tensor:
    """The tensor before any part; None of a layer without it, which only :class:`Shift` adapts."""
    return cast(Tensor, module._parameters.get(tensor))


def _lists(module: nn.Module) -> dict[str, nn.ModuleDict]:
    """The parts of an adapted module, by the tensor that they adapt."""
    return {tensor: cast(nn.ModuleDict, parts) for tensor, parts in cast(nn.ModuleDict, module.adapted).items()}


class _Adapted:
    """Mixin of the classes that :func:`_adapted_class` makes."""


def _plain_class(module: nn.Module) -> type[nn.Module]:
    cls = type(module)
    return cls.__mro__[2] if issubclass(cls, _Adapted) else cls


@cache
def _adapted_class(cls: Any, *tensors: str) -> Any:
    """A subclass whose tensors are properties; the parameters themselves stay where they are, under their names.

    Classes are shared by all modules (a copied module has the class of its original) and so never changed.
    """
    members = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    properties = {tensor: property(partial(_adapted_tensor, tensor)) for tensor in tensors}
    return type(cls.__name__, (_Adapted, cls), members | properties)


def _adapted_tensor(tensor: str, module: nn.Module) -> Tensor:
    value = _original(module, tensor)
    parts = cast(nn.ModuleDict, cast(nn.ModuleDict, module.adapted)[tensor])
    for part in parts.values():
        value = cast(WeightPart, part)(value)
    return value
