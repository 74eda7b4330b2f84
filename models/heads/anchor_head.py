"""The anchor head of SECOND and PointPillars.

Yan et al., "SECOND: Sparsely Embedded Convolutional Detection", Sensors 2018; Lang et al., "PointPillars", CVPR 2019
(arXiv 1812.05784), section 3; constants and rules as in OpenPCDet's ``AnchorHeadSingle``, whose names the layers have.
"""

# No postponed annotations here: jsonargparse takes the types of a dataclass's __init__ as they stand, and would check
# nothing.
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pc3d.config import Configurable
from pc3d.data.boxes import Boxes
from pc3d.errors import InputError
from pc3d.losses.detection import sigmoid_focal
from pc3d.nn.bev import BevGrid
from pc3d.ops.boxes import decode_boxes, encode_boxes, nearest_iou, wrap_angle
from pc3d.tasks.heads import ProposalHead, Suppression, check_counts

_DIRECTION_OFFSET = 0.78539  # radians, as published
_DIRECTIONS = 2
_PRIOR = 0.01  # probability of an object at the start


@dataclass(frozen=True)
class Anchor(Configurable):
    """What objects of a class look like, and which anchors learn from one.

    Attributes:
        name: of the class.
        size: length, width, height in metres.
        bottom: height of the lower face in metres.
        matched: an anchor that overlaps an object at least so much is positive.
        unmatched: one that overlaps none so much is negative; between the two it does not count.
        headings: in radians, one anchor each at every cell.

    Raises:
        InputError: for a size that is not positive, ``unmatched`` above ``matched``, or no headings.
    """

    name: str
    size: tuple[float, float, float]
    bottom: float
    matched: float
    unmatched: float
    headings: Sequence[float] = field(default=(0.0, 1.57))

    def __post_init__(self) -> None:
        if min(self.size) <= 0 or not 0 <= self.unmatched <= self.matched or not self.headings:
            raise InputError(
                f"head.anchors: '{self.name}' needs a positive size (is {tuple(self.size)}), unmatched "
                f"{self.unmatched} up to matched {self.matched}, and headings"
            )


KITTI_ANCHORS = (
    Anchor("Car", (3.9, 1.6, 1.56), -1.78, 0.6, 0.45),
    Anchor("Pedestrian", (0.8, 0.6, 1.73), -0.6, 0.5, 0.35),
    Anchor("Cyclist", (1.76, 0.6, 1.73), -0.6, 0.5, 0.35),
)


class AnchorOutput(NamedTuple):
    """What the layers say of every anchor: ``(B, A, K)`` class logits, ``(B, A, 7)`` residuals, ``(B, A, 2)`` direction
    logits."""

    classes: Tensor
    residuals: Tensor
    directions: Tensor


class AnchorTargets(NamedTuple):
    """What the anchors of one frame should say.

    Attributes:
        labels: ``(A,)`` int64 class, -1 for none, -2 where it does not count.
        residuals: ``(A, 7)``, zeros where there is no object.
    """

    labels: Tensor
    residuals: Tensor


class AnchorHead(ProposalHead[AnchorOutput]):
    """Boxes as corrections of anchors that stand in rows on the ground.

    Args:
        anchors: of every class; None takes those of KITTI.
        class_weight, box_weight, direction_weight: factors of the three losses.
        score_threshold: less likely boxes are dropped.
        nms_threshold: largest overlap of two boxes of any classes.
        nms_candidates: the best so many boxes are compared.
        max_boxes: the best so many of those left are kept.
    """

    anchors: Tensor

    def __init__(
        self,
        anchors: list[Anchor] | None = None,
        class_weight: float = 1.0,
        box_weight: float = 2.0,
        direction_weight: float = 0.2,
        score_threshold: float = 0.1,
        nms_threshold: float = 0.01,
        nms_candidates: int = 4096,
        max_boxes: int = 500,
    ) -> None:
        super().__init__()
        check_counts("head", nms_candidates=nms_candidates, max_boxes=max_boxes)
        self.settings = list(KITTI_ANCHORS) if anchors is None else list(anchors)
        self.weights = {"class": class_weight, "box": box_weight, "direction": direction_weight}
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.nms_candidates = nms_candidates
        self.max_boxes = max_boxes

    def build(self, in_channels: int, class_names: list[str], grid: BevGrid, stride: int) -> None:
        known = {setting.name: setting for setting in self.settings}
        if len(known) < len(self.settings):
            raise InputError(f"head.anchors: a class has two: {', '.join(setting.name for setting in self.settings)}")
        missing = [name for name in class_names if name not in known]
        if missing:
            raise InputError(f"head.anchors: none for {', '.join(missing)} (there are some for {', '.join(known)})")
        self.classes = [known[name] for name in class_names]
        counts = {len(setting.headings) for setting in self.classes}
        if len(counts) > 1:
            raise InputError("head.anchors: all classes need the same number of headings")
        per_cell = len(self.classes) * counts.pop()
        self.register_buffer("anchors", make_anchors(self.classes, grid, *grid.bev_shape(stride)), persistent=False)
        self.conv_cls = nn.Conv2d(in_channels, per_cell * len(self.classes), 1)
        self.conv_box = nn.Conv2d(in_channels, per_cell * 7, 1)
        self.conv_dir_cls = nn.Conv2d(in_channels, per_cell * _DIRECTIONS, 1)
        assert self.conv_cls.bias is not None
        nn.init.constant_(self.conv_cls.bias, -math.log((1 - _PRIOR) / _PRIOR))
        nn.init.normal_(self.conv_box.weight, std=0.001)

    def forward(self, features: Tensor) -> AnchorOutput:
        def each_anchor(layer: nn.Module, width: int) -> Tensor:
            return layer(features).permute(0, 2, 3, 1).reshape(len(features), len(self.anchors), width).float()

        return AnchorOutput(
            each_anchor(self.conv_cls, len(self.classes)),
            each_anchor(self.conv_box, 7),
            each_anchor(self.conv_dir_cls, _DIRECTIONS),
        )

    # Training --------------------------------------------------------------------------------------------------------

    def losses(self, output: AnchorOutput, truth: list[Boxes]) -> dict[str, Tensor]:
        """Focal loss of classes, smooth L1 of residuals, cross-entropy of directions.

        Each is summed over a frame, divided by its number of positive anchors, and averaged over the batch.
        """
        frames = [self._frame_losses(AnchorOutput(*parts), boxes) for *parts, boxes in zip(*output, truth, strict=True)]
        return {name: weight * torch.stack([f[name] for f in frames]).mean() for name, weight in self.weights.items()}

    def _frame_losses(self, output: AnchorOutput, truth: Boxes) -> dict[str, Tensor]:
        targets = self.targets(truth)
        positive, counts = targets.labels >= 0, targets.labels > -2
        number = positive.sum().clamp(min=1)
        wanted = F.one_hot(targets.labels.clamp(min=0), len(self.classes)).float() * positive[:, None]
        found, residuals = output.residuals[positive], targets.residuals[positive]
        heading = residuals[:, 6] + self.anchors[positive, 6]
        turned = wrap_angle(heading - _DIRECTION_OFFSET, 0.0, 2 * math.pi)
        direction = (turned / (2 * math.pi / _DIRECTIONS)).floor().long().clamp(0, _DIRECTIONS - 1)
        pair = _sine_of_difference(found, residuals)
        parts = {
            "class": sigmoid_focal(output.classes[counts], wanted[counts]),
            "box": F.smooth_l1_loss(*pair, beta=1 / 9, reduction="none"),
            "direction": F.cross_entropy(output.directions[positive], direction, reduction="none"),
        }
        return {name: values.sum() / number for name, values in parts.items()}

    @torch.no_grad()
    def targets(self, truth: Boxes) -> AnchorTargets:
        """Labels and residuals of every anchor: each class has anchors of its own and looks at its own boxes only."""
        classes = len(self.classes)
        anchors = self.anchors.view(-1, classes, len(self.classes[0].headings), 7)  # cells, classes, headings
        labels = torch.empty(anchors.shape[:3], dtype=torch.int64, device=anchors.device)
        residuals = torch.zeros_like(anchors)
        for number, setting in enumerate(self.classes):
            boxes = truth.boxes[truth.labels == number, :7].float()
            own = anchors[:, number].reshape(-1, 7)
            match = match_anchors(own, boxes, setting.matched, setting.unmatched)
            code = torch.zeros_like(own)
            hit = match >= 0
            code[hit] = encode_boxes(boxes[match[hit]], own[hit])
            labels[:, number] = torch.where(hit, number, match).view(labels.shape[0], -1)
            residuals[:, number] = code.view(anchors.shape[0], -1, 7)
        return AnchorTargets(labels.flatten(), residuals.view(-1, 7))

    # Inference -------------------------------------------------------------------------------------------------------

    def detections(self, output: AnchorOutput) -> list[Boxes]:
        rule = Suppression(self.nms_candidates, self.nms_threshold, self.max_boxes)
        return self._boxes(output, rule, self.score_threshold)

    def proposals(self, output: AnchorOutput, rule: Suppression) -> list[Boxes]:
        return self._boxes(output, rule, 0.0)

    @torch.no_grad()
    def _boxes(self, output: AnchorOutput, rule: Suppression, least_score: float) -> list[Boxes]:
        found = []
        for parts in zip(*output, strict=True):
            frame = AnchorOutput(*parts)
            scores, labels = frame.classes.sigmoid().max(1)
            rows = (scores >= least_score).nonzero()[:, 0]
            rows = rows[scores[rows].sort(descending=True, stable=True).indices[: rule.candidates]]
            boxes = self.decode(AnchorOutput(*(part[rows] for part in frame)), self.anchors[rows])
            found.append(rule(Boxes(boxes, labels[rows], scores[rows])))
        return found

    def decode(self, output: AnchorOutput, anchors: Tensor) -> Tensor:
        """``(N, 7)`` boxes from what is said of ``(N, 7)`` anchors; the heading is turned into its direction's half."""
        boxes = decode_boxes(output.residuals, anchors)
        half = wrap_angle(boxes[:, 6] - _DIRECTION_OFFSET, 0.0, math.pi)
        heading = half + _DIRECTION_OFFSET + math.pi * output.directions.argmax(1)
        return torch.cat([boxes[:, :6], heading[:, None]], 1)


def make_anchors(classes: Sequence[Anchor], grid: BevGrid, height: int, width: int) -> Tensor:
    """``(height * width * classes * headings, 7)`` anchors, in that order.

    The first and the last of a row stand on the borders of the range.
    """
    x, y = (
        torch.linspace(grid.point_range[axis], grid.point_range[axis + 3], count, dtype=torch.float64)
        for axis, count in ((0, width), (1, height))
    )
    shapes = torch.tensor(
        [
            [[setting.bottom + setting.size[2] / 2, *setting.size, heading] for heading in setting.headings]
            for setting in classes
        ],
        dtype=torch.float64,
    )
    anchors = torch.empty(height, width, *shapes.shape[:2], 7)
    anchors[..., 0] = x[None, :, None, None]
    anchors[..., 1] = y[:, None, None, None]
    anchors[..., 2:] = shapes
    return anchors.view(-1, 7)


def match_anchors(anchors: Tensor, boxes: Tensor, matched: float, unmatched: float) -> Tensor:
    """``(A,)`` int64 box of every anchor, -1 if it has none, -2 if it does not count.

    A box claims all anchors that tie for its greatest overlap; such an anchor gets its own best box, which may be
    another one.
    """
    if not len(boxes):
        return torch.full((len(anchors),), -1, device=anchors.device)
    overlap = nearest_iou(anchors, boxes)
    best, box = overlap.max(1)
    match = torch.where(best < unmatched, -1, -2)
    greatest = overlap.amax(0)
    claimed = ((overlap == greatest) & (greatest > 0)).any(1)
    return torch.where(claimed | (best >= matched), box, match)


def _sine_of_difference(found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Residuals whose angles are replaced by two terms whose difference is the sine of theirs."""
    a, b = found[:, 6:], wanted[:, 6:]
    return torch.cat([found[:, :6], a.sin() * b.cos()], 1), torch.cat([wanted[:, :6], a.cos() * b.sin()], 1)
