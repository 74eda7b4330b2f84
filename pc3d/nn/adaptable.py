"""The contract between blocks and whatever is attached to them: see :mod:`pc3d.peft`."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn

from pc3d.points import Points


class AdapterPart(nn.Module):
    """What an adapter puts into one place of a model. It does nothing while it is not ``active``.

    Args:
        adapter: name of the adapter that this is a part of.
    """

    def __init__(self, adapter: str) -> None:
        super().__init__()
        self.adapter = adapter
        self.active = True


class BlockAdapter(AdapterPart, abc.ABC):
    """A part that stands around an :class:`Adaptable`.

    Attributes:
        passes_by: kinds of modules inside which it does not call, but does the work of: adapters of these are not run.
    """

    passes_by: tuple[type[nn.Module], ...] = ()

    @abc.abstractmethod
    def forward(self, block: Any, run: Callable[[Any], Any], tokens: Any) -> Any:
        """What the block is to give for ``tokens``; ``run(tokens)`` is what it gives without this part."""

    def prepare(self, block: Any, clouds: Callable[[int], Iterable[Points]]) -> None:
        """What the part does once before a training: see :func:`pc3d.peft.prepare`."""

    def remove(self, block: Any) -> None:
        """Take back what the part changed in the block, other than being in its ``adapters``."""


class Adaptable(abc.ABC):
    """Mixin of modules that adapters can stand around: blocks, their MLPs, whole networks.

    The module implements :meth:`run` instead of ``forward``, and calls :meth:`make_adaptable` in its ``__init__``.
    Without adapters nothing changes: no parameter, no name in the state dict.
    """

    adapters: nn.ModuleDict
    channels: int
    """Width of the features that go in and come out."""

    def make_adaptable(self, channels: int) -> None:
        self.channels = channels
        self.adapters = nn.ModuleDict()

    @abc.abstractmethod
    def run(self, tokens: Any) -> Any:
        """The work of the module."""

    def forward(self, tokens: Any) -> Any:
        run: Callable[[Any], Any] = self.run
        for part in self.adapters.values():
            if part.active:
                run = partial(part, self, run)
        return run(tokens)
