"""Sparse convolutions on ``Voxels``, with the semantics of spconv 2.x (cross-correlation, no kernel flip).

Weights are ``(K, Cin, Cout)`` with kernel offsets row-major, x slowest and z fastest. The maps behind the layers live
in ``voxels.context`` and are shared by all layers on one grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pc3d.ops.conv import Epilogue
from pc3d.ops.depthwise import depthwise_conv
from pc3d.ops.kernel_map import KernelMap, triple
from pc3d.sparse import maps
from pc3d.sparse.flows import planned_conv
from pc3d.sparse.modules import SparseModule
from pc3d.voxels import Voxels


class SparseConvolution(SparseModule):
    """Parameters of a sparse convolution; the subclasses say which voxels meet.

    Every forward takes an ``epilogue``, what follows on the rows of the result (see :func:`pc3d.sparse.conv_norm_act`).

    Args:
        in_channels, out_channels: feature widths Cin and Cout.
        kernel_size: voxels along each axis, one number or three.
        bias: add a learned ``(Cout,)`` to every output voxel.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | Sequence[int], bias: bool = True
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = triple("kernel_size", kernel_size)
        self.weight = nn.Parameter(torch.empty(math.prod(self.kernel_size), in_channels, out_channels))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ``+-1 / sqrt(Cin * K)``, weight and bias: the default of spconv and of torch."""
        bound = 1 / math.sqrt(self.weight.shape[0] * self.in_channels)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def convolve(self, feat: Tensor, kernel_map: KernelMap, epilogue: Epilogue | None = None) -> Tensor:
        """``(num_out, Cout)`` from ``(num_in, Cin)``."""
        return planned_conv(feat, self.weight, kernel_map, self.bias, epilogue)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        return text if self.bias is not None else f"{text}, bias=False"


class SubMConv3d(SparseConvolution):
    """Submanifold convolution: ``out[c] = sum_k W_k^T in[c + (k - kernel_size // 2) * dilation] + bias``.

    The output voxels are the input voxels, row by row (Graham et al. 2018, arXiv 1711.10275).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        dilation: int | Sequence[int] = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias)
        self.dilation = triple("dilation", dilation)

    def forward(self, voxels: Voxels, epilogue: Epilogue | None = None) -> Voxels:
        kernel_map = maps.submanifold(voxels, self.kernel_size, self.dilation)
        return voxels.with_feat(self.convolve(voxels.feat, kernel_map, epilogue))


class DepthwiseSubMConv3d(SparseModule):
    """Submanifold convolution with a filter per channel: ``out[c] = sum_k w_k * in[c + k - kernel_size // 2] + bias``.

    Args:
        channels: width C of input and output.
        kernel_size, dilation: as for :class:`SubMConv3d`, whose maps it shares.
        bias: add a learned ``(C,)``.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | Sequence[int] = 3,
        dilation: int | Sequence[int] = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.kernel_size = triple("kernel_size", kernel_size)
        self.dilation = triple("dilation", dilation)
        self.weight = nn.Parameter(torch.empty(math.prod(self.kernel_size), channels))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ``+-1 / sqrt(K)``, weight and bias: one input channel per filter."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1 / math.sqrt(len(self.weight)), 1 / math.sqrt(len(self.weight)))

    def forward(self, voxels: Voxels) -> Voxels:
        kernel_map = maps.submanifold(voxels, self.kernel_size, self.dilation)
        return voxels.with_feat(depthwise_conv(voxels.feat, self.weight, kernel_map, self.bias))

    def extra_repr(self) -> str:
        text = f"{self.channels}, kernel_size={self.kernel_size}"
        return text if self.bias is not None else f"{text}, bias=False"


class _WindowedConvolution(SparseConvolution):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias)
        self.window = maps.window(kernel_size, stride, padding, dilation)

    def extra_repr(self) -> str:
        _, stride, padding, dilation = self.window
        return f"{super().extra_repr()}, stride={stride}, padding={padding}, dilation={dilation}"


class SparseConv3d(_WindowedConvolution):
    """Strided convolution: ``out[o] = sum_k W_k^T in[o * stride - padding + k * dilation] + bias``.

    An output voxel exists where an input contributes; rows are sorted by (batch, x, y, z). A grid with a
    ``spatial_shape`` also drops outputs beyond its last full window, as spconv does.
    """

    def forward(self, voxels: Voxels, epilogue: Epilogue | None = None) -> Voxels:
        made = maps.strided(voxels, self.window)
        return made.grid(voxels, self.convolve(voxels.feat, made.kernel_map, epilogue))


class SparseConvTranspose3d(_WindowedConvolution):
    """Generative transposed convolution: ``out[i * stride - padding + k * dilation] += W_k^T in[i]``, plus bias.

    Makes every voxel it reaches; with ``target``, a finer grid, it fills the voxels of that grid instead, wherever they
    come from. To go back to the very voxels a strided convolution came from, use :class:`SparseInverseConv3d`.

    Raises:
        ValueError: if the stride of the grid, or of ``target``, does not fit this layer's.
    """

    def forward(self, voxels: Voxels, target: Voxels | None = None, epilogue: Epilogue | None = None) -> Voxels:
        if target is not None:
            onto = maps.transposed_onto(voxels, self.window, target)
            return target.with_feat(self.convolve(voxels.feat, onto, epilogue))
        made = maps.transposed(voxels, self.window)
        return made.grid(voxels, self.convolve(voxels.feat, made.kernel_map, epilogue))


class SparseInverseConv3d(SparseConvolution):
    """Inverse of a strided layer, ``out[i] = sum_(k, o) W_k^T in[o] + bias`` over the pairs that made the grid.

    Output voxels and rows are exactly the inputs of that convolution. The kernel is not flipped.

    Raises:
        ValueError: if no strided layer made the grid, or one with another kernel size.
    """

    def forward(self, voxels: Voxels, epilogue: Epilogue | None = None) -> Voxels:
        made = maps.derivation(voxels)
        if made is None:
            raise ValueError(
                f"inverse convolution on a grid of stride {voxels.stride} that no strided layer made; "
                "a SparseConv3d or pooling must come first, and its output grid must reach this layer"
            )
        if made.window.kernel_size != self.kernel_size:
            made_with = made.window.kernel_size
            raise ValueError(
                f"inverse convolution with kernel {self.kernel_size} on a grid made with kernel {made_with}"
            )
        return made.parent_grid(voxels, self.convolve(voxels.feat, made.kernel_map.inverse(), epilogue))
