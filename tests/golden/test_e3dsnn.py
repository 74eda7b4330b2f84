"""E-3DSNN against the published implementation: neuron, one stage with gradients, classifier and segmenter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Golden, golden_files, needs_gpu, sorted_rows
from torch import Tensor
from torch.testing import assert_close

from pc3d import Points, Voxels
from pc3d.models import E3DSNN
from pc3d.models.backbones.e3dsnn import SpikeStage
from pc3d.models.convert import KernelLayout, convert_state_dict, import_e3dsnn
from pc3d.models.convert.kernels import write_kernel
from pc3d.nn.spiking import SpikeMeter, SpikingNeuron
from pc3d.tasks.heads import LinearHead

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]
NETS = golden_files("e3dsnn-cls") + golden_files("e3dsnn-seg")


def close(actual: Tensor, expected: Tensor) -> None:
    tolerance = 1e-5 * max(1.0, float(expected.abs().max()))
    assert_close(actual.detach().cpu(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("golden", golden_files("e3dsnn-neuron"))
def test_neuron(golden: Golden) -> None:
    x = golden.tensor("in/x").requires_grad_()
    spikes = SpikingNeuron()(x)
    assert torch.equal(spikes, golden.tensor("out/spikes"))
    spikes.backward(golden.tensor("in/grad_out"))
    assert x.grad is not None
    assert torch.equal(x.grad, golden.tensor("out/grad_x"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("golden", golden_files("e3dsnn-stage"))
def test_stage(golden: Golden, device: str) -> None:
    meta, out = golden.meta, golden.group("out")
    stage = SpikeStage(meta["in_channels"], meta["embed_channels"], meta["depth"], SpikingNeuron).eval()
    stage.load_state_dict(convert_state_dict(golden.group("state"), stage, KernelLayout.KRSC))
    stage.to(device)
    coord = golden.tensor("in/indices").to(device)
    feat = golden.tensor("in/features").to(device).requires_grad_()
    voxels = Voxels(coord, feat, int(coord[:, 0].max()) + 1, spatial_shape=tuple(meta["spatial_shape"]))
    with SpikeMeter(stage) as meter:
        down, result = stage.down(voxels), stage(voxels)
    rows = sorted_rows(result.coord).to(device)
    assert torch.equal(result.coord[rows].cpu(), out["out_indices"])
    close(down.feat[rows], out["down_features"])
    close(result.feat[rows], out["out_features"])
    rates = torch.tensor([rate for _, rate in meter.rates])
    assert_close(rates, out["firing_rates"], rtol=0, atol=1e-7)

    result.feat[rows].backward(golden.tensor("in/grad_out").to(device))
    assert feat.grad is not None
    close(feat.grad, out["grad_features"])
    for conv, name in ((stage.down[1], "grad_down_weight"), (stage.blocks[-1].voxel_block[4], "grad_last_conv")):
        close(write_kernel(conv.weight.grad, conv, KernelLayout.KRSC), out[name])


def build(golden: Golden) -> tuple[E3DSNN, LinearHead]:
    config: dict[str, Any] = golden.meta["cfg"]
    network = E3DSNN(
        config["in_channels"],
        config["embed_channels"],
        config["enc_channels"],
        config["enc_depth"],
        config.get("dec_channels"),
    )
    head = LinearHead(network.out_channels, config["num_classes"])
    import_e3dsnn({f"module.backbone.{name}": v for name, v in golden.group("state").items()}, network, head)
    return network.eval(), head.eval()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("golden", NETS)
def test_net(golden: Golden, device: str) -> None:
    network, head = (module.to(device) for module in build(golden))
    ends = golden.tensor("in/offset")
    grid = golden.tensor("in/grid_coord").int()
    attrs = {"feat": golden.tensor("in/feat"), "grid_coord": grid}
    points = Points(torch.zeros(len(grid), 3), torch.cat([ends.new_zeros(1), ends]), attrs).to(device)
    with torch.no_grad(), SpikeMeter(network) as meter:
        logits = head(network(points), points)
    close(logits, golden.tensor("out/logits"))
    rates = torch.tensor([rate for _, rate in meter.rates])
    assert_close(rates, golden.tensor("out/firing_rates"), rtol=0, atol=1e-7)
