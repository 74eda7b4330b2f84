"""What sparse layers have in common, and the wrapper of ordinary layers."""

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


class FeatureWise(SparseModule):
    """An ordinary layer (norm, activation, dropout, linear) on the ``(M, C)`` features, for use outside a
    :class:`~pc3d.sparse.SparseSequential`, which needs no wrapper."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, voxels: Voxels) -> Voxels:
        return voxels.with_feat(self.layer(voxels.feat))
