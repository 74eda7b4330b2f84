"""Segment-Fusion: attention between the segments of a scene, for semantics and instances at once.

Thyagharajan et al., "Segment-Fusion: Hierarchical Context Fusion for Robust 3D Semantic Segmentation", CVPR 2022 (arXiv
2111.08434). The paper's stages are: graph segmentation, pooling to segments, a learnable attention-based fusion with
semantic and instance features, connected component labelling. Layers, sizes, biases, losses and thresholds here are our
own design: no code and no such details are public.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pc3d.errors import InputError
from pc3d.losses.discriminative import discriminative_loss, offset_loss
from pc3d.losses.lovasz import Lovasz
from pc3d.metrics import Instances
from pc3d.nn.mlp import MLP, DropPath
from pc3d.ops.graph import (
    Segments,
    connected_components,
    contract_graph,
    edge_weights,
    estimate_normals,
    majority,
    neighbour_edges,
    segment_graph,
)
from pc3d.ops.neighbours import knn
from pc3d.ops.segment import segment_max, segment_sum
from pc3d.points import Points
from pc3d.tasks.heads import InstanceHead, InstanceOutput, instance_targets

_EDGE_FEATURES = 8
_CONCAVE = 0.15  # a border that bends inwards by more parts two segments at first
_STEEPNESS = 10.0  # of the affinity over the bend of a border, at first
_FAR_NEIGHBOURS = 64  # of a segment in a scene with more than `dense_limit` of them


@dataclass
class Pairs:
    """Directed pairs of segments, sorted by the first: who listens to whom.

    Attributes:
        first, second: ``(P,)`` int64 segments.
        borders: ``(S + 1,)`` int64 runs of one first segment.
        features: ``(P, 8)`` see :meth:`SegmentGraph.features`.
    """

    first: Tensor
    second: Tensor
    borders: Tensor
    features: Tensor


@dataclass
class SegmentGraph:
    """Pooled geometry of the segments of a batch, and which of them touch.

    Attributes:
        segments: the partition.
        edges: ``(E, 2)`` int64 touching pairs ``a < b``.
        crossings: ``(E,)`` log of 1 + number of edges between their points; ``weight``: mean weight of those;
            ``convexity``: mean bend of those, see :func:`bends`.
        center: ``(S, 3)`` mean of the points; ``voted``: mean of where their instance centres are said to be.
        normal: ``(S, 3)`` mean normal; ``embedding``: ``(S, E)`` mean point embedding.
    """

    segments: Segments
    edges: Tensor
    crossings: Tensor
    weight: Tensor
    convexity: Tensor
    center: Tensor
    voted: Tensor
    normal: Tensor
    embedding: Tensor

    def features(self, a: Tensor, b: Tensor, crossings: Tensor, weight: Tensor) -> Tensor:
        """``(..., 8)`` of pairs: crossings, weight, centre difference (3), distance of the voted centres, cosine of the
        mean embeddings, and the mean normals' product without sign. Nothing depends on where the scene lies. The
        segments ``a`` and ``b`` may broadcast to the shape of the others."""
        apart = self.center[b] - self.center[a]
        voted = (self.voted[b] - self.voted[a]).square().sum(-1)
        unit = F.normalize(self.embedding, dim=-1)
        alike = (unit[a] * unit[b]).sum(-1)
        normals = (self.normal[a] * self.normal[b]).sum(-1).abs()
        columns = [crossings, weight, (voted + 1e-12).sqrt(), alike, normals]
        return torch.cat([torch.stack(columns, -1), apart], -1)

    def touching(self) -> Pairs:
        """Each segment with itself and those it touches."""
        a, b = self.edges.unbind(1)
        own = torch.arange(len(self.segments), device=a.device)
        zero = self.weight.new_zeros(len(own))
        crossings, weight = (torch.cat([v, v, zero]) for v in (self.crossings, self.weight))
        return self._pairs(torch.cat([a, b, own]), torch.cat([b, a, own]), crossings, weight)

    def _pairs(self, a: Tensor, b: Tensor, crossings: Tensor, weight: Tensor) -> Pairs:
        order = (a * max(len(self.segments), 1) + b).argsort()
        a, b = a[order], b[order]
        counts = torch.bincount(a, minlength=len(self.segments))
        borders = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return Pairs(a, b, borders, self.features(a, b, crossings[order], weight[order]))

    def scene(self, dense_limit: int, radius: float) -> Scope:
        """Each segment with all of its scene, or in large scenes with those whose voted centres are within a radius."""
        sizes = self.segments.offsets.diff()
        large = sizes > dense_limit
        dense = [
            (begin, end, self._all_pairs(begin, end))
            for (begin, end), is_large in zip(
                itertools.pairwise(self.segments.offsets.tolist()), large.tolist(), strict=True
            )
            if begin < end and not is_large
        ]
        if not bool(large.any()):
            return Scope(dense, None)
        voted, offsets = self.voted.detach().float(), self.segments.offsets
        rows = knn(voted, offsets, voted, offsets, _FAR_NEIGHBOURS, radius)[0]
        rows = torch.cat([rows, torch.arange(len(rows), device=rows.device)[:, None]], 1)
        home = torch.repeat_interleave(large, sizes)[:, None] & (rows >= 0)
        keys = (torch.arange(len(rows), device=rows.device)[:, None] * len(rows) + rows)[home].unique()
        a, b = keys.div(len(rows), rounding_mode="floor"), keys % len(rows)
        crossings, weight = self._of_pairs(a, b)
        return Scope(dense, self._pairs(a, b, crossings, weight))

    def _all_pairs(self, begin: int, end: int) -> Tensor:
        index = torch.arange(begin, end, device=self.edges.device)
        size = end - begin
        tables = self.weight.new_zeros(2, size, size)
        inside = (self.edges[:, 0] >= begin) & (self.edges[:, 0] < end)
        a, b = (self.edges[inside] - begin).unbind(1)
        values = torch.stack([self.crossings[inside], self.weight[inside]])
        tables[:, a, b] = values
        tables[:, b, a] = values
        return self.features(index[:, None], index[None], *tables)

    def _of_pairs(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Crossings and weight of any pairs, 0 for those that do not touch."""
        size = len(self.segments)
        known = self.edges[:, 0] * size + self.edges[:, 1]
        wanted = torch.minimum(a, b) * size + torch.maximum(a, b)
        if not len(known):
            return self.weight.new_zeros(len(a)), self.weight.new_zeros(len(a))
        place = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
        found = known[place] == wanted
        return self.crossings[place] * found, self.weight[place] * found


@dataclass
class Scope:
    """Who attends to whom: whole scenes (first segment, behind the last, features (S, S, 8)), and single pairs."""

    dense: list[tuple[int, int, Tensor]]
    pairs: Pairs | None


class SegmentAttention(nn.Module):
    """Multi-head attention between segments, with a bias from the features of each pair."""

    def __init__(self, channels: int, num_heads: int, bias_hidden: int = 32) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.bias_mlp = nn.Sequential(
            nn.Linear(_EDGE_FEATURES, bias_hidden), nn.GELU(), nn.Linear(bias_hidden, num_heads)
        )

    def forward(self, feat: Tensor, scope: Scope) -> Tensor:
        """``(S, C)`` to ``(S, C)``; a segment that attends to nothing gets the bias of the projection."""
        width = feat.shape[1] // self.num_heads
        q, k, v = self.qkv(feat).view(len(feat), 3, self.num_heads, width).unbind(1)
        out = torch.zeros_like(v) if scope.pairs is None else self._sparse(q, k, v, scope.pairs)
        for begin, end, features in scope.dense:
            rows = slice(begin, end)
            bias = self.bias_mlp(features.to(feat.dtype)).permute(2, 0, 1)
            query, key, value = (t[rows].transpose(0, 1)[None] for t in (q, k, v))
            mixed = F.scaled_dot_product_attention(query, key, value, bias[None].to(v.dtype))[0].transpose(0, 1)
            out = torch.cat([out[:begin], mixed.to(out.dtype), out[end:]])
        return self.proj(out.flatten(1))

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs) -> Tensor:
        """Softmax over the pairs of each first segment; memory grows with the number of pairs."""
        scores = (q[pairs.first] * k[pairs.second]).sum(-1) * q.shape[-1] ** -0.5
        scores = (scores + self.bias_mlp(pairs.features.to(q.dtype))).float()
        scores = (scores - segment_max(scores.detach(), pairs.borders)[pairs.first]).exp()
        share = scores / segment_sum(scores, pairs.borders)[pairs.first]
        return segment_sum(share.to(v.dtype)[..., None] * v[pairs.second], pairs.borders)


class FusionBlock(nn.Module):
    """Pre-norm transformer block over segments."""

    def __init__(self, channels: int, num_heads: int, mlp_ratio: float, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = SegmentAttention(channels, num_heads)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = MLP(channels, int(channels * mlp_ratio))
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, feat: Tensor, scope: Scope) -> Tensor:
        feat = feat + self.drop_path(self.dropout(self.attn(self.norm1(feat), scope)))
        return feat + self.drop_path(self.dropout(self.mlp(self.norm2(feat))))


class Tokenizer(nn.Module):
    """Pooled features to tokens."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_channels, channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.norm(self.proj(pooled))


@dataclass
class FusionOutput(InstanceOutput):
    """Adds: the graph, segment ``semantic`` logits (S, K), unit ``identity`` (S, 16), ``affinity`` logits (E,) of the
    touching pairs, and per point ``embedding`` (N, E) and ``offset`` (N, 3) to the centre of its instance."""

    graph: SegmentGraph
    semantic: Tensor
    identity: Tensor
    affinity: Tensor
    embedding: Tensor
    offset: Tensor


class SegmentFusion(InstanceHead[FusionOutput]):
    """Pool to segments, fuse them by attention, label points and join segments to instances.

    Points need ``superpoint`` (N,), as :class:`~pc3d.data.transforms.GraphSegments` makes it (of several columns the
    first counts). Attention goes to touching segments in every first block, to the whole scene in every second. The
    class logits are the log of a segment's mean probability plus what the network adds; that is zero at first, so an
    untrained head gives exactly the segments' vote. In the same way the affinity of two segments is a line over how
    convex their border is, which is learnt, plus what the network adds: an untrained head parts segments of one class
    at concave borders (Stein et al., "Object Partitioning using Local Convexity", CVPR 2014). Normals have to point
    out of the objects, as those do that point to the sensor or to the middle of a room.

    Args:
        channels, depth, num_heads, mlp_ratio, dropout, drop_path: of the transformer.
        embedding: width of a point's embedding; ``identity``: of a segment's.
        neighbours: nearest points whose segments touch.
        dense_limit: most segments of a scene that attend to each other all; ``radius``: metres between voted centres
            beyond which segments of larger scenes do not.
        segment_drop: share of the segments whose input is hidden while training; ``noise``: of the pooled features.
        min_purity: segments below this share of their majority do not count in the loss.
        affinity_weight, identity_weight, point_weight: factors of the losses beside the semantic one.
        restraint: cost of the square of what the network adds to an affinity. About 0.01 where few scenes of convex
            objects are learnt from, which it would else learn by heart.
        join: affinity from which touching segments join; ``gap``: metres between voted centres and ``difference``: of
            identities, below which others do.
        linkage: ``single``: one such pair joins all that hangs on either segment. ``sum``: the log-odds of all borders
            between two parts count, each as often as edges cross it (:func:`~pc3d.ops.graph.contract_graph`), so that
            a short doubtful border does not join objects that a long one parts.
        min_points: smaller instances are dropped.
    """

    things: Tensor

    def __init__(
        self,
        channels: int = 128,
        depth: int = 4,
        num_heads: int = 8,
        mlp_ratio: float = 2.0,
        dropout: float = 0.1,
        drop_path: float = 0.1,
        embedding: int = 8,
        identity: int = 16,
        neighbours: int = 10,
        dense_limit: int = 1024,
        radius: float = 2.0,
        segment_drop: float = 0.1,
        noise: float = 0.02,
        min_purity: float = 0.6,
        affinity_weight: float = 0.5,
        identity_weight: float = 0.1,
        point_weight: float = 1.0,
        restraint: float = 0.0,
        join: float = 0.5,
        linkage: Literal["single", "sum"] = "single",
        gap: float = 0.3,
        difference: float = 0.5,
        min_points: int = 100,
    ) -> None:
        super().__init__()
        if channels % num_heads:
            raise InputError(f"SegmentFusion: channels {channels} do not divide into num_heads {num_heads}")
        self.widths = (channels, depth, num_heads, mlp_ratio, dropout, drop_path)
        self.embedding_channels, self.identity_channels = embedding, identity
        self.neighbours = neighbours
        self.dense_limit, self.radius = dense_limit, radius
        self.segment_drop, self.noise = segment_drop, noise
        self.min_purity = min_purity
        self.affinity_weight, self.identity_weight, self.point_weight = affinity_weight, identity_weight, point_weight
        self.restraint = restraint
        self.join, self.gap, self.difference = join, gap, difference
        self.min_points = min_points
        if linkage not in ("single", "sum") or not 0 < join < 1:
            raise InputError(f"SegmentFusion: linkage '{linkage}' must be single or sum, join {join} lie within 0..1")
        self.linkage = linkage
        self.lovasz = Lovasz()

    def build(self, in_channels: int, num_classes: int, things: list[bool]) -> None:
        channels, depth, num_heads, mlp_ratio, dropout, drop_path = self.widths
        self.register_buffer("things", torch.tensor(things), persistent=False)
        self.point_heads = nn.ModuleDict(
            {"embedding": _two_layers(in_channels, self.embedding_channels), "offset": _two_layers(in_channels, 3)}
        )
        pooled = in_channels + num_classes + 2 * self.embedding_channels + 13
        semantic = nn.Sequential(nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, num_classes))
        affinity = nn.Sequential(nn.Linear(2 * channels + _EDGE_FEATURES, channels), nn.GELU(), nn.Linear(channels, 1))
        border = nn.Linear(1, 1)
        with torch.no_grad():
            for parameter in (*semantic[-1].parameters(), *affinity[-1].parameters()):
                parameter.zero_()
            border.weight.fill_(_STEEPNESS)
            border.bias.fill_(_STEEPNESS * _CONCAVE)
        heads = {
            "semantic": semantic,
            "embedding": nn.Sequential(nn.Linear(channels, self.identity_channels)),
            "affinity": affinity,
        }
        self.fusion = nn.ModuleDict(
            {
                "tokenizer": Tokenizer(pooled, channels),
                "blocks": nn.ModuleList(
                    FusionBlock(channels, num_heads, mlp_ratio, dropout, drop_path) for _ in range(depth)
                ),
                "heads": nn.ModuleDict(heads),
                "border": border,
            }
        )

    # Forward ---------------------------------------------------------------------------------------------------------

    def forward(self, features: Tensor, logits: Tensor, points: Points) -> FusionOutput:
        """Fused logits, segment embeddings and affinities.

        Raises:
            InputError: if the points have no ``superpoint``.
        """
        embedding, offset = self.point_heads["embedding"](features), self.point_heads["offset"](features)
        graph, normal = self._graph(points, embedding, offset)
        segments = graph.segments
        share = segments.mean(logits.float().softmax(1))
        tokens = self._tokens(graph, points, features, share, embedding, normal)
        touching, scene = Scope([], graph.touching()), graph.scene(self.dense_limit, self.radius)
        blocks, heads = (cast(Any, self.fusion[name]) for name in ("blocks", "heads"))
        for i, block in enumerate(blocks):
            tokens = block(tokens, scene if i % 2 else touching)
        vote = (share + 1e-6).log()
        semantic = vote + heads["semantic"](tokens).float()
        identity = F.normalize(heads["embedding"](tokens).float(), dim=1)
        affinity = self._affinity(heads["affinity"], tokens, graph)
        fused = semantic[segments.labels]
        variants = {"backbone": logits, "voting": vote[segments.labels]}
        return FusionOutput(fused, graph, semantic, identity, affinity, embedding, offset, variants=variants)

    def _graph(self, points: Points, embedding: Tensor, offset: Tensor) -> tuple[SegmentGraph, Tensor]:
        segments = _segments(points)
        coord, offsets = points.coord.float(), points.offsets
        rows = knn(coord, offsets, coord, offsets, self.neighbours + 1)[0] if len(coord) else _no_rows(coord)
        normal = points.get("normal").float() if "normal" in points else estimate_normals(coord, offsets, rows)
        edges = neighbour_edges(rows, self.neighbours)
        pairs, counts, pair = segment_graph(segments.labels, edges)
        crossing = pair >= 0
        weight = edge_weights(coord, normal, edges[crossing])
        bend = bends(coord, normal, edges[crossing])
        weight, convexity = (
            values.new_zeros(len(pairs)).index_add_(0, pair[crossing], values) / counts for values in (weight, bend)
        )
        graph = SegmentGraph(
            segments,
            pairs,
            counts.float().log1p(),
            weight,
            convexity,
            segments.mean(coord),
            segments.mean(coord + offset.float()),
            segments.mean(normal),
            segments.mean(embedding.float()),
        )
        return graph, normal

    def _tokens(
        self, graph: SegmentGraph, points: Points, features: Tensor, share: Tensor, embedding: Tensor, normal: Tensor
    ) -> Tensor:
        segments, coord = graph.segments, points.coord.float()
        local = coord - graph.center[segments.labels]  # exact box and spread, wherever the scene lies
        parts = [
            segments.mean(features.float()),
            share,
            graph.embedding,
            segments.max(embedding.float()),
            graph.voted - graph.center,
            segments.max(local) - segments.min(local),
            segments.sizes.float().log()[:, None].clamp(min=0),
            graph.normal,
            segments.spread(local),
        ]
        pooled = torch.cat(parts, 1)
        if self.training:
            pooled = pooled + self.noise * torch.randn_like(pooled)
        tokens = self.fusion["tokenizer"](pooled)
        if self.training and self.segment_drop:
            tokens = tokens * (torch.rand(len(tokens), 1, device=tokens.device) >= self.segment_drop)
        return tokens

    def _affinity(self, head: nn.Module, tokens: Tensor, graph: SegmentGraph) -> Tensor:
        a, b = graph.edges.unbind(1)
        features = graph.features(a, b, graph.crossings, graph.weight).abs()  # the same whichever comes first
        both = [tokens[a] + tokens[b], (tokens[a] - tokens[b]).abs(), features.to(tokens.dtype)]
        return self._border(graph) + head(torch.cat(both, 1)).float()[:, 0]

    def _border(self, graph: SegmentGraph) -> Tensor:
        """``(E,)`` what the borders alone say of the affinities."""
        return cast(Any, self.fusion["border"])(graph.convexity[:, None]).float()[:, 0]

    # Losses ----------------------------------------------------------------------------------------------------------

    def losses(self, output: FusionOutput, points: Points) -> dict[str, Tensor]:
        segments, segment = output.graph.segments, points.get("segment")
        group, center = instance_targets(points, self.things)
        count = len(segments)
        truth, votes = majority(segments.labels, segment, count)
        owner, owned = majority(segments.labels, group, count)
        purity = votes / segments.sizes.clamp(min=1)
        weight = torch.where((truth >= 0) & (purity >= self.min_purity), purity * segments.sizes.float().log1p(), 0.0)
        cloud = torch.repeat_interleave(segments.offsets.diff(), output_size=count)
        owner = torch.where((owned * 2 > segments.sizes) & (weight > 0), owner, -1)
        inside = group >= 0
        points_of = points.batch
        embedding = discriminative_loss(output.embedding, group, points_of, 0.5, 1.5)
        offset = offset_loss(output.offset[inside], (center - points.coord)[inside])
        identity = discriminative_loss(output.identity, owner, cloud, 0.1, 1.0)
        semantic = F.cross_entropy(output.semantic, truth.clamp(min=0), reduction="none")
        semantic = (semantic * weight).sum() / weight.sum().clamp(min=1e-6)
        return {
            "fusion": semantic + self.lovasz(output.logits, segment),
            "affinity": self.affinity_weight * self._affinity_loss(output, owner, weight > 0, cloud),
            "identity": self.identity_weight * identity,
            "points": self.point_weight * (embedding + offset),
        }

    def _affinity_loss(self, output: FusionOutput, owner: Tensor, counts: Tensor, cloud: Tensor) -> Tensor:
        """Binary cross-entropy of touching pairs, joined and separate ones counting alike in every scene.

        Pairs of which neither segment belongs to an instance teach nothing.
        """
        a, b = output.graph.edges.unbind(1)
        known = counts[a] & counts[b] & ((owner[a] >= 0) | (owner[b] >= 0))
        if not bool(known.any()):
            return output.affinity.sum() * 0
        same = (owner[a] == owner[b])[known]
        loss = F.binary_cross_entropy_with_logits(output.affinity[known], same.float(), reduction="none")
        loss = loss + self.restraint * (output.affinity - self._border(output.graph))[known].square()
        kind = 2 * cloud[a][known] + same
        names, kind, size = kind.unique(return_inverse=True, return_counts=True)
        mean = loss.new_zeros(len(names)).index_add(0, kind, loss) / size
        _, home, kinds = (names // 2).unique(return_inverse=True, return_counts=True)
        return (mean / kinds[home]).sum() / len(kinds)

    # Instances -------------------------------------------------------------------------------------------------------

    def instances(self, output: FusionOutput, points: Points) -> list[Instances]:
        """Connected components of segments of one thing class, of at least ``min_points`` points.

        Touching segments join by affinity and ``linkage``; others where voted centres and identities are close. The
        score is the mean probability of the class times the mean affinity of the joined pairs (1 for one segment).
        """
        probability, label = output.semantic.softmax(1).max(1)
        thing, edges = self.things[label], output.graph.edges
        affinity = output.affinity.sigmoid()
        alike = (label[edges] == label[edges[:, :1]]).all(1) & thing[edges[:, 0]]
        joined = alike & (affinity > self.join)
        if self.linkage == "sum":
            odds = (output.affinity - math.log(self.join / (1 - self.join))) * output.graph.crossings.expm1()
            part = contract_graph(edges[alike], odds[alike], len(label))
            joined = alike & (part[edges[:, 0]] == part[edges[:, 1]])
        far = self._far_pairs(output, label, thing)
        return self._components(output.graph, points, label, probability, affinity, joined, far)

    def baseline(self, output: FusionOutput, points: Points) -> list[Instances]:
        """Plain connected components of the same graph: every touching pair of one voted thing class joins."""
        vote = output.graph.segments.mean(output.variants["voting"])
        probability, label = vote.softmax(1).max(1)
        edges = output.graph.edges
        joined = (label[edges] == label[edges[:, :1]]).all(1) & self.things[label[edges[:, 0]]]
        sure = torch.ones_like(output.affinity)
        return self._components(output.graph, points, label, probability, sure, joined, edges[:0])

    def _components(
        self,
        graph: SegmentGraph,
        points: Points,
        label: Tensor,
        probability: Tensor,
        affinity: Tensor,
        joined: Tensor,
        far: Tensor,
    ) -> list[Instances]:
        a = graph.edges[:, 0]
        pairs = torch.cat([graph.edges[joined], far])
        component = connected_components(pairs, len(graph.segments))
        strength = affinity.new_zeros(len(component)).index_add(0, component[a[joined]], affinity[joined])
        links = torch.bincount(component[a[joined]], minlength=len(component))
        strength = torch.where(links > 0, strength / links.clamp(min=1), 1.0)
        found = []
        clouds = zip(
            itertools.pairwise(points.offsets.tolist()),
            itertools.pairwise(graph.segments.offsets.tolist()),
            strict=True,
        )
        for (begin, end), (first, last) in clouds:
            names, number = component[first:last].unique(return_inverse=True)
            sizes = graph.segments.sizes[first:last]
            total = torch.zeros_like(names).index_add_(0, number, sizes)
            mass = probability.new_zeros(len(names)).index_add_(0, number, probability[first:last] * sizes)
            label_of = torch.zeros_like(names).scatter_(0, number, label[first:last])
            labels = number[graph.segments.labels[begin:end] - first]
            instances = Instances.of(labels, label_of, mass / total.clamp(min=1) * strength[names])
            found.append(instances.take(self.things[label_of] & (total >= self.min_points)))
        return found

    def _far_pairs(self, output: FusionOutput, label: Tensor, thing: Tensor) -> Tensor:
        graph = output.graph
        if not len(graph.segments):
            return graph.edges
        voted, offsets = graph.voted.detach().float(), graph.segments.offsets
        rows = knn(voted, offsets, voted, offsets, _FAR_NEIGHBOURS, self.gap)[0]
        a = torch.arange(len(rows), device=rows.device)[:, None].expand_as(rows)
        pairs = torch.stack([a, rows], -1)[(rows > a)]
        a, b = pairs.unbind(1)
        apart = (output.identity[a] - output.identity[b]).norm(dim=1)
        touching = graph._of_pairs(a, b)[0] > 0
        return pairs[~touching & (label[a] == label[b]) & thing[a] & (apart < self.difference)]


def bends(coord: Tensor, normal: Tensor, edges: Tensor) -> Tensor:
    """``(M,)`` float32 how much the surface bends along edges, in -2..2: convex above 0, concave below, flat 0.

    The part of the change of the normal that points along the edge, ``(n_j - n_i) . (x_j - x_i) / |x_j - x_i|``.
    """
    a, b = edges.unbind(1)
    return ((normal[b] - normal[a]) * F.normalize(coord[b] - coord[a], dim=1)).sum(1)


def _two_layers(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels), nn.ReLU(), nn.Linear(channels, out))


def _segments(points: Points) -> Segments:
    """The segments of the points at hand: numbers without points go, clouds keep apart."""
    if "superpoint" not in points:
        raise InputError(
            f"{points.describe()}: field 'superpoint' is missing; add pc3d.data.transforms.GraphSegments to "
            "data.pipeline.prepare"
        )
    labels = points.get("superpoint").long()
    labels = labels if labels.ndim == 1 else labels[:, 0]
    span = int(labels.max()) + 1 if len(labels) else 1
    return Segments.of((points.batch * span + labels).unique(return_inverse=True)[1], points.offsets)


def _no_rows(coord: Tensor) -> Tensor:
    return torch.empty(0, 1, dtype=torch.int64, device=coord.device)
