"""E-3DSNN: a sparse convolutional network in which a spiking neuron stands before every convolution.

Qiu et al., "Efficient 3D Recognition with Event-driven Spike Sparse Convolution", AAAI 2025 (arXiv 2412.07360).
Residual sums are made of real membrane values, before the neurons, never of spikes. Modules carry the names of the
published checkpoints; :func:`pc3d.models.convert.import_e3dsnn` reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.nn import Backbone, FeatureInfo
from pc3d.nn.bev import BevGrid, SparseEncoder, VoxelBevBackbone
from pc3d.nn.bev_neck import MultiScaleNeck
from pc3d.nn.spiking import SpikingNeuron, Surrogate
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
)
from pc3d.voxels import Voxels

NeuronFactory = Callable[[], SpikingNeuron]


class SpikeBlock(SparseModule):
    """``y = x + BN(conv(S(x)))``, then ``y + BN(conv(S(BN(conv(S(y))))))``, 3^3 submanifold convolutions."""

    def __init__(self, channels: int, neuron: NeuronFactory) -> None:
        super().__init__()
        self.block = _spiking(neuron, _conv(channels, channels))
        self.voxel_block = SparseSequential(
            *_spiking(neuron, _conv(channels, channels)), *_spiking(neuron, _conv(channels, channels))
        )

    def forward(self, voxels: Voxels) -> Voxels:
        voxels = voxels.with_feat(voxels.feat + self.block(voxels).feat)
        return voxels.with_feat(voxels.feat + self.voxel_block(voxels).feat)


class SpikeStage(SparseModule):
    """A strided convolution of spikes, then blocks."""

    def __init__(
        self, in_channels: int, out_channels: int, depth: int, neuron: NeuronFactory, kernel: int = 2, padding: int = 0
    ) -> None:
        super().__init__()
        down = SparseConv3d(in_channels, out_channels, kernel, stride=2, padding=padding, bias=False)
        self.down = _spiking(neuron, down)
        self.blocks = SparseSequential(*(SpikeBlock(out_channels, neuron) for _ in range(depth)))

    def forward(self, voxels: Voxels) -> Voxels:
        return self.blocks(self.down(voxels))


class SpikeUpStage(nn.Module):
    """An inverse convolution of spikes to the finer grid, fused with the features that grid had on the way down."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int, neuron: NeuronFactory) -> None:
        super().__init__()
        self.up = _spiking(neuron, SparseInverseConv3d(in_channels, out_channels, 2, bias=False))
        self.fuse = SparseSequential(
            *_spiking(neuron, nn.Linear(skip_channels + out_channels, out_channels)),
            *_spiking(neuron, nn.Linear(out_channels, out_channels)),
        )

    def forward(self, voxels: Voxels, skip: Voxels) -> Voxels:
        fine = self.up(voxels)
        fused = self.fuse(fine.with_feat(torch.cat([fine.feat, skip.feat], 1)))
        return fine.with_feat(fine.feat + fused.feat)


class E3DSNN(Backbone):
    """E-3DSNN, encoder or U-Net.

    Args:
        in_channels: width of ``points.attrs["feat"]``: 6 for ModelNet40 (xyz, normal), 4 outdoors (xyz, strength).
        embed_channels: width of the stem.
        enc_channels, enc_depths: widths and blocks of the stages.
        dec_channels: widths of the decoder stages, finest first; None: no decoder, ``forward`` gives the mean membrane
            values of the voxels of each cloud, one row per cloud.
        bounded: with a decoder, as published, the grid of a batch ends at its largest cell: where an extent is odd, the
            strided layer drops the last plane, which gets zeros on the way up, so a cloud depends on its batch. False
            drops nothing.
        levels, surrogate, learn_threshold, decay: of the neurons, see :class:`~pc3d.nn.spiking.SpikingNeuron`.

    The defaults are the classifier T, 1.87 M parameters with a head of 40 classes. :meth:`classifier` makes the other
    published sizes, :meth:`segmenter` the network for SemanticKITTI. Train without mixed precision: rounding moves
    spikes.
    """

    def __init__(
        self,
        in_channels: int = 6,
        embed_channels: int = 16,
        enc_channels: Sequence[int] = (16, 32, 64, 128),
        enc_depths: Sequence[int] = (1, 1, 1, 1),
        dec_channels: Sequence[int] | None = None,
        bounded: bool = True,
        levels: int = 4,
        surrogate: Surrogate = "rectangular",
        learn_threshold: bool = False,
        decay: float | None = None,
    ) -> None:
        super().__init__()
        if len(enc_channels) != len(enc_depths) or (dec_channels is not None and len(dec_channels) != len(enc_depths)):
            raise InputError(
                f"E3DSNN: enc_channels {tuple(enc_channels)}, enc_depths {tuple(enc_depths)} and dec_channels "
                f"{dec_channels and tuple(dec_channels)} must have the same length"
            )
        neuron = partial(SpikingNeuron, levels, surrogate, learn_threshold, decay)
        self.in_channels, self.bounded = in_channels, bounded
        self.stem = _stem(in_channels, embed_channels, neuron)
        widths = [embed_channels, *enc_channels]
        self.enc = nn.ModuleList(
            SpikeStage(widths[s], widths[s + 1], depth, neuron) for s, depth in enumerate(enc_depths)
        )
        above = [*(dec_channels or ()), widths[-1]]  # decoder stages are numbered by resolution, 0 the finest
        self.dec = nn.ModuleList(
            SpikeUpStage(above[s + 1], widths[s], above[s], neuron) for s in range(len(dec_channels or ()))
        )
        self.pool = SparseGlobalPool("mean") if dec_channels is None else None
        self.out_channels = above[0]
        self.feature_info = [FeatureInfo("stem", embed_channels, 1)]
        self.feature_info += [FeatureInfo(f"enc{s}", width, 2 ** (s + 1)) for s, width in enumerate(enc_channels)]
        self.feature_info += [FeatureInfo(f"dec{s}", above[s], 2**s) for s in reversed(range(len(self.dec)))]
        self.apply(_init_weights)

    @classmethod
    def classifier(cls, size: str = "T", in_channels: int = 6) -> E3DSNN:
        """The published classifiers, by rising size ``T``, ``S``, ``L`` and ``H``.

        Raises:
            InputError: if there is no such size.
        """
        sizes = {
            "T": (16, (16, 32, 64, 128), (1, 1, 1, 1)),
            "S": (24, (24, 48, 96, 160), (1, 1, 1, 1)),
            "L": (64, (64, 128, 128, 256), (2, 2, 2, 2)),
            "H": (64, (96, 192, 288, 384), (2, 2, 2, 2)),
        }
        if size not in sizes:
            raise InputError(f"E3DSNN: size {size!r} is not one of {', '.join(sizes)}")
        return cls(in_channels, *sizes[size])

    @classmethod
    def segmenter(cls, in_channels: int = 4) -> E3DSNN:
        """The published network for SemanticKITTI, 20.05 M parameters with a head of 19 classes."""
        return cls(in_channels, 64, (64, 128, 128, 256), (2, 2, 2, 2), (256, 256, 256, 256))

    def forward(self, points: Points) -> Tensor:
        """Features ``(N, out_channels)`` in input order, or ``(B, out_channels)`` without a decoder.

        Args:
            points: clouds with ``feat`` ``(N, in_channels)`` and ``grid_coord`` ``(N, 3)``, as grid sampling leaves it.

        Raises:
            InputError: if a field is missing, ``feat`` has another width, or there are too few points to train on.
        """
        for _, last in self._stages(points):
            voxels = last
        return voxels.to_points() if self.pool is None else self.pool(voxels)

    def forward_features(self, points: Points) -> dict[str, Voxels]:
        """The membrane values after the stem and every stage, by the names of ``feature_info``."""
        return dict(self._stages(points))

    def _stages(self, points: Points) -> Iterator[tuple[str, Voxels]]:
        self.check_input(points)
        voxels = points.voxels()
        if self.bounded and self.pool is None and len(voxels):
            x, y, z = (voxels.coord[:, 1:].amax(0) + 1).tolist()
            voxels = replace(voxels, spatial_shape=(x, y, z))
        voxels = self.stem(voxels)
        yield "stem", voxels
        skips = []
        for s, stage in enumerate(self.enc):
            skips.append(voxels)
            voxels = stage(voxels)
            yield f"enc{s}", voxels
        for s in reversed(range(len(self.dec))):
            voxels = self.dec[s](voxels, skips[s])
            yield f"dec{s}", voxels


class SpikeEncoder(SparseEncoder):
    """The levels of E-3DSNN's detector: a stem, one layer at its resolution, three stages, one more step of height.

    Args:
        in_channels: width of the voxels' features.
        channels: width of stem and first level, of the stages, and of the result, which are spikes.
        depths: blocks of the stages.
        neuron: makes what stands before every convolution but the first and the last.
    """

    def __init__(self, in_channels: int, channels: Sequence[int], depths: Sequence[int], neuron: NeuronFactory) -> None:
        super().__init__(channels)
        one, *_, four, out = channels
        self.conv_input = _stem(in_channels, one, neuron)
        self.conv1 = SparseSequential(_spiking(neuron, _conv(one, one)))
        for i, ((below, width), depth) in enumerate(zip(pairwise(channels[:-1]), depths, strict=True)):
            self.add_module(f"conv{i + 2}", SpikeStage(below, width, depth, neuron, kernel=3, padding=1))
        last = SparseConv3d(four, out, (1, 1, 3), stride=(1, 1, 2), bias=False)
        self.conv_out = SparseSequential(last, VoxelBatchNorm(out), neuron())

    def height(self, cells: int) -> int:
        for _ in range(3):
            cells = (cells - 1) // 2 + 1
        return (cells - 3) // 2 + 1


class E3DSNNDetector(VoxelBevBackbone):
    """The detector of E-3DSNN: spikes up to the map and in its neck.

    Args:
        in_channels: width of ``points.attrs["feat"]``.
        grid: range and voxels; heights need 16 voxels at least, maps must be multiples of 16 voxels.
        channels: width of the first level, of the three stages, and of the encoder's result.
        depths: blocks of the stages.
        max_points: the first so many points of a voxel count.
        max_voxels: of a cloud, in training and otherwise; None sets no limit.
        neck_layers, neck_channels, up_channels: of the two levels of the neck, see
            :class:`~pc3d.nn.bev_neck.MultiScaleNeck`.
        levels, surrogate, learn_threshold, decay: of the neurons, see :class:`~pc3d.nn.spiking.SpikingNeuron`.

    The defaults are the published network for KITTI, as SECOND's grid has it; cars are found with a
    :class:`~pc3d.models.heads.VoxelRCNNHead` of spikes behind an :class:`~pc3d.models.heads.AnchorHead`.
    """

    def __init__(
        self,
        in_channels: int,
        grid: BevGrid,
        channels: Sequence[int] = (16, 32, 64, 64, 128),
        depths: Sequence[int] = (2, 2, 2),
        max_points: int | None = 5,
        max_voxels: tuple[int, int] | None = (16000, 40000),
        neck_layers: Sequence[int] = (5, 5),
        neck_channels: Sequence[int] = (64, 128),
        up_channels: Sequence[int] = (128, 128),
        levels: int = 4,
        surrogate: Surrogate = "rectangular",
        learn_threshold: bool = False,
        decay: float | None = None,
    ) -> None:
        if len(channels) != 5 or len(depths) != 3:
            raise InputError(
                f"E3DSNNDetector: channels {tuple(channels)} must be five widths, depths {tuple(depths)} three numbers"
            )
        neuron = partial(SpikingNeuron, levels, surrogate, learn_threshold, decay)

        def neck(width: int) -> MultiScaleNeck:
            return MultiScaleNeck(width, neck_layers, (1, 2), neck_channels, (1, 2), up_channels, neuron)

        encoder = SpikeEncoder(in_channels, channels, depths, neuron)
        super().__init__(in_channels, grid, encoder, neck, max_points, max_voxels)


def _stem(in_channels: int, channels: int, neuron: NeuronFactory) -> SparseSequential:
    return SparseSequential(
        *(_conv(in_channels, channels), VoxelBatchNorm(channels)),
        *_spiking(neuron, _conv(channels, channels)),
        *_spiking(neuron, _conv(channels, channels)),
    )


def _conv(in_channels: int, out_channels: int) -> SubMConv3d:
    return SubMConv3d(in_channels, out_channels, 3, bias=False)


def _spiking(neuron: NeuronFactory, layer: SparseConvolution | nn.Linear) -> SparseSequential:
    """A neuron, the layer that gets its spikes, and a norm."""
    width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return SparseSequential(neuron(), layer, VoxelBatchNorm(width))


def _init_weights(module: nn.Module) -> None:
    """Published rule: strided and inverse convolutions keep the default of spconv."""
    if isinstance(module, (SubMConv3d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
