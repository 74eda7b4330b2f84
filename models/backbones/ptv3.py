"""Point Transformer V3: windowed attention along space-filling curves, a sparse convolution as positional encoding.

Wu et al., "Point Transformer V3: Simpler, Faster, Stronger", CVPR 2024 (arXiv 2312.10035); Pointcept, ``PT-v3m1``.
Modules carry the names of the published checkpoints; :mod:`pc3d.models.convert` reads and writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import nn

from pc3d.errors import InputError
from pc3d.nn.attention import Backend
from pc3d.nn.norm import Condition, ConditionalNorm, PointBatchNorm, PointLayerNorm, check_default, condition_of
from pc3d.nn.serialized import (
    ConvEmbedding,
    DeterministicOrders,
    NormFactory,
    SerializedAttention,
    SerializedBlock,
    SerializedMamba,
    SerializedPooling,
    SerializedUNet,
    Stage,
    Unpooling,
    stages,
)
from pc3d.ops.serialize import CURVES, Curve
from pc3d.points import Points


class PTv3(SerializedUNet):
    """Point Transformer V3 (m1).

    Args:
        in_channels: width of ``points.attrs["feat"]``: 6 indoors (color in 0..1, normal), 4 outdoors (xyz, strength).
        order: curves; block i of a stage takes the one at i modulo their number.
        stride: of each pooling, powers of two.
        enc_depths, enc_channels, enc_num_head, enc_patch_size: blocks, width, heads and points per window of the
            encoder stages, finest first.
        dec_depths, dec_channels, dec_num_head, dec_patch_size: the same for the decoder stages, finest first.
        mlp_ratio: hidden width of the MLPs in units of the stage's width.
        qkv_bias: bias of queries, keys and values.
        drop_path: largest probability of stochastic depth.
        shuffle_orders: permute the orders of the input level; those of pooled levels are always permuted.
        deterministic_orders: no permutation at all: ``True``, ``False`` (as published, evaluation differs from run to
            run), or ``"eval"`` for evaluation mode only.
        enable_rpe: learned bias of relative cells in the attention.
        upcast_attention: attention in float32 under autocast.
        equal_windows: windows as long as the smallest cloud of the batch where that is shorter than the patch size:
            the published network without flash attention. False makes a cloud independent of its batch.
        refresh_sparse_after_unpool: the first convolution after an unpooling sees the sum of both branches. Published
            checkpoints were trained without: it sees the projected skip features.
        legacy_v151: the network of Pointcept up to 1.5.1, for checkpoints published before 1.6: convolutions see the
            MLP branch of the block before, and the depth of codes is counted differently. Those checkpoints also want
            colors scaled to -1..1.
        depth: bits per axis of a code, at most 16. None counts the bits of the largest cell of a batch, as published;
            a fixed number makes Hilbert orders independent of the batch.
        pdnorm_conditions: datasets of a jointly trained network (PPT); the clouds of a batch name theirs in
            ``meta["condition"]``.
        pdnorm_default: dataset of clouds that name none.
        pdnorm_bn, pdnorm_ln: which norms have one set of parameters per dataset.
        pdnorm_adaptive: these norms are also modulated by a learned context of the dataset, of ``context_channels``.
        enc_mode: no decoder; ``forward`` gives the features of all encoder stages at each input point.
        upcast_levels: with ``enc_mode``, how many of the finer stages are joined to the deepest; None: all.
        mixer: "mamba" puts a bidirectional Mamba along the same orders in the place of windowed attention (our own
            variant): linear in points, and what concerns heads, patches and attention has no effect.
        attention_backend: see :data:`pc3d.nn.attention.Backend`.
        checkpoint_blocks: keep no activations inside blocks but compute them again in the backward pass.

    The defaults are the published network for ScanNet, ScanNet200, nuScenes, Waymo and SemanticKITTI: 46,167,572
    parameters with a linear head of 20 classes and 6 input channels. :meth:`s3dis_rpe` is the one for S3DIS with
    relative positions, :meth:`small` one for CPUs.
    """

    def __init__(
        self,
        in_channels: int = 6,
        order: Sequence[Curve] = CURVES,
        stride: Sequence[int] = (2, 2, 2, 2),
        enc_depths: Sequence[int] = (2, 2, 2, 6, 2),
        enc_channels: Sequence[int] = (32, 64, 128, 256, 512),
        enc_num_head: Sequence[int] = (2, 4, 8, 16, 32),
        enc_patch_size: Sequence[int] = (1024, 1024, 1024, 1024, 1024),
        dec_depths: Sequence[int] = (2, 2, 2, 2),
        dec_channels: Sequence[int] = (64, 64, 128, 256),
        dec_num_head: Sequence[int] = (4, 4, 8, 16),
        dec_patch_size: Sequence[int] = (1024, 1024, 1024, 1024),
        mlp_ratio: float = 4,
        qkv_bias: bool = True,
        drop_path: float = 0.3,
        shuffle_orders: bool = True,
        deterministic_orders: DeterministicOrders = "eval",
        enable_rpe: bool = False,
        upcast_attention: bool = False,
        equal_windows: bool = False,
        refresh_sparse_after_unpool: bool = False,
        legacy_v151: bool = False,
        depth: int | None = None,
        pdnorm_conditions: Sequence[str] = (),
        pdnorm_bn: bool = True,
        pdnorm_ln: bool = True,
        pdnorm_default: str | None = None,
        pdnorm_adaptive: bool = False,
        context_channels: int = 256,
        enc_mode: bool = False,
        upcast_levels: int | None = None,
        mixer: Literal["attention", "mamba"] = "attention",
        attention_backend: Backend = "auto",
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        if mixer not in ("attention", "mamba"):
            raise InputError(f"mixer: {mixer!r} is not attention or mamba")
        if pdnorm_adaptive and not pdnorm_conditions:
            raise InputError("pdnorm_adaptive: there is nothing to modulate without pdnorm_conditions")
        check_default(pdnorm_default, pdnorm_conditions)
        self.in_channels = in_channels
        self.curves = tuple(order)
        self.shuffle_orders = shuffle_orders
        self.deterministic_orders = deterministic_orders
        self.depth, self.headroom = depth, 0 if legacy_v151 else 1
        self.conditions, self.default_condition = tuple(pdnorm_conditions), pdnorm_default
        self.upcast_levels = upcast_levels
        self.checkpoint_blocks = checkpoint_blocks

        context = context_channels if pdnorm_adaptive else None
        self.embedding_table = nn.Embedding(len(pdnorm_conditions), context) if context else None
        per_dataset = partial(ConditionalNorm, conditions=len(pdnorm_conditions), context_channels=context)
        batch_norm: NormFactory = PointBatchNorm
        layer_norm: NormFactory = PointLayerNorm
        if pdnorm_conditions and pdnorm_bn:
            batch_norm = partial(per_dataset, PointBatchNorm)
        if pdnorm_conditions and pdnorm_ln:
            layer_norm = partial(per_dataset, PointLayerNorm)

        def block(stage: Stage, index: int, rate: float, in_decoder: bool) -> SerializedBlock:
            if mixer == "mamba":
                mamba = SerializedMamba(stage.channels, order=index)
                return SerializedBlock(stage.channels, mamba, layer_norm, rate, mlp_ratio, refresh_conv=not legacy_v151)
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
            return SerializedBlock(stage.channels, attention, layer_norm, rate, mlp_ratio, refresh_conv=not legacy_v151)

        def down(index: int, narrow: int, wide: int) -> SerializedPooling:
            return SerializedPooling(narrow, wide, stride[index], batch_norm, deterministic_orders)

        self.embedding = ConvEmbedding(in_channels, enc_channels[0], batch_norm)
        self.build(
            stages("enc", enc_depths, enc_channels, enc_num_head, enc_patch_size),
            [] if enc_mode else stages("dec", dec_depths, dec_channels, dec_num_head, dec_patch_size),
            stride,
            drop_path,
            down,
            block,
            partial(Unpooling, norm=batch_norm, refresh_conv=refresh_sparse_after_unpool),
        )

    def condition(self, points: Points) -> Condition | None:
        if not self.conditions:
            return None
        return condition_of(points, self.conditions, self.default_condition, self.embedding_table)

    @classmethod
    def s3dis_rpe(cls, in_channels: int = 6) -> PTv3:
        """The published network for S3DIS with relative position bias: windows of 128, attention in float32."""
        return cls(
            in_channels,
            enc_patch_size=(128,) * 5,
            dec_patch_size=(128,) * 4,
            enable_rpe=True,
            upcast_attention=True,
        )

    @classmethod
    def outdoor(cls, in_channels: int = 4) -> PTv3:
        """The published network for nuScenes, Waymo and SemanticKITTI: coordinates and strength go in."""
        return cls(in_channels)

    @classmethod
    def small(cls, in_channels: int = 6, mixer: Literal["attention", "mamba"] = "attention") -> PTv3:
        """A small variant for CPUs and small data: 2.3 M parameters, four stages, windows of 128."""
        return cls(
            in_channels,
            stride=(2, 2, 2),
            enc_depths=(1, 1, 2, 1),
            enc_channels=(24, 48, 96, 144),
            enc_num_head=(2, 4, 8, 12),
            enc_patch_size=(128,) * 4,
            dec_depths=(1, 1, 1),
            dec_channels=(32, 48, 96),
            dec_num_head=(2, 4, 8),
            dec_patch_size=(128,) * 3,
            drop_path=0.1,
            mixer=mixer,
        )
