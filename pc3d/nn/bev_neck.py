"""Two-dimensional convolutions on a map seen from above, over several scales: the neck of SECOND and PointPillars."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pc3d.errors import InputError


class MultiScaleNeck(nn.Module):
    """Levels of 3x3 convolutions, each coarser than the one before, brought to one scale and joined.

    A level is a convolution with its stride, then ``layers`` of stride 1, each with batch norm and ReLU; a transposed
    convolution brings it to the common scale. Lang et al., "PointPillars", CVPR 2019, section 2.2; modules have the
    names of OpenPCDet's ``BaseBEVBackbone``.

    Args:
        in_channels: width of the map.
        layers: further convolutions of every level.
        strides: of every level, relative to the one before.
        channels: width of every level.
        up_strides: factor by which every level grows.
        up_channels: width of every level after that; their sum is ``out_channels``.
        neuron: makes what stands before every convolution, in place of the ReLU behind its norm.

    Attributes:
        stride: of the result, in cells of the input; ``coarsest``, of the last level.
    """

    def __init__(
        self,
        in_channels: int,
        layers: Sequence[int],
        strides: Sequence[int],
        channels: Sequence[int],
        up_strides: Sequence[int],
        up_channels: Sequence[int],
        neuron: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        settings = {"strides": strides, "channels": channels, "up_strides": up_strides, "up_channels": up_channels}
        for name, values in settings.items():
            if len(values) != len(layers):
                raise InputError(f"neck.{name} has {len(values)} values for {len(layers)} levels")
            if min(values, default=1) < 1:
                raise InputError(f"neck.{name} {list(values)} must be at least 1")
        if min(layers, default=0) < 0:
            raise InputError(f"neck.layers {list(layers)} must not be negative")
        below = list(itertools.accumulate(strides, lambda a, b: a * b))
        reached = {total / up for total, up in zip(below, up_strides, strict=True)}
        if len(reached) != 1 or reached != {float(round(next(iter(reached))))}:
            raise InputError(f"neck.up_strides {list(up_strides)} do not bring strides {below} to one whole stride")
        self.stride, self.coarsest = round(reached.pop()), below[-1]
        self.out_channels = sum(up_channels)
        widths = itertools.pairwise([in_channels, *channels])
        self.blocks = nn.ModuleList(
            _level(before, width, stride, count, neuron)
            for (before, width), stride, count in zip(widths, strides, layers, strict=True)
        )
        self.deblocks = nn.ModuleList(
            nn.Sequential(*_layer(nn.ConvTranspose2d(width, up_width, up, up, bias=False), neuron))
            for width, up, up_width in zip(channels, up_strides, up_channels, strict=True)
        )

    def check_shape(self, height: int, width: int) -> None:
        """Raises InputError for a map that the levels cannot be put together on again."""
        if height % self.coarsest or width % self.coarsest:
            raise InputError(
                f"grid: makes a map of {height} x {width} cells; both must be multiples of {self.coarsest} here: "
                "change point_range or voxel_size"
            )

    def forward(self, features: Tensor) -> Tensor:
        """``(B, out_channels, H / stride, W / stride)`` from ``(B, in_channels, H, W)``."""
        scales = []
        for block, deblock in zip(self.blocks, self.deblocks, strict=True):
            features = block(features)
            scales.append(deblock(features))
        return torch.cat(scales, 1)


def _level(
    in_channels: int, channels: int, stride: int, layers: int, neuron: Callable[[], nn.Module] | None
) -> nn.Sequential:
    # Padding is a module of its own in the published networks: the numbers of the others follow from it.
    modules = [nn.ZeroPad2d(1), *_layer(nn.Conv2d(in_channels, channels, 3, stride, bias=False), neuron)]
    for _ in range(layers):
        modules += _layer(nn.Conv2d(channels, channels, 3, padding=1, bias=False), neuron)
    return nn.Sequential(*modules)


def _layer(conv: nn.Conv2d | nn.ConvTranspose2d, neuron: Callable[[], nn.Module] | None) -> list[nn.Module]:
    norm = map_norm(conv.out_channels)
    return [conv, norm, nn.ReLU()] if neuron is None else [neuron(), conv, norm]


def map_norm(channels: int) -> nn.BatchNorm2d:
    """Batch norm with the constants of published detectors."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)
