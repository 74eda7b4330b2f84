"""Layers on sparse voxels: convolutions, pooling, the kernel maps they share and the order voxels lie in."""

from pc3d.sparse.conv import (
    DepthwiseSubMConv3d,
    SparseConv3d,
    SparseConvolution,
    SparseConvTranspose3d,
    SparseInverseConv3d,
    SubMConv3d,
)
from pc3d.sparse.dense import bounds, from_dense, to_dense
from pc3d.sparse.join import add, cat, multiply, prune
from pc3d.sparse.modules import FeatureWise, SparseModule
from pc3d.sparse.order import BlockSoarOrder, CurveOrder, SoarOrder, WindowOrder, apply_in_order, named_order, reorder
from pc3d.sparse.pool import SparseAvgPool3d, SparseGlobalPool, SparseMaxPool3d
from pc3d.sparse.sequence import SparseSequential, VoxelBatchNorm, conv_norm_act

__all__ = [
    "BlockSoarOrder",
    "CurveOrder",
    "DepthwiseSubMConv3d",
    "FeatureWise",
    "SoarOrder",
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
    "VoxelBatchNorm",
    "WindowOrder",
    "add",
    "apply_in_order",
    "bounds",
    "cat",
    "conv_norm_act",
    "from_dense",
    "multiply",
    "named_order",
    "prune",
    "reorder",
    "to_dense",
]
