"""Plain transformer blocks over one fixed-length set of tokens per cloud, as Point-BERT and its successors use them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn import functional as F

from pc3d.errors import InputError
from pc3d.nn.adaptable import Adaptable
from pc3d.nn.backbone import Backbone
from pc3d.nn.mlp import MLP, DropPath
from pc3d.nn.patches import Patches, select_patches
from pc3d.points import Points


@dataclass(frozen=True)
class PatchTokens:
    """What goes from block to block.

    Attributes:
        feat: ``(B, T, C)``; the last tokens are the patches', the first ``special`` ones a class token or prompts.
        position: ``(B, T, C)`` added before every block.
        centres: ``(B, T - special, 3)`` of the patches.
        special: tokens that are no patch.
    """

    feat: Tensor
    position: Tensor
    centres: Tensor
    special: int = 0

    @property
    def patches(self) -> Tensor:
        """``(B, T - special, C)``."""
        return self.feat[:, self.special :]

    def select(self, keep: Tensor) -> PatchTokens:
        """The patches where ``keep`` (B, G), which must be equally many in every cloud; there are no special tokens."""
        feat, position, centres = (select_patches(values, keep) for values in (self.feat, self.position, self.centres))
        return PatchTokens(feat, position, centres)


class SelfAttention(nn.Module):
    """Multi-head attention between the tokens of a cloud (arXiv 1706.03762); no bias on queries, keys and values."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        if channels % num_heads:
            raise InputError(f"channels {channels} do not divide into num_heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)

    def forward(self, feat: Tensor) -> Tensor:
        """``(B, T, C)``."""
        q, k, v = self.qkv(feat).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TransformerBlock(Adaptable, nn.Module):
    """Pre-norm block; the position is added to its input, and so again before every block."""

    def __init__(self, channels: int, num_heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.make_adaptable(channels)
        self.norm1 = nn.LayerNorm(channels)
        self.attn = SelfAttention(channels, num_heads)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = MLP(channels, int(channels * mlp_ratio))

    def run(self, tokens: PatchTokens) -> PatchTokens:
        x = tokens.feat + tokens.position
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return replace(tokens, feat=x + self.drop_path(self.mlp(self.norm2(x))))


class PatchBackbone(Backbone):
    """A backbone with one token per patch, which pre-training takes apart: hides patches, changes tokens.

    Attributes:
        channels: width of a token, C; ``patch_count`` patches, G; ``patch_points`` points in each, S.
        encoder: points of patches ``(..., S, F)`` to their tokens.
        pos_embed: ``(..., 3)`` centres to positions ``(..., C)``.
        norm: of the tokens that leave the last block.
    """

    channels: int
    patch_count: int
    patch_points: int
    encoder: nn.Module
    pos_embed: nn.Module
    norm: nn.Module

    @abstractmethod
    def group(self, points: Points) -> Patches:
        """Patches of clouds; errors as ``forward``."""

    @abstractmethod
    def embed(self, patches: Patches) -> PatchTokens:
        """A token of each patch, without special ones."""

    @abstractmethod
    def with_class_token(self, tokens: PatchTokens) -> PatchTokens:
        """The tokens behind a class token, if the network has one."""

    @abstractmethod
    def encode(self, tokens: PatchTokens) -> PatchTokens:
        """Tokens after the last block, before the last norm."""


def position_mlp(channels: int) -> nn.Sequential:
    """``(..., 3)`` centres to ``(..., C)`` positions."""
    return nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, channels))


def transformer_blocks(channels: int, depth: int, num_heads: int, mlp_ratio: float, drop_path: float) -> nn.ModuleList:
    """Blocks whose drop path rises linearly from 0 to ``drop_path``."""
    rates: Sequence[float] = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
    return nn.ModuleList(TransformerBlock(channels, num_heads, mlp_ratio, rate) for rate in rates)
