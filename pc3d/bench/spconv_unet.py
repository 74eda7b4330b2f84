"""SparseUNet as it is published: the same network, written with spconv's own layers."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pc3d.models import SparseUNet
from pc3d.models.convert import export_sparse_unet
from pc3d.points import Points


class BasicBlock(nn.Module):
    """Two 3^3 submanifold convolutions and a shortcut, with the names and weights of the published block."""

    def __init__(self, in_channels: int, out_channels: int, key: str) -> None:
        super().__init__()
        import spconv.pytorch as spconv

        self.proj = nn.ModuleList()
        if in_channels != out_channels:
            self.proj.extend([spconv.SubMConv3d(in_channels, out_channels, 1, bias=False), _norm(out_channels)])
        self.conv1 = spconv.SubMConv3d(in_channels, out_channels, 3, bias=False, indice_key=key)
        self.bn1 = _norm(out_channels)
        self.conv2 = spconv.SubMConv3d(out_channels, out_channels, 3, bias=False, indice_key=key)
        self.bn2 = _norm(out_channels)

    def forward(self, x: Any) -> Any:
        out = self.conv1(x)
        out = self.conv2(out.replace_feature(self.bn1(out.features).relu()))
        shortcut = x.features if not len(self.proj) else self.proj[1](self.proj[0](x).features)
        return out.replace_feature((self.bn2(out.features) + shortcut).relu())


class SpconvUNet(nn.Module):
    """SparseUNet-34C with the weights of ``ours``; takes the same points, gives the same features."""

    def __init__(self, ours: SparseUNet) -> None:
        super().__init__()
        import spconv.pytorch as spconv
        import spconv.pytorch.ops as ops

        if not torch.cuda.is_available():
            ops.get_current_stream = lambda: 0  # its backward asks for a CUDA stream even on the CPU, and ignores it
        stages = len(ours.down)
        wide = [info.channels for info in ours.feature_info[: stages + 1]]  # of the stem and the encoder, finest first
        out = [*(info.channels for info in ours.feature_info[:stages:-1]), wide[-1]]  # of the decoder, and what it gets
        self.conv_input = _layer(spconv.SubMConv3d(ours.in_channels, wide[0], 5, bias=False, indice_key="stem"))
        self.down, self.enc, self.up, self.dec = (nn.ModuleList() for _ in range(4))
        for s in range(stages):
            key = f"spconv{s + 1}"
            self.down.append(_layer(spconv.SparseConv3d(wide[s], wide[s + 1], 2, stride=2, bias=False, indice_key=key)))
            self.enc.append(_blocks([wide[s + 1]] * (_depth(ours.enc[s]) + 1), f"subm{s + 1}"))
            self.up.append(_layer(spconv.SparseInverseConv3d(out[s + 1], out[s], 2, bias=False, indice_key=key)))
            self.dec.append(_blocks([out[s] + wide[s], *[out[s]] * _depth(ours.dec[s])], f"subm{s}"))
        self.load_state_dict(export_sparse_unet(ours, prefix=""))

    def forward(self, points: Points) -> Tensor:
        import spconv.pytorch as spconv

        grid = points.get("grid_coord").int()
        indices = torch.cat([points.batch[:, None].int(), grid], 1).contiguous()
        shape = (grid.amax(0) + 96).tolist()  # the published slack: no stride-2 level drops cells
        x = self.conv_input(spconv.SparseConvTensor(points.get("feat"), indices, shape, len(points)))
        skips = []
        for down, enc in zip(self.down, self.enc, strict=True):
            skips.append(x)
            x = enc(down(x))
        for s in reversed(range(len(self.dec))):
            x = self.up[s](x)
            x = self.dec[s](x.replace_feature(torch.cat([x.features, skips[s].features], 1)))
        return x.features


def _depth(blocks: nn.Module) -> int:
    return len(list(blocks.children()))


def _norm(channels: int) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(channels, eps=1e-3, momentum=0.01)


def _layer(conv: Any) -> Any:
    import spconv.pytorch as spconv

    return spconv.SparseSequential(conv, _norm(conv.out_channels), nn.ReLU())


def _blocks(widths: Sequence[int], key: str) -> nn.Sequential:
    pairs = enumerate(itertools.pairwise(widths))
    return nn.Sequential(OrderedDict((f"block{i}", BasicBlock(a, b, key)) for i, (a, b) in pairs))
