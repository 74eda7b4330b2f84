"""ScatterFormer against the published implementation: one stage with its gradients, and the whole backbone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from harness import Golden, golden_files, needs_gpu, sorted_rows
from torch import Tensor
from torch.testing import assert_close

from pc3d import Voxels
from pc3d.errors import InputError
from pc3d.models import ScatterFormer
from pc3d.models.backbones.scatterformer import WindowLayers
from pc3d.models.convert import KernelLayout, convert_state_dict, import_scatterformer
from pc3d.models.convert.scatterformer import depthwise_kernel
from pc3d.nn.bev import BevGrid
from pc3d.sparse import reorder

BLOCKS, BACKBONES = golden_files("scatterformer-block"), golden_files("scatterformer-backbone")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert_close(actual.detach().cpu(), expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))


def voxels_of(indices: Tensor, feat: Tensor, golden: Golden, device: str) -> Voxels:
    coord = indices[:, [0, 3, 2, 1]].int().to(device)  # stored [batch, z, y, x]
    return Voxels(coord, feat.to(device), golden.meta["batch_size"])


def close_voxels(voxels: Voxels, golden: Golden, name: str) -> None:
    """The same voxels and features; rows recorded by (batch, z, y, x)."""
    close_rows(voxels.coord[:, [0, 3, 2, 1]], voxels.feat, golden, name)


def close_rows(indices: Tensor, feat: Tensor, golden: Golden, name: str) -> None:
    rows = sorted_rows(indices)
    assert torch.equal(indices[rows].cpu().int(), golden.tensor(f"out/{name}_indices"))
    close(feat[rows], golden.tensor(f"out/{name}_features"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("golden", BLOCKS)
def test_stage(golden: Golden, device: str) -> None:
    meta, state = golden.meta, golden.group("state")
    layers = sum(name.endswith("qkv.weight") for name in state)
    stage = WindowLayers(meta["dim"], meta["heads"], layers, meta["win_size"]).eval()
    state = {name: depthwise_kernel(f".{name}", value) for name, value in state.items()}
    stage.load_state_dict(convert_state_dict(state, stage, KernelLayout.KRSC))
    stage.to(device)
    feat = golden.tensor("in/features").to(device).requires_grad_()
    voxels = voxels_of(golden.tensor("in/indices"), feat, golden, device)

    grouped, permutation = reorder(voxels, stage.order)
    offsets = stage.order.offsets(grouped.coord)
    assert torch.equal(offsets.diff().cpu(), golden.tensor("out/window_counts"))
    close(permutation.undo(stage.attn_layers[0](grouped.feat, offsets)), golden.tensor("out/sla_out"))

    out = stage(voxels)
    close_voxels(out, golden, "out")
    upstream = torch.empty_like(out.feat)
    upstream[sorted_rows(out.coord[:, [0, 3, 2, 1]])] = golden.tensor("in/grad_out").to(device)
    out.feat.backward(upstream)
    assert feat.grad is not None
    close(feat.grad, golden.tensor("out/grad_features"))
    close(stage.attn_layers[0].qkv.weight.grad, golden.tensor("out/grad_qkv0"))
    expected = depthwise_kernel(".conv_h.weight", golden.tensor("out/grad_convh1"))
    close(stage.cffn_layers[1].conv_h.weight.grad, expected)


def build(golden: Golden) -> ScatterFormer:
    meta = golden.meta
    grid = BevGrid([0.0, 0.0, 0.0, *meta["grid_size_xyz"]], [1.0, 1.0, 1.0])
    settings = {"channels": meta["FEATURE_DIM"], "window": meta["WIN_SIZE"], "neck_units": 1}
    return ScatterFormer(4, grid, encoder_channels=(8, meta["input_channels"]), **settings).eval()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("golden", BACKBONES)
def test_backbone(golden: Golden, device: str) -> None:
    network = build(golden)
    import_scatterformer(golden.group("state"), network)
    encoder = network.encoder.to(device)
    given = voxels_of(golden.tensor("in/voxel_coords"), golden.tensor("in/voxel_features"), golden, device)
    x, y, z = golden.meta["grid_size_xyz"]
    with torch.no_grad():
        for name, voxels in encoder.stages(replace(given, spatial_shape=(x, y, z + 1))):
            if name != "app":
                close_voxels(voxels, golden, name)
        # From the recorded features: those of stage 2 reach 1000, which rounds what follows in the 5th digit.
        last = (golden.tensor(f"out/stage2_{name}") for name in ("indices", "features"))
        close_voxels(encoder.app(voxels_of(*last, golden, device)), golden, "app")


@pytest.mark.parametrize("golden", BACKBONES)
def test_import_of_a_whole_detector(golden: Golden) -> None:
    network, other = build(golden), build(golden)
    encoder = golden.group("state")
    state = {f"module.backbone_3d.{name}": value for name, value in encoder.items()}
    state |= {f"vfe.{name}": value for name, value in other.vfe.state_dict().items()}
    state |= {f"backbone_2d.{name}": value for name, value in other.neck.state_dict().items()}
    state |= {"dense_head.shared_conv.0.weight": torch.ones(1), "global_step": torch.ones(1)}
    import_scatterformer({"model_state": state}, network)
    import_scatterformer({f"backbone_3d.{name}": value for name, value in encoder.items()}, other)
    for name, value in network.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    del state["module.backbone_3d.cpe.0.0.weight"]
    with pytest.raises(InputError, match=r"1 missing \(backbone.encoder.cpe.0.0.weight\)"):
        import_scatterformer({"model_state": state}, network)
