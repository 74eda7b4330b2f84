"""What sparse layers have in common, and the container that mixes them with ordinary layers."""

from __future__ import annotations

import abc
from collections.abc import Callable

from torch import nn

from pc3d.voxels import Voxels


class SparseModule(nn.Module, abc.ABC):
    """A layer that maps :class:`~pc3d.voxels.Voxels` to ``Voxels``."""

    __call__: Callable[..., Voxels]

    @abc.abstractmethod
    def forward(self, voxels: Voxels) -> Voxels: ...


class SparseSequential(nn.Sequential, SparseModule):
    """Layers one after the other: a :class:`SparseModule` gets the grid, any other layer its ``(M, C)`` features."""

    def forward(self, voxels: Voxels) -> Voxels:
        for layer in self:
            voxels = layer(voxels) if isinstance(layer, SparseModule) else voxels.with_feat(layer(voxels.feat))
        return voxels
