"""What transformers on serialized clouds share: levels, tokens, blocks, pooling, and the U-Net they are put into.

Wu et al., "Point Transformer V3: Simpler, Faster, Stronger", CVPR 2024 (arXiv 2312.10035). Modules carry the names of
the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pc3d.errors import InputError
from pc3d.nn.adaptable import Adaptable
from pc3d.nn.attention import Backend, RelativePositionBias, Windows, split_windows, window_attention
from pc3d.nn.backbone import Backbone, FeatureInfo
from pc3d.nn.mamba import BidirectionalMamba
from pc3d.nn.mlp import MLP, DropPath, LayerScale
from pc3d.nn.norm import Condition, ConditionalSequential, PointLayerNorm, apply_layer
from pc3d.nn.rope import Rotation
from pc3d.ops.segment import segment_max, segment_mean
from pc3d.ops.serialize import Curve, grid_depth
from pc3d.ops.voxelize import unique_voxels
from pc3d.points import Points
from pc3d.serialization import Order, Serialization, serialize
from pc3d.sparse import SubMConv3d
from pc3d.voxels import Voxels

NormFactory = Callable[[int], nn.Module]

AnyStage = TypeVar("AnyStage", bound="Stage")

DeterministicOrders = bool | Literal["eval"]
"""Whether orders stay as they are instead of being shuffled: always (True), never (False), or in evaluation mode only.
The published models shuffle always; their evaluation differs from run to run."""


@dataclass(frozen=True, eq=False)
class Level:
    """The points of a batch at one resolution: shared by all blocks of the encoder and the decoder on it.

    Attributes:
        voxels: cells ``[batch, x, y, z]`` without features; kernel maps are in its ``context``.
        position: ``(M, 3)`` float32 metres, the mean of the input points in a cell.
        offsets: ``(B + 1,)`` int64 cloud borders.
        serialization: the orders that attention uses, or None where there is none.
        condition: dataset of the batch, for networks with one set of norms per dataset.
        cache: what layers derive from the level once.
    """

    voxels: Voxels
    position: Tensor
    offsets: Tensor
    serialization: Serialization | None = None
    condition: Condition | None = None
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def grid(self) -> Tensor:
        """``(M, 3)`` int32 cells."""
        return self.voxels.coord[:, 1:]

    def windows(self, order: int, size: int, equal: bool = False) -> Windows:
        """Windows along an order (modulo their number); see :func:`~pc3d.nn.attention.split_windows`."""
        assert self.serialization is not None
        number = order % len(self.serialization)
        split, along = (size, equal), (size, equal, number)
        if split not in self.cache:
            self.cache[split] = split_windows(self.offsets, size, equal)
        if along not in self.cache:
            chosen = self.serialization[number]
            self.cache[along] = self.cache[split].along(chosen.order, chosen.inverse)
        return self.cache[along]


@dataclass(frozen=True, eq=False)
class Tokens:
    """What blocks take and give.

    Attributes:
        feat: ``(M, C)`` features of the points of ``level``.
        level: where they are.
        conv_feat: ``(M, C)`` what the next positional convolution sees; None is ``feat``.
        parent: the tokens of the finer level these were pooled from.
        cluster: ``(M_parent,)`` int64, the row here of each row of ``parent``.
        child: the tokens of the coarser level these were unpooled from, where the network is ``traceable``.
    """

    feat: Tensor
    level: Level
    conv_feat: Tensor | None = None
    parent: Tokens | None = None
    cluster: Tensor | None = None
    child: Tokens | None = None

    def to_points(self) -> Points:
        """The points of the level with ``feat`` and ``grid_coord``."""
        attrs = {"feat": self.feat, "grid_coord": self.level.grid}
        return Points(self.level.position, self.level.offsets, attrs)


# Blocks --------------------------------------------------------------------------------------------------------------


class PointRotation(Protocol):
    """A module that gives the rotation of queries and keys on a level."""

    def __call__(self, level: Level) -> Rotation: ...


class SerializedAttention(nn.Module):
    """Multi-head attention inside windows along one order of a level.

    Args:
        channels: width C.
        num_heads: heads H, a divisor of C.
        window_size: points per window.
        order: which order, modulo their number.
        rpe: add a learned bias of the differences of cells.
        rope: module that gives the rotation of queries and keys, or None.
        upcast: scores and softmax in float32 under autocast.
        equal_windows: see :func:`~pc3d.nn.attention.split_windows`.
        backend: see :data:`~pc3d.nn.attention.Backend`.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        window_size: int,
        order: int,
        qkv_bias: bool = True,
        rpe: bool = False,
        rope: PointRotation | None = None,
        upcast: bool = False,
        equal_windows: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if channels % num_heads:
            raise InputError(f"attention: {channels} channels cannot be split into {num_heads} heads")
        self.num_heads = num_heads
        self.window_size = window_size
        self.order = order
        self.upcast = upcast
        self.equal_windows = equal_windows
        self.backend = backend
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.proj = nn.Linear(channels, channels)
        self.rpe = RelativePositionBias(window_size, num_heads) if rpe else None
        self.rope = rope

    def forward(self, feat: Tensor, level: Level) -> Tensor:
        """``(M, C)`` from ``(M, C)``."""
        windows = self.windows(level)
        q, k, v = self.qkv(feat).unflatten(1, (3, self.num_heads, -1)).unbind(1)
        out = window_attention(
            q,
            k,
            v,
            windows,
            bias=None if self.rpe is None else lambda rows: self._bias(level.grid[rows]),
            rope=None if self.rope is None else self.rope(level),
            upcast=self.upcast,
            backend=self.backend,
        )
        return self.proj(out.flatten(1).to(self.proj.weight.dtype))

    def windows(self, level: Level) -> Windows:
        """The windows of this layer, split once per level."""
        return level.windows(self.order, self.window_size, self.equal_windows)

    def prepare(self, level: Level) -> None:
        """Split the windows: they depend on the sizes of the clouds, which torch.compile cannot trace."""
        self.windows(level)

    def _bias(self, cells: Tensor) -> Tensor:
        assert self.rpe is not None
        return self.rpe(cells)


class SerializedMamba(nn.Module):
    """Bidirectional Mamba along one order of a level: every point sees its whole cloud, in time linear in its size.

    Args:
        channels: width C.
        order: which order, modulo their number.
        state: states per channel of the scan.
    """

    def __init__(self, channels: int, order: int, state: int = 16) -> None:
        super().__init__()
        self.order = order
        self.mixer = BidirectionalMamba(channels, state)

    def forward(self, feat: Tensor, level: Level) -> Tensor:
        """``(M, C)`` from ``(M, C)``."""
        along = self._along(level)
        return self.mixer(feat.index_select(0, along.order), level.offsets).index_select(0, along.inverse)

    def prepare(self, level: Level) -> None:
        """Sort the order, once per level."""
        _ = self._along(level).order

    def _along(self, level: Level) -> Order:
        assert level.serialization is not None
        return level.serialization[self.order % len(level.serialization)]


class SerializedBlock(Adaptable, nn.Module):
    """Convolution as conditional positional encoding, then attention, then MLP, each on a residual branch.

    ``block.attn.compile(dynamic=True)`` and ``block.mlp.compile(dynamic=True)`` run through torch.compile without a
    graph break (each block counts towards ``torch._dynamo.config.recompile_limit``). The convolution does not: its
    kernel map depends on the values of the coordinates.

    Args:
        channels: width C.
        attention: mixes points; attention in windows, or Mamba.
        norm: makes layer norms.
        drop_path: probability that a point skips the attention or MLP branch in training.
        mlp_ratio: hidden width of the MLP in units of C.
        layer_scale: start value of the scales of both branches; None has none.
        refresh_conv: False keeps a quirk of Pointcept up to 1.5.1: the convolution of the next block sees the output of
            this block's MLP branch instead of the sum.
    """

    def __init__(
        self,
        channels: int,
        attention: SerializedAttention | SerializedMamba,
        norm: NormFactory,
        drop_path: float = 0.0,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        refresh_conv: bool = True,
    ) -> None:
        super().__init__()
        self.make_adaptable(channels)
        self.refresh_conv = refresh_conv
        self.cpe = nn.ModuleList([SubMConv3d(channels, channels), nn.Linear(channels, channels), norm(channels)])
        self.norm1 = ConditionalSequential(norm(channels))
        self.attn = attention
        self.norm2 = ConditionalSequential(norm(channels))
        self.mlp = nn.Sequential(MLP(channels, int(channels * mlp_ratio)))
        if layer_scale is None:
            self.ls1, self.ls2 = nn.Sequential(), nn.Sequential()
        else:
            self.ls1 = nn.Sequential(LayerScale(channels, layer_scale))
            self.ls2 = nn.Sequential(LayerScale(channels, layer_scale))
        self.drop_path = DropPath(drop_path)

    def run(self, tokens: Tokens) -> Tokens:
        level = tokens.level
        seen = tokens.feat if tokens.conv_feat is None else tokens.conv_feat
        conv, linear, norm = self.cpe
        encoding = linear(conv(level.voxels.with_feat(seen)).feat)
        feat = tokens.feat + apply_layer(norm, encoding, level.condition)
        self.attn.prepare(level)
        feat, branch = self._mix(feat, level)
        return replace(tokens, feat=feat, conv_feat=None if self.refresh_conv else branch)

    def _mix(self, feat: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """Features after both branches, and what the second one added."""
        attended = self.attn(self.norm1(feat, level.condition), level)
        feat = feat + self.drop_path(self.ls1(attended))
        branch = self.drop_path(self.ls2(self.mlp(self.norm2(feat, level.condition))))
        return feat + branch, branch


# Between levels ------------------------------------------------------------------------------------------------------


class SerializedPooling(nn.Module):
    """Pooling of the m1 model: the cells that share the beginning of a code; no order is computed again.

    Rows come in the order of the first curve, features are the maximum of ``Linear(x)``, then norm and GELU.

    Args:
        in_channels, out_channels: widths.
        stride: a power of two.
        norm: makes the norm.
        deterministic_orders: see :data:`DeterministicOrders`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        norm: NormFactory,
        deterministic_orders: DeterministicOrders,
    ) -> None:
        super().__init__()
        if stride < 1 or stride & (stride - 1):
            raise InputError(f"serialized pooling: stride must be a power of two, got {stride}")
        self.levels = stride.bit_length() - 1
        self.deterministic_orders = deterministic_orders
        self.proj = nn.Linear(in_channels, out_channels)
        self.norm = ConditionalSequential(norm(out_channels))
        self.act = nn.GELU()

    def forward(self, tokens: Tokens) -> Tokens:
        level = tokens.level
        assert level.serialization is not None
        serialization, pooling = level.serialization.pooled(self.levels)
        shift = level.serialization.depth - serialization.depth
        coord = level.voxels.coord.index_select(0, pooling.heads)
        coord = torch.cat([coord[:, :1], coord[:, 1:] >> shift], 1)
        child = Level(
            voxels=_without_features(coord, level),
            position=segment_mean(level.position.index_select(0, pooling.rows), pooling.row_offsets),
            offsets=serialization.offsets,
            serialization=_shuffled(serialization, self.deterministic_orders, self.training),
            condition=level.condition,
        )
        feat = segment_max(self.proj(tokens.feat).index_select(0, pooling.rows), pooling.row_offsets)
        feat = self.act(self.norm(feat, level.condition))
        return Tokens(feat, child, parent=tokens, cluster=pooling.cluster)


class GridPooling(nn.Module):
    """Pooling of the later models: cells of a coarser grid, rows by cloud, x, y and z; then a new serialization.

    Features are the maximum of ``Linear(x)``, then norm and GELU.

    Args:
        in_channels, out_channels: widths.
        stride: cells per coarser cell along an axis, any integer.
        norm: makes the norm.
        curves: orders of the coarser level; none where it has no attention.
        deterministic_orders: see :data:`DeterministicOrders`.
        depth: bits per axis of a code, see :func:`first_tokens`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        norm: NormFactory,
        curves: Sequence[Curve],
        deterministic_orders: DeterministicOrders,
        depth: int | None = None,
    ) -> None:
        super().__init__()
        if stride < 1:
            raise InputError(f"grid pooling: stride must be at least 1, got {stride}")
        self.stride = stride
        self.curves = tuple(curves)
        self.depth = depth
        self.deterministic_orders = deterministic_orders
        self.proj = nn.Linear(in_channels, out_channels)
        self.norm = ConditionalSequential(norm(out_channels))
        self.act = nn.GELU()

    def forward(self, tokens: Tokens) -> Tokens:
        level = tokens.level
        grid = torch.div(level.grid, self.stride, rounding_mode="trunc")
        cells = unique_voxels(grid, level.offsets)
        coord = torch.cat([level.voxels.coord[:, :1], grid], 1).index_select(0, cells.first)
        serialization = None
        if self.curves:
            serialization = serialize(coord[:, 1:], cells.voxel_offsets, self.curves, self.depth)
            serialization = _shuffled(serialization, self.deterministic_orders, self.training)
        child = Level(
            voxels=_without_features(coord, level),
            position=segment_mean(level.position.index_select(0, cells.order_rows), cells.row_offsets),
            offsets=cells.voxel_offsets,
            serialization=serialization,
            condition=level.condition,
        )
        feat = segment_max(self.proj(tokens.feat).index_select(0, cells.order_rows), cells.row_offsets)
        feat = self.act(self.norm(feat, level.condition))
        return Tokens(feat, child, parent=tokens, cluster=cells.inverse)


class Unpooling(nn.Module):
    """``GELU(norm(Linear(skip))) + GELU(norm(Linear(x)))[cluster]``: back to the level that was pooled.

    Args:
        in_channels, skip_channels, out_channels: widths.
        norm: makes the norms.
        refresh_conv: False keeps a quirk of the m1 model: the convolution of the next block sees the projected skip
            instead of the sum.
        traceable: keep the coarser tokens as ``child`` of the result.
    """

    def __init__(
        self,
        in_channels: int,
        skip_channels: int,
        out_channels: int,
        norm: NormFactory,
        refresh_conv: bool = True,
        traceable: bool = False,
    ) -> None:
        super().__init__()
        self.refresh_conv = refresh_conv
        self.traceable = traceable
        self.proj = ConditionalSequential(nn.Linear(in_channels, out_channels), norm(out_channels), nn.GELU())
        self.proj_skip = ConditionalSequential(nn.Linear(skip_channels, out_channels), norm(out_channels), nn.GELU())

    def forward(self, tokens: Tokens) -> Tokens:
        parent, cluster = tokens.parent, tokens.cluster
        if parent is None or cluster is None:
            raise ValueError("unpooling of tokens that were not pooled")
        condition = tokens.level.condition
        skip = self.proj_skip(parent.feat, condition)
        feat = skip + self.proj(tokens.feat, condition).index_select(0, cluster)
        child = tokens if self.traceable else None
        return replace(parent, feat=feat, conv_feat=None if self.refresh_conv else skip, child=child)


def first_tokens(
    points: Points,
    curves: Sequence[Curve],
    depth: int | None = None,
    headroom: int = 1,
    condition: Condition | None = None,
) -> tuple[Tokens, Tensor]:
    """Points with ``feat`` and ``grid_coord`` as the tokens of the finest level; points of one cell become their mean.

    Args:
        points: the batch.
        curves: orders; none leaves the level without a serialization.
        depth: bits per axis of a code; None measures the batch as the published models do. Hilbert orders of a cloud
            then depend on the largest cloud of its batch.
        headroom: see :func:`~pc3d.ops.serialize.grid_depth`.
        condition: dataset of the batch.

    Returns:
        The tokens and, ``(N,)`` int64, the token of each point.

    Raises:
        InputError: names the cloud if a field is missing or cells are negative or too far apart.
    """
    width = points.get("feat").shape[1]
    voxels = points.with_attrs(feat=torch.cat([points.get("feat"), points.coord], 1)).voxels()
    clouds = torch.arange(len(points) + 1, dtype=torch.int32, device=points.device)
    offsets = torch.searchsorted(voxels.coord[:, 0].contiguous(), clouds)
    serialization = None
    if curves:
        try:
            bits = grid_depth(voxels.coord[:, 1:], headroom) if depth is None else depth
            serialization = serialize(voxels.coord[:, 1:], offsets, curves, bits)
        except InputError as error:
            raise InputError(f"{points.describe()}: field 'grid_coord': {error}") from None
    level = Level(
        voxels=replace(voxels, feat=voxels.feat[:, :0]),
        position=voxels.feat[:, width:].float(),
        offsets=offsets,
        serialization=serialization,
        condition=condition,
    )
    assert voxels.point_to_voxel is not None
    return Tokens(voxels.feat[:, :width].to(points.get("feat").dtype), level), voxels.point_to_voxel


def _without_features(coord: Tensor, finer: Level) -> Voxels:
    return Voxels(coord, finer.position.new_empty(len(coord), 0), finer.voxels.batch_size)


def _shuffled(serialization: Serialization, deterministic: DeterministicOrders, training: bool) -> Serialization:
    keep = not training if deterministic == "eval" else deterministic
    return serialization if keep else serialization.shuffled()


# The network ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One stage of the encoder or decoder: blocks, width, heads and points per window."""

    depth: int
    channels: int
    num_heads: int
    window_size: int


def stages(
    name: str, depths: Sequence[int], channels: Sequence[int], heads: Sequence[int], windows: Sequence[int]
) -> list[Stage]:
    """The settings of the stages of ``name`` (``enc`` or ``dec``), finest first.

    Raises:
        InputError: if the lists differ in length.
    """
    if len({len(depths), len(channels), len(heads), len(windows)}) != 1:
        raise InputError(
            f"{name}_depths, {name}_channels, {name}_num_head and {name}_patch_size must have one entry per stage, got "
            f"{len(depths)}, {len(channels)}, {len(heads)} and {len(windows)}"
        )
    return [Stage(*settings) for settings in zip(depths, channels, heads, windows, strict=True)]


class SerializedUNet(Backbone):
    """Embedding, encoder stages that pool before their blocks, decoder stages that unpool before theirs.

    Subclasses set what makes the parts and call :meth:`build`. Without a decoder, ``forward`` gives the deepest
    features carried back to the input: at each of ``upcast_levels`` steps they are joined to the features of the finer
    level, further steps copy them.
    """

    embedding: nn.Module
    curves: tuple[Curve, ...]
    shuffle_orders: bool = True
    deterministic_orders: DeterministicOrders = "eval"
    depth: int | None = None
    headroom: int = 1
    upcast_levels: int | None = None
    checkpoint_blocks: bool = False

    def build(
        self,
        encoder: Sequence[AnyStage],
        decoder: Sequence[AnyStage],
        strides: Sequence[int],
        drop_path: float,
        down: Callable[[int, int, int], nn.Module],
        block: Callable[[AnyStage, int, float, bool], nn.Module],
        up: Callable[[int, int, int], nn.Module],
    ) -> None:
        """Make the stages.

        Args:
            encoder, decoder: stages, finest first; no decoder stages for an encoder alone.
            strides: of each pooling.
            drop_path: largest probability of stochastic depth; it rises linearly from 0 with depth.
            down: ``(index of the pooling, in, out channels)`` to a pooling layer.
            block: ``(stage, index in the stage, probability, whether in the decoder)`` to a block.
            up: ``(in, skip, out channels)`` to an unpooling layer.

        Raises:
            InputError: if the numbers of stages and strides do not fit together.
        """
        if len(strides) != len(encoder) - 1 or (decoder and len(decoder) != len(encoder) - 1):
            raise InputError(
                f"{type(self).__name__}: {len(encoder)} encoder stages need {len(encoder) - 1} strides and decoder "
                f"stages, got {len(strides)} and {len(decoder)}"
            )
        rates = _rates(encoder, drop_path)
        self.enc = nn.ModuleDict()
        for s, stage in enumerate(encoder):
            blocks = {f"block{i}": block(stage, i, rates[s][i], False) for i in range(stage.depth)}
            first = {"down": down(s - 1, encoder[s - 1].channels, stage.channels)} if s else {}
            self.enc[f"enc{s}"] = nn.ModuleDict({**first, **blocks})
        self.dec = nn.ModuleDict()
        rates = _rates(decoder, drop_path)
        for s in reversed(range(len(decoder))):
            deeper = [*decoder, encoder[-1]][s + 1].channels
            parts = {"up": up(deeper, encoder[s].channels, decoder[s].channels)}
            # Rates fall towards the output: the block that runs last never skips.
            blocks = {f"block{i}": block(decoder[s], i, rates[s][-1 - i], True) for i in range(decoder[s].depth)}
            self.dec[f"dec{s}"] = nn.ModuleDict({**parts, **blocks})

        widths, steps = [stage.channels for stage in encoder], self.upcast_levels
        joined = len(strides) if steps is None else min(steps, len(strides))
        self.out_channels = decoder[0].channels if decoder else sum(widths[len(widths) - 1 - joined :])
        scale = [1]
        for stride in strides:
            scale.append(scale[-1] * stride)
        self.feature_info = [FeatureInfo("embedding", widths[0], 1)]
        self.feature_info += [FeatureInfo(f"enc{s}", width, scale[s]) for s, width in enumerate(widths)]
        self.feature_info += [
            FeatureInfo(f"dec{s}", decoder[s].channels, scale[s]) for s in reversed(range(len(decoder)))
        ]

    def forward(self, points: Points) -> Tensor:
        """Features ``(N, out_channels)`` in input order.

        Args:
            points: clouds with ``feat`` ``(N, in_channels)`` and ``grid_coord`` ``(N, 3)``, as grid sampling leaves it.

        Raises:
            InputError: if a field is missing, ``feat`` has another width, or cells are negative or too far apart.
        """
        last, token_of_point = self.forward_tokens(points)
        feat = last.feat if len(self.dec) else upcast(last, self.upcast_levels)
        return feat.index_select(0, token_of_point)

    def forward_tokens(self, points: Points) -> tuple[Tokens, Tensor]:
        """The tokens of the last stage, linked to those of other levels, and the token of each point ``(N,)`` int64.

        Without a decoder ``parent`` leads to all finer levels; with one, ``child`` to all coarser ones of a network
        that is ``traceable``. Errors as :meth:`forward`.
        """
        tokens, token_of_point = self._first(points)
        for _, stage in self._stages(points, tokens, token_of_point):
            last = stage
        return last, token_of_point

    def forward_features(self, points: Points) -> dict[str, Points]:
        """The points after the embedding and every stage with ``feat`` and ``grid_coord``, by ``feature_info``."""
        tokens, token_of_point = self._first(points)
        return {name: stage.to_points() for name, stage in self._stages(points, tokens, token_of_point)}

    def _first(self, points: Points) -> tuple[Tokens, Tensor]:
        self.check_input(points)
        return first_tokens(points, self.curves, self.depth, self.headroom, self.condition(points))

    def condition(self, points: Points) -> Condition | None:
        """The dataset of a batch; a network with norms per dataset says here how it is found."""
        return None

    def embed(self, tokens: Tokens, points: Points, token_of_point: Tensor) -> Tokens:
        """The tokens after the stem; a network whose stem needs more than features says so here."""
        return self.embedding(tokens)

    def _stages(self, points: Points, tokens: Tokens, token_of_point: Tensor) -> Iterator[tuple[str, Tokens]]:
        if tokens.level.serialization is not None and self.shuffle_orders:
            shuffled = _shuffled(tokens.level.serialization, self.deterministic_orders, self.training)
            tokens = replace(tokens, level=replace(tokens.level, serialization=shuffled))
        tokens = self.embed(tokens, points, token_of_point)
        yield "embedding", tokens
        for name, stage in [*self.enc.items(), *self.dec.items()]:
            for part, layer in stage.named_children():
                # Pooling and unpooling are left out: their batch norms must see a batch once.
                if self.checkpoint_blocks and part.startswith("block") and torch.is_grad_enabled():
                    tokens = checkpoint(layer, tokens, use_reentrant=False)
                else:
                    tokens = layer(tokens)
            yield name, tokens


def upcast(tokens: Tokens, levels: int | None = None) -> Tensor:
    """Features of the finest level ``(N, C)`` from the deepest tokens of an encoder.

    Args:
        tokens: linked to their parents.
        levels: steps that put the finer level's features before the coarser ones; further steps only copy. None: all.
    """
    feat, step = tokens.feat, 0
    while tokens.parent is not None and tokens.cluster is not None:
        feat, tokens = feat.index_select(0, tokens.cluster), tokens.parent
        if levels is None or step < levels:
            feat = torch.cat([tokens.feat.to(feat.dtype), feat], 1)
        step += 1
    return feat


def _rates(stages: Sequence[AnyStage], largest: float) -> list[list[float]]:
    """Probability of stochastic depth of each block."""
    depths = [stage.depth for stage in stages]
    rates = torch.linspace(0, largest, sum(depths), device="cpu")
    return [part.tolist() for part in rates.split(depths)]


class ConvStem(nn.Module):
    """``GELU(BN(conv(x)))`` with a 5^3 submanifold convolution."""

    def __init__(self, in_channels: int, channels: int, norm: NormFactory) -> None:
        super().__init__()
        self.conv = SubMConv3d(in_channels, channels, 5, bias=False)
        # One layer, named as in the checkpoints; a conditional norm gets its condition from the sequence.
        self.norm = norm(channels)
        self.act = nn.GELU()

    def forward(self, tokens: Tokens) -> Tokens:
        feat = self.conv(tokens.level.voxels.with_feat(tokens.feat)).feat
        feat = ConditionalSequential(self.norm, self.act)(feat, tokens.level.condition)
        return replace(tokens, feat=feat)


class ConvEmbedding(nn.Sequential):
    """The stem under its published name."""

    def __init__(self, in_channels: int, channels: int, norm: NormFactory) -> None:
        super().__init__()
        self.stem = ConvStem(in_channels, channels, norm)


class LinearStem(nn.Module):
    """``GELU(LN(Linear(x)))``."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, channels)
        self.norm = PointLayerNorm(channels)
        self.act = nn.GELU()

    def forward(self, feat: Tensor) -> Tensor:
        return self.act(self.norm(self.linear(feat)))


class LinearEmbedding(nn.Module):
    """Stem of the self-supervised models: no convolution, and a learned token where features are masked.

    Args:
        in_channels, channels: widths.
        mask_token: replace the result where ``points.attrs["mask"]`` ``(N,)`` bool is true, if the points have it.
    """

    def __init__(self, in_channels: int, channels: int, mask_token: bool) -> None:
        super().__init__()
        self.stem = LinearStem(in_channels, channels)
        self.mask_token = nn.Parameter(torch.zeros(1, channels)) if mask_token else None

    def forward(self, tokens: Tokens, points: Points, token_of_point: Tensor) -> Tokens:
        feat = self.stem(tokens.feat)
        if self.mask_token is not None and "mask" in points:
            masked = torch.zeros(len(feat), dtype=torch.bool, device=feat.device)
            masked[token_of_point[points.get("mask")]] = True
            feat = torch.where(masked[:, None], self.mask_token.to(feat.dtype), feat)
        return replace(tokens, feat=feat)


def init_truncated_normal(module: nn.Module) -> None:
    """Start of the self-supervised models: truncated normal (0.02) for linear layers and convolutions, zero biases."""
    if isinstance(module, (nn.Linear, SubMConv3d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
