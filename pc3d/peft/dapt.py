"""DAPT: Zhou et al., "Dynamic Adapter Meets Prompt Tuning", CVPR 2024 (arXiv 2403.01439)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pc3d.errors import InputError
from pc3d.nn.backbone import Backbone
from pc3d.nn.mlp import MLP
from pc3d.nn.vit import TransformerBlock
from pc3d.peft.adaptation import Adaptation, check_rate
from pc3d.peft.patch_transformer import ChannelAffine, NetworkPart, PatchTransformer, patch_transformer
from pc3d.points import Points

_STD = 0.02

Pool = Literal["mean", "max"]


class DAPT(Adaptation):
    """A scored bottleneck beside each MLP, a prompt made of its output, and an affine behind most layers.

    Positions are added once, before the first block, unlike in the network without it.

    Args:
        rank: width of the bottlenecks.
        dropout: rate inside them.
        class_token: whether the class token is part of the feature of a cloud.
        prompts, patches: how prompts and patch tokens become part of it; None leaves them out.
        identity: start the affines as the identity, not with the published noise of 0.02.
    """

    def __init__(
        self,
        rank: int = 64,
        dropout: float = 0.0,
        class_token: bool = True,
        prompts: Pool | None = "mean",
        patches: Pool | None = "max",
        identity: bool = False,
    ) -> None:
        if rank < 1:
            raise InputError(f"DAPT.rank: {rank} must be at least 1")
        check_rate("DAPT.dropout", dropout)
        for option, value in (("prompts", prompts), ("patches", patches)):
            if value not in ("mean", "max", None):
                raise InputError(f"DAPT.{option}: '{value}' must be mean, max or null")
        if not (class_token or prompts or patches):
            raise InputError("DAPT: class_token, prompts and patches all left out: the feature is empty")
        self.rank, self.dropout, self.identity = rank, dropout, identity
        self.class_token, self.prompts, self.patches = class_token, prompts, patches

    def insert(self, backbone: Backbone, name: str) -> None:
        network = patch_transformer(backbone, "DAPT")
        network.adapters[name] = DAPTPart(name, self, network)


class DAPTPart(NetworkPart):
    passes_by = (TransformerBlock, MLP)

    def __init__(self, adapter: str, config: DAPT, network: PatchTransformer) -> None:
        channels, config_parts = network.channels, (config.class_token, config.prompts, config.patches)
        super().__init__(adapter, network, sum(map(bool, config_parts)) * channels)
        self.use_class, self.prompt_pool, self.patch_pool = config_parts
        std = 0.0 if config.identity else _STD
        self.affine1, self.affine2 = (ChannelAffine(channels, std) for _ in range(2))
        self.blocks = nn.ModuleList(DAPTBlock(block, config, std) for block in network.blocks)

    def forward(self, block: PatchTransformer, run: Any, tokens: Points) -> Tensor:
        given = self.tokens(block, tokens)
        x = torch.cat([given.feat[:, :1], self.affine1(given.patches)], 1) + given.position
        for layer, mine in zip(block.blocks, self.blocks, strict=True):
            x = mine(x, layer)
        x, count = self.affine2(block.norm(x)), given.centres.shape[1]
        parts = [x[:, 0]] if self.use_class else []
        for pool, some in ((self.prompt_pool, x[:, 1:-count]), (self.patch_pool, x[:, -count:])):
            if pool is not None:
                parts.append(some.mean(1) if pool == "mean" else some.amax(1))
        return torch.cat(parts, -1)


class DAPTBlock(nn.Module):
    """What stands around one block of the network; the sequence grows by its prompt."""

    def __init__(self, block: nn.Module, config: DAPT, std: float) -> None:
        super().__init__()
        assert isinstance(block, TransformerBlock)
        channels, hidden = block.channels, block.mlp.fc1.out_features
        self.norm1, self.norm2, self.prompt, self.proj, self.fc2 = (ChannelAffine(channels, std) for _ in range(5))
        self.qkv, self.fc1 = ChannelAffine(3 * channels, std), ChannelAffine(hidden, std)
        self.adapter = ScoredBottleneck(channels, config.rank, config.dropout)

    def forward(self, x: Tensor, block: TransformerBlock) -> Tensor:
        """``(B, T + 1, C)`` from ``(B, T, C)``."""
        x = x + block.drop_path(self._attend(self.norm1(block.norm1(x)), block))
        y = self.norm2(block.norm2(x))
        added = self.adapter(y)
        mixed = self.fc2(block.mlp.fc2(block.mlp.act(self.fc1(block.mlp.fc1(y)))))
        x = x + block.drop_path(mixed + added)
        prompt = self.prompt(F.gelu(added).mean(1, keepdim=True))
        return torch.cat([x[:, :1], prompt, x[:, 1:]], 1)

    def _attend(self, x: Tensor, block: TransformerBlock) -> Tensor:
        attn = block.attn
        q, k, v = self.qkv(attn.qkv(x)).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


class ScoredBottleneck(nn.Module):
    """``ReLU(s(u)) * W2 GELU(W1 u)`` with ``u = LN(x)`` and a score ``s`` per token; zero at the start."""

    def __init__(self, channels: int, rank: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.score, self.down, self.up = nn.Linear(channels, 1), nn.Linear(channels, rank), nn.Linear(rank, channels)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.score, self.down):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        for layer in (self.score, self.down, self.up):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm(x)
        return self.up(self.dropout(F.gelu(self.down(u)))) * F.relu(self.score(u))
