"""Height maps of aerial scans from a few points per hectare: the network of LidarScout (arXiv 2509.20198, HPG 2025)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pc3d.errors import InputError

WINDOW = 96
"""Pixels per side of the two input rasters."""
PATCH = 64
"""Pixels per side of the height map: the middle of the window."""

_ENCODER_CHANNELS = (1, 8, 16, 32, 64, 128)
_ENCODER_STRIDES = (1, 3, 3, 3, 3)
_DECODER = ((64, 3, 1), (32, 3, 3), (16, 3, 3), (8, 3, 3), (1, 8, 1), (1, 9, 1))  # channels, kernel, stride
_REFINEMENT_CHANNELS = (3, 3, 32, 1)
_INPUT_SCALE = WINDOW / PATCH


def _with_relus(layers: Iterable[nn.Module]) -> nn.Sequential:
    """The layers with a ReLU between each two of them, none after the last."""
    return nn.Sequential(*[module for layer in layers for module in (layer, nn.ReLU())][:-1])


def _encoder() -> nn.Sequential:
    """``(B, 1, 96, 96)`` to ``(B, 128, 1, 1)``."""
    pairs = itertools.pairwise(_ENCODER_CHANNELS)
    return _with_relus(nn.Conv2d(a, b, 3, stride) for (a, b), stride in zip(pairs, _ENCODER_STRIDES, strict=True))


def _decoder(channels: int) -> nn.Sequential:
    """``(B, channels, 1, 1)`` to ``(B, 1, 96, 96)``."""
    inputs = [channels, *(out for out, _, _ in _DECODER)]
    return _with_relus(
        nn.ConvTranspose2d(channels, out, kernel, stride)
        for channels, (out, kernel, stride) in zip(inputs, _DECODER, strict=False)
    )


class HeightMapNet(nn.Module):
    """Two interpolations of sparse heights to one height map (642,888 parameters).

    Each raster has an encoder of its own; their codes are joined and decoded to a first map, which three wide
    convolutions refine together with both rasters. Heights are normalised, see :mod:`pc3d.data.height_patches`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList([_encoder(), _encoder()])
        self.merge = nn.Sequential(nn.Conv2d(2 * _ENCODER_CHANNELS[-1], 512, 1), nn.ReLU())
        self.mix = nn.Sequential(nn.Conv2d(512, 256, 1), nn.ReLU())
        self.decoder = _decoder(256)
        pairs = itertools.pairwise(_REFINEMENT_CHANNELS)
        self.refine = _with_relus(nn.Conv2d(a, b, 9, padding=4) for a, b in pairs)

    def forward(self, nearest: Tensor, linear: Tensor) -> Tensor:
        """Height maps.

        Args:
            nearest: ``(B, 1, 96, 96)`` height of the nearest sample.
            linear: ``(B, 1, 96, 96)`` heights interpolated in the triangles of the samples.

        Returns:
            ``(B, 1, 64, 64)`` heights of the middle of the window.

        Raises:
            InputError: for rasters of another shape.
        """
        for raster in (nearest, linear):
            if raster.shape != (len(nearest), 1, WINDOW, WINDOW):
                raise InputError(f"HeightMapNet takes rasters (B, 1, {WINDOW}, {WINDOW}), got {tuple(raster.shape)}")
        nearest, linear = nearest * _INPUT_SCALE, linear * _INPUT_SCALE
        codes = [encode(raster) for encode, raster in zip(self.encoders, (nearest, linear), strict=True)]
        first = self.decoder(self.mix(self.merge(torch.cat(codes, 1))))
        refined = self.refine(torch.cat([first, nearest, linear], 1))
        border = (WINDOW - PATCH) // 2
        return refined[..., border : border + PATCH, border : border + PATCH]
