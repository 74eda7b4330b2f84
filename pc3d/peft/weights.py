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
    """``gamma * b + beta``; ``added``: the layer had no bias before, and has none again without this part."""

    def __init__(self, adapter: str, scale: Scale, added: bool) -> None:
        super().__init__(adapter)
        self.scale, self.added = (scale,), added  # in a tuple: the factors belong to the weight's part
        self.beta = nn.Parameter(torch.zeros_like(scale.gamma))

    def adapted(self, weight: Tensor) -> Tensor:
        return self.scale[0].gamma * weight + self.beta


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


def restore_weight(module: nn.Module, adapter: str, keep: bool = False) -> None:
    """Take an adapter's parts off an adapted module; with ``keep`` what they made of the weights becomes the weights.

    Raises:
        InputError: with ``keep``, if parts of another adapter come before.
    """
    lists = cast(nn.ModuleDict, module.adapted)
    for tensor, parts in list(lists.items()):
        assert isinstance(parts, nn.ModuleDict)
        mine = [key for key, part in parts.items() if cast(AdapterPart, part).adapter == adapter]
        if not mine:
            continue
        if keep:
            if mine != list(parts)[: len(mine)]:
                raise InputError(f"peft: adapter '{adapter}' lies on another one: merge that one first")
            with torch.no_grad():
                original = value = cast(Tensor, module._parameters[tensor])
                for key in mine:
                    value = cast(WeightPart, parts[key])(value)
                original.copy_(value)
        added = any(getattr(parts[key], "added", False) for key in mine)
        for key in mine:
            del parts[key]
        if added and not keep:
            module.register_parameter(tensor, None)
        if not parts:
            del lists[tensor]
    plain = _plain_class(module)
    if lists:
        module.__class__ = _adapted_class(cast(Any, plain), *sorted(lists))
    else:
        module.__class__ = plain
        del module.adapted


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
    value = cast(Tensor, module._parameters[tensor])
    parts = cast(nn.ModuleDict, cast(nn.ModuleDict, module.adapted)[tensor])
    for part in parts.values():
        value = cast(WeightPart, part)(value)
    return value
