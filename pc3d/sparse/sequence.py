"""Sparse and ordinary layers one after the other; at inference convolution, norm and activation are one pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.ops.conv import Epilogue
from pc3d.sparse.conv import SparseConvolution
from pc3d.sparse.modules import SparseModule
from pc3d.voxels import Voxels


class VoxelBatchNorm(nn.BatchNorm1d):
    """Batch normalisation over voxels; the default constants are those of Pointcept's sparse networks.

    Raises:
        InputError: in training mode with fewer than two voxels, which have no variance.
    """

    rows = "voxels"  # what an error calls them

    def __init__(self, channels: int, eps: float = 1e-3, momentum: float = 0.01) -> None:
        super().__init__(channels, eps=eps, momentum=momentum)

    def forward(self, feat: Tensor) -> Tensor:
        if self.training and len(feat) < 2:
            raise InputError(
                f"batch normalisation cannot train on a batch with {len(feat)} {self.rows} in a stage, it needs two; "
                "use larger crops, a larger batch or a smaller grid size"
            )
        return super().forward(feat)


class SparseSequential(nn.Sequential, SparseModule):
    """Layers one after the other: a :class:`SparseModule` gets the grid, any other layer its ``(M, C)`` features."""

    def forward(self, voxels: Voxels) -> Voxels:
        layers = list(self)
        while layers:
            layer = layers.pop(0)
            if isinstance(layer, SparseConvolution):
                norm = layers.pop(0) if layers and isinstance(layers[0], nn.BatchNorm1d) else None
                act = layers.pop(0) if layers and isinstance(layers[0], nn.ReLU) else None
                voxels = conv_norm_act(layer, voxels, norm, act)
            else:
                voxels = _apply(layer, voxels)
        return voxels


def conv_norm_act(
    conv: SparseConvolution,
    voxels: Voxels,
    norm: nn.Module | None = None,
    act: nn.Module | None = None,
    residual: Tensor | None = None,
) -> Voxels:
    """``act(norm(conv(x)) + residual)``: layer by layer, or in one pass where nobody needs what lies between.

    One pass is taken without gradients, for a batch normalisation with fixed statistics, a ReLU, and modules without
    hooks.

    Args:
        residual: ``(num_out, Cout)``.
    """
    if not torch.is_grad_enabled() and _fixed(norm) and _rectifies(act) and not _hooked(conv):
        scale, shift = _affine(norm) if isinstance(norm, nn.BatchNorm1d) else (None, None)
        return conv(voxels, epilogue=Epilogue(scale, shift, residual, act is not None))
    out = _apply(norm, conv(voxels))
    return _apply(act, out if residual is None else out.with_feat(out.feat + residual))


def _apply(layer: nn.Module | None, voxels: Voxels) -> Voxels:
    """A :class:`SparseModule` gets the grid, any other layer its features."""
    if layer is None:
        return voxels
    return layer(voxels) if isinstance(layer, SparseModule) else voxels.with_feat(layer(voxels.feat))


def _fixed(norm: nn.Module | None) -> bool:
    if norm is None:
        return True
    known = type(norm).forward in (nn.BatchNorm1d.forward, VoxelBatchNorm.forward)  # classes of adapted ones differ
    return known and not norm.training and norm.running_var is not None and not _hooked(norm)


def _rectifies(act: nn.Module | None) -> bool:
    return act is None or (type(act) is nn.ReLU and not _hooked(act))


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _affine(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Scale and shift ``(C,)`` of a normalisation with fixed statistics."""
    assert norm.running_var is not None
    assert norm.running_mean is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias
