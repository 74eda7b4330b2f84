"""Instances by clustering points around the centres they point at."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pc3d.losses.discriminative import offset_loss
from pc3d.metrics import Instances
from pc3d.ops.graph import connected_components
from pc3d.ops.neighbours import knn
from pc3d.points import Points
from pc3d.tasks.heads import InstanceHead, InstanceOutput, instance_targets


@dataclass
class OffsetOutput(InstanceOutput):
    """Adds the ``offset`` (N, 3) of every point to the centre of its instance."""

    offset: Tensor


class OffsetClustering(InstanceHead[OffsetOutput]):
    """PointGroup without its score network: a baseline.

    Jiang et al., "PointGroup: Dual-Set Point Grouping for 3D Instance Segmentation", CVPR 2020 (arXiv 2004.01658),
    sections 3.2 and 3.3, as Pointcept has it: points predicted as things move by their predicted offset; those of one
    class that then lie within ``radius`` of each other are one instance. The score is the mean probability of its
    class.

    Args:
        radius: metres.
        neighbours: of a moved point that are looked at.
        min_points: smaller instances are dropped.
    """

    things: Tensor

    def __init__(self, radius: float = 0.03, neighbours: int = 32, min_points: int = 100) -> None:
        super().__init__()
        self.radius = radius
        self.neighbours = neighbours
        self.min_points = min_points

    def build(self, in_channels: int, num_classes: int, things: list[bool]) -> None:
        self.register_buffer("things", torch.tensor(things), persistent=False)
        self.offset = nn.Sequential(
            nn.Linear(in_channels, in_channels), nn.LayerNorm(in_channels), nn.ReLU(), nn.Linear(in_channels, 3)
        )

    def forward(self, features: Tensor, logits: Tensor, points: Points) -> OffsetOutput:
        return OffsetOutput(logits, self.offset(features))

    def losses(self, output: OffsetOutput, points: Points) -> dict[str, Tensor]:
        group, center = instance_targets(points, self.things)
        inside = group >= 0
        return {"offset": offset_loss(output.offset[inside], (center - points.coord)[inside])}

    def instances(self, output: OffsetOutput, points: Points) -> list[Instances]:
        probability, label = output.logits.float().softmax(1).max(1)
        moved = (points.coord + output.offset.detach()).float()
        return [
            self._cluster(moved[begin:end], label[begin:end], probability[begin:end])
            for begin, end in itertools.pairwise(points.offsets.tolist())
        ]

    def _cluster(self, moved: Tensor, label: Tensor, probability: Tensor) -> Instances:
        number = torch.full_like(label, -1)
        classes: list[int] = []
        scores: list[float] = []
        for thing in self.things.nonzero()[:, 0].tolist():
            rows = (label == thing).nonzero()[:, 0]
            if not len(rows):
                continue
            ends = torch.tensor([0, len(rows)], device=rows.device)
            near = knn(moved[rows], ends, moved[rows], ends, self.neighbours, self.radius)[0]
            own = torch.arange(len(rows), device=rows.device)[:, None].expand_as(near)
            component = connected_components(torch.stack([own, near], -1)[near >= 0], len(rows))
            sizes = torch.bincount(component)
            for kept in (sizes >= self.min_points).nonzero()[:, 0].tolist():
                members = rows[component == kept]
                number[members] = len(classes)
                classes.append(thing)
                scores.append(float(probability[members].mean()))
        return Instances.of(number, label.new_tensor(classes), probability.new_tensor(scores))
