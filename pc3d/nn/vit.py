"""Plain transformer blocks over one fixed-length set of tokens per cloud, as Point-BERT and its successors use them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn import functional as F

from pc3d.errors import InputError
from pc3d.nn.adaptable import Adaptable
from pc3d.nn.mlp import MLP, DropPath


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
