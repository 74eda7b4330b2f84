"""Sonata: the Point Transformer V3 of self-supervised pre-training, without batch norms and without a stem convolution.

Wu et al., "Sonata: Self-Supervised Learning of Reliable Point Representations", CVPR 2025 (arXiv 2503.16429);
Pointcept, ``PT-v3m2``. Modules carry the names of the published checkpoints; :mod:`pc3d.models.convert` reads and
writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from pc3d.nn.attention import Backend
from pc3d.nn.norm import PointLayerNorm
from pc3d.nn.serialized import (
    DeterministicOrders,
    GridPooling,
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


class Sonata(SerializedUNet):
    """Point Transformer V3 (m2).

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
        enable_rpe: learned bias of relative cells in the attention.
        upcast_attention: attention in float32 under autocast.
        equal_windows: windows as long as the smallest cloud of the batch where that is shorter than the patch size:
            the published network without flash attention.
        depth: bits per axis of a code, at most 16, the same on every level. None counts the bits of the largest cell
            of a batch, as published; a fixed number makes Hilbert orders independent of the batch.
        enc_mode: no decoder; ``forward`` gives the features of all encoder stages at each input point.
        upcast_levels: with ``enc_mode``, how many of the finer stages are joined to the deepest; None: all (1232
            channels), 2 gives the 1088 channels of the published demo.
        traceable: each decoder stage keeps the tokens it was unpooled from, see :meth:`forward_tokens`.
        attention_backend: see :data:`pc3d.nn.attention.Backend`.
        checkpoint_blocks: keep no activations inside blocks but compute them again in the backward pass.

    The defaults are the released encoder, 108.46 M parameters; ``enc_mode=False`` adds the decoder of its fine-tuning
    on ScanNet (124.8 M).
    """

    def __init__(
        self,
        in_channels: int = 9,
        order: Sequence[Curve] = CURVES,
        stride: Sequence[int] = (2, 2, 2, 2),
        enc_depths: Sequence[int] = (3, 3, 3, 12, 3),
        enc_channels: Sequence[int] = (48, 96, 192, 384, 512),
        enc_num_head: Sequence[int] = (3, 6, 12, 24, 32),
        enc_patch_size: Sequence[int] = (1024, 1024, 1024, 1024, 1024),
        dec_depths: Sequence[int] = (2, 2, 2, 2),
        dec_channels: Sequence[int] = (64, 96, 192, 384),
        dec_num_head: Sequence[int] = (4, 6, 12, 24),
        dec_patch_size: Sequence[int] = (1024, 1024, 1024, 1024),
        mlp_ratio: float = 4,
        qkv_bias: bool = True,
        drop_path: float = 0.3,
        layer_scale: float | None = None,
        mask_token: bool = False,
        shuffle_orders: bool = True,
        deterministic_orders: DeterministicOrders = "eval",
        enable_rpe: bool = False,
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
            attention = SerializedAttention(
                stage.channels,
                stage.num_heads,
                stage.window_size,
                order=index,
                qkv_bias=qkv_bias,
                rpe=enable_rpe,
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
