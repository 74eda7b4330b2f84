"""Segments of a cloud as an attribute, made once and then carried through augmentation and sampling."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from pc3d.data.transforms.base import CloudTransform
from pc3d.errors import InputError
from pc3d.ops.graph import PointGraph
from pc3d.points import Points


class GraphSegments(CloudTransform):
    """``superpoint`` (N,) int64: the graph segment of every point, see :func:`pc3d.ops.graph.graph_segments`.

    Belongs into ``pipeline.prepare``, whose result is kept on disk per cloud and parameters. A cloud without normals
    gets ``normal`` too. With several ``k`` or ``min_size`` the attribute is (N, V), one column per pair, the first
    being the usual one; :class:`ChooseSegments` takes another one in training.

    Args:
        k: larger values give larger segments: 0.05 for rooms sampled at 2-5 cm, 0.2 for lidar.
        min_size: smaller segments join a neighbour: 20 for rooms, 50 for lidar.
        neighbours: nearest points that a point is tied to.
        normal_neighbours: nearest points that a normal is estimated from.
        color_weight: factor of the squared difference of colours (0..1) in the weight of an edge.
        output: name of the attribute.
    """

    def __init__(
        self,
        k: float | Sequence[float] = 0.05,
        min_size: int | Sequence[int] = 20,
        neighbours: int = 10,
        normal_neighbours: int = 16,
        color_weight: float = 0.0,
        output: str = "superpoint",
    ) -> None:
        self.variants = list(itertools.product(_several(k), _several(min_size)))
        if any(value <= 0 for pair in self.variants for value in pair) or neighbours < 1 or normal_neighbours < 3:
            raise InputError(
                f"GraphSegments: k {k} and min_size {min_size} must be above 0, neighbours {neighbours} at least 1, "
                f"normal_neighbours {normal_neighbours} at least 3"
            )
        self.neighbours = neighbours
        self.normal_neighbours = normal_neighbours
        self.color_weight = color_weight
        self.output = output

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        color = cloud.get("color") if self.color_weight else None
        graph = PointGraph.of(
            cloud.coord,
            cloud.offsets,
            cloud.get("normal") if "normal" in cloud else None,
            neighbours=self.neighbours,
            normal_neighbours=self.normal_neighbours,
            color=color,
            color_weight=self.color_weight,
        )
        if "normal" not in cloud:
            cloud = cloud.with_attrs(normal=graph.normal)
        columns = [graph.segments(k, int(min_size)) for k, min_size in self.variants]
        return cloud.with_attrs(**{self.output: columns[0] if len(columns) == 1 else torch.stack(columns, 1)})


class ChooseSegments(CloudTransform):
    """One random column of ``superpoint`` (N, V): a segmentation at another scale in every epoch."""

    def __init__(self, name: str = "superpoint") -> None:
        self.name = name

    def apply(self, cloud: Points, generator: torch.Generator | None) -> Points:
        segments = cloud.get(self.name)
        if segments.ndim == 1:
            return cloud
        column = int(torch.randint(segments.shape[1], (), generator=generator))
        return cloud.with_attrs(**{self.name: segments[:, column].contiguous()})


def _several(value: float | Sequence[float]) -> list[float]:
    return list(value) if isinstance(value, Sequence) else [value]
