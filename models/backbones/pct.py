"""Point Cloud Transformer: Guo et al., "PCT: Point cloud transformer", CVM 2021 (arXiv 2012.09688).

The classifier with neighbour embedding, as the robustness benchmarks train it: two set abstractions, then offset
attention among their tokens. With PointSP's rules for key points and sizes of clouds (arXiv 2408.12062) it is the
network of that paper's main results.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.nn import Backbone, FeatureInfo
from pc3d.nn.robust_sampling import FullPointResampler, KeyPoints, KeyPointSampler, resampled
from pc3d.ops.neighbours import knn
from pc3d.ops.segment import segment_max
from pc3d.points import Points
from pc3d.voxels import Voxels

_ATTENTIONS = 4


class SharedMLP(nn.Sequential):
    """Linear layers without bias over the last axis, each with batch norm and ReLU."""

    def __init__(self, *channels: int) -> None:
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(channels):
            layers += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU()]
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


class SetAbstraction(nn.Module):
    """Key points, each with the largest of ``MLP([f_j - f_i, f_i])`` over its nearest points j.

    Args:
        channels: width of f; the result is twice as wide.
        neighbours: points j, the key point itself among them; a cloud of fewer points repeats its nearest.
        sampler: picks key points.
    """

    def __init__(self, channels: int, neighbours: int, sampler: KeyPointSampler) -> None:
        super().__init__()
        self.neighbours, self.sampler = neighbours, sampler
        self.local = SharedMLP(2 * channels, 2 * channels, 2 * channels)

    def forward(self, points: Points) -> Points:
        """Key points with ``feat`` ``(M, 2 channels)``."""
        feat = points.get("feat")
        rows, offsets = self.sampler(points.coord, points.offsets)
        coord = points.coord[rows]
        near, _ = knn(coord, offsets, points.coord, points.offsets, self.neighbours)
        grouped = group_features(feat, rows, torch.where(near < 0, near[:, :1], near))
        return Points(coord, offsets, {"feat": self.local(grouped).amax(1)})


def group_features(feat: Tensor, rows: Tensor, near: Tensor) -> Tensor:
    """``(M, K, 2 C)``: of the key points ``rows`` (M,) and their neighbours ``near`` (M, K), ``[f_j - f_i, f_i]``."""
    own = feat[rows][:, None].expand(-1, near.shape[1], -1)
    return torch.cat([feat[near] - own, own], -1)


class OffsetAttention(nn.Module):
    """``x + ReLU(BN(W (x - A^T V)))``: attention whose queries and keys are one, normalised twice (section 3.3).

    The softmax of ``Q Q^T`` over keys is divided by its sum over queries.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Linear(channels, channels // 4, bias=False)
        self.value = nn.Linear(channels, channels)
        self.project = nn.Linear(channels, channels)
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        """``(M, C)`` tokens, cloud after cloud, of which ``there`` ``(B, T)`` says how many each has."""
        query, value = (x.new_zeros(*there.shape, layer.out_features) for layer in (self.query, self.value))
        query[there], value[there] = self.query(x), self.value(x)
        scores = (query @ query.mT).masked_fill(~there[:, None], -torch.inf)
        # A cloud without tokens has no key to see: its rows are put to zero, like those of tokens that are not there.
        share = scores.softmax(-1).masked_fill(~there[..., None], 0)
        share = share / (1e-9 + share.sum(1, keepdim=True))
        return x + self.norm(self.project(x - (share.mT @ value)[there])).relu()


class PCT(Backbone):
    """Features of whole clouds, ``(B, 1024)``, from tokens of two set abstractions.

    Args:
        in_channels: width of ``points.attrs["feat"]``, whose first three columns are the coordinates.
        channels: width of a point.
        key_points: tokens of either abstraction; smaller clouds have fewer. The second takes farthest points always.
        neighbours: of a token.
        out_channels: width of the result.
        training_rule, inference_rule, random_start, ignore_origin: of the first abstraction, see
            :class:`~pc3d.nn.robust_sampling.KeyPointSampler`; PointSP: ``weighted`` and ``filtered``.
        resample: vary the number of points in training (PointSP).
        least_points, cut: of a cloud in inference, see :class:`~pc3d.nn.robust_sampling.FullPointResampler` (PointSP:
            1024 and true); 0 leaves clouds as they are.
    """

    def __init__(
        self,
        in_channels: int = 3,
        channels: int = 64,
        key_points: Sequence[int] = (512, 256),
        neighbours: int = 32,
        out_channels: int = 1024,
        training_rule: KeyPoints = "farthest",
        inference_rule: KeyPoints = "farthest",
        random_start: bool = False,
        ignore_origin: bool = False,
        resample: bool = False,
        least_points: int = 0,
        cut: bool = False,
    ) -> None:
        super().__init__()
        if in_channels < 3 or len(key_points) != 2 or neighbours < 1 or channels < 1:
            raise InputError(
                f"PCT: in_channels {in_channels} must be 3 or more, key_points {list(key_points)} two numbers, "
                f"neighbours {neighbours} and channels {channels} at least 1"
            )
        first = KeyPointSampler(key_points[0], training_rule, inference_rule, False, random_start, ignore_origin)
        second = KeyPointSampler(key_points[1], "farthest", "farthest", ignore_origin=ignore_origin)
        self.resampler = FullPointResampler(least_points, cut, resample)
        self.embed = SharedMLP(in_channels, channels, channels)
        self.abstractions = nn.ModuleList(
            SetAbstraction(width, neighbours, sampler) for width, sampler in ((channels, first), (2 * channels, second))
        )
        width = 4 * channels
        self.enter = SharedMLP(width, width, width)
        self.attentions = nn.ModuleList(OffsetAttention(width) for _ in range(_ATTENTIONS))
        self.fuse = nn.Sequential(
            nn.Linear((_ATTENTIONS + 1) * width, out_channels, bias=False),
            nn.BatchNorm1d(out_channels),
            nn.LeakyReLU(0.2),
        )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.feature_info = [
            FeatureInfo("abstraction0", 2 * channels, 1),
            FeatureInfo("abstraction1", 4 * channels, 1),
            FeatureInfo("tokens", out_channels, 1),
        ]

    def forward(self, points: Points) -> Tensor:
        """``(B, out_channels)``, the largest value of each feature among a cloud's tokens; an empty cloud gives zeros.

        Raises:
            InputError: if the points come in cells, or ``feat`` has another width.
        """
        tokens = self._stages(points)["tokens"]
        return segment_max(tokens.get("feat"), tokens.offsets)

    def forward_features(self, points: Points) -> Mapping[str, Points | Voxels]:
        """The tokens of either abstraction, and those of the second after attention."""
        return self._stages(points)

    def _stages(self, points: Points) -> dict[str, Points]:
        self.check_input(points)
        points = resampled(points, self.resampler)
        points = Points(points.coord, points.offsets, {"feat": self.embed(points.get("feat"))})
        stages = {}
        for i, abstraction in enumerate(self.abstractions):
            points = stages[f"abstraction{i}"] = abstraction(points)
        first = points.get("feat")
        counts = points.counts
        there = torch.arange(int(counts.max()) if len(counts) else 0, device=counts.device) < counts[:, None]
        x, seen = self.enter(first), []
        for attention in self.attentions:
            x = attention(x, there)
            seen.append(x)
        stages["tokens"] = points.with_attrs(feat=self.fuse(torch.cat([*seen, first], 1)))
        return stages
