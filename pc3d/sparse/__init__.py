"""Layers on sparse voxels: convolutions, pooling and the kernel maps they share."""

from pc3d.sparse.conv import SparseConv3d, SparseConvolution, SparseConvTranspose3d, SparseInverseConv3d, SubMConv3d
from pc3d.sparse.modules import SparseModule, SparseSequential
from pc3d.sparse.pool import SparseAvgPool3d, SparseGlobalPool, SparseMaxPool3d

__all__ = [
    "SparseAvgPool3d",
    "SparseConv3d",
    "SparseConvTranspose3d",
    "SparseConvolution",
    "SparseGlobalPool",
    "SparseInverseConv3d",
    "SparseMaxPool3d",
    "SparseModule",
    "SparseSequential",
    "SubMConv3d",
]
