"""Convolution, norm and activation in one pass at inference, and layer by layer everywhere else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pc3d.models import SparseUNet
from pc3d.sparse import SparseConv3d, SparseInverseConv3d, SparseSequential, SubMConv3d, VoxelBatchNorm, conv_norm_act
from pc3d.voxels import Voxels


@pytest.fixture
def voxels() -> Voxels:
    generator = torch.Generator().manual_seed(0)
    coord = torch.randint(0, 9, (600, 4), generator=generator).int()
    coord[:, 0] %= 2
    coord = coord.unique(dim=0)
    return Voxels(coord, torch.randn(len(coord), 6, generator=generator), 2)


def lively(module: nn.Module) -> nn.Module:
    """Norms with statistics and parameters of their own, as after training."""
    generator = torch.Generator().manual_seed(1)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None:
            norm.running_mean.normal_(0, 0.3, generator=generator)
            norm.running_var.uniform_(0.5, 2, generator=generator)
            if norm.affine:
                nn.init.uniform_(norm.weight, -1, 1, generator=generator)
                nn.init.normal_(norm.bias, generator=generator)
    return module.eval()


LAYERS = {
    "all": lambda: SparseSequential(SubMConv3d(6, 20), VoxelBatchNorm(20), nn.ReLU()),
    "plain norm": lambda: SparseSequential(SubMConv3d(6, 20, bias=False), nn.BatchNorm1d(20)),
    "norm without parameters": lambda: SparseSequential(SubMConv3d(6, 20), nn.BatchNorm1d(20, affine=False)),
    "norm without statistics": lambda: SparseSequential(
        SubMConv3d(6, 20), nn.BatchNorm1d(20, track_running_stats=False), nn.ReLU()
    ),
    "activation": lambda: SparseSequential(SubMConv3d(6, 20), nn.ReLU(), nn.Linear(20, 3)),
    "down and up": lambda: SparseSequential(
        SparseConv3d(6, 8, 2, stride=2), VoxelBatchNorm(8), nn.ReLU(), SparseInverseConv3d(8, 5, 2), nn.BatchNorm1d(5)
    ),
    "other activation": lambda: SparseSequential(SubMConv3d(6, 20), VoxelBatchNorm(20), nn.GELU()),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_equals_the_layers(voxels, name, dtype):
    torch.manual_seed(0)
    layers = lively(LAYERS[name]())
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        slow = layers(voxels)
        with torch.inference_mode():
            fast = layers(voxels)
    assert torch.equal(fast.coord, slow.coord)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(fast.feat.float(), slow.feat.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_network_in_one_pass_equals_its_layers(voxels, dtype):
    torch.manual_seed(0)
    network = lively(SparseUNet.small(6)).to(dtype)
    grid = voxels.with_feat(voxels.feat.to(dtype))
    slow = network.forward_voxels(grid).feat
    with torch.no_grad():
        fast = network.forward_voxels(grid).feat
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)


def test_training_statistics_are_those_of_the_layers(voxels):
    torch.manual_seed(0)
    layers = SparseSequential(SubMConv3d(6, 20), VoxelBatchNorm(20), nn.ReLU())
    other = copy.deepcopy(layers)
    with torch.no_grad():
        layers.train()(voxels)
    conv, norm, act = other
    act(norm(conv(voxels).feat))
    assert torch.equal(layers[1].running_var, norm.running_var)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_hook_sees_what_it_would_see(voxels, place):
    layers = lively(SparseSequential(SubMConv3d(6, 20), VoxelBatchNorm(20), nn.ReLU()))
    seen: list[torch.Tensor] = []
    layers[place].register_forward_hook(lambda module, inputs, output: seen.append(output))
    layers(voxels)
    with torch.no_grad():
        layers(voxels)
    features = [value.feat if isinstance(value, Voxels) else value for value in seen]
    assert len(features) == 2
    assert torch.equal(*features)


def test_a_residual_comes_before_the_activation(voxels):
    conv, norm = lively(SparseSequential(SubMConv3d(6, 6), VoxelBatchNorm(6)))
    expected = (norm(conv(voxels).feat) + voxels.feat).relu()
    with torch.no_grad():
        actual = conv_norm_act(conv, voxels, norm, nn.ReLU(), residual=voxels.feat)
    torch.testing.assert_close(actual.feat, expected, rtol=1e-5, atol=1e-5)
