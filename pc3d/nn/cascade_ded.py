"""Cascade of dense encoder-decoders on maps from above, the neck of HEDNet and ScatterFormer.

Zhang et al., "HEDNet: A Hierarchical Encoder-Decoder Network for 3D Object Detection in Point Clouds", NeurIPS 2023
(arXiv 2310.20234). Modules carry the names of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.nn.bev_neck import map_norm


class BasicBlock(nn.Module):
    """``ReLU(BN(conv(ReLU(BN(conv(x))))) + P(x))``; ``P`` is a 1x1 convolution with BN where the block has a stride."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = map_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = map_norm(channels)
        self.downsample_layer = nn.Sequential()
        if stride > 1:
            self.downsample_layer.extend([nn.Conv2d(channels, channels, 1, stride, bias=False), map_norm(channels)])

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv2(self.bn1(self.conv1(x)).relu())
        return (self.bn2(inner) + self.downsample_layer(x)).relu()


class EncoderDecoder(nn.Module):
    """Levels of basic blocks, each at half the resolution of the one before, and the way back up.

    Args:
        channels: width of the map and of every level.
        blocks: blocks of each level behind the one that halves the resolution.
    """

    def __init__(self, channels: int, blocks: Sequence[int]) -> None:
        super().__init__()
        self.encoder, self.decoder, self.decoder_norm = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level, count in enumerate(blocks):
            halve = [BasicBlock(channels, stride=2)] if level else []
            self.encoder.append(nn.Sequential(*halve, *(BasicBlock(channels) for _ in range(count))))
        for _ in blocks[1:]:
            up = nn.ConvTranspose2d(channels, channels, 2, 2, bias=False)
            self.decoder.append(nn.Sequential(up, map_norm(channels), nn.ReLU()))
            self.decoder_norm.append(map_norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for encode in self.encoder:
            x = encode(x)
            levels.append(x)
        for decode, norm, skip in zip(self.decoder, self.decoder_norm, levels[-2::-1], strict=True):
            height, width = skip.shape[2:]
            x = norm(decode(x)[..., :height, :width] + skip)  # an odd map comes back one row larger
        return x


class CascadeDED(nn.Module):
    """Encoder-decoders in series, on maps of one width and resolution.

    Args:
        channels: width of the map.
        units: encoder-decoders; none leave the map as it is.
        blocks: of each level, see :class:`EncoderDecoder`.
    """

    def __init__(self, channels: int, units: int, blocks: Sequence[int]) -> None:
        super().__init__()
        if units < 0 or not blocks or min(blocks) < 0:
            raise InputError(f"neck: units {units} and blocks {tuple(blocks)} of its levels must not be negative")
        self.layers = nn.ModuleList(EncoderDecoder(channels, blocks) for _ in range(units))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, bev: Tensor) -> Tensor:
        """``(B, channels, H, W)`` from the same."""
        for layer in self.layers:
            bev = layer(bev)
        return bev
