"""Segment-Fusion on part errors: flip segments of every object, train the fusion, count what it puts right."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from pc3d.data.transforms import GraphSegments, GridSample
from pc3d.datasets import SyntheticRooms
from pc3d.metrics import PartErrors, PartMisclassification, SegmentationMetrics
from pc3d.models.heads import SegmentFusion
from pc3d.ops.graph import majority
from pc3d.points import Points

GRID, SHARE, ROOMS, HELD_OUT = 0.05, 0.3, 30, 6
_SURE = 4.0  # logit of the class that the pretended backbone believes in


@dataclass
class FusionResult:
    """Shares in 0..1 over the held-out rooms; part errors by :class:`PartMisclassification`."""

    seconds: float
    steps: int
    flipped: int
    repaired: dict[str, float]
    miou: dict[str, float]
    part_errors: dict[str, float]
    broken: dict[str, float]

    def table(self) -> str:
        lines = [f"{self.flipped} segments flipped in {HELD_OUT} rooms; {self.steps} steps in {self.seconds:.0f} s"]
        lines.append(f"{'':10}{'repaired':>10}{'mIoU':>8}{'part errors':>13}{'broken objects':>16}")
        for name in self.miou:
            row = (self.repaired[name], self.miou[name], self.part_errors[name], self.broken[name])
            lines.append(f"{name:10}{row[0]:>10.1%}{row[1]:>8.3f}{row[2]:>13.1%}{row[3]:>16.1%}")
        return "\n".join(lines)


def run(seconds: float, seed: int = 0, picture: Path | None = None) -> FusionResult:
    """Train the fusion alone for some seconds on rooms whose errors change at every step, and test on other rooms.

    The pretended backbone is right but for :data:`SHARE` of the segments of every object, which carry one wrong class
    each, and knows colours and normals. A vote inside a segment cannot repair that.
    """
    torch.manual_seed(seed)
    data = SyntheticRooms(ROOMS, 0, HELD_OUT, points=25_000, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    rooms = [_prepared(data.load("train", i)) for i in range(ROOMS)]
    head = SegmentFusion(min_points=20)
    head.build(data.num_classes + 6, data.num_classes, [True] * data.num_classes)
    steps, spent = _train(head, rooms, data.num_classes, seconds, generator)
    return _test(head, data, generator, steps, spent, picture)


def _prepared(room: Points) -> Points:
    segments = GraphSegments(k=0.02, min_size=10, color_weight=1.0)
    return GridSample(GRID, pick="first")(segments(room))


def _train(
    head: SegmentFusion, rooms: list[Points], num_classes: int, seconds: float, generator: torch.Generator
) -> tuple[int, float]:
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.05)
    start = time.perf_counter()
    head.train()
    for step, room in enumerate(_endless(rooms, generator)):
        spent = time.perf_counter() - start
        if spent > seconds:
            return step, spent
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 20) * (1.02 - spent / seconds)
        logits, _ = flip_segments(room, num_classes, generator)
        loss = torch.stack(list(head.losses(head(_features(room, logits), logits, room), room).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
    raise AssertionError("the rooms never end")


def _test(
    head: SegmentFusion,
    data: SyntheticRooms,
    generator: torch.Generator,
    steps: int,
    seconds: float,
    picture: Path | None,
) -> FusionResult:
    head.eval()
    names = ("backbone", "voting", "fusion")
    scores = {name: SegmentationMetrics(data.num_classes) for name in names}
    parts = {name: PartMisclassification(data.num_classes) for name in names}
    repaired, flips = dict.fromkeys(names, 0), 0
    for i in range(HELD_OUT):
        room = _prepared(data.load("test", i))
        segment, instance = room.get("segment"), room.get("instance")
        logits, flipped = flip_segments(room, data.num_classes, generator)
        with torch.no_grad():
            output = head(_features(room, logits), logits, room)
        predictions = {name: output.variants.get(name, output.logits).argmax(1) for name in names}
        labels = output.graph.segments.labels
        truth, _ = majority(labels, segment, len(output.graph.segments))
        flips += len(flipped)
        for name, prediction in predictions.items():
            scores[name].update(prediction, segment)
            parts[name].update(prediction, segment, instance)
            found, _ = majority(labels, prediction, len(truth))
            repaired[name] += int((found == truth)[flipped].sum())
        if picture is not None and i == 0:
            from pc3d.viz.figures import save_label_panels

            save_label_panels(picture, room, {"truth": segment, **predictions}, data.palette, data.class_names)
    errors: dict[str, PartErrors] = {name: parts[name].compute() for name in names}
    return FusionResult(
        seconds,
        steps,
        flips,
        {name: repaired[name] / max(flips, 1) for name in names},
        {name: scores[name].compute().miou_present for name in names},
        {name: errors[name].points for name in names},
        {name: errors[name].instances for name in names},
    )


def flip_segments(room: Points, num_classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logits ``(N, K)`` of a backbone that is wrong about some segments of every object, and those segments.

    Args:
        room: with ``superpoint`` numbered 0, 1, ..., ``segment`` and ``instance``.
    """
    labels = room.get("superpoint").unique(return_inverse=True)[1]
    count = int(labels.max()) + 1
    believed, _ = majority(labels, room.get("segment"), count)
    owner, _ = majority(labels, room.get("instance"), count)
    flipped = []
    for instance in owner[owner >= 0].unique():
        own = (owner == instance).nonzero()[:, 0]
        shuffled = own[torch.randperm(len(own), generator=generator)]
        flipped.append(shuffled[: round(SHARE * len(own))])
    wrong = torch.cat(flipped)
    shift = torch.randint(1, num_classes, (len(wrong),), generator=generator)
    believed[wrong] = (believed[wrong] + shift) % num_classes
    return _SURE * F.one_hot(believed.clamp(min=0), num_classes)[labels].float(), wrong


def _features(room: Points, logits: Tensor) -> Tensor:
    return torch.cat([logits, room.get("color") / 127.5 - 1, room.get("normal")], 1)


def _endless(rooms: list[Points], generator: torch.Generator) -> Iterator[Points]:
    while True:
        for i in torch.randperm(len(rooms), generator=generator).tolist():
            yield rooms[i]
