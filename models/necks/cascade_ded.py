"""Cascade of dense encoder-decoders on maps from above, the neck of HEDNet and ScatterFormer.

Zhang et al., "HEDNet: A Hierarchical Encoder-Decoder Network for 3D Object Detection in Point Clouds", NeurIPS 2023
(arXiv 2310.20234). Modules carry the names of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from pc3d.config import Configurable
from pc3d.errors import InputError

_BatchNorm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)


class BasicBlock(nn.Module):
    """``ReLU(BN(conv(ReLU(BN(conv(x))))) + P(x))``; ``P`` is a 1x1 convolution with BN where ``projects``."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, projects: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = _BatchNorm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = _BatchNorm(out_channels)
        self.downsample_layer = nn.Sequential()
        if projects:
            self.downsample_layer.append(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))
            self.downsample_layer.append(_BatchNorm(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv2(self.bn1(self.conv1(x)).relu())
        return (self.bn2(inner) + self.downsample_layer(x)).relu()


class EncoderDecoder(nn.Module):
    """Levels of basic blocks, each at half the resolution of the one before, and the way back up.

    Args:
        in_channels: width of the map; another one than ``channels`` adds a block in front.
        channels: width of every level.
        blocks: blocks of each level behind the one that halves the resolution.
    """

    def __init__(self, in_channels: int, channels: int, blocks: Sequence[int]) -> None:
        super().__init__()
        self.encoder, self.decoder, self.decoder_norm = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level, count in enumerate(blocks):
            layers = [BasicBlock(channels, channels) for _ in range(count)]
            if level or in_channels != channels:
                layers.insert(0, BasicBlock(channels if level else in_channels, channels, 2 if level else 1, True))
            self.encoder.append(nn.Sequential(*layers))
        for _ in blocks[1:]:
            up = nn.ConvTranspose2d(channels, channels, 2, 2, bias=False)
            self.decoder.append(nn.Sequential(up, _BatchNorm(channels), nn.ReLU()))
            self.decoder_norm.append(_BatchNorm(channels))

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for encode in self.encoder:
            x = encode(x)
            levels.append(x)
        for decode, norm, skip in zip(self.decoder, self.decoder_norm, levels[-2::-1], strict=True):
            height, width = skip.shape[2:]
            x = norm(decode(x)[..., :height, :width] + skip)  # an odd map comes back one row larger
        return x


class CascadeDED(nn.Module, Configurable):
    """Encoder-decoders in series, on maps of one resolution.

    Args:
        in_channels: width of the map.
        channels: width inside and of the result.
        units: encoder-decoders.
        blocks: of each level, see :class:`EncoderDecoder`.

    The defaults are those published with ScatterFormer.
    """

    stride = 1

    def __init__(
        self, in_channels: int = 128, channels: int = 128, units: int = 4, blocks: Sequence[int] = (2, 1, 1)
    ) -> None:
        super().__init__()
        if units < 1 or not blocks or min(blocks) < 0 or (blocks[0] == 0 and in_channels == channels):
            raise InputError(
                f"CascadeDED: units {units} must be positive, and blocks {tuple(blocks)} one number for each level, "
                "positive for the first"
            )
        self.in_channels, self.out_channels = in_channels, channels
        inputs = [in_channels] + [channels] * (units - 1)
        self.layers = nn.ModuleList(EncoderDecoder(width, channels, blocks) for width in inputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, bev: Tensor) -> Tensor:
        """``(B, channels, H, W)`` from ``(B, in_channels, H, W)``."""
        for layer in self.layers:
            bev = layer(bev)
        return bev
