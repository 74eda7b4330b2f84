"""SECOND and PointPillars: shapes, published sizes, empty clouds, and layers against what they stand for."""

from __future__ import annotations

import pytest
import torch
from detectors import clouds, small_second
from torch import nn

from pc3d.config import instantiate
from pc3d.errors import InputError
from pc3d.models import SECOND, PointPillars
from pc3d.models.backbones.pointpillars import PillarEncoder
from pc3d.models.backbones.second import SECONDEncoder
from pc3d.models.convert import import_openpcdet
from pc3d.models.convert.kernels import KernelLayout, write_kernel
from pc3d.models.heads import AnchorHead
from pc3d.nn.bev import BevGrid, bev_map
from pc3d.nn.bev_neck import MultiScaleNeck
from pc3d.sparse import SparseConvolution
from pc3d.voxels import Voxels

CLASSES = ["Car", "Pedestrian", "Cyclist"]


def small_pillars() -> PointPillars:
    grid = BevGrid([0, -3.2, -3, 6.4, 3.2, 1], [0.2, 0.2, 4])
    return PointPillars(4, grid, 8, 6, None, (1, 1, 1), (2, 2, 2), (8, 8, 8), (1, 2, 4), (8, 8, 8))


@pytest.mark.parametrize("make", [small_second, small_pillars])
def test_maps_of_batches_and_empty_clouds(make):
    torch.manual_seed(0)
    network = make()
    batch = clouds(400, 0, 150)
    out = network(batch)
    assert out.shape == (3, network.out_channels, *network.grid.bev_shape(network.stride))
    out.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())
    network.eval()
    with torch.no_grad():
        together = network(batch)
        torch.testing.assert_close(together[:1], network(batch[0]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together[1:2], network(batch[1]), atol=1e-5, rtol=1e-4)
        shuffled = batch[2].select(torch.randperm(150, generator=torch.Generator().manual_seed(1)))
        torch.testing.assert_close(network(shuffled), together[2:], atol=1e-5, rtol=1e-4)
    copy = instantiate(network.to_config())
    copy.load_state_dict(network.state_dict())
    torch.testing.assert_close(copy.eval()(batch), together)


def test_published_sizes():
    """Counted over the published configurations for KITTI."""
    with torch.device("meta"):
        second = SECOND(4, BevGrid([0, -40, -3, 70.4, 40, 1], [0.05, 0.05, 0.1]))
        pillars = PointPillars(4, BevGrid([0, -39.68, -3, 69.12, 39.68, 1], [0.16, 0.16, 4]))
    assert (second.out_channels, second.stride, second.grid.bev_shape(8)) == (512, 8, (200, 176))
    assert (pillars.out_channels, pillars.stride, pillars.grid.bev_shape(2)) == (384, 2, (248, 216))
    assert sum(p.numel() for p in second.parameters()) == 5_288_640
    assert sum(p.numel() for p in pillars.parameters()) == 4_807_168


def test_wrong_grids_are_refused():
    with pytest.raises(InputError, match="24 at least"):
        SECOND(4, BevGrid([0, 0, 0, 16, 16, 2.3], [0.1, 0.1, 0.1]))
    SECOND(4, BevGrid([0, 0, 0, 16, 16, 2.4], [0.1, 0.1, 0.1]))
    with pytest.raises(InputError, match="multiples of 8"):
        SECOND(4, BevGrid([0, 0, 0, 16, 16.1, 4], [0.1, 0.1, 0.1]))
    with pytest.raises(InputError, match="1 x 3 cells"):
        SECOND(4, BevGrid([0, 0, 0, 2.4, 0.8, 4], [0.1, 0.1, 0.1]))
    with pytest.raises(InputError, match="along z"):
        PointPillars(4, BevGrid([0, 0, 0, 16, 16, 4], [0.1, 0.1, 0.1]))
    with pytest.raises(InputError, match="do not bring"):
        MultiScaleNeck(4, (1, 1), (1, 2), (8, 8), (1, 1), (8, 8))
    for name, place in (("strides", 2), ("channels", 3), ("up_strides", 4), ("up_channels", 5)):
        settings = [4, (1, 1), (1, 2), (8, 8), (1, 2), (8, 8)]
        settings[place] = (0, 2)
        with pytest.raises(InputError, match=rf"neck\.{name} \[0, 2\] must be at least 1"):
            MultiScaleNeck(*settings)
    with pytest.raises(InputError, match=r"neck\.layers \[-1\] must not be negative"):
        MultiScaleNeck(4, (-1,), (1,), (8,), (1,), (8,))
    with pytest.raises(InputError, match=r"neck\.strides has 1"):
        MultiScaleNeck(4, (1, 1), (1,), (8, 8), (1, 2), (8, 8))


def test_sparse_encoder_equals_dense_convolutions():
    """Where every voxel is occupied, sparse and dense convolutions are the same."""
    torch.manual_seed(0)
    encoder = SECONDEncoder(3, (4, 4, 5, 5, 6)).eval()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    shape = (16, 16, 25)
    cells = torch.cartesian_prod(*(torch.arange(n) for n in shape)).int()
    coord = torch.cat([torch.zeros(len(cells), 1, dtype=torch.int32), cells], 1)
    voxels = Voxels(coord, torch.randn(len(cells), 3), 1, spatial_shape=shape)
    dense = voxels.feat.T.reshape(1, 3, *shape)
    for layer in (m for m in encoder.modules() if isinstance(m, nn.Sequential) and isinstance(m[0], SparseConvolution)):
        conv, norm = layer[0], layer[1]
        window = getattr(conv, "window", None)
        weight = conv.weight.reshape(*conv.kernel_size, conv.in_channels, conv.out_channels).permute(4, 3, 0, 1, 2)
        stride, padding = (window.stride, window.padding) if window else (1, 1)
        dense = torch.nn.functional.conv3d(dense, weight, stride=stride, padding=padding)
        scale = (norm.running_var + norm.eps).rsqrt()
        dense = ((dense.movedim(1, -1) - norm.running_mean) * scale).relu().movedim(-1, 1)
    found, levels = encoder(voxels)
    assert [len(levels[info.name].feat[0]) for info in encoder.feature_info] == [4, 4, 5, 5]
    assert found.spatial_shape == tuple(dense.shape[2:]) == (2, 2, 1)
    expected = dense.permute(0, 1, 4, 3, 2).flatten(1, 2)  # heights are channels, rows along y
    torch.testing.assert_close(bev_map(found), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_pillars_equal_published_padding(training):
    """The layer as published: pillars filled up with zeros, norm and maximum over all rows."""
    torch.manual_seed(0)
    encoder = PillarEncoder(5, 7, 4).train(training)
    nn.init.normal_(encoder.norm.running_mean)
    nn.init.normal_(encoder.norm.bias)
    nn.init.uniform_(encoder.norm.weight, 0.5, 2)
    counts = torch.tensor([1, 4, 3, 2])
    borders = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    feat = torch.randn(10, 5, requires_grad=True)
    norm = nn.BatchNorm1d(7, eps=1e-3, momentum=0.01).train(training)
    norm.load_state_dict(encoder.norm.state_dict())
    padded = torch.zeros(4, 4, 5)
    for pillar, (begin, count) in enumerate(zip(borders.tolist(), counts.tolist(), strict=False)):
        padded[pillar, :count] = feat[begin : begin + count]
    expected = norm(encoder.linear(padded).view(16, 7)).relu().view(4, 4, 7).amax(1)
    found = encoder(feat, borders)
    torch.testing.assert_close(found, expected)
    for name, value in norm.state_dict().items():
        torch.testing.assert_close(encoder.norm.state_dict()[name], value)
    weight = torch.randn_like(found)
    parts = [feat, encoder.linear.weight]
    for own, other in zip(
        torch.autograd.grad((found * weight).sum(), parts, retain_graph=True),
        torch.autograd.grad((expected * weight).sum(), parts),
        strict=True,
    ):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", [KernelLayout.KRSC, KernelLayout.RSCK])
def test_published_names_of_second(layout):
    torch.manual_seed(0)
    network, head = small_second(), AnchorHead()
    head.build(network.out_channels, CLASSES, network.grid, network.stride)
    convs = {f"{n}.weight": m for n, m in network.named_modules() if isinstance(m, SparseConvolution)}
    state = {"global_step": torch.tensor([5])}
    for name, value in network.state_dict().items():
        stored = write_kernel(value, convs[name], layout, "zyx") if name in convs else value
        state[name.replace("encoder.", "backbone_3d.").replace("neck.", "backbone_2d.")] = stored
    state |= {f"dense_head.{name}": value for name, value in head.state_dict().items()}
    for name in ("backbone_3d.conv_input.0.weight", "backbone_3d.conv1.0.0.weight", "backbone_3d.conv4.2.1.bias",
                 "backbone_3d.conv_out.1.running_var", "backbone_2d.blocks.1.4.weight", "backbone_2d.deblocks.0.1.bias",
                 "dense_head.conv_dir_cls.weight"):  # fmt: skip
        assert name in state
    other, other_head = small_second(), AnchorHead()
    other_head.build(other.out_channels, CLASSES, other.grid, other.stride)
    assert import_openpcdet({"model_state": state}, other, other_head) is layout
    batch = clouds(200)
    torch.testing.assert_close(other_head(other.eval()(batch)), head(network.eval()(batch)))
    assert import_openpcdet(state, small_second()) is layout
    del state["backbone_3d.conv4.2.1.bias"]
    with pytest.raises(InputError, match="does not fit this SECOND: 1 missing"):
        import_openpcdet(state, other, other_head)


def test_published_names_of_pillars():
    network = small_pillars()
    state = {
        name.replace("vfe.", "vfe.pfn_layers.0.").replace("neck.", "backbone_2d."): value
        for name, value in network.state_dict().items()
    }
    assert {"vfe.pfn_layers.0.linear.weight", "vfe.pfn_layers.0.norm.running_mean"} <= set(state)
    other = small_pillars()
    assert import_openpcdet(state, other) is None
    torch.testing.assert_close(dict(other.state_dict()), dict(network.state_dict()))
