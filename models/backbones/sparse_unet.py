"""SparseUNet: the residual sparse-convolution U-Net of Pointcept (SpUNet-v1m1), with the topology of MinkUNet34C.

Choy et al. 2019, "4D Spatio-Temporal ConvNets" (arXiv 1904.08755); Pointcept, ``SpUNet-v1m1`` on spconv 2.x. Modules
carry the names of the published checkpoints; :mod:`pc3d.models.convert` reads and writes them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.nn import Backbone, FeatureInfo
from pc3d.nn.adaptable import Adaptable
from pc3d.nn.norm import Condition, ConditionalNorm, check_default, condition_of
from pc3d.points import Points
from pc3d.sparse import (
    SparseConv3d,
    SparseConvolution,
    SparseGlobalPool,
    SparseInverseConv3d,
    SparseModule,
    SparseSequential,
    SubMConv3d,
    VoxelBatchNorm,
    conv_norm_act,
    named_order,
    reorder,
)
from pc3d.voxels import Voxels


class ConditionalVoxelNorm(ConditionalNorm, SparseModule):
    """One batch norm per dataset, see :class:`~pc3d.nn.norm.ConditionalNorm`; the dataset is in the voxels' context."""

    def forward(self, voxels: Voxels) -> Voxels:  # type: ignore[override]
        return voxels.with_feat(super().forward(voxels.feat, voxels.context[Condition]))


NormFactory = Callable[[int], nn.Module]


class BasicBlock(Adaptable, SparseModule):
    """``ReLU(BN(conv(ReLU(BN(conv(x))))) + P(x))`` with 3^3 submanifold convolutions.

    ``P`` is the identity, or a 1^3 convolution with BN where the width changes.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: NormFactory = VoxelBatchNorm) -> None:
        super().__init__()
        self.make_adaptable(out_channels)
        self.proj = SparseSequential()
        if in_channels != out_channels:
            self.proj.extend([SubMConv3d(in_channels, out_channels, 1, bias=False), norm(out_channels)])
        self.conv1 = SubMConv3d(in_channels, out_channels, 3, bias=False)
        self.bn1 = norm(out_channels)
        self.conv2 = SubMConv3d(out_channels, out_channels, 3, bias=False)
        self.bn2 = norm(out_channels)
        self.relu = nn.ReLU()

    def run(self, voxels: Voxels) -> Voxels:
        out = conv_norm_act(self.conv1, voxels, self.bn1, self.relu)
        return conv_norm_act(self.conv2, out, self.bn2, self.relu, residual=self.proj(voxels).feat)


class SparseUNet(Backbone):
    """Sparse U-Net with residual blocks, stride 2 per stage.

    Args:
        in_channels: width of ``points.attrs["feat"]``.
        base_channels: width of the 5^3 stem.
        channels: widths of the S encoder stages, then of the S decoder stages from coarse to fine.
        layers: residual blocks of the same stages.
        enc_mode: no decoder; ``forward`` returns the mean of the deepest features, one row per cloud.
        norm_conditions: datasets of a jointly trained network (PPT, ``SpUNet-v1m3``), each with batch norms of its own;
            the clouds of a batch name theirs in ``meta["condition"]``.
        norm_default: dataset of clouds that name none.
        context_channels: width of a learned context per dataset that modulates the norms (256 in PPT); None: no
            modulation.
        order: work on the voxels in this order, on every stage: ``raster``, ``morton``, ``hilbert``, ``soar``,
            ``soar_two_level`` or ``soar_blocks``; None: as they come. Results differ in rounding only, points keep
            their rows.
        bn_momentum: share of a batch in the running statistics of the batch norms. The published 0.01 takes hundreds of
            steps to forget how it began; trainings of one or two hundred steps need about 0.1.

    With the defaults and a linear head this is the published network: 39,157,844 parameters for 6 input channels and 20
    classes. :meth:`small` trains on a CPU.
    """

    def __init__(
        self,
        in_channels: int,
        base_channels: int = 32,
        channels: Sequence[int] = (32, 64, 128, 256, 256, 128, 96, 96),
        layers: Sequence[int] = (2, 3, 4, 6, 2, 2, 2, 2),
        enc_mode: bool = False,
        norm_conditions: Sequence[str] = (),
        norm_default: str | None = None,
        context_channels: int | None = None,
        order: str | None = None,
        bn_momentum: float = 0.01,
    ) -> None:
        super().__init__()
        self.order = None if order is None else named_order(order)
        if len(channels) != len(layers) or len(layers) % 2 or not layers:
            raise InputError(
                f"SparseUNet: channels {tuple(channels)} and layers {tuple(layers)} must have the same, even length: "
                "encoder stages, then as many decoder stages"
            )
        stages = len(layers) // 2
        if not enc_mode and min(layers[stages:]) < 1:
            raise InputError(f"SparseUNet: layers {tuple(layers)} leave a decoder stage without a block")
        if context_channels is not None and not norm_conditions:
            raise InputError("SparseUNet: context_channels has no effect without norm_conditions")
        check_default(norm_default, norm_conditions)
        self.conditions, self.default_condition = tuple(norm_conditions), norm_default
        self.embedding_table = nn.Embedding(len(norm_conditions), context_channels) if context_channels else None
        if not 0 < bn_momentum <= 1:
            raise InputError(f"SparseUNet: bn_momentum {bn_momentum} does not lie above 0 and up to 1")
        norm: NormFactory = partial(VoxelBatchNorm, momentum=bn_momentum)
        if norm_conditions:
            norm = partial(ConditionalVoxelNorm, norm, conditions=len(norm_conditions))
            norm = partial(norm, context_channels=context_channels)
        self.in_channels = in_channels
        self.enc_mode = enc_mode
        self.out_channels = channels[stages - 1] if enc_mode else channels[-1]
        self.conv_input = _conv_norm_relu(SubMConv3d(in_channels, base_channels, 5, bias=False), norm)

        widths = [base_channels, *channels[:stages]]
        self.down, self.enc = nn.ModuleList(), nn.ModuleList()
        for s in range(stages):
            self.down.append(_conv_norm_relu(SparseConv3d(widths[s], widths[s + 1], 2, stride=2, bias=False), norm))
            self.enc.append(_blocks(widths[s + 1], widths[s + 1], layers[s], norm))

        # Decoder stages are numbered by resolution, 0 the finest, as in the published checkpoints.
        self.up, self.dec = nn.ModuleList(), nn.ModuleList()
        decoder = [*channels[: stages - 1 : -1], widths[-1]]
        for s in range(0 if enc_mode else stages):
            self.up.append(_conv_norm_relu(SparseInverseConv3d(decoder[s + 1], decoder[s], 2, bias=False), norm))
            self.dec.append(_blocks(decoder[s] + widths[s], decoder[s], layers[-1 - s], norm))

        self.pool = SparseGlobalPool("mean") if enc_mode else None
        self.feature_info = [FeatureInfo("conv_input", base_channels, 1)]
        self.feature_info += [FeatureInfo(f"enc{s}", channels[s], 2 ** (s + 1)) for s in range(stages)]
        self.feature_info += [FeatureInfo(f"dec{s}", decoder[s], 2**s) for s in reversed(range(len(self.dec)))]
        self.apply(_init_weights)

    @classmethod
    def small(cls, in_channels: int) -> SparseUNet:
        """A small variant for CPUs and small data: 1.6 M parameters, one block in each of the 4 stages.

        In a config: ``base_channels: 16``, ``channels: [16, 32, 64, 96, 64, 48, 32, 32]``,
        ``layers: [1, 1, 1, 1, 1, 1, 1, 1]``.
        """
        return cls(in_channels, base_channels=16, channels=(16, 32, 64, 96, 64, 48, 32, 32), layers=(1,) * 8)

    def forward(self, points: Points) -> Tensor:
        """Features ``(N, out_channels)`` in input order, or ``(B, out_channels)`` in ``enc_mode``.

        Args:
            points: clouds with ``feat`` ``(N, in_channels)`` and ``grid_coord`` ``(N, 3)``, as grid sampling leaves it.

        Raises:
            InputError: if a field is missing, ``feat`` has another width, or there are too few points to train on.
        """
        last = self.forward_voxels(self._voxels(points))
        return last.to_points() if self.pool is None else self.pool(last)

    def forward_voxels(self, voxels: Voxels) -> Voxels:
        """The last stage's voxels, without pooling; kernel maps are kept in, and taken from, ``voxels.context``."""
        for _, last in self._stages(voxels):
            voxels = last
        return voxels

    def forward_features(self, points: Points) -> dict[str, Voxels]:
        """The voxels after the stem, every encoder and every decoder stage, by the names of ``feature_info``.

        Their rows are in the network's ``order``.
        """
        return dict(self._stages(self._voxels(points)))

    def _voxels(self, points: Points) -> Voxels:
        self.check_input(points)
        voxels = points.voxels()
        if self.order is not None:
            voxels, _ = reorder(voxels, self.order)
        if self.conditions:
            voxels.context[Condition] = condition_of(
                points, self.conditions, self.default_condition, self.embedding_table
            )
        return voxels

    def _stages(self, voxels: Voxels) -> Iterator[tuple[str, Voxels]]:
        voxels = self.conv_input(voxels)
        yield "conv_input", voxels
        skips = []
        for s, (down, enc) in enumerate(zip(self.down, self.enc, strict=True)):
            skips.append(voxels)
            voxels = enc(down(voxels))
            yield f"enc{s}", voxels
        for s in reversed(range(len(self.dec))):
            voxels = self.up[s](voxels)
            voxels = self.dec[s](voxels.with_feat(torch.cat([voxels.feat, skips[s].feat], 1)))
            yield f"dec{s}", voxels


def _conv_norm_relu(conv: SparseConvolution, norm: NormFactory) -> SparseSequential:
    return SparseSequential(conv, norm(conv.out_channels), nn.ReLU())


def _blocks(in_channels: int, out_channels: int, count: int, norm: NormFactory) -> SparseSequential:
    widths = [in_channels, *[out_channels] * (count - 1)][:count]
    return SparseSequential(OrderedDict((f"block{i}", BasicBlock(c, out_channels, norm)) for i, c in enumerate(widths)))


def _init_weights(module: nn.Module) -> None:
    """Published rule: truncated normal for submanifold layers; strided and inverse ones keep the default of spconv."""
    if isinstance(module, (SubMConv3d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):  # of modulated norms
        nn.init.zeros_(module.bias)
