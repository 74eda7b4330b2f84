"""LitePT: sparse convolutions at high resolution, windowed attention with rotary cells (PointROPE) at low resolution.

"LitePT: Lighter Yet Stronger Point Transformer" (arXiv 2512.13689); ``LitePT-v1`` of its repository and of Pointcept.
Modules carry the names of the published checkpoints; :mod:`pc3d.models.convert` reads and writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial

from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.nn.adaptable import Adaptable
from pc3d.nn.attention import Backend
from pc3d.nn.mlp import MLP, DropPath
from pc3d.nn.norm import PointBatchNorm, PointLayerNorm
from pc3d.nn.rope import Rotation, rotary_frequencies, rotation
from pc3d.nn.serialized import (
    ConvEmbedding,
    DeterministicOrders,
    GridPooling,
    Level,
    SerializedAttention,
    SerializedUNet,
    Stage,
    Tokens,
    Unpooling,
    stages,
)
from pc3d.ops.serialize import CURVES, Curve
from pc3d.sparse import SubMConv3d


@dataclass(frozen=True)
class HybridStage(Stage):
    """A stage whose blocks convolve, attend, or both; with the base of its rotary frequencies."""

    conv: bool
    attn: bool
    rope_freq: float


class CellRope(nn.Module):
    """Rotation of queries and keys by the integer cells of a level, computed once per level."""

    frequencies: Tensor

    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        self.key = "rotary cells", head_dim, base
        self.register_buffer("frequencies", rotary_frequencies(head_dim, base), persistent=False)

    def forward(self, level: Level) -> Rotation:
        if self.key not in level.cache:
            level.cache[self.key] = rotation(level.grid, self.frequencies)
        return level.cache[self.key]


class HybridBlock(Adaptable, nn.Module):
    """A convolution with a residual, an attention and an MLP branch, or both.

    Without a convolution, a layer norm replaces the features before the attention: published, and no residual.

    Args:
        channels: width C.
        conv: ``x + LN(Linear(conv(x)))`` with a 3^3 submanifold convolution.
        attention: mixes points inside windows; None leaves the MLP out too.
        drop_path: probability that a point skips the attention or MLP branch in training.
        mlp_ratio: hidden width of the MLP in units of C.
    """

    def __init__(
        self,
        channels: int,
        conv: bool,
        attention: SerializedAttention | None,
        drop_path: float = 0.0,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.make_adaptable(channels)
        self.conv: nn.ModuleList | None = None
        if conv:
            self.conv = nn.ModuleList(
                [SubMConv3d(channels, channels), nn.Linear(channels, channels), PointLayerNorm(channels)]
            )
        elif attention is not None:
            self.norm0 = nn.Sequential(PointLayerNorm(channels))
        self.attn = attention
        if attention is not None:
            self.norm1, self.norm2 = (nn.Sequential(PointLayerNorm(channels)) for _ in range(2))
            self.mlp = nn.Sequential(MLP(channels, int(channels * mlp_ratio)))
            self.drop_path = DropPath(drop_path)

    def run(self, tokens: Tokens) -> Tokens:
        feat, level = tokens.feat, tokens.level
        if self.conv is not None:
            conv, linear, norm = self.conv
            feat = feat + norm(linear(conv(level.voxels.with_feat(feat)).feat))
        if self.attn is not None:
            if self.conv is None:
                feat = self.norm0(feat)
            self.attn.prepare(level)
            feat = feat + self.drop_path(self.attn(self.norm1(feat), level))
            feat = feat + self.drop_path(self.mlp(self.norm2(feat)))
        return replace(tokens, feat=feat)


class LitePT(SerializedUNet):
    """LitePT (v1).

    Args:
        in_channels: width of ``points.attrs["feat"]``: 6 indoors (color in 0..1, normal), 4 outdoors (xyz, strength).
        order: curves; block i of a stage takes the one at i modulo their number.
        stride: of each pooling.
        enc_depths, enc_channels, enc_num_head, enc_patch_size: blocks, width, heads and points per window of the
            encoder stages, finest first; channels over heads must be a multiple of 6 where there is attention.
        enc_conv, enc_attn: whether the blocks of a stage convolve and attend; at least one where there are blocks.
        enc_rope_freq: base of the rotary frequencies of each stage.
        dec_depths, dec_channels, dec_num_head, dec_patch_size, dec_conv, dec_attn, dec_rope_freq: the same for the
            decoder stages, finest first. A stage may attend only where the encoder does too.
        mlp_ratio: hidden width of the MLPs in units of the stage's width.
        qkv_bias: bias of queries, keys and values.
        drop_path: largest probability of stochastic depth.
        shuffle_orders: permute the orders of the input level; those of pooled levels are always permuted.
        deterministic_orders: no permutation at all: ``True``, ``False`` (as published, evaluation differs from run to
            run), or ``"eval"`` for evaluation mode only.
        upcast_attention: attention in float32 under autocast.
        equal_windows: see :func:`~pc3d.nn.attention.split_windows`.
        depth: bits per axis of a code, at most 16; None counts those of the largest cell of a batch, as published.
        enc_mode: no decoder; ``forward`` gives the features of all encoder stages at each input point.
        upcast_levels: with ``enc_mode``, how many of the finer stages are joined to the deepest; None: all.
        attention_backend: see :data:`pc3d.nn.attention.Backend`.
        checkpoint_blocks: keep no activations inside blocks but compute them again in the backward pass.

    The defaults are LitePT-S (12,712,932 parameters with 6 input channels); :meth:`base`, :meth:`large` and
    :meth:`small_with_decoder` are the other published sizes, :meth:`tiny` is one for CPUs.

    Raises:
        InputError: if the settings of the stages do not fit each other, or heads cannot be rotated.
    """

    def __init__(
        self,
        in_channels: int = 6,
        order: Sequence[Curve] = CURVES,
        stride: Sequence[int] = (2, 2, 2, 2),
        enc_depths: Sequence[int] = (2, 2, 2, 6, 2),
        enc_channels: Sequence[int] = (36, 72, 144, 252, 504),
        enc_num_head: Sequence[int] = (2, 4, 8, 14, 28),
        enc_patch_size: Sequence[int] = (1024, 1024, 1024, 1024, 1024),
        enc_conv: Sequence[bool] = (True, True, True, False, False),
        enc_attn: Sequence[bool] = (False, False, False, True, True),
        enc_rope_freq: Sequence[float] = (100, 100, 100, 100, 100),
        dec_depths: Sequence[int] = (0, 0, 0, 0),
        dec_channels: Sequence[int] = (72, 72, 144, 252),
        dec_num_head: Sequence[int] = (4, 4, 8, 14),
        dec_patch_size: Sequence[int] = (1024, 1024, 1024, 1024),
        dec_conv: Sequence[bool] = (False, False, False, False),
        dec_attn: Sequence[bool] = (False, False, False, False),
        dec_rope_freq: Sequence[float] = (100, 100, 100, 100),
        mlp_ratio: float = 4,
        qkv_bias: bool = True,
        drop_path: float = 0.3,
        shuffle_orders: bool = True,
        deterministic_orders: DeterministicOrders = "eval",
        upcast_attention: bool = False,
        equal_windows: bool = False,
        depth: int | None = None,
        enc_mode: bool = False,
        upcast_levels: int | None = None,
        attention_backend: Backend = "auto",
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        enc = enc_depths, enc_channels, enc_num_head, enc_patch_size
        dec = dec_depths, dec_channels, dec_num_head, dec_patch_size
        encoder = _stages("enc", *enc, enc_conv, enc_attn, enc_rope_freq)
        decoder = [] if enc_mode else _stages("dec", *dec, dec_conv, dec_attn, dec_rope_freq)
        for s, (stage, skipped) in enumerate(zip(decoder, encoder, strict=False)):
            if stage.attn and not skipped.attn:
                raise InputError(f"LitePT: dec_attn[{s}] needs enc_attn[{s}]: that stage is not serialized")
        self.in_channels = in_channels
        self.curves = tuple(order) if enc_attn[0] else ()
        self.shuffle_orders = shuffle_orders
        self.deterministic_orders = deterministic_orders
        self.depth = depth
        self.upcast_levels = upcast_levels
        self.checkpoint_blocks = checkpoint_blocks

        def block(stage: HybridStage, index: int, rate: float, in_decoder: bool) -> HybridBlock:
            attention = None
            if stage.attn:
                attention = SerializedAttention(
                    stage.channels,
                    stage.num_heads,
                    stage.window_size,
                    order=index,
                    qkv_bias=qkv_bias,
                    rope=CellRope(stage.channels // stage.num_heads, stage.rope_freq),
                    upcast=upcast_attention,
                    equal_windows=equal_windows,
                    backend=attention_backend,
                )
            return HybridBlock(stage.channels, stage.conv, attention, rate, mlp_ratio)

        def down(index: int, narrow: int, wide: int) -> GridPooling:
            curves = tuple(order) if enc_attn[index + 1] else ()
            return GridPooling(narrow, wide, stride[index], PointBatchNorm, curves, deterministic_orders, depth)

        self.embedding = ConvEmbedding(in_channels, enc_channels[0], PointBatchNorm)
        self.build(encoder, decoder, stride, drop_path, down, block, partial(Unpooling, norm=PointBatchNorm))

    @classmethod
    def base(cls, in_channels: int = 6) -> LitePT:
        """LitePT-B: 45,112,788 parameters."""
        return cls(
            in_channels,
            enc_depths=(3, 3, 3, 12, 3),
            enc_channels=(54, 108, 216, 432, 576),
            enc_num_head=(3, 6, 12, 24, 32),
            dec_channels=(72, 108, 216, 432),
            dec_num_head=(4, 6, 12, 24),
        )

    @classmethod
    def large(cls, in_channels: int = 6) -> LitePT:
        """LitePT-L: 85,880,448 parameters."""
        return cls(
            in_channels,
            enc_depths=(3, 3, 3, 12, 3),
            enc_channels=(72, 144, 288, 576, 864),
            enc_num_head=(4, 8, 16, 32, 48),
            dec_channels=(72, 144, 288, 576),
            dec_num_head=(4, 8, 16, 32),
        )

    @classmethod
    def small_with_decoder(cls, in_channels: int = 6) -> LitePT:
        """LitePT-S*, with blocks in the decoder (instance segmentation): 15,988,716 parameters."""
        return cls(
            in_channels,
            dec_depths=(2, 2, 2, 2),
            dec_conv=(True, True, True, False),
            dec_attn=(False, False, False, True),
        )

    @classmethod
    def tiny(cls, in_channels: int = 6) -> LitePT:
        """A small variant for CPUs and small data: four stages, windows of 128."""
        return cls(
            in_channels,
            stride=(2, 2, 2),
            enc_depths=(1, 1, 2, 1),
            enc_channels=(24, 48, 96, 144),
            enc_num_head=(2, 4, 8, 12),
            enc_patch_size=(128,) * 4,
            enc_conv=(True, True, False, False),
            enc_attn=(False, False, True, True),
            enc_rope_freq=(100,) * 4,
            dec_depths=(0, 0, 0),
            dec_channels=(48, 48, 96),
            dec_num_head=(4, 4, 8),
            dec_patch_size=(128,) * 3,
            dec_conv=(False,) * 3,
            dec_attn=(False,) * 3,
            dec_rope_freq=(100,) * 3,
            drop_path=0.1,
        )


def _stages(
    name: str,
    depths: Sequence[int],
    channels: Sequence[int],
    heads: Sequence[int],
    windows: Sequence[int],
    conv: Sequence[bool],
    attn: Sequence[bool],
    bases: Sequence[float],
) -> list[HybridStage]:
    plain = stages(name, depths, channels, heads, windows)
    if not len(plain) == len(conv) == len(attn) == len(bases):
        raise InputError(
            f"LitePT: {name}_conv, {name}_attn and {name}_rope_freq must have one entry per stage, got {len(conv)}, "
            f"{len(attn)} and {len(bases)} for {len(plain)}"
        )
    made = [HybridStage(*astuple(stage), *kind) for stage, *kind in zip(plain, conv, attn, bases, strict=True)]
    for s, stage in enumerate(made):
        if stage.depth and not (stage.conv or stage.attn):
            raise InputError(
                f"LitePT: the blocks of {name}{s} neither convolve nor attend: set {name}_conv or {name}_attn"
            )
    return made
