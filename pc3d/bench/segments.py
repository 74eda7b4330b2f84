"""Graph segmentation: every step on a cloud as it comes from grid sampling."""

from __future__ import annotations

from pc3d.bench.timing import Timing, time_interleaved
from pc3d.data.transforms import GridSample
from pc3d.ops.graph import edge_weights, estimate_normals, graph_segments, merge_graph, neighbour_edges
from pc3d.ops.neighbours import nearest_rows
from pc3d.points import Points


def bench(points: Points, size: float, rounds: int) -> list[Timing]:
    """Neighbours, normals, edges, weights, merge, and all of them together."""
    cloud = GridSample(size, pick="first")(points)
    coord, offsets = cloud.coord.contiguous(), cloud.offsets
    rows = nearest_rows(coord, offsets, 16, inner=11)
    normal = estimate_normals(coord, offsets, rows)
    edges = neighbour_edges(rows, 10).int()
    weights = edge_weights(coord, normal, edges)
    steps = {
        "16 neighbours": lambda: nearest_rows(coord, offsets, 16, inner=11),
        "normals": lambda: estimate_normals(coord, offsets, rows),
        "edges": lambda: neighbour_edges(rows, 10),
        "weights": lambda: edge_weights(coord, normal, edges),
        "merge": lambda: merge_graph(edges, weights, len(coord)),
        "all": lambda: graph_segments(coord, offsets),
        "all, edges and normals given": lambda: graph_segments(coord, offsets, normal, edges),
    }
    return [
        timing
        for name, step in steps.items()
        for timing in time_interleaved(f"segments {size} {name}", len(coord), {"kernels": step}, rounds)
    ]
