"""Utonia: the Point Transformer V3 of Sonata with rotary embedding of metric positions in every attention.

Pointcept, ``PT-v3m3``. Modules carry the names of the published checkpoints; :mod:`pc3d.models.convert` reads and
writes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.nn.attention import Backend
from pc3d.nn.norm import PointLayerNorm
from pc3d.nn.rope import Rotation, rotary_frequencies, rotation
from pc3d.nn.serialized import (
    DeterministicOrders,
    GridPooling,
    Level,
    LinearEmbedding,
    SerializedAttention,
    SerializedBlock,
    SerializedUNet,
    Stage,
    Tokens,
    Unpooling,
    init_truncated_normal,
    stages,
)
from pc3d.ops.serialize import CURVES, Curve
from pc3d.points import Points


class PointRope(nn.Module):
    """Rotation of queries and keys by the positions of a level.

    Args:
        head_dim: channels per head, a multiple of 6.
        base: of the frequencies.
        shift: in training, move all positions by up to this many metres, drawn per axis.
        jitter: in training, scale each axis by a factor in ``1 / jitter .. jitter``, log-uniform.
        rescale: in training, scale all axes by a common factor in ``1 / rescale .. rescale``, log-uniform.

    Raises:
        InputError: if ``head_dim`` is not a multiple of 6, a factor is below 1 or the shift negative.
    """

    inv_freq: Tensor

    def __init__(
        self, head_dim: int, base: float, shift: float | None, jitter: float | None, rescale: float | None
    ) -> None:
        super().__init__()
        for name, value, least in (("shift", shift, 0), ("jitter", jitter, 1), ("rescale", rescale, 1)):
            if value is not None and value < least:
                raise InputError(f"Utonia: {name}_coords must be at least {least}, got {value}")
        self.shift, self.jitter, self.rescale = shift, jitter, rescale
        self.register_buffer("inv_freq", rotary_frequencies(head_dim, base))

    def forward(self, level: Level) -> Rotation:
        position = level.position
        if self.training and self.shift is not None:
            position = position + position.new_empty(3).uniform_(-self.shift, self.shift)
        if self.training and self.jitter is not None:
            position = position * _log_uniform(position, 3, self.jitter)
        if self.training and self.rescale is not None:
            position = position * _log_uniform(position, 1, self.rescale)
        return rotation(position, self.inv_freq)


def _log_uniform(like: Tensor, count: int, factor: float) -> Tensor:
    return like.new_empty(count).uniform_(-math.log(factor), math.log(factor)).exp()


class Utonia(SerializedUNet):
    """Point Transformer V3 (m3): heads have a multiple of 6 channels.

    Args:
        in_channels: width of ``points.attrs["feat"]``: 9 in the released encoder (coord, color in 0..1, normal).
        order: curves; block i of a stage takes the one at i modulo their number.
        stride: cells per coarser cell of each pooling.
        enc_depths, enc_channels, enc_num_head, enc_patch_size: blocks, width, heads and points per window of the
            encoder stages, finest first.
        dec_depths, dec_channels, dec_num_head, dec_patch_size: the same for the decoder stages, finest first.
        mlp_ratio: hidden width of the MLPs in units of the stage's width.
        qkv_bias: bias of queries, keys and values.
        drop_path: largest probability of stochastic depth.
        layer_scale: start value of the scales of attention and MLP branches; None has none.
        mask_token: learn the features of points whose ``attrs["mask"]`` is true.
        shuffle_orders: permute the orders of the input level; those of pooled levels are always permuted.
        deterministic_orders: no permutation at all: ``True``, ``False`` (as published), or ``"eval"`` for evaluation
            mode only.
        rope_base: of the rotary frequencies; 10 in the released configurations.
        shift_coords, jitter_coords, rescale_coords: changes of the positions that the rotation sees in training, drawn
            anew in each block; see :class:`PointRope`. None: no such change.
        dec_rope_enable: rotate in the decoder, too.
        upcast_attention: attention in float32 under autocast.
        equal_windows: windows as long as the smallest cloud of the batch where that is shorter than the patch size:
            the published network without flash attention.
        depth: bits per axis of a code, at most 16, the same on every level. None counts the bits of the largest cell
            of a batch, as published; a fixed number makes Hilbert orders independent of the batch.
        enc_mode: no decoder; ``forward`` gives the features of all encoder stages at each input point.
        upcast_levels: with ``enc_mode``, how many of the finer stages are joined to the deepest; None: all.
        traceable: each decoder stage keeps the tokens it was unpooled from, see :meth:`forward_tokens`.
        attention_backend: see :data:`pc3d.nn.attention.Backend`.
        checkpoint_blocks: keep no activations inside blocks but compute them again in the backward pass.

    The defaults are the released encoder; ``enc_mode=False`` adds the decoder of its fine-tuning on ScanNet, where
    coordinates are halved before grid sampling at 0.01.
    """

    def __init__(
        self,
        in_channels: int = 9,
        order: Sequence[Curve] = CURVES,
        stride: Sequence[int] = (2, 2, 2, 2),
        enc_depths: Sequence[int] = (3, 3, 3, 12, 3),
        enc_channels: Sequence[int] = (54, 108, 216, 432, 576),
        enc_num_head: Sequence[int] = (3, 6, 12, 24, 32),
        enc_patch_size: Sequence[int] = (1024, 1024, 1024, 1024, 1024),
        dec_depths: Sequence[int] = (2, 2, 2, 2),
        dec_channels: Sequence[int] = (54, 108, 216, 432),
        dec_num_head: Sequence[int] = (3, 6, 12, 24),
        dec_patch_size: Sequence[int] = (1024, 1024, 1024, 1024),
        mlp_ratio: float = 4,
        qkv_bias: bool = True,
        drop_path: float = 0.3,
        layer_scale: float | None = None,
        mask_token: bool = False,
        shuffle_orders: bool = True,
        deterministic_orders: DeterministicOrders = "eval",
        rope_base: float = 10,
        shift_coords: float | None = None,
        jitter_coords: float | None = 1.1,
        rescale_coords: float | None = 1.2,
        dec_rope_enable: bool = True,
        upcast_attention: bool = False,
        equal_windows: bool = False,
        depth: int | None = None,
        enc_mode: bool = True,
        upcast_levels: int | None = None,
        traceable: bool = False,
        attention_backend: Backend = "auto",
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.curves = tuple(order)
        self.shuffle_orders = shuffle_orders
        self.deterministic_orders = deterministic_orders
        self.depth = depth
        self.upcast_levels = upcast_levels
        self.checkpoint_blocks = checkpoint_blocks

        def block(stage: Stage, index: int, rate: float, in_decoder: bool) -> SerializedBlock:
            rope = None
            if dec_rope_enable or not in_decoder:
                head_dim = stage.channels // stage.num_heads
                rope = PointRope(head_dim, rope_base, shift_coords, jitter_coords, rescale_coords)
            attention = SerializedAttention(
                stage.channels,
                stage.num_heads,
                stage.window_size,
                order=index,
                qkv_bias=qkv_bias,
                rope=rope,
                upcast=upcast_attention,
                equal_windows=equal_windows,
                backend=attention_backend,
            )
            return SerializedBlock(stage.channels, attention, PointLayerNorm, rate, mlp_ratio, layer_scale)

        def down(index: int, narrow: int, wide: int) -> GridPooling:
            return GridPooling(narrow, wide, stride[index], PointLayerNorm, self.curves, deterministic_orders, depth)

        self.embedding = LinearEmbedding(in_channels, enc_channels[0], mask_token)
        self.build(
            stages("enc", enc_depths, enc_channels, enc_num_head, enc_patch_size),
            [] if enc_mode else stages("dec", dec_depths, dec_channels, dec_num_head, dec_patch_size),
            stride,
            drop_path,
            down,
            block,
            partial(Unpooling, norm=PointLayerNorm, traceable=traceable),
        )
        self.task_layers = () if enc_mode else ("dec",)
        self.apply(init_truncated_normal)

    def embed(self, tokens: Tokens, points: Points, token_of_point: Tensor) -> Tokens:
        return self.embedding(tokens, points, token_of_point)
