"""What adapters of transformers over patches share: where they attach, and the class token that trains with them."""

from __future__ import annotations

import dataclasses
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.nn.adaptable import Adaptable, BlockAdapter
from pc3d.nn.backbone import Backbone
from pc3d.nn.vit import PatchTokens, TransformerBlock
from pc3d.points import Points


class PatchTransformer(Protocol):
    """The parts of a network such as :class:`~pc3d.models.PointViT` that its adapters work with."""

    adapters: nn.ModuleDict
    blocks: nn.ModuleList
    channels: int
    ignore_origin: bool
    norm: nn.LayerNorm
    out_channels: int
    patch_count: int
    patch_points: int

    def tokens(self, points: Points) -> PatchTokens: ...


def patch_transformer(backbone: Backbone, who: str) -> PatchTransformer:
    """The backbone as what it must be for an adapter of whole networks.

    Raises:
        InputError: if it is no transformer over patches, has no class token, or has such an adapter already.
    """
    blocks = getattr(backbone, "blocks", ())
    if not isinstance(backbone, Adaptable) or not all(isinstance(block, TransformerBlock) for block in blocks):
        raise InputError(f"peft: {who} adapts PointViT; {type(backbone).__name__} is no transformer over patches")
    if getattr(backbone, "cls_token", None) is None or getattr(backbone, "decoder", None) is not None:
        raise InputError(f"peft: {who} needs the class token: a PointViT without decoder")
    if backbone.adapters:
        raise InputError(f"peft: {who} takes the network over, as '{next(iter(backbone.adapters))}' does; detach it")
    return cast(PatchTransformer, backbone)


class NetworkPart(BlockAdapter):
    """Stands around a whole network, and trains its class token and the position of it.

    Both are differences from the pre-trained ones, zero at the start.

    Args:
        adapter: name.
        network: where it will be.
        out_channels: width of the features that it makes.
    """

    def __init__(self, adapter: str, network: PatchTransformer, out_channels: int) -> None:
        super().__init__(adapter)
        self.cls_token, self.cls_pos = (nn.Parameter(torch.zeros(1, 1, network.channels)) for _ in range(2))
        self.width_before, network.out_channels = network.out_channels, out_channels

    def remove(self, block: PatchTransformer) -> None:
        block.out_channels = self.width_before

    def tokens(self, network: PatchTransformer, points: Points) -> PatchTokens:
        """Tokens before the first block, the class token first."""
        tokens = network.tokens(points)
        feat = torch.cat([tokens.feat[:, :1] + self.cls_token, tokens.patches], 1)
        position = torch.cat([tokens.position[:, :1] + self.cls_pos, tokens.position[:, 1:]], 1)
        return dataclasses.replace(tokens, feat=feat, position=position)


class ChannelAffine(nn.Module):
    """``gamma * x + beta`` on the last dimension; ``gamma ~ N(1, std)``, ``beta ~ N(0, std)``."""

    def __init__(self, channels: int, std: float = 0.0) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.full((channels,), value)) for value in (1.0, 0.0))
        if std:
            nn.init.normal_(self.gamma, 1.0, std)
            nn.init.normal_(self.beta, 0.0, std)

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * x + self.beta
