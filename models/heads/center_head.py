"""The centre head of CenterPoint.

Yin et al., "Center-based 3D Object Detection and Tracking", CVPR 2021 (arXiv 2006.11275), section 4, as OpenPCDet's
``CenterHead`` has it, whose names the layers have; with its branch for the overlap (IoU) and its DIoU loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pc3d.data.boxes import Boxes
from pc3d.errors import InputError
from pc3d.losses.detection import center_focal, upright_diou
from pc3d.nn.bev import BevGrid
from pc3d.ops.boxes import box_iou, rotated_nms
from pc3d.tasks.heads import DetectionHead, Suppression, check_counts

_HEAT_BIAS = -2.19  # about a probability of 0.1
_ROUNDING = torch.finfo(torch.float64).eps
Maps = dict[str, Tensor]


@dataclass
class CenterTargets:
    """What the maps of one group of classes should say, for B frames with N objects in all.

    Attributes:
        heat: ``(B, K, H, W)`` float32, 1 at the cell of an object's centre.
        frame, cell: ``(N,)`` int64, the frame of each object and the place ``y * W + x`` of its cell.
        values: ``(N, 8)`` offset in the cell (x, y), z, logarithms of the size, cosine and sine of the heading; and the
            velocity, ``(N, 10)``.
        boxes: ``(N, 7)``, or ``(N, 9)``, the objects themselves.
    """

    heat: Tensor
    frame: Tensor
    cell: Tensor
    values: Tensor
    boxes: Tensor


class SeparateHead(nn.Module):
    """One small stack of convolutions for every quantity of a group of classes."""

    def __init__(
        self, widths: dict[str, int], channels: int, num_conv: int, bias: bool, eps: float, mom: float
    ) -> None:
        super().__init__()
        self.names = list(widths)
        for name, width in widths.items():
            hidden = [_conv_norm_relu(channels, channels, bias, eps, mom) for _ in range(num_conv - 1)]
            last = nn.Conv2d(channels, width, 3, padding=1)
            self.add_module(name, nn.Sequential(*hidden, last))
            if name == "hm":
                assert last.bias is not None
                nn.init.constant_(last.bias, _HEAT_BIAS)
            else:
                self.get_submodule(name).apply(_init)

    def forward(self, features: Tensor) -> Maps:
        return {name: self.get_submodule(name)(features).float() for name in self.names}


def _init(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class CenterHead(DetectionHead[list[Maps]]):
    """Objects as peaks of a heat map per class, with everything else read at the peak.

    Args:
        groups: names of the classes of each group; a group has layers and suppression of its own. None: one group.
        shared_channels: width of the layer before the branches.
        num_conv: convolutions of a branch.
        iou: predict the overlap of each box with its object, which corrects the score.
        diou_loss: also learn from the DIoU of boxes.
        velocity: predict the velocity, from boxes of 9 columns.
        norm_bias: convolutions before a norm have a bias too.
        norm_eps, norm_momentum: of the norms; 1e-5 and 0.1 in older published networks.
        heat_weight, box_weight: factors of the losses; ``box_weight`` of both losses of boxes.
        code_weights: factor of each of the 8 values of a box (10 with velocity); None takes 1, for velocities 0.2.
        overlap: least overlap of a box that is off by the radius of its peak.
        min_radius: least radius of a peak in cells.
        max_objects: of one frame and group to learn from.
        max_peaks: of one frame and group to look at.
        score_threshold: less likely boxes are dropped.
        center_range: boxes whose centre is outside are dropped: ``x_min y_min z_min x_max y_max z_max``; None: the
            grid's range, and 10 m up and down.
        iou_powers: per class, how much the predicted overlap counts in the score; one number for all.
        nms_threshold: largest overlap of two boxes of any classes of a group; or one per class, which then do not
            suppress each other.
        nms_candidates: the best so many boxes are compared; per class where thresholds are.
        max_boxes: the best so many of those left are kept. Not applied per class, as published.
    """

    def __init__(
        self,
        groups: list[list[str]] | None = None,
        shared_channels: int = 64,
        num_conv: int = 2,
        iou: bool = False,
        diou_loss: bool = False,
        velocity: bool = False,
        norm_bias: bool = False,
        norm_eps: float = 1e-3,
        norm_momentum: float = 0.01,
        heat_weight: float = 1.0,
        box_weight: float = 2.0,
        code_weights: list[float] | None = None,
        overlap: float = 0.1,
        min_radius: int = 2,
        max_objects: int = 500,
        max_peaks: int = 500,
        score_threshold: float = 0.1,
        center_range: list[float] | None = None,
        iou_powers: float | list[float] = 0.5,
        nms_threshold: float | list[float] = 0.7,
        nms_candidates: int = 4096,
        max_boxes: int = 500,
    ) -> None:
        super().__init__()
        counts = {"num_conv": num_conv, "shared_channels": shared_channels, "max_objects": max_objects}
        check_counts("head", **counts, max_peaks=max_peaks, nms_candidates=nms_candidates, max_boxes=max_boxes)
        if not 0 < overlap < 1 or min_radius < 0:
            raise InputError(
                f"head.overlap {overlap} must lie between 0 and 1, head.min_radius {min_radius} must not be negative"
            )
        width = 10 if velocity else 8
        if code_weights is not None and len(code_weights) != width:
            raise InputError(f"head.code_weights has {len(code_weights)} values, a box {width}")
        if center_range is not None and len(center_range) != 6:
            raise InputError(f"head.center_range has {len(center_range)} values, it needs 6")
        self.groups = groups
        self.shared_channels = shared_channels
        self.num_conv = num_conv
        self.iou = iou
        self.diou_loss = diou_loss
        self.velocity = velocity
        self.norm_bias, self.norm_eps, self.norm_momentum = norm_bias, norm_eps, norm_momentum
        self.heat_weight, self.box_weight = heat_weight, box_weight
        self.code_weights = code_weights or [1.0] * 8 + [0.2] * (width - 8)
        self.overlap, self.min_radius = overlap, min_radius
        self.max_objects, self.max_peaks = max_objects, max_peaks
        self.score_threshold = score_threshold
        self.center_range = center_range
        self.iou_powers = iou_powers
        self.nms_threshold = nms_threshold
        self.nms_candidates, self.max_boxes = nms_candidates, max_boxes

    def build(self, in_channels: int, class_names: list[str], grid: BevGrid, stride: int) -> None:
        groups = self.groups or [class_names]
        if sorted(name for group in groups for name in group) != sorted(class_names) or [] in groups:
            raise InputError(f"head.groups {groups} must name every class once: {', '.join(class_names)}")
        for option, given in (("iou_powers", self.iou_powers), ("nms_threshold", self.nms_threshold)):
            if isinstance(given, list) and len(given) != len(class_names):
                raise InputError(f"head.{option} has {len(given)} values for {len(class_names)} classes")
        self.grid, self.stride = grid, stride
        self.members = [[class_names.index(name) for name in group] for group in groups]
        norm = self.norm_bias, self.norm_eps, self.norm_momentum
        self.shared_conv = _conv_norm_relu(in_channels, self.shared_channels, *norm)
        self.heads_list = nn.ModuleList(
            SeparateHead(self._widths(len(group)), self.shared_channels, self.num_conv, *norm) for group in groups
        )

    def _widths(self, classes: int) -> dict[str, int]:
        widths = {"center": 2, "center_z": 1, "dim": 3, "rot": 2}
        if self.velocity:
            widths["vel"] = 2
        if self.iou:
            widths["iou"] = 1
        return {**widths, "hm": classes}

    def forward(self, features: Tensor) -> list[Maps]:
        shared = self.shared_conv(features)
        return [head(shared) for head in self.heads_list]

    # Training --------------------------------------------------------------------------------------------------------

    def losses(self, output: list[Maps], truth: list[Boxes]) -> dict[str, Tensor]:
        """Focal loss of heat maps, L1 of values at objects; with them, L1 of the predicted overlap, and 1 - DIoU."""
        groups = [self._group_losses(maps, members, truth) for maps, members in zip(output, self.members, strict=True)]
        return {name: torch.stack([group[name] for group in groups]).sum() for name in groups[0]}

    def _group_losses(self, maps: Maps, members: list[int], truth: list[Boxes]) -> dict[str, Tensor]:
        targets = self.targets(truth, members, maps["hm"].shape[2:])
        found = torch.cat([_at_cells(maps[name], targets.frame, targets.cell) for name in self._value_maps()], 1)
        objects = max(len(found), 1)
        known = ~targets.values.isnan()
        off = torch.where(known, found - targets.values.nan_to_num(), 0).abs().sum(0) / objects
        losses = {
            "heat": self.heat_weight * center_focal(maps["hm"], targets.heat),
            "box": self.box_weight * (off * off.new_tensor(self.code_weights)).sum(),
        }
        if not (self.iou or self.diou_loss):
            return losses
        boxes = self._boxes(found, targets.cell, maps["hm"].shape[3])
        if self.iou:
            overlap = 2 * box_iou(boxes, targets.boxes).float() - 1
            said = _at_cells(maps["iou"], targets.frame, targets.cell)[:, 0]
            losses["iou"] = (said - overlap).abs().sum() / objects
        if self.diou_loss:
            losses["diou"] = self.box_weight * (1 - upright_diou(boxes, targets.boxes)).sum() / objects
        return losses

    def _value_maps(self) -> list[str]:
        return ["center", "center_z", "dim", "rot", *(["vel"] if self.velocity else [])]

    @torch.no_grad()
    def targets(self, truth: list[Boxes], members: Sequence[int], shape: Sequence[int]) -> CenterTargets:
        """What maps of ``shape`` (H, W) should say of the classes ``members``."""
        height, width = shape
        columns = 9 if self.velocity else 7
        device = truth[0].boxes.device
        boxes, classes, frames = [], [], []
        for frame, objects in enumerate(truth):
            numbers = torch.full((max([*members, *objects.labels.tolist()]) + 1,), -1, device=device)
            numbers[list(members)] = torch.arange(len(members), device=device)
            own = numbers[objects.labels]
            rows = ((own >= 0) & (objects.boxes[:, 3:5] > 0).all(1)).nonzero()[: self.max_objects, 0]
            if objects.boxes.shape[1] < columns and len(rows):
                raise InputError("head.velocity: the boxes of the data have no velocities")
            boxes.append(objects.boxes[rows, :columns].float())
            classes.append(own[rows])
            frames.append(torch.full_like(rows, frame))
        box, number, frame_of = torch.cat(boxes), torch.cat(classes), torch.cat(frames)
        low, voxel = box.new_tensor(self.grid.point_range[:2]), box.new_tensor(self.grid.voxel_size[:2])
        place = (box[:, :2] - low) / voxel / self.stride
        place = torch.minimum(place.clamp(min=0), place.new_tensor([width - 0.5, height - 0.5]))
        cell = place.long()
        length, across = (box[:, 3:5] / voxel / self.stride).unbind(1)
        radius = peak_radius(length, across, self.overlap).clamp(min=self.min_radius)
        heat = draw_peaks((len(truth), len(members), height, width), frame_of * len(members) + number, cell, radius)
        heading = box[:, 6:7]
        values = [place - cell, box[:, 2:3], box[:, 3:6].log(), heading.cos(), heading.sin(), box[:, 7:]]
        return CenterTargets(heat, frame_of, cell[:, 1] * width + cell[:, 0], torch.cat(values, 1), box)

    # Inference -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def detections(self, output: list[Maps]) -> list[Boxes]:
        frames = []
        for frame in range(len(output[0]["hm"])):
            groups = []
            for maps, members in zip(output, self.members, strict=True):
                peaks = self.peaks({name: value[frame] for name, value in maps.items()}, members)
                groups.append(self._suppressed(peaks, members))
            scores = torch.cat([group.scores for group in groups if group.scores is not None])
            boxes, labels = (torch.cat([getattr(g, name) for g in groups]) for name in ("boxes", "labels"))
            frames.append(Boxes(boxes, labels, scores).take(scores.sort(descending=True, stable=True).indices))
        return frames

    def peaks(self, maps: Maps, members: Sequence[int]) -> Boxes:
        """Boxes at the best cells of one frame's maps ``(C, H, W)``, before suppression."""
        heat = maps["hm"].sigmoid().flatten(1)
        best, cell = _top(heat, self.max_peaks)
        scores, which = _top(best.flatten(), self.max_peaks)
        number, cell = which // best.shape[1], cell.flatten()[which]
        zero = torch.zeros_like(cell)
        values = torch.cat([_at_cells(maps[name][None], zero, cell) for name in self._value_maps()], 1)
        boxes = self._boxes(values, cell, maps["hm"].shape[2])
        low, high = boxes.new_tensor(self._limits()).view(2, 3)
        inside = ((boxes[:, :3] >= low) & (boxes[:, :3] <= high)).all(1) & (scores > self.score_threshold)
        labels = torch.tensor(list(members), device=cell.device)[number]
        if self.iou:
            quality = ((_at_cells(maps["iou"][None], zero, cell)[:, 0] + 1) / 2).clamp(0, 1)
            power = scores.new_tensor(self._per_class(self.iou_powers))[labels]
            scores = scores ** (1 - power) * quality**power
        return Boxes(boxes, labels, scores).take(inside)

    def _limits(self) -> list[float]:
        if self.center_range is not None:
            return self.center_range
        low, high = list(self.grid.point_range[:3]), list(self.grid.point_range[3:])
        return [*low[:2], low[2] - 10, *high[:2], high[2] + 10]

    def _per_class(self, given: float | list[float]) -> list[float]:
        return given if isinstance(given, list) else [given] * sum(map(len, self.members))

    def _suppressed(self, found: Boxes, members: Sequence[int]) -> Boxes:
        assert found.scores is not None
        if not isinstance(self.nms_threshold, list):
            return Suppression(self.nms_candidates, self.nms_threshold, self.max_boxes)(found)
        order = found.scores.sort(descending=True, stable=True).indices
        candidates = [order[found.labels[order] == number][: self.nms_candidates] for number in members]
        found = found.take(torch.cat(candidates))
        assert found.scores is not None
        return found.take(rotated_nms(found.boxes, found.scores, self.nms_threshold, found.labels))

    def _boxes(self, values: Tensor, cell: Tensor, width: int) -> Tensor:
        """``(N, 7 or 9)`` boxes from values read at cells; differentiable."""
        corner = torch.stack([cell % width, cell // width], 1)
        low, size = values.new_tensor(self.grid.point_range[:2]), values.new_tensor(self.grid.cell_size(self.stride))
        heading = torch.atan2(values[:, 7], values[:, 6])[:, None]
        return torch.cat(
            [(corner + values[:, :2]) * size + low, values[:, 2:3], values[:, 3:6].exp(), heading, values[:, 8:]], 1
        )


def _conv_norm_relu(in_channels: int, out_channels: int, bias: bool, eps: float, momentum: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias),
        nn.BatchNorm2d(out_channels, eps=eps, momentum=momentum),
        nn.ReLU(),
    )


def _at_cells(values: Tensor, frame: Tensor, cell: Tensor) -> Tensor:
    """``(N, C)`` of ``(B, C, H, W)`` maps at cells ``y * W + x`` of frames."""
    return values.flatten(2).permute(0, 2, 1)[frame, cell]


def _top(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The greatest of the last axis and their places; of equal ones the first."""
    if values.shape[-1] > 4 * count:  # sorting what may be among them is enough
        least = values.topk(count).values[..., -1:]
        values = values.masked_fill(values < least, -1.0)
    found = values.sort(dim=-1, descending=True, stable=True)
    return found.values[..., :count], found.indices[..., :count]


def peak_radius(length: Tensor, width: Tensor, overlap: float) -> Tensor:
    """``(N,)`` int64 radius in cells: boxes moved by less still overlap by ``overlap``.

    Law and Deng, "CornerNet", ECCV 2018, in the published form, whose divisors are 2 where the roots have 2a.
    """
    total, product = length + width, length * width
    roots = [
        (total + (total**2 - 4 * product * (1 - overlap) / (1 + overlap)).sqrt()) / 2,
        (2 * total + (4 * total**2 - 16 * product * (1 - overlap)).sqrt()) / 2,
        (-2 * overlap * total + (4 * overlap**2 * total**2 - 16 * overlap * product * (overlap - 1)).sqrt()) / 2,
    ]
    return torch.stack(roots).amin(0).long()


def draw_peaks(shape: tuple[int, int, int, int], plane: Tensor, cell: Tensor, radius: Tensor) -> Tensor:
    """``(B, K, H, W)`` float32 maps of Gaussians, merged by the greatest.

    Args:
        shape: of the result.
        plane: ``(N,)`` int64 map ``b * K + k`` of each peak.
        cell: ``(N, 2)`` int64 x and y of its middle.
        radius: ``(N,)`` int64 cells; sigma is ``(2 radius + 1) / 6``.
    """
    planes, height, width = shape[0] * shape[1], *shape[2:]
    heat = torch.zeros(planes * height * width, device=cell.device)
    if not len(cell):
        return heat.view(shape)
    reach = int(radius.max())
    step = torch.arange(-reach, reach + 1, device=cell.device)
    x, y = cell[:, 0, None, None] + step, cell[:, 1, None, None] + step[:, None]
    distance = (step**2 + step[:, None] ** 2).double()
    peak = torch.exp(-distance / (2 * ((2 * radius.double() + 1) / 6)[:, None, None] ** 2))
    near = (step.abs() <= radius[:, None, None]) & (step.abs()[:, None] <= radius[:, None, None])
    seen = near & (peak >= _ROUNDING) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    place = (plane[:, None, None] * height + y) * width + x
    return heat.scatter_reduce(0, place[seen], peak[seen].float(), "amax").view(shape)
