"""ConDaFormer against the published implementation: one block with its gradients, and whole networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Golden, golden_files, needs_gpu
from torch import Tensor
from torch.testing import assert_close

from pc3d import Points, Voxels
from pc3d.errors import InputError
from pc3d.models import ConDaFormer
from pc3d.models.backbones.condaformer import Block, Level, SlabRule
from pc3d.models.convert import KernelLayout, convert_state_dict, import_condaformer
from pc3d.models.convert.condaformer import depthwise_kernel
from pc3d.models.heads import MLPHead

BLOCKS, NETS = golden_files("condaformer-block"), golden_files("condaformer-net")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]


def build_block(golden: Golden) -> Block:
    meta = golden.meta
    rule = SlabRule(meta["window_size"], meta["quant_size"], "batch")
    block = Block(meta["dim"], meta["dim"] // meta["head_dim"], rule, meta["shift"]).eval()
    state = {name: depthwise_kernel(name, value) for name, value in golden.group("state").items()}
    block.load_state_dict(convert_state_dict(state, block, KernelLayout.KRSC))
    return block


def build_level(golden: Golden, device: str) -> Level:
    batch = golden.tensor("in/batch")
    counts = torch.bincount(batch, minlength=golden.meta["batch_size"])
    coord = torch.cat([batch[:, None], golden.tensor("in/voxel")], 1).int()
    voxels = Voxels(coord.to(device), golden.tensor("in/features").to(device).requires_grad_(), len(counts))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(device)
    position = golden.tensor("in/xyz").to(device)
    return Level(voxels, position, torch.ones_like(position[:, :1]), offsets)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert_close(actual.detach().cpu(), expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("golden", BLOCKS)
def test_block(golden: Golden, device: str) -> None:
    block, level, out = build_block(golden).to(device), build_level(golden, device), golden.group("out")
    attention = block.attn
    for slab, plane in zip(level.cut(attention.rule, attention.shifted), ("xy", "xz", "yz"), strict=True):
        numbers = torch.repeat_interleave(slab.windows.lengths()).to(device)[slab.windows.slots]
        pairs = torch.stack([numbers.cpu(), out[f"window_id_{plane}"]]).unique(dim=1)
        assert pairs.shape[1] == len(numbers.unique()) == len(out[f"window_id_{plane}"].unique())  # the same partition

    normed = level.with_feat(block.norm1(level.feat))
    q, k, v = attention.project(normed).unbind(1)
    for actual, name in ((q, "query"), (k, "key"), (v, "value")):
        close(actual, out[name])
    for actual, plane in zip(attention.attend(q, k, v, normed).chunk(3, 1), ("xy", "xz", "yz"), strict=True):
        close(actual, out[f"attn_{plane}"])
    seen: list[Tensor] = []
    attention.proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    result = block(level).feat
    close(seen[0], out["after_post_conv"])
    close(result, out["out_features"])

    result.backward(golden.tensor("in/grad_out").to(device))
    assert level.feat.grad is not None
    close(level.feat.grad, out["grad_features"])
    for name in ("q_table", "k_table", "v_table"):
        close(getattr(attention, name).grad, out[f"grad_{name}"])


def build_net(golden: Golden) -> tuple[ConDaFormer, MLPHead]:
    config: dict[str, Any] = golden.meta["cfg"]
    network = ConDaFormer(
        config["in_channels"],
        config["voxel_size"],
        config["window_size"],
        config["quant_size"],
        config["base_channels"],
        config["channels"],
        config["layers"],
        config["head_dim"],
        drop_path=config["drop_path_rate"],
        window_origin="batch",
    )
    head = MLPHead(network.out_channels, config["out_channels"], [network.out_channels], dropout=0, bias=True)
    import_condaformer(golden.group("state"), network, head)
    return network.eval(), head.eval()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("golden", NETS)
def test_net(golden: Golden, device: str) -> None:
    network, head = (module.to(device) for module in build_net(golden))
    ends = golden.tensor("in/offset")
    grid = golden.tensor("in/discrete_coord").int()
    attrs = {"feat": golden.tensor("in/feat"), "grid_coord": grid}
    points = Points(golden.tensor("in/coord"), torch.cat([ends.new_zeros(1), ends]), attrs).to(device)
    out, pooled = golden.group("out"), []
    for pool in network.pool:
        pool.register_forward_hook(lambda _, __, level: pooled.append(level))
    with torch.no_grad():
        logits = head(network(points), points)
        stages = network.forward_features(points)
    for s, level in enumerate(pooled[: len(network.pool)], 1):
        close(level.position, out[f"pool{s}_xyz"])
        assert torch.equal(level.voxels.coord[:, 0].cpu(), out[f"pool{s}_batch"])
        close(level.feat, out[f"pool{s}_features"])
    close(stages["stem"].feat, out["stem"])
    close(logits, out["logits"])


@pytest.mark.parametrize("golden", NETS)
def test_import_names_what_does_not_fit(golden: Golden) -> None:
    network, head = build_net(golden)
    state = golden.group("state")
    import_condaformer({f"module.backbone.{name}": value for name, value in state.items()}, network)
    del state["block1.0.attn.q_table"]
    with pytest.raises(InputError, match=r"ConDaFormer: 1 missing \(network.block.0.0.attn.q_table\)"):
        import_condaformer(state, network, head)
