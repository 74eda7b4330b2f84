"""The second stage of Voxel R-CNN, and of E-3DSNN's detector.

Deng et al., "Voxel R-CNN: Towards High Performance Voxel-based 3D Object Detection", AAAI 2021 (arXiv 2012.15712);
constants and rules as in OpenPCDet's ``VoxelRCNNHead``. With ``spikes``, a spiking neuron stands before every layer in
place of the ReLU behind it: Qiu et al., "Efficient 3D Recognition with Event-driven Spike Sparse Convolution", AAAI
2025 (arXiv 2412.07360).
"""

# No postponed annotations here: jsonargparse takes the types of a dataclass's __init__ as they stand, and would check
# nothing.
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pc3d.config import Configurable
from pc3d.data.boxes import Boxes
from pc3d.errors import InputError
from pc3d.nn.backbone import FeatureInfo
from pc3d.nn.bev import BevGrid
from pc3d.nn.spiking import SpikingNeuron
from pc3d.ops.boxes import box_corners, box_iou_table, decode_boxes, encode_boxes, turn
from pc3d.ops.voxel_query import voxel_query
from pc3d.sparse import VoxelBatchNorm
from pc3d.tasks.heads import RefinementHead, Suppression, check_counts
from pc3d.voxels import Voxels

NeuronFactory = Callable[[], SpikingNeuron]

_FARTHEST = 1e6  # cells; beyond, a place is far from everything


@dataclass(frozen=True)
class PooledLevel(Configurable):
    """How the voxels of one level are gathered.

    Attributes:
        name: of the level, see ``backbone.feature_info``.
        radius: of the ball around a place, in metres.
        channels: width of the result.
        samples: voxels of a ball, the first ones of the grid.
        reach: cells to look at, on either side.
    """

    name: str
    radius: float
    channels: int = 32
    samples: int = 16
    reach: int = 4

    def __post_init__(self) -> None:
        check_counts("refine.levels", channels=self.channels, samples=self.samples, reach=self.reach)
        if not self.radius > 0:
            raise InputError(f"refine.levels.radius is {self.radius}: it must be positive")


KITTI_LEVELS = (PooledLevel("conv2", 0.4), PooledLevel("conv3", 0.8), PooledLevel("conv4", 1.6))


class Sampled(NamedTuple):
    """Proposals of a frame to learn from: boxes, overlap ``(R,)`` with the best true box of their class, and that box
    ``(R, 7)`` (anything where there is none)."""

    boxes: Tensor
    overlap: Tensor
    matched: Tensor


class VoxelRCNNHead(RefinementHead):
    """Boxes corrected by the voxels around a grid of places inside each of them.

    The score of a corrected box is its expected overlap with a true one; its class is that of the proposal.

    Args:
        levels: what is gathered; None takes those of the published networks.
        grid_size: places of a box along each of its axes.
        channels: width of the fully connected layers: two for all, two more for the score, two more for the box.
        dropout: between two of these layers.
        spikes: levels of the neurons in place of ReLU; None: ReLU.
        suppression: makes the boxes that are corrected.
        training_suppression: makes those that ``samples`` are drawn from.
        samples: boxes of a frame to learn from.
        positive_share: at most so many of these overlap a true box by ``box_overlap``.
        box_overlap: what overlaps more learns the box.
        hard_share: of the other samples, so many overlap a true box by 0.1 at least.
        score_overlap: overlaps at and below the first mean a score of 0, at and above the second of 1.
        class_weight, box_weight, corner_weight: factors of the losses.
        score_threshold: less likely boxes are dropped.
        final: which of the corrected boxes are kept.
    """

    def __init__(
        self,
        levels: list[PooledLevel] | None = None,
        grid_size: int = 6,
        channels: int = 256,
        dropout: float = 0.3,
        spikes: int | None = None,
        suppression: Suppression = Suppression(2048, 0.7, 100),  # noqa: B008 (frozen)
        training_suppression: Suppression = Suppression(9000, 0.8, 512),  # noqa: B008 (frozen)
        samples: int = 128,
        positive_share: float = 0.5,
        box_overlap: float = 0.55,
        hard_share: float = 0.8,
        score_overlap: tuple[float, float] = (0.25, 0.75),
        class_weight: float = 1.0,
        box_weight: float = 1.0,
        corner_weight: float = 1.0,
        score_threshold: float = 0.3,
        final: Suppression = Suppression(4096, 0.1, 500),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        check_counts("refine", grid_size=grid_size, channels=channels, samples=samples)
        for name, share in (
            ("positive_share", positive_share),
            ("hard_share", hard_share),
            ("box_overlap", box_overlap),
        ):
            if not 0 <= share <= 1:
                raise InputError(f"refine.{name} is {share}: it must lie between 0 and 1")
        if not 0 <= dropout < 1:
            raise InputError(f"refine.dropout is {dropout}: it must be at least 0 and below 1")
        if not score_overlap[0] < score_overlap[1]:
            raise InputError(f"refine.score_overlap {list(score_overlap)} must rise")
        self.settings = list(KITTI_LEVELS) if levels is None else list(levels)
        self.grid_size, self.channels, self.dropout = grid_size, channels, dropout
        self.neuron: NeuronFactory | None = None if spikes is None else partial(SpikingNeuron, spikes)
        self.suppression, self.training_suppression, self.final = suppression, training_suppression, final
        self.samples, self.positive_share, self.hard_share = samples, positive_share, hard_share
        self.box_overlap, self.score_overlap = box_overlap, score_overlap
        self.weights = {"class": class_weight, "box": box_weight, "corner": corner_weight}
        self.score_threshold = score_threshold

    def build(self, grid: BevGrid, levels: Sequence[FeatureInfo]) -> None:
        known = {info.name: info for info in levels}
        missing = [setting.name for setting in self.settings if setting.name not in known]
        if missing:
            raise InputError(
                f"refine.levels: the backbone has no level {', '.join(missing)} (it has {', '.join(known) or 'none'})"
            )
        self.grid = grid
        self.strides = [known[setting.name].stride for setting in self.settings]
        self.pools = nn.ModuleList(
            VoxelPool(known[setting.name].channels, setting, self.neuron) for setting in self.settings
        )
        width = self.grid_size**3 * sum(setting.channels for setting in self.settings)
        self.shared = self._layers(width)
        self.class_layers, self.box_layers = self._layers(self.channels), self._layers(self.channels)
        self.class_out, self.box_out = nn.Linear(self.channels, 1), nn.Linear(self.channels, 7)
        for layer in itertools.chain(self.shared, self.class_layers, self.box_layers):
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
        for out, std in ((self.class_out, 0.01), (self.box_out, 0.001)):
            nn.init.normal_(out.weight, std=std)
            nn.init.zeros_(out.bias)

    def _layers(self, width: int) -> nn.Sequential:
        first = _layer(nn.Linear(width, self.channels, bias=False), self.neuron)
        second = _layer(nn.Linear(self.channels, self.channels, bias=False), self.neuron)
        between = [nn.Dropout(self.dropout)] if self.dropout > 0 else []  # as published, no layer without dropout
        return nn.Sequential(*first, *between, *second)

    def forward(self, levels: Mapping[str, Voxels], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """``(R,)`` logits and ``(R, 7)`` residuals, float32, of the boxes ``(R_i, 7)`` of all clouds."""
        packed = torch.cat(boxes)
        cloud = torch.repeat_interleave(torch.tensor([len(own) for own in boxes])).to(packed.device)
        places = box_places(packed, self.grid_size).flatten(0, 1)
        low, size = (places.new_tensor(list(v)) for v in (self.grid.point_range[:3], self.grid.voxel_size))
        cell = ((places - low) / size).floor().nan_to_num(_FARTHEST).clamp(-_FARTHEST, _FARTHEST).int()
        owner = cloud.int().repeat_interleave(self.grid_size**3)[:, None]
        pooled = []
        for setting, stride, pool in zip(self.settings, self.strides, self.pools, strict=True):
            cells = torch.cat([owner, cell.div(stride, rounding_mode="floor")], 1)
            voxels = levels[setting.name]
            pooled.append(pool(voxels, self.grid.centers(voxels.coord[:, 1:], stride), cells, places))
        shared = self.shared(torch.cat(pooled, 1).view(len(packed), -1))
        logits, residuals = self.class_out(self.class_layers(shared)), self.box_out(self.box_layers(shared))
        return logits[:, 0].float(), residuals.float()

    # Training --------------------------------------------------------------------------------------------------------

    def losses(self, levels: Mapping[str, Voxels], proposals: list[Boxes], truth: list[Boxes]) -> dict[str, Tensor]:
        """Cross-entropy of scores, smooth L1 of residuals and of the way between corners, means over the batch.

        Samples are drawn from torch's global generator. A frame without proposals brings none; published code fills up
        with boxes without size.
        """
        frames = [self.sample(found, true) for found, true in zip(proposals, truth, strict=True)]
        names = {name: f"refine_{name}" for name in self.weights}
        if sum(len(frame.boxes) for frame in frames) < 2:  # norms need two
            nothing = torch.stack([parameter.sum() for parameter in self.parameters()]).sum() * 0.0
            return dict.fromkeys(names.values(), nothing)
        logits, residuals = self(levels, [frame.boxes for frame in frames])
        boxes, overlap, matched = (torch.cat(parts) for parts in zip(*frames, strict=True))
        least, most = self.score_overlap
        quality = ((overlap - least) / (most - least)).clamp(0, 1)
        rows = overlap > self.box_overlap
        boxes, matched, residuals = boxes[rows], matched[rows], residuals[rows]
        own = torch.cat([torch.zeros_like(boxes[:, :3]), boxes[:, 3:6], torch.zeros_like(boxes[:, 6:])], 1)
        wanted = encode_boxes(seen_from(boxes, matched), own)
        count = max(len(boxes), 1)
        parts = {
            "class": F.binary_cross_entropy_with_logits(logits, quality),
            "box": F.smooth_l1_loss(residuals, wanted, beta=1 / 9, reduction="sum") / count,
            "corner": corner_loss(corrected(boxes, residuals), matched).sum() / count,
        }
        return {names[name]: weight * parts[name] for name, weight in self.weights.items()}

    @torch.no_grad()
    def sample(self, proposals: Boxes, truth: Boxes) -> Sampled:
        """Some proposals: positive ones once, of the others the hard ones more often, again and again if need be."""
        boxes, true = proposals.boxes[:, :7].float(), truth.boxes[:, :7].float()
        if len(true):
            overlap = box_iou_table(boxes, true).float()
            overlap = overlap * (proposals.labels[:, None] == truth.labels)
            best, which = overlap.max(1)
        else:
            best, which, true = boxes.new_zeros(len(boxes)), torch.zeros_like(proposals.labels), boxes.new_zeros(1, 7)
        rows = self._drawn(best.cpu()).to(boxes.device)
        return Sampled(boxes[rows], best[rows], true[which[rows]])

    def _drawn(self, overlap: Tensor) -> Tensor:
        positive = (overlap >= min(self.box_overlap, self.score_overlap[1])).nonzero()[:, 0]
        easy = (overlap < 0.1).nonzero()[:, 0]
        hard = ((overlap >= 0.1) & (overlap < self.box_overlap)).nonzero()[:, 0]
        if not len(easy) and not len(hard):
            return _again(positive, self.samples)
        positive = positive[torch.randperm(len(positive))[: round(self.positive_share * self.samples)]]
        others = self.samples - len(positive)
        if not len(easy) or not len(hard):
            return torch.cat([positive, _again(torch.cat([hard, easy]), others)])
        many = min(int(others * self.hard_share), len(hard))
        return torch.cat([positive, _again(hard, many), _again(easy, others - many)])

    # Inference -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def detections(self, levels: Mapping[str, Voxels], proposals: list[Boxes]) -> list[Boxes]:
        counts = [len(found) for found in proposals]
        if not sum(counts):
            return proposals
        logits, residuals = self(levels, [found.boxes for found in proposals])
        found = []
        for own, scores, shift in zip(proposals, logits.sigmoid().split(counts), residuals.split(counts), strict=True):
            boxes = Boxes(corrected(own.boxes, shift), own.labels, scores)
            found.append(self.final(boxes.take(scores >= self.score_threshold)))
        return found


class VoxelPool(nn.Module):
    """The largest of what the voxels around a place, and their ways from it, say (paper, section 3.3, accelerated).

    Args:
        in_channels: width of the voxels.
        setting: of the level.
        neuron: makes what stands in place of ReLU.
    """

    def __init__(self, in_channels: int, setting: PooledLevel, neuron: NeuronFactory | None) -> None:
        super().__init__()
        width = setting.channels
        self.setting = setting
        self.enter = nn.Sequential(nn.Linear(in_channels, width, bias=False), VoxelBatchNorm(width, 1e-5, 0.1))
        self.way = nn.Sequential(nn.Linear(3, width, bias=False), nn.BatchNorm1d(width))
        self.activation = nn.ReLU() if neuron is None else neuron()
        self.leave = nn.Sequential(*_layer(nn.Linear(width, width, bias=False), neuron))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, voxels: Voxels, center: Tensor, cells: Tensor, places: Tensor) -> Tensor:
        """``(Q, channels)`` of places ``(Q, 3)`` in cells ``(Q, 4)`` ``[cloud, x, y, z]`` of the voxels' grid.

        Args:
            center: ``(M, 3)`` where the voxels are, in metres.
        """
        setting = self.setting
        rows = voxel_query(voxels.coord, center, cells, places, setting.reach, setting.radius, setting.samples)
        # A row more, for where no voxel is.
        feat = F.pad(self.enter(voxels.feat), (0, 0, 0, 1))
        center = F.pad(center, (0, 0, 0, 1))
        way = torch.where(rows[..., None] >= 0, center[rows] - places[:, None], 0.0)
        norm = self.way[1]
        if isinstance(norm, nn.SyncBatchNorm):
            largest = (feat[rows] + self.way(way.flatten(0, 1)).view(*rows.shape, -1)).amax(1)
        else:
            weight, bias = self._affine(way)
            largest = self._largest(feat, center, weight, rows, places) + bias
        return self.leave(self.activation(largest))

    def _affine(self, way: Tensor) -> tuple[Tensor, Tensor]:
        """The layer of ways and its norm as one, ``(C, 3)`` and ``(C,)``: moments of ways give those of the layer."""
        layer, norm = self.way
        assert isinstance(layer, nn.Linear)
        assert isinstance(norm, nn.BatchNorm1d)
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None
        assert variance is not None
        assert norm.momentum is not None
        if self.training:
            ways, weight = way.flatten(0, 1).double(), layer.weight.double()
            middle = ways.mean(0)
            apart = ways - middle
            spread = torch.stack([(apart * column[:, None]).mean(0) for column in apart.unbind(1)])
            batch_mean = (weight * middle).sum(1)
            batch_variance = (weight[:, :, None] * spread * weight[:, None]).sum((1, 2))
            with torch.no_grad():
                rate, unbiased = norm.momentum, len(ways) / max(len(ways) - 1, 1)
                mean.lerp_(batch_mean.to(mean), rate)
                variance.lerp_((batch_variance * unbiased).to(variance), rate)
                if norm.num_batches_tracked is not None:
                    norm.num_batches_tracked.add_(1)
            mean, variance = batch_mean.to(layer.weight), batch_variance.to(layer.weight)
        scale = norm.weight * (variance + norm.eps).rsqrt()
        return layer.weight * scale[:, None], norm.bias - mean * scale

    def _largest(self, feat: Tensor, center: Tensor, weight: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """``(Q, C)`` largest of ``feat + weight (center - place)`` over the rows of a place, 0 where there is none.

        The place is the same for all rows, so one table of the voxels tells which is the largest.
        """
        with torch.no_grad():
            table = feat + (center[:, None] * weight).sum(2)  # no matrix product: autocast would round coordinates
            largest, best = table[rows[:, 0]], rows[:, :1].expand(-1, feat.shape[1])
            for row in rows[:, 1:].unbind(1):
                rival = table[row]
                best = torch.where(rival > largest, row[:, None], best)
                largest = torch.maximum(rival, largest)
        columns = torch.arange(feat.shape[1], device=feat.device)
        moved = ((center[best] - places[:, None]) * weight).sum(2)
        return torch.where(best >= 0, feat[best, columns] + moved, 0.0)


def _layer(linear: nn.Linear, neuron: NeuronFactory | None) -> list[nn.Module]:
    norm = nn.BatchNorm1d(linear.out_features)
    return [linear, norm, nn.ReLU()] if neuron is None else [neuron(), linear, norm]


def _again(rows: Tensor, count: int) -> Tensor:
    """``count`` of the rows, each drawn from all; none if there are none."""
    return rows[torch.randint(len(rows), (count,))] if len(rows) else rows


def box_places(boxes: Tensor, size: int) -> Tensor:
    """``(R, size^3, 3)`` middles of the cells of boxes ``(R, 7)``, along x, then y, then z of a box, z the fastest."""
    step = (torch.arange(size, device=boxes.device) + 0.5) / size - 0.5
    inside = torch.cartesian_prod(step, step, step) * boxes[:, None, 3:6]
    return torch.cat([turn(inside[..., :2], boxes[:, 6]), inside[..., 2:]], 2) + boxes[:, None, :3]


def seen_from(boxes: Tensor, others: Tensor) -> Tensor:
    """``(R, 7)`` others in the frames of boxes, pair by pair; headings at most a right angle off: fronts are not told
    from backs."""
    offset = others[:, :3] - boxes[:, :3]
    flat = turn(offset[:, None, :2], -boxes[:, 6])[:, 0]
    angle = (others[:, 6] - boxes[:, 6]) % (2 * math.pi)
    turned = (angle > math.pi / 2) & (angle < 3 * math.pi / 2)
    angle = torch.where(turned, (angle + math.pi) % (2 * math.pi), angle)
    angle = torch.where(angle > math.pi, angle - 2 * math.pi, angle).clamp(-math.pi / 2, math.pi / 2)
    return torch.cat([flat, offset[:, 2:], others[:, 3:6], angle[:, None]], 1)


def corrected(boxes: Tensor, residuals: Tensor) -> Tensor:
    """``(R, 7)`` boxes moved by residuals in their own frames."""
    own = torch.cat([torch.zeros_like(boxes[:, :3]), boxes[:, 3:7]], 1)
    found = decode_boxes(residuals, own)
    flat = turn(found[:, None, :2], boxes[:, 6])[:, 0]
    return torch.cat([torch.cat([flat, found[:, 2:3]], 1) + boxes[:, :3], found[:, 3:]], 1)


def corner_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """``(R,)`` smooth L1 of the distances of corners, a mean over 8; the wanted box may be turned front to back."""
    corners = box_corners(found)
    back = torch.cat([wanted[:, :6], wanted[:, 6:7] + math.pi], 1)
    ways = [(corners - box_corners(box)).norm(dim=2) for box in (wanted, back)]
    way = torch.minimum(*ways)
    return F.smooth_l1_loss(way, torch.zeros_like(way), reduction="none").mean(1)
