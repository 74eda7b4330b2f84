"""Graph segmentation: neighbour graphs, normals, edge weights and the Felzenszwalb-Huttenlocher merge.

The segments that Segment-Fusion (Thyagharajan et al. 2022, arXiv 2111.08434, stage 1) fuses. The paper names a graph
segmentation and no more; weights, thresholds and sizes here are our own design, after the over-segmentation that comes
with ScanNet. On the CPU the C++ kernels serve; every result is the same for any number of threads.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pc3d.ops.backend import cpu_kernels
from pc3d.ops.neighbours import checked_coord, nearest_rows
from pc3d.ops.segment import segment_max, segment_mean
from pc3d.ops.serialize import curve_codes

_CURVE_BITS = 14  # of each axis, in the order that points of a graph are taken in


def estimate_normals(coord: Tensor, offsets: Tensor, neighbours: int | Tensor = 16) -> Tensor:
    """``(N, 3)`` float32 unit normals: the direction in which the nearest points spread least.

    A normal points to the middle of its cloud (mean of its points).

    Args:
        coord: ``(N, 3)`` float32; ``offsets (S + 1,)`` int64 their clouds.
        neighbours: how many nearest points, the point itself among them; or their rows ``(N, K)`` int64, -1 for none.
    """
    rows = nearest_rows(coord, offsets, neighbours) if isinstance(neighbours, int) else neighbours
    centers = _centers(coord, offsets)
    kernels = cpu_kernels(coord, rows)
    if kernels is not None:
        out = torch.empty_like(coord, memory_format=torch.contiguous_format)
        kernels.normals(coord.detach().contiguous(), offsets.contiguous(), rows.int().contiguous(), centers, out)
        return out
    near = (rows >= 0).double()[..., None]
    around = (coord.double()[rows.clamp(min=0).long()] - coord.double()[:, None]) * near
    around = (around - around.sum(1, keepdim=True) / near.sum(1, keepdim=True)) * near
    normal = torch.linalg.eigh(around.transpose(1, 2) @ around)[1][..., 0]
    center = centers.double().repeat_interleave(offsets.diff().to(coord.device), 0, output_size=len(coord))
    toward = (normal * (center - coord.double())).sum(1, keepdim=True)
    return torch.where(toward < 0, -normal, normal).float()


def _centers(coord: Tensor, offsets: Tensor) -> Tensor:
    """``(S, 3)`` mean of each cloud, summed in float64."""
    means = [coord[a:b].mean(0, dtype=torch.float64) for a, b in itertools.pairwise(offsets.tolist())]
    return torch.stack(means).float() if means else coord.new_empty(0, 3)


def neighbour_edges(neighbours: Tensor, k: int) -> Tensor:
    """``(M, 2)`` int64 edges ``i < j``, each once and sorted: j is one of the k nearest of i, or i one of j's.

    Args:
        neighbours: ``(N, K)`` int64 rows of the nearest points, nearest first, -1 for none; a row itself is skipped.
        k: neighbours that count.
    """
    return _neighbour_edges(neighbours, k).long()


def _neighbour_edges(neighbours: Tensor, k: int) -> Tensor:
    kernels = cpu_kernels(neighbours)
    if kernels is not None:
        return kernels.neighbour_edges(neighbours.int().contiguous(), k)
    neighbours = neighbours.long()
    own = torch.arange(len(neighbours), device=neighbours.device)[:, None]
    other = (neighbours >= 0) & (neighbours != own)
    other &= other.cumsum(1) <= k
    a, b = own.expand_as(neighbours)[other], neighbours[other]
    size = max(len(neighbours), 1)
    keys = (torch.minimum(a, b) * size + torch.maximum(a, b)).unique()
    return torch.stack([keys.div(size, rounding_mode="floor"), keys % size], 1)


def edge_weights(coord: Tensor, normal: Tensor, edges: Tensor) -> Tensor:
    """``(M,)`` float32 ``1 - n_i . n_j``, squared where the edge is convex (``n_j . (x_j - x_i) > 0``), at least 0.

    Args:
        coord, normal: ``(N, 3)`` float32.
        edges: ``(M, 2)`` int64.
    """
    kernels = cpu_kernels(coord, normal, edges)
    if kernels is not None:
        return kernels.edge_weights(*(t.detach().contiguous() for t in (coord, normal, edges.int())))
    i, j = edges.long().unbind(1)
    weight = 1 - _dot(normal[i], normal[j])
    convex = _dot(normal[j], coord[j] - coord[i]) > 0
    return torch.where(convex, weight * weight, weight).clamp(min=0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    products = a * b
    return (products[:, 0] + products[:, 1]) + products[:, 2]


def merge_graph(edges: Tensor, weights: Tensor, num_points: int, k: float = 0.05, min_size: int = 20) -> Tensor:
    """Felzenszwalb-Huttenlocher merge of a weighted graph.

    Edges are taken in ascending weight, ties by row. Two components join if the weight exceeds neither's threshold,
    which then becomes ``weight + k / size`` (``k`` for a single point). In a second round over the same edges, a
    component below ``min_size`` joins what it touches; one that touches nothing stays.

    Args:
        edges: ``(M, 2)`` int64 rows of points.
        weights: ``(M,)`` float32, compared with float64 thresholds.
        num_points: N.
        k: larger values give larger segments.
        min_size: points; 1 switches the second round off.

    Returns:
        ``(N,)`` int64 segment of each point, numbered by first occurrence, on the device of ``edges``.

    Raises:
        ValueError: if shapes do not fit, an edge names no point, or a weight is NaN.
    """
    if edges.ndim != 2 or edges.shape[1] != 2 or weights.shape != edges.shape[:1]:
        raise ValueError(f"edges must be (M, 2) and weights (M,), got {tuple(edges.shape)} and {tuple(weights.shape)}")
    _check_edges(edges, num_points)
    place = torch.arange(num_points, device=edges.device)
    return _merge(edges.detach(), weights.detach().float(), place, k, min_size)


def _check_edges(edges: Tensor, num_points: int) -> None:
    if not len(edges):
        return
    low, high = edges.aminmax()
    if int(low) < 0 or int(high) >= num_points:
        raise ValueError(f"an edge names a point outside 0..{num_points - 1}")


def _merge(edges: Tensor, weights: Tensor, place: Tensor, k: float, min_size: int) -> Tensor:
    """As :func:`merge_graph`, for points that the edges call ``place``."""
    kernels = cpu_kernels()
    if kernels is not None:
        labels = torch.empty(len(place), dtype=torch.int64)
        edges, place = (t.int().cpu().contiguous() for t in (edges, place))
        kernels.graph_merge(edges, weights.cpu().contiguous(), k, min_size, labels, place)
        return labels.to(weights.device)
    if bool(weights.isnan().any()):
        raise ValueError(f"{int(weights.isnan().sum())} edge weights are NaN")
    labels = _merge_reference(edges.cpu(), weights.cpu(), len(place), k, min_size).to(weights.device)
    return renumber(labels[place.long()])


def _merge_reference(edges: Tensor, weights: Tensor, num_points: int, k: float, min_size: int) -> Tensor:
    parent, size, threshold = list(range(num_points)), [1] * num_points, [k] * num_points

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    def join(a: int, b: int) -> int:
        if size[a] < size[b]:
            a, b = b, a
        parent[b] = a
        size[a] += size[b]
        return a

    ordered = [(*edges[row].tolist(), float(weights[row])) for row in weights.argsort(stable=True).tolist()]
    for i, j, weight in ordered:
        a, b = root(i), root(j)
        if a != b and weight <= threshold[a] and weight <= threshold[b]:
            joined = join(a, b)
            threshold[joined] = weight + k / size[joined]
    for i, j, _ in ordered:
        a, b = root(i), root(j)
        if a != b and (size[a] < min_size or size[b] < min_size):
            join(a, b)
    return torch.tensor([root(i) for i in range(num_points)], dtype=torch.int64)


def renumber(labels: Tensor) -> Tensor:
    """``(N,)`` int64 labels numbered 0, 1, ... in the order of their first occurrence."""
    if not len(labels):
        return labels
    values, inverse = labels.unique(return_inverse=True)
    first = torch.full((len(values),), len(labels), dtype=torch.int64, device=labels.device)
    first.scatter_reduce_(0, inverse, torch.arange(len(labels), device=labels.device), "amin")
    return first.argsort().argsort()[inverse]


@dataclass(frozen=True)
class PointGraph:
    """A weighted graph of packed points: built once, cut into segments with any parameters.

    Attributes:
        place: ``(N,)`` int32 or int64, the row of each point where each cloud lies along a z curve.
        normals: ``(N, 3)`` float32 unit normals, in these rows.
        edges: ``(M, 2)`` int32 or int64 of these rows.
        weights: ``(M,)`` float32.
    """

    place: Tensor
    normals: Tensor
    edges: Tensor
    weights: Tensor

    @staticmethod
    def of(
        coord: Tensor,
        offsets: Tensor,
        normal: Tensor | None = None,
        edges: Tensor | None = None,
        neighbours: int = 10,
        normal_neighbours: int = 16,
        color: Tensor | None = None,
        color_weight: float = 0.0,
        probabilities: Tensor | None = None,
        semantic_weight: float = 0.0,
    ) -> PointGraph:
        """The graph of :func:`graph_segments`, which explains the arguments; neighbours are searched once.

        Raises:
            ValueError: if coordinates are not finite, an edge is wrong, or a weight asks for a missing attribute.
        """
        if (color_weight and color is None) or (semantic_weight and probabilities is None):
            raise ValueError("color_weight needs colours and semantic_weight probabilities")
        coord, order, place = _in_canonical_order(coord, offsets)
        reach = [neighbours + 1] * (edges is None) + [normal_neighbours] * (normal is None)
        found = nearest_rows(coord, offsets, max(reach), min(reach), along_curve=True) if reach else None
        if normal is not None:
            normal = normal.float()[order]
        elif found is not None:
            normal = estimate_normals(coord, offsets, found[:, :normal_neighbours])
        if edges is not None:
            edges = _distinct_edges(edges, place)
        elif found is not None:
            edges = _neighbour_edges(found, neighbours)
        assert normal is not None
        assert edges is not None
        weights = edge_weights(coord, normal, edges)
        if color is not None and color_weight:
            shade, (i, j) = color.float()[order] / 255, edges.long().unbind(1)
            weights = weights + color_weight * (shade[i] - shade[j]).square().sum(1)
        if probabilities is not None and semantic_weight:
            share, (i, j) = probabilities.float()[order], edges.long().unbind(1)
            weights = weights + semantic_weight * (1 - (share[i] * share[j]).sum(1))
        return PointGraph(place, normal, edges, weights)

    @property
    def normal(self) -> Tensor:
        """``(N, 3)`` float32 normal of each point."""
        return self.normals[self.place.long()]

    def segments(self, k: float = 0.05, min_size: int = 20) -> Tensor:
        """``(N,)`` int64 segment of each point, numbered by first occurrence; see :func:`merge_graph`."""
        return _merge(self.edges, self.weights, self.place, k, min_size)


def graph_segments(
    coord: Tensor,
    offsets: Tensor,
    normal: Tensor | None = None,
    edges: Tensor | None = None,
    neighbours: int = 10,
    normal_neighbours: int = 16,
    k: float = 0.05,
    min_size: int = 20,
    color: Tensor | None = None,
    color_weight: float = 0.0,
    probabilities: Tensor | None = None,
    semantic_weight: float = 0.0,
) -> Tensor:
    """Segments of packed clouds; the same ones (but for their numbers) for points in any order.

    The weight of an edge is :func:`edge_weights`, plus ``color_weight |c_i - c_j|^2`` of colours in 0..1, plus
    ``semantic_weight (1 - p_i . p_j)``.

    Args:
        coord: ``(N, 3)`` float32; ``offsets (S + 1,)`` int64 their clouds.
        normal: ``(N, 3)`` unit normals; estimated from ``normal_neighbours`` nearest points by default.
        edges: ``(M, 2)`` int64, of a mesh, any order and direction; by default those of the ``neighbours`` nearest
            points.
        k, min_size: see :func:`merge_graph`; 0.05 and 20 suit rooms sampled at 2-5 cm, 0.2 and 50 lidar.
        color: ``(N, 3)`` colours 0..255.
        probabilities: ``(N, C)`` of a classifier.

    Returns:
        ``(N,)`` int64, numbered by first occurrence; a segment lies in one cloud.

    Raises:
        ValueError: if coordinates are not finite, an edge is wrong, or a weight asks for a missing attribute.
    """
    graph = PointGraph.of(
        coord,
        offsets,
        normal,
        edges,
        neighbours,
        normal_neighbours,
        color,
        color_weight,
        probabilities,
        semantic_weight,
    )
    return graph.segments(k, min_size)


def _in_canonical_order(coord: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Points of each cloud along a z curve, whatever the order given; their old rows, and the inverse.

    Points in one cell of the curve (one of 2^14 of the cloud's longest side) are in the order of x, y, z.
    """
    kernels, coord = cpu_kernels(coord), checked_coord("coord", coord)
    if kernels is not None:
        order, place = torch.empty(len(coord), dtype=torch.int64), torch.empty(len(coord), dtype=torch.int32)
        ordered = torch.empty_like(coord)
        kernels.graph_sorted_rows(coord, offsets.contiguous(), order, place, ordered)
        return ordered, order, place
    clouds = itertools.pairwise(offsets.tolist())
    order = torch.cat(
        [torch.empty(0, dtype=torch.int64, device=coord.device)] + [_curve_order(coord[a:b]) + a for a, b in clouds]
    )
    return coord[order], order, order.argsort()


def _curve_order(coord: Tensor) -> Tensor:
    """``(N,)`` int64 rows of one cloud along the curve of :func:`_in_canonical_order`."""
    if not len(coord):
        return torch.empty(0, dtype=torch.int64, device=coord.device)
    bits = min((64 - len(coord).bit_length()) // 3, _CURVE_BITS)
    low = coord.amin(0).double()
    extent = (coord.amax(0).double() - low).amax()
    scale = torch.where(extent > 0, ((1 << bits) - 1) / extent, 0)
    order = torch.arange(len(coord), device=coord.device)
    cells = ((coord.double() - low) * scale).long()
    code = curve_codes(cells, torch.tensor([0, len(coord)], device=coord.device), bits, ["z"])[0]
    for column in (*coord.unbind(1)[::-1], code):
        order = order[column[order].argsort(stable=True)]
    return order


def _distinct_edges(edges: Tensor, place: Tensor) -> Tensor:
    """``(M', 2)`` edges ``i < j`` of ``place[edges]``, each once and sorted.

    Raises:
        ValueError: if an edge names no point.
    """
    size = len(place)
    _check_edges(edges, size)
    kernels = cpu_kernels(edges, place)
    if kernels is not None:
        return kernels.distinct_edges(edges.int().contiguous(), place.int().contiguous())
    place = place.long()
    low, high = torch.minimum(*place[edges].unbind(1)), torch.maximum(*place[edges].unbind(1))
    keys = (low * max(size, 1) + high)[low != high].unique()
    return torch.stack([keys.div(max(size, 1), rounding_mode="floor"), keys % max(size, 1)], 1)


def segment_graph(labels: Tensor, edges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which segments touch: the edges of the point graph between two segments, gathered.

    Args:
        labels: ``(N,)`` int64 segments.
        edges: ``(M, 2)`` int64 edges of points.

    Returns:
        ``(E, 2)`` int64 pairs of segments ``a < b``, each once and sorted; ``(E,)`` int64 how many edges cross; and
        ``(M,)`` int64 the pair of every edge, -1 inside a segment.
    """
    a, b = labels[edges[:, 0]], labels[edges[:, 1]]
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    crossing = low != high
    size = int(labels.max()) + 1 if len(labels) else 1
    keys, inverse, counts = (low * size + high)[crossing].unique(return_inverse=True, return_counts=True)
    pair = torch.full((len(edges),), -1, dtype=torch.int64, device=edges.device)
    pair[crossing] = inverse
    return torch.stack([keys.div(size, rounding_mode="floor"), keys % size], 1), counts, pair


def segment_purity(labels: Tensor, truth: Tensor, ignore_index: int = -1) -> float:
    """Share of the labelled points that carry the most common class of their segment: what perfect voting reaches."""
    valid = truth != ignore_index
    if not bool(valid.any()):
        return 1.0
    count = majority(labels[valid], truth[valid], int(labels.max()) + 1)[1]
    return float(count.sum() / valid.sum())


def majority(labels: Tensor, values: Tensor, num_segments: int) -> tuple[Tensor, Tensor]:
    """Most common value of each segment and how many points have it.

    Args:
        labels: ``(N,)`` int64 segments.
        values: ``(N,)`` int64 classes or instances; negative ones do not count.

    Returns:
        ``(S,)`` int64 value, the smallest of equals, -1 where there is none; ``(S,)`` int64 points, 0 there.
    """
    counted = values >= 0
    span = int(values.max()) + 1 if bool(counted.any()) else 1
    keys, counts = (labels[counted] * span + values[counted]).unique(return_counts=True)
    order = counts.argsort(stable=True, descending=True)
    order = order[keys[order].div(span, rounding_mode="floor").argsort(stable=True)]
    owner = keys[order].div(span, rounding_mode="floor")
    first = torch.ones_like(owner, dtype=torch.bool)
    first[1:] = owner[1:] != owner[:-1]
    best, count = labels.new_full((num_segments,), -1), labels.new_zeros(num_segments)
    best[owner[first]] = keys[order[first]] % span
    count[owner[first]] = counts[order[first]]
    return best, count


def connected_components(pairs: Tensor, num_nodes: int) -> Tensor:
    """``(num_nodes,)`` int64 component of every node of an undirected graph with edges ``(E, 2)``, by first occurrence.

    Runs on the CPU (SciPy), whatever the device of the pairs.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components as label

    a, b = pairs.detach().cpu().numpy().T
    graph = coo_matrix((np.ones(len(a), np.int8), (a, b)), shape=(num_nodes, num_nodes))
    labels = torch.from_numpy(label(graph, directed=False)[1].astype(np.int64))
    return renumber(labels).to(pairs.device)


def contract_graph(pairs: Tensor, weights: Tensor, num_nodes: int) -> Tensor:
    """``(num_nodes,)`` int64 component of every node, by first occurrence: the heaviest edges contract first.

    Greedy additive edge contraction (Keuper et al., "Efficient Decomposition of Image and Mesh Graphs by Lifted
    Multicuts", ICCV 2015): the weights of edges that become parallel are summed, and it ends where none is above 0. So
    edges below 0 keep apart what single edges above 0 would join. Runs on the CPU, whatever the device of the pairs.

    Args:
        pairs: ``(E, 2)`` int64 undirected edges.
        weights: ``(E,)`` for joining above 0, against it below; among equal ones that of the lowest nodes is first.
    """
    near: list[dict[int, float]] = [{} for _ in range(num_nodes)]
    for (a, b), weight in zip(pairs.tolist(), weights.tolist(), strict=True):
        if a != b:
            near[a][b] = near[b][a] = near[a].get(b, 0.0) + weight
    queue = [(-weight, a, b) for a, own in enumerate(near) for b, weight in own.items() if a < b and weight > 0]
    heapq.heapify(queue)
    joined = []
    while queue:
        weight, a, b = heapq.heappop(queue)
        if near[a].get(b) != -weight:
            continue  # gone, or no longer of this weight
        joined.append((a, b))
        a, b = (a, b) if len(near[a]) >= len(near[b]) else (b, a)
        del near[a][b], near[b][a]
        for c, more in near[b].items():
            del near[c][b]
            near[a][c] = near[c][a] = total = near[a].get(c, 0.0) + more
            if total > 0:
                heapq.heappush(queue, (-total, min(a, c), max(a, c)))
        near[b] = {}
    return connected_components(pairs.new_tensor(joined).reshape(-1, 2), num_nodes)


@dataclass(frozen=True)
class Segments:
    """A partition of packed points into segments, ready to pool over; everything it does is differentiable.

    Attributes:
        labels: ``(N,)`` int64 segment of each point; segments of one cloud are consecutive numbers.
        order: ``(N,)`` int64 rows of points, segment after segment, in each in their own order.
        borders: ``(S + 1,)`` int64, ``order[borders[s]:borders[s + 1]]`` are the points of segment s.
        offsets: ``(B + 1,)`` int64, segments ``offsets[b]:offsets[b + 1]`` lie in cloud b.
    """

    labels: Tensor
    order: Tensor
    borders: Tensor
    offsets: Tensor

    @staticmethod
    def of(labels: Tensor, offsets: Tensor) -> Segments:
        """From segment numbers ``(N,)`` 0, 1, ... of points in clouds ``offsets``; numbers may be left out.

        Raises:
            ValueError: if a segment lies in two clouds, or numbers do not rise from cloud to cloud.
        """
        count = int(labels.max()) + 1 if len(labels) else 0
        sizes = torch.bincount(labels, minlength=count)
        borders = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        ends = [0]
        for a, b in itertools.pairwise(offsets.tolist()):
            if a < b and int(labels[a:b].min()) < ends[-1]:
                raise ValueError("segments must be numbered cloud after cloud, and none lie in two")
            ends.append(int(labels[a:b].max()) + 1 if a < b else ends[-1])
        return Segments(labels, labels.argsort(stable=True), borders, torch.tensor(ends, device=labels.device))

    def __len__(self) -> int:
        return len(self.borders) - 1

    @property
    def sizes(self) -> Tensor:
        """``(S,)`` int64 points of each segment."""
        return self.borders.diff()

    def mean(self, values: Tensor) -> Tensor:
        """``(S, C)`` mean of ``(N, C)`` values; 0 for an empty segment."""
        return segment_mean(values[self.order], self.borders)

    def max(self, values: Tensor) -> Tensor:
        """``(S, C)`` largest of ``(N, C)`` values; 0 for an empty segment."""
        return segment_max(values[self.order], self.borders)

    def min(self, values: Tensor) -> Tensor:
        """``(S, C)`` smallest of ``(N, C)`` values; 0 for an empty segment."""
        return -self.max(-values)

    def spread(self, coord: Tensor) -> Tensor:
        """``(S, 3)`` linearity, planarity and scattering of ``(N, 3)`` coordinates: shares of the covariance's axes.

        With standard deviations ``a >= b >= c``: ``(a - b) / a``, ``(b - c) / a``, ``c / a``; 0 for a single point.
        """
        around = (coord - self.mean(coord)[self.labels]).double()
        products = (around[:, :, None] * around[:, None]).flatten(1)
        covariance = self.mean(products).view(-1, 3, 3)
        a, b, c = torch.linalg.eigvalsh(covariance).clamp(min=0).sqrt().flip(1).unbind(1)
        shares = torch.stack([a - b, b - c, c], 1) / a[:, None].clamp(min=1e-12)
        return shares.to(coord.dtype)
