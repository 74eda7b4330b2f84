"""SparseUNet: published sizes and initialisation, contracts of a backbone, clouds of every size."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pc3d import InputError, Points
from pc3d.config import instantiate
from pc3d.models import SparseUNet
from pc3d.sparse import SparseConv3d, SparseInverseConv3d, SubMConv3d

TINY = {"base_channels": 4, "channels": (4, 6, 5, 7), "layers": (1, 1, 1, 1)}


def clouds(*counts: int, channels: int = 3, size: int = 12, seed: int = 0) -> Points:
    """Clouds of ``counts`` points, each in a cell of its own."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.cat([torch.randperm(size**3, generator=generator)[:count] for count in counts])
    grid = torch.stack([cells // size**2, cells // size % size, cells % size], 1).int()
    offsets = torch.tensor([0, *counts]).cumsum(0)
    feat = torch.randn(len(grid), channels, generator=generator)
    return Points(grid.float(), offsets, {"grid_coord": grid, "feat": feat})


def count_parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


@pytest.mark.parametrize(("in_channels", "classes", "expected"), [(6, 20, 39_157_844), (4, 19, 39_149_747)])
def test_published_parameter_count(in_channels: int, classes: int, expected: int) -> None:
    with torch.device("meta"):
        backbone = SparseUNet(in_channels)
        head = nn.Linear(backbone.out_channels, classes)
    assert backbone.out_channels == 96
    assert count_parameters(backbone, head) == expected


def test_published_initialisation() -> None:
    torch.manual_seed(0)
    net = SparseUNet.small(6)
    for module in net.modules():
        if isinstance(module, SubMConv3d):
            assert module.bias is None
            assert module.weight.detach().std().item() == pytest.approx(0.02, rel=0.2)
        elif isinstance(module, (SparseConv3d, SparseInverseConv3d)):
            bound = (module.in_channels * 8) ** -0.5
            assert bound * 0.9 < module.weight.abs().max() <= bound
        elif isinstance(module, nn.BatchNorm1d):
            assert (module.eps, module.momentum) == (1e-3, 0.01)


@pytest.mark.parametrize("conditions", [(), ("indoor", "outdoor")])
def test_momentum_of_the_batch_norms(conditions: tuple[str, ...]) -> None:
    net = SparseUNet(3, **TINY, norm_conditions=conditions, bn_momentum=0.1)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm1d)]
    assert len(norms) == 15 * max(len(conditions), 1)
    assert {norm.momentum for norm in norms} == {0.1}
    with pytest.raises(InputError, match="bn_momentum 0 does not lie"):
        SparseUNet(3, bn_momentum=0)


def test_features_in_input_order_and_stages() -> None:
    net = SparseUNet(3, **TINY).eval()
    points = clouds(150, 0, 60)
    features = net(points)
    assert features.shape == (210, net.out_channels) == (210, 7)
    stages = net.forward_features(points)
    assert list(stages) == ["conv_input", "enc0", "enc1", "dec1", "dec0"]
    for info in net.feature_info:
        assert (stages[info.name].feat.shape[1], stages[info.name].stride) == (info.channels, info.stride)
    assert_close(stages["dec0"].to_points(), features)

    order = torch.cat([torch.randperm(150), 150 + torch.randperm(60)])
    assert_close(net(points.select(order)), features[order], rtol=1e-4, atol=1e-5)
    assert_close(net(points[2]), features[150:], rtol=1e-4, atol=1e-5)


def test_features_do_not_depend_on_where_the_grid_starts() -> None:
    net = SparseUNet(3, **TINY).eval()
    points = clouds(100)
    moved = points.with_attrs(grid_coord=points.attrs["grid_coord"] - 8)
    assert_close(net(moved), net(points), rtol=1e-4, atol=1e-5)


def test_encoder_mode_gives_one_row_per_cloud() -> None:
    net = SparseUNet(3, **TINY, enc_mode=True).eval()
    points = clouds(150, 0, 60)
    rows = net(points)
    assert rows.shape == (3, net.out_channels) == (3, 6)
    deepest = net.forward_features(points)["enc1"]
    for cloud in (0, 2):
        assert_close(rows[cloud], deepest.feat[deepest.coord[:, 0] == cloud].mean(0))
    assert not net.up
    assert not net.dec


def test_stages_without_blocks() -> None:
    net = SparseUNet(3, base_channels=4, channels=(4, 4), layers=(0, 1)).eval()
    assert net(clouds(30)).shape == (30, 4)
    assert SparseUNet(3, channels=(8, 8), layers=(1, 0), enc_mode=True).eval()(clouds(30, 20)).shape == (2, 8)


def test_points_of_one_cell_share_their_features() -> None:
    points = clouds(40)
    grid = points.attrs["grid_coord"].clone()
    grid[1] = grid[0]
    features = SparseUNet(3, **TINY).eval()(points.with_attrs(grid_coord=grid))
    assert torch.equal(features[0], features[1])


@pytest.mark.parametrize("counts", [(0,), (1,), (0, 1), (2,)])
def test_tiny_clouds(counts: tuple[int, ...]) -> None:
    net = SparseUNet(3, **TINY)
    assert net.eval()(clouds(*counts)).shape == (sum(counts), 7)
    points = clouds(*counts, size=2)
    with pytest.raises(InputError, match=r"cannot train on a batch with . voxels"):
        net.train()(points)


def test_training_reaches_every_parameter() -> None:
    net = SparseUNet(3, **TINY)
    net(clouds(150, 60)).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_half_precision() -> None:
    net = SparseUNet(3, **TINY).eval()
    points = clouds(150, 60)
    with torch.autocast("cpu", torch.bfloat16):
        features = net(points)
    expected = net(points)
    assert_close(features.float(), expected, rtol=0.1, atol=0.05 * expected.abs().max().item())


def test_inference_mode() -> None:
    net = SparseUNet(3, **TINY).eval()
    points = clouds(50)
    with torch.inference_mode():
        assert_close(net(points), net(points))


def test_wrong_input_is_one_clear_line() -> None:
    net = SparseUNet(3, **TINY)
    points = clouds(20, channels=4)
    points.meta[0]["path"] = "scan.ply"
    with pytest.raises(InputError, match=r"scan.ply: field 'feat' is \(20, 4\), SparseUNet takes \(N, 3\)"):
        net(points)
    with pytest.raises(InputError, match="field 'grid_coord' is missing"):
        net(clouds(20).without_attrs("grid_coord"))
    with pytest.raises(InputError, match="same, even length"):
        SparseUNet(3, channels=(8, 8, 8), layers=(1, 1, 1))
    with pytest.raises(InputError, match="decoder stage without a block"):
        SparseUNet(3, channels=(8, 8), layers=(1, 0))


def test_config_round_trip() -> None:
    net = SparseUNet.small(5)
    again = instantiate(net.to_config())
    assert net.to_config()["class_path"] == "pc3d.models.SparseUNet"
    assert str(again) == str(net)


@pytest.mark.parametrize("enc_mode", [False, True])
@pytest.mark.parametrize("order", ["raster", "hilbert", "soar", "soar_two_level", "soar_blocks"])
def test_the_order_of_voxels_does_not_show(order: str, enc_mode: bool) -> None:
    torch.manual_seed(0)
    plain = SparseUNet(3, **TINY, enc_mode=enc_mode).train()
    torch.manual_seed(0)
    ordered = SparseUNet(3, **TINY, enc_mode=enc_mode, order=order).train()
    points = clouds(150, 0, 60)
    outs = [network(points) for network in (plain, ordered)]
    assert_close(outs[1], outs[0], atol=1e-4, rtol=1e-4)
    for out in outs:
        out.square().sum().backward()
    for one, other in zip(plain.parameters(), ordered.parameters(), strict=True):
        scale = float(one.grad.abs().max()) + 1e-3
        assert_close(other.grad, one.grad, atol=1e-3 * scale, rtol=1e-3)


def test_an_unknown_order_is_named() -> None:
    with pytest.raises(InputError, match="'zorder': there is no such order of voxels, choose from raster"):
        SparseUNet(3, **TINY, order="zorder")
