"""IDPT, DAPT, Point-PEFT and PointGST against vectors recorded from the published implementations."""

from __future__ import annotations

import pytest
import torch
from harness import Golden, golden_files
from patch_vit import close, points_of

from pc3d.models import PointViT
from pc3d.models.convert import import_point_vit
from pc3d.models.heads import MLPHead
from pc3d.peft import DAPT, IDPT, Adaptation, PointGST, PointPEFT, attach
from pc3d.peft.dapt import DAPTPart
from pc3d.peft.idpt import IDPTPart
from pc3d.peft.patch_transformer import NetworkPart
from pc3d.peft.point_peft import PointPEFTPart
from pc3d.peft.pointgst import Bases, PointGSTPart, eigenbasis, laplacian, morton_keys, morton_order


def _adapted(golden: Golden, method: Adaptation) -> tuple[PointViT, NetworkPart, MLPHead]:
    """Network, adapter and head of a file, with its weights."""
    config = golden.meta["config"]
    network = PointViT(
        channels=config["trans_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        patches=config["num_group"],
        patch_points=config["group_size"],
        stages=(config["depth"] - 1,),
    )
    attach(network, method)
    head = MLPHead(network.out_channels, config["cls_dim"], (256, 256), bias=True).eval()
    kept = import_point_vit(golden.group("state"), network.eval(), head)
    assert all(".bank." in name for name in kept)
    part = network.adapters["default"]
    assert isinstance(part, NetworkPart)
    return network, part, head


def _check_head(golden: Golden, network: PointViT, head: MLPHead) -> None:
    with torch.no_grad():
        features = network(points_of(golden))
        close(features, golden.tensor("out/head_in"))
        torch.testing.assert_close(head(features, points_of(golden)), golden.tensor("out/logits"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("golden", golden_files("idpt"))
def test_idpt(golden: Golden) -> None:
    config = golden.meta["config"]
    method = IDPT(config["prompt_layer"], config["prompt_module"], config["cls_type"])
    network, part, head = _adapted(golden, method)
    assert isinstance(part, IDPTPart)
    seen = {}
    part.prompt.register_forward_hook(lambda module, args, out: seen.update(given=args[0].patches, prompt=out))
    blocks = []
    for block in network.blocks:
        block.register_forward_hook(lambda module, args, out: blocks.append(out.feat))
    _check_head(golden, network, head)
    close(seen["given"], golden.tensor("out/prompt_in"))
    close(seen["prompt"], golden.tensor("out/prompt"))
    for i, block in enumerate(blocks):
        close(block, golden.tensor(f"out/block{i}"))


@pytest.mark.parametrize("golden", golden_files("dapt"))
def test_dapt(golden: Golden) -> None:
    config = golden.meta["config"]
    pools = {name: value if value in ("mean", "max") else None
             for name, value in (("prompts", config["prompt_token"]), ("patches", config["patch_token"]))}  # fmt: skip
    method = DAPT(config["rank"], config["drop_adapter_rate"], config["class_token"] == "use", **pools)
    network, part, head = _adapted(golden, method)
    assert isinstance(part, DAPTPart)
    seen = []
    for block in part.blocks:
        block.adapter.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
        block.register_forward_hook(lambda module, args, out: seen.append(out))
    _check_head(golden, network, head)
    for i, ((given, added), out) in enumerate(zip(seen[::2], seen[1::2], strict=True)):
        close(given, golden.tensor(f"out/adapter_in{i}"))
        close(added, golden.tensor(f"out/adapter{i}"))
        close(out, golden.tensor(f"out/block{i}"))


@pytest.mark.parametrize("golden", golden_files("pointpeft-vit"))
def test_point_peft(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the recorded query and bank, and the look-up as published."""
    config, bank = golden.meta["config"], golden.tensor("in/bank").T
    rank = config["adapter_config"]["adapter_dim"]
    method = PointPEFT(len(bank), rank, half_bank=False, published_neighbours=True)
    network, part, head = _adapted(golden, method)
    assert isinstance(part, PointPEFTPart)
    part.bank.fill(bank)
    query = golden.tensor("in/cp_feat")
    monkeypatch.setattr(part, "query", lambda network, tokens: query)
    points = points_of(golden)
    centres = network.tokens(points).centres
    close(centres, golden.tensor("out/center_a"))
    with torch.no_grad():
        close(part.retrieve(query, points), golden.tensor("out/cache_prompt"))
        prompted, plain = part.neighbourhoods(network, points, centres)
    for near, suffix in ((prompted, "_prompt"), (plain, "")):
        assert torch.equal(near.rows.flatten(), golden.tensor(f"out/idx{suffix}"))
        assert torch.equal(near.own.flatten(), golden.tensor(f"out/center_idx{suffix}"))
    blocks = []
    for block in part.blocks:
        block.register_forward_hook(lambda module, args, out: blocks.append(out))
    _check_head(golden, network, head)
    for i, block in enumerate(blocks):
        close(block, golden.tensor(f"out/block{i}"))


@pytest.mark.parametrize("golden", golden_files("pointgst-vit"))
def test_pointgst(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the recorded eigenvectors: their signs are the solver's."""
    config = golden.meta["config"]
    network, part, head = _adapted(golden, PointGST(config["rank"], config["local"], published_distances=True))
    assert isinstance(part, PointGSTPart)
    stored = Bases(*(golden.tensor(f"out/{name}") for name in ("U", "sub_U", "idx_sort", "idx_inv")))
    own = part.bases(golden.tensor("out/center"))
    assert torch.equal(own.order, stored.order)
    assert torch.equal(own.inverse, stored.inverse)
    for mine, theirs in ((own.whole, stored.whole), (own.local, stored.local)):
        overlap = (mine.mT @ theirs).abs().diagonal(dim1=-2, dim2=-1)
        assert (overlap > 0.99).float().mean() > 0.9
    monkeypatch.setattr(part, "bases", lambda centres: stored)
    seen = []
    for adapter in part.blocks:
        adapter.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    _check_head(golden, network, head)
    for i, (given, added) in enumerate(seen):
        close(given, golden.tensor(f"out/adapter_in{i}"))
        close(added, golden.tensor(f"out/adapter{i}"))


@pytest.mark.parametrize("golden", golden_files("pointgst-basis"))
def test_pointgst_basis(golden: Golden) -> None:
    cases = [name.removeprefix("in/").removesuffix("_center") for name in golden.arrays if name.endswith("_center")]
    for case in cases:
        single = f"out/{case}_U" not in golden.arrays
        # The published minimum is over the batch; for a cloud alone ours is the same.
        matrix = laplacian(golden.tensor(f"in/{case}_center"), published_distances=True)
        torch.testing.assert_close(matrix, golden.tensor(f"out/{case}_L"), rtol=0, atol=1e-6)
        values, vectors = eigenbasis(matrix)
        torch.testing.assert_close(values, golden.tensor(f"out/{case}_lam"), rtol=0, atol=2e-6)
        if len(matrix) == 1:
            exact = laplacian(golden.tensor(f"in/{case}_center"))
            torch.testing.assert_close(exact, golden.tensor(f"out/{case}_L"), rtol=0, atol=1e-6)
        if not single:
            heat = vectors @ torch.diag_embed((-3 * values).exp()) @ vectors.mT
            torch.testing.assert_close(heat, golden.tensor(f"out/{case}_heat3"), rtol=0, atol=1e-5)
    points = golden.tensor("in/z_points")
    order = morton_order(points)
    assert torch.equal(morton_keys(points), golden.tensor("out/z_key"))
    assert torch.equal(order, golden.tensor("out/z_perm"))
    assert torch.equal(order.argsort(1), golden.tensor("out/z_inv"))
