"""Point-PEFT: Tang et al., "Point-PEFT: Parameter-Efficient Fine-Tuning for 3D Pre-trained Models", AAAI 2024.

arXiv 2310.03059, the variant for Point-MAE. Prompts in the first blocks are refined by features of similar training
clouds; an adapter pools and spreads patch tokens over neighbourhoods in space; biases and the last norm train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pc3d.errors import InputError
from pc3d.nn.backbone import Backbone
from pc3d.nn.patches import sample_centres
from pc3d.nn.vit import PatchTokens, TransformerBlock
from pc3d.ops.neighbours import farthest_points, knn
from pc3d.peft.adaptation import Adaptation, check_rate, disabled
from pc3d.peft.bank import FeatureBank, cloud_ids
from pc3d.peft.patch_transformer import NetworkPart, PatchTransformer, patch_transformer
from pc3d.peft.selective import BitFit, NormTuning
from pc3d.points import Points

_HEADS, _HEAD_CHANNELS = 6, 3  # of the attention inside neighbourhoods
_PROMPT_RANK = 8
_MLP_SCALE, _CENTRE_SCALE, _SPREAD_SCALE = 0.7, 0.3, 0.3
_STD = 0.02


class PointPEFT(Adaptation):
    """Point-prior prompts, a geometry-aware adapter, biases, the last norm and the class token.

    The prompts are made of features that the frozen network gave for training clouds. These are kept in a bank, which
    a training fills before its first step (:func:`pc3d.peft.prepare`) and every checkpoint holds. Does not start as
    the frozen model.

    Args:
        bank_size: training clouds in the bank, taken evenly from all of them; published: 11392 of ScanObjectNN.
        rank: width of the two bottlenecks of a block.
        prompts: prompt tokens; two of them come from the query and its mean neighbour, the others from a neighbour
            each.
        prompt_blocks: how many blocks, from the first, have prompts.
        neighbours: tokens per neighbourhood; None: half the points of a patch.
        dropout: rate in the bottlenecks and on the prompts.
        exclude_self: a training cloud does not retrieve itself. False is published.
        half_bank: keep the bank in float16.
        published_neighbours: reproduce the published look-up in the blocks with prompts: neighbourhoods of farthest
            points of prompt coordinates and cloud together, used as row numbers of another, longer list of tokens, so
            that a cloud's result depends on the clouds before it in the batch. False: neighbourhoods of the tokens
            themselves, prompts at their coordinates.
    """

    def __init__(
        self,
        bank_size: int = 11392,
        rank: int = 16,
        prompts: int = 10,
        prompt_blocks: int = 6,
        neighbours: int | None = None,
        dropout: float = 0.1,
        exclude_self: bool = True,
        half_bank: bool = True,
        published_neighbours: bool = False,
    ) -> None:
        for option, value, least in (
            ("rank", rank, 1),
            ("prompts", prompts, 3),
            ("prompt_blocks", prompt_blocks, 1),
            ("neighbours", 1 if neighbours is None else neighbours, 1),
            ("bank_size", bank_size, prompts - 1),  # as many neighbours as prompts need, and the query itself
        ):
            if value < least:
                raise InputError(f"PointPEFT.{option}: {value} must be at least {least}")
        check_rate("PointPEFT.dropout", dropout)
        self.bank_size, self.rank, self.prompts, self.prompt_blocks = bank_size, rank, prompts, prompt_blocks
        self.neighbours, self.dropout, self.exclude_self = neighbours, dropout, exclude_self
        self.half_bank, self.published_neighbours = half_bank, published_neighbours

    def insert(self, backbone: Backbone, name: str) -> None:
        network = patch_transformer(backbone, "PointPEFT")
        if network.patch_count < 2:
            raise InputError("PointPEFT: neighbourhoods need 2 patches or more")
        BitFit([r"^blocks\.\d+\."]).insert(backbone, name)
        NormTuning([r"^norm$"]).insert(backbone, name)
        network.adapters[name] = PointPEFTPart(name, self, network)


class PointPEFTPart(NetworkPart):
    passes_by = (TransformerBlock,)

    def __init__(self, adapter: str, config: PointPEFT, network: PatchTransformer) -> None:
        super().__init__(adapter, network, network.out_channels)
        self.config = config
        self.neighbours = config.neighbours or max(network.patch_points // 2, 1)
        self.bank = FeatureBank(config.bank_size, network.channels, config.half_bank)
        self.prompt_coord = nn.Parameter(torch.empty(config.prompts, 3))
        nn.init.trunc_normal_(self.prompt_coord, std=_STD)
        self.attention = NeighbourAttention(network.channels)
        self.blocks = nn.ModuleList(GeometryBlock(network.channels, config) for _ in network.blocks)
        prompted = min(config.prompt_blocks, len(network.blocks))
        self.prompts = nn.ModuleList(PriorPrompt(network.channels, config) for _ in range(prompted))

    def prepare(self, module: Any, clouds: Callable[[int], Iterable[Points]]) -> None:
        """Fill the bank."""
        network = cast(PatchTransformer, module)
        self.bank.build(clouds(len(self.bank)), lambda batch: self.query(network, network.tokens(batch)))

    def forward(self, block: PatchTransformer, run: Any, tokens: Points) -> Tensor:
        given = self.tokens(block, tokens)
        retrieved = self.retrieve(self.query(block, given), tokens)
        prompted, plain = self.neighbourhoods(block, tokens, given.centres)
        feat = given.feat
        for i, (layer, mine) in enumerate(zip(block.blocks, self.blocks, strict=True)):
            with_prompts = i < len(self.prompts)
            prompt, near = (self.prompts[i](retrieved), prompted) if with_prompts else (feat[:, :0], plain)
            feat = mine(feat + given.position, prompt, layer, self.attention, near)
        feat = block.norm(feat)
        return torch.cat([feat[:, 0], feat[:, 1:].amax(1)], -1)

    @torch.no_grad()
    def query(self, network: PatchTransformer, tokens: PatchTokens) -> Tensor:
        """``(B, C)``: the largest of the patch tokens of the network before it was adapted, without a class token."""
        feat, position = tokens.patches, tokens.position[:, tokens.special :]
        with disabled(cast(Backbone, network)):
            for layer in network.blocks:  # without drop path, in training too
                assert isinstance(layer, TransformerBlock)
                feat = feat + position
                feat = feat + layer.attn(layer.norm1(feat))
                feat = feat + layer.mlp(layer.norm2(feat))
            return network.norm(feat).amax(1)

    def retrieve(self, query: Tensor, points: Points) -> Tensor:
        """``(B, prompts, C)``: the query, the mean of its nearest features by their similarity, these features."""
        leave_out = cloud_ids(points) if self.training and self.config.exclude_self else None
        near, similarity = self.bank.retrieve(query, self.config.prompts - 2, leave_out)
        mean = similarity.softmax(1)[:, None] @ near
        return torch.cat([query[:, None], mean.to(query.dtype), near.to(query.dtype)], 1)

    def neighbourhoods(
        self, network: PatchTransformer, points: Points, centres: Tensor
    ) -> tuple[Neighbourhoods, Neighbourhoods]:
        """With the prompts among the tokens, and without; ``centres`` (B, G, 3) of the patches."""
        count = network.patch_count // 2
        plain = find_neighbourhoods(centres, centres, count, self.neighbours)
        prompts = self.prompt_coord.to(centres.dtype).expand(len(centres), -1, -1)
        if not self.config.published_neighbours:
            coord = torch.cat([prompts, centres], 1)
            return find_neighbourhoods(coord, centres, count, self.neighbours), plain
        joined = _with_points(prompts, points, network)
        return find_neighbourhoods(joined, joined, count, self.neighbours), plain


def _with_points(prompts: Tensor, points: Points, network: PatchTransformer) -> Tensor:
    """``(B, G, 3)`` farthest points of each cloud with the prompts' coordinates ``(B, P, 3)`` before its points."""
    clouds = zip(prompts, points.coord.split(points.counts.tolist()), strict=True)
    coord = torch.cat([torch.cat(pair) for pair in clouds])
    offsets = points.offsets + prompts.shape[1] * torch.arange(len(points.offsets), device=coord.device)
    rows, _ = sample_centres(coord.detach(), offsets, network.patch_count, network.ignore_origin)
    return coord[rows].view(len(prompts), -1, 3)


@dataclass(frozen=True)
class Neighbourhoods:
    """Neighbourhoods of M tokens in each cloud.

    Attributes:
        rows: ``(B, M, k)`` int64 rows of the tokens of all clouds, nearest first.
        own: ``(B, M)`` int64 rows of the tokens in their middle.
        weight: ``(B, G, M)``, how much of each a patch is given; sums to 1 over M.
    """

    rows: Tensor
    own: Tensor
    weight: Tensor


def find_neighbourhoods(coord: Tensor, patches: Tensor, count: int, neighbours: int) -> Neighbourhoods:
    """Neighbourhoods of so many farthest tokens, beginning with the first.

    Args:
        coord: ``(B, T, 3)`` of the tokens; the weights are differentiable in it.
        patches: ``(B, G, 3)`` centres that features are spread to.
        count: M.
        neighbours: k; at most T are found.
    """
    batch, tokens, _ = coord.shape
    flat, each = coord.detach().flatten(0, 1).float(), torch.arange(batch + 1, device=coord.device)
    own = farthest_points(flat, each * tokens, each * count)
    rows, _ = knn(flat[own], each * count, flat, each * tokens, min(neighbours, tokens))
    middle = coord.flatten(0, 1)[own].view(batch, count, 3)
    weight = 1 / ((patches[:, :, None] - middle[:, None]).square().sum(-1) + 1e-8)
    return Neighbourhoods(rows.view(batch, count, -1), own.view(batch, -1), weight / weight.sum(-1, keepdim=True))


class NeighbourAttention(nn.Module):
    """Narrow attention between the tokens of a neighbourhood, one for all blocks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = _HEADS * _HEAD_CHANNELS
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * width, bias=False)
        self.proj = nn.Linear(width, channels)

    def forward(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """``(R, k, C)`` from ``(T, C)`` tokens and ``(R, k)`` rows of them."""
        # Norm and projection see each token once, not in each of its neighbourhoods.
        each = self.qkv(self.norm(tokens))[rows].unflatten(-1, (3, _HEADS, _HEAD_CHANNELS))
        q, k, v = each.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, scale=(_HEADS * _HEAD_CHANNELS) ** -0.5)
        return self.proj(seen.transpose(1, 2).flatten(2))


class QuickBottleneck(nn.Module):
    """``W2 (u sigmoid(1.702 u))`` with ``u = W1 x``."""

    def __init__(self, channels: int, rank: int, dropout: float) -> None:
        super().__init__()
        self.down, self.up, self.dropout = nn.Linear(channels, rank), nn.Linear(rank, channels), nn.Dropout(dropout)
        for layer in (self.down, self.up):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        u = self.down(x)
        return self.up(self.dropout(u * (1.702 * u).sigmoid()))


class PriorPrompt(nn.Module):
    """Prompts of one block: learned ones, and what was retrieved, refined."""

    def __init__(self, channels: int, config: PointPEFT) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.empty(config.prompts, channels))
        nn.init.trunc_normal_(self.prompt, std=_STD)
        self.refine = QuickBottleneck(channels, _PROMPT_RANK, config.dropout)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, retrieved: Tensor) -> Tensor:
        """``(B, P, C)`` from ``(B, P, C)``."""
        return self.dropout(self.prompt.expand_as(retrieved)) + retrieved + self.refine(retrieved)


class GeometryBlock(nn.Module):
    """What stands around one block: a bottleneck behind its MLP, pooled neighbourhoods, one more bottleneck."""

    def __init__(self, channels: int, config: PointPEFT) -> None:
        super().__init__()
        self.mlp, self.last = (QuickBottleneck(channels, config.rank, config.dropout) for _ in range(2))
        self.norm = nn.BatchNorm1d(channels)

    def forward(
        self, x: Tensor, prompt: Tensor, layer: TransformerBlock, attention: NeighbourAttention, near: Neighbourhoods
    ) -> Tensor:
        """``(B, 1 + G, C)`` class token and patches, from those with their positions, and ``(B, P, C)`` prompts."""
        x = torch.cat([x[:, :1], prompt, x[:, 1:]], 1)
        x = x + layer.attn(layer.norm1(x))
        hidden = layer.drop_path(layer.mlp(layer.norm2(x)))
        x = x + hidden + _MLP_SCALE * self.mlp(hidden)
        spread = near.weight.to(x.dtype) @ self.pool(x[:, 1:], layer, attention, near)
        patches = x[:, 1 + prompt.shape[1] :] + _SPREAD_SCALE * spread
        kept = torch.cat([x[:, :1], patches], 1)
        return kept + self.last(kept)

    def pool(
        self, tokens: Tensor, layer: TransformerBlock, attention: NeighbourAttention, near: Neighbourhoods
    ) -> Tensor:
        """``(B, M, C)`` of the neighbourhoods of ``(B, T, C)`` tokens."""
        batch, flat, rows = len(tokens), tokens.flatten(0, 1), near.rows.flatten(0, 1)
        around = flat[rows] + layer.drop_path(attention(flat, rows))
        pooled = F.gelu(self.norm(around.amax(1))) + _CENTRE_SCALE * flat[near.own.flatten()]
        return pooled.unflatten(0, (batch, -1))
