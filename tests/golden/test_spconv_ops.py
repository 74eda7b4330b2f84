"""Every sparse convolution against spconv 2.3.8: forward, input, weight and bias gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Golden, golden_files, needs_gpu, sorted_rows
from torch import Tensor
from torch.testing import assert_close

from pc3d import Voxels
from pc3d.models.convert import KernelLayout
from pc3d.models.convert.kernels import read_kernel, write_kernel
from pc3d.sparse import SparseConv3d, SparseConvolution, SparseConvTranspose3d, SparseInverseConv3d, SubMConv3d

OUTPUTS = {"indices", "features", "spatial_shape", "grad_input", "grad_weight", "grad_bias"}


def build(config: dict[str, Any]) -> SparseConvolution:
    """The layer of a golden file; ``k``, ``s``, ``p``, ``d`` are kernel size, stride, padding and dilation."""
    widths, bias = (config["cin"], config["cout"], config["k"]), config.get("bias", False)
    dilation = config.get("d", config.get("dilation", 1))
    if config["cls"] == "SubMConv3d":
        return SubMConv3d(*widths, dilation=dilation, bias=bias)
    if config["cls"] == "SparseInverseConv3d":
        return SparseInverseConv3d(*widths, bias=bias)
    cls = {"SparseConv3d": SparseConv3d, "SparseConvTranspose3d": SparseConvTranspose3d}[config["cls"]]
    return cls(*widths, stride=config.get("s", 1), padding=config.get("p", 0), dilation=dilation, bias=bias)


def input_grid(golden: Golden, feat: Tensor) -> Voxels:
    """The grid the layer is fed: the recorded voxels, or for an inverse layer the coarse ones made from them."""
    config, coord = golden.meta["config"], golden.tensor("in/indices").to(feat.device)
    shape = tuple(golden.arrays["in/spatial_shape"].tolist())
    if config["cls"] != "SparseInverseConv3d":
        stride = config.get("s", 1) if config["cls"] == "SparseConvTranspose3d" else 1
        return Voxels(coord, feat, config["batch_size"], stride=stride, spatial_shape=shape)
    down = build({**config, "cls": "SparseConv3d", "cin": 1, "cout": 1}).to(feat.device)
    ones = torch.ones(len(coord), 1, device=feat.device)
    coarse = down(Voxels(coord, ones, config["batch_size"], spatial_shape=shape))
    assert_close(coarse.coord.cpu(), golden.tensor("in/coarse_indices"), rtol=0, atol=0)
    return coarse.with_feat(feat)


def close(actual: Tensor, golden: Golden, name: str) -> None:
    expected = golden.tensor(name)
    assert_close(actual.cpu(), expected, rtol=0, atol=1e-6 + 1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("golden", golden_files("spconv-ops"))
def test_spconv_ops(golden: Golden) -> None:
    check_layer(golden, "cpu")


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("golden", golden_files("spconv-ops"))
def test_spconv_ops_on_gpu(golden: Golden) -> None:
    check_layer(golden, "cuda")


def check_layer(golden: Golden, device: str) -> None:
    assert set(golden.group("out")) <= OUTPUTS
    config = golden.meta["config"]
    layer = build(config)
    with torch.no_grad():
        layer.weight.copy_(read_kernel(golden.tensor("state/weight"), layer, KernelLayout.KRSC))
        if layer.bias is not None:
            layer.bias.copy_(golden.tensor("state/bias"))
    layer.to(device)
    feat = golden.tensor("in/features").to(device).requires_grad_()

    out = layer(input_grid(golden, feat))
    order = sorted_rows(out.coord).to(device)
    assert_close(out.coord[order].cpu(), golden.tensor("out/indices"), rtol=0, atol=0)
    assert out.spatial_shape == tuple(golden.arrays["out/spatial_shape"].tolist())
    close(out.feat[order], golden, "out/features")

    out.feat[order].backward(golden.tensor("in/grad_output").to(device))
    close(feat.grad, golden, "out/grad_input")
    close(write_kernel(layer.weight.grad, layer, KernelLayout.KRSC), golden, "out/grad_weight")
    assert (layer.bias is None) == ("out/grad_bias" not in golden.arrays)
    if layer.bias is not None:
        close(layer.bias.grad, golden, "out/grad_bias")
