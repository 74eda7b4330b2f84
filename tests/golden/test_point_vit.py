"""Encoders and part segmentations of Point-MAE and Point-BERT against vectors of the published implementations."""

from __future__ import annotations

import pytest
import torch
from harness import Golden, golden_files
from patch_vit import close, point_vit, points_of
from torch import Tensor

from pc3d.models.convert import import_point_vit
from pc3d.models.heads import MLPHead
from pc3d.nn.patch_decoders import LevelDecoder
from pc3d.nn.patches import group_patches
from pc3d.nn.vit import PatchTokens
from pc3d.tasks.heads import LinearHead


def _without_head(golden: Golden) -> dict[str, Tensor]:
    state = golden.group("state")
    return {name: value for name, value in state.items() if not name.startswith("cls_head_finetune.")}


@pytest.mark.parametrize("golden", golden_files("pointmae-cls*"))
def test_point_mae_classifier(golden: Golden) -> None:
    config, points = golden.meta["config"], points_of(golden)
    network = point_vit(config)
    head = MLPHead(network.out_channels, config["cls_dim"], (256, 256), bias=True).eval()
    assert import_point_vit(golden.group("state"), network, head) == []
    with torch.no_grad():
        patches = group_patches(points, network.patch_count, network.patch_points, ignore_origin=True)
        assert torch.equal(patches.centres, golden.tensor("out/center"))
        close(network.encoder(patches.feat), golden.tensor("out/patch_tokens"))
        feature = network(points)
        close(feature, golden.tensor("out/concat_feature"))
        close(head(feature, points), golden.tensor("out/logits"))


@pytest.mark.parametrize("golden", golden_files("pointbert-cls*"))
def test_point_bert_encoder(golden: Golden) -> None:
    points, network = points_of(golden), point_vit(golden.meta["config"])
    import_point_vit(_without_head(golden), network)
    with torch.no_grad():
        patches = group_patches(points, network.patch_count, network.patch_points, ignore_origin=True)
        local = patches.rows - points.offsets[:-1, None, None]
        assert torch.equal(local[..., 0], golden.tensor("out/fps_idx"))
        assert torch.equal(local.sort(-1).values, golden.tensor("out/knn_idx_sorted"))
        tokens = network.tokens(points)
        close(tokens.patches, golden.tensor("out/reduced_tokens"))
        close(tokens.position[:, 1:], golden.tensor("out/pos"))
        for i, block in enumerate(network.blocks):
            tokens = block(tokens)
            close(tokens.feat, golden.tensor(f"out/block{i}"))
        close(network(points), golden.tensor("out/concat_feature"))


@pytest.mark.parametrize("golden", golden_files("pointmae-partseg*"))
def test_point_mae_part_segmentation(golden: Golden) -> None:
    config, points = golden.meta["config"], points_of(golden)
    widths = (4 * config["trans_dim"], 1024, 512, 256)
    network = point_vit(config, stages=(3, 7, 11), decoder=widths, categories=16)
    head = LinearHead(network.out_channels, config["cls_dim"]).eval()
    assert import_point_vit({"model_state_dict": golden.group("state")}, network, head) == []
    with torch.no_grad():
        tokens = network.tokens(points)
        for i, block in enumerate(network.blocks):
            tokens = block(tokens)
            if i in network.stages:
                close(tokens.feat, golden.tensor(f"out/block{i}"))
        logits = head(network(points), points).log_softmax(1)
    expected = golden.tensor("out/log_prob").flatten(0, 1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("golden", golden_files("pointbert-partseg*"))
def test_point_bert_part_segmentation(golden: Golden) -> None:
    config, points = golden.meta["config"], points_of(golden)
    levels = config["fps_level1"], config["fps_level2"]
    network = point_vit(config, stages=(3, 7, 11), levels=levels, categories=16)
    decoder = network.decoder
    assert isinstance(decoder, LevelDecoder)
    head = LinearHead(network.out_channels, config["cls_dim"]).eval()
    assert import_point_vit({"model_state_dict": golden.group("state")}, network, head) == []
    seen: dict[str, Tensor] = {}
    for i, layer in enumerate(decoder.propagation):
        layer.register_forward_hook(lambda m, args, out, i=i: seen.update({f"propagation_{i}": out}))
    for i, edges in enumerate(decoder.edges, 1):
        edges.register_forward_hook(lambda m, args, out, i=i: seen.update({f"dgcnn_pro_{i}": out.flatten(0, 1)}))
    with torch.no_grad():
        tokens = network.tokens(points)
        close(tokens.centres, golden.tensor("out/center"))
        for i, block in enumerate(network.blocks):
            tokens = block(tokens)
            if i in network.stages:
                close(tokens.feat, golden.tensor(f"out/block{i}"))
        logits = head(network(points), points).log_softmax(1)
    for name, found in seen.items():
        close(found.unflatten(0, (len(points), -1)).transpose(1, 2), golden.tensor(f"out/{name}"))
    assert len(seen) == 5
    close(logits, golden.tensor("out/log_prob").flatten(0, 1))
    loss = torch.nn.functional.nll_loss(logits, golden.tensor("in/target").flatten())
    close(loss, golden.tensor("out/loss_nll"))


@pytest.mark.parametrize("golden", golden_files("pointmae-pretrain*"))
def test_visible_patches_of_a_pretraining(golden: Golden) -> None:
    meta = golden.meta["config"]
    config = {**meta["transformer_config"], **{key: meta[key] for key in ("num_group", "group_size")}}
    network, points = point_vit(config), points_of(golden)
    state = golden.group("state")
    of_act = {f"module.{name.replace('MAE_encoder.', 'ACT_encoder.')}": value for name, value in state.items()}
    plain = {f"base_model.{name.removeprefix('MAE_encoder.')}": v for name, v in state.items() if "MAE_enc" in name}
    for names in (of_act, {**plain, "cls_token": torch.ones(1, 1, 1), "cls_pos": torch.ones(1, 1, 1)}, state):
        tokens = {n: v.expand_as(network.cls_token) if n.startswith("cls_") else v for n, v in names.items()}
        new = import_point_vit({"base_model": tokens}, network)
        assert new == ([] if "cls_token" in names else ["network.cls_pos", "network.cls_token"])
    visible = ~golden.tensor("in/mask").bool()
    with torch.no_grad():
        patches = group_patches(points, network.patch_count, network.patch_points, ignore_origin=True)
        feat = network.encoder(patches.feat)
        close(feat, golden.tensor("out/patch_tokens"))
        seen = [t[visible].unflatten(0, (len(visible), -1)) for t in (feat, network.pos_embed(patches.centres))]
        centres = patches.centres[visible].unflatten(0, (len(visible), -1))
        close(seen[1], golden.tensor("out/pos_visible"))
        close(network.norm(network.encode(PatchTokens(*seen, centres)).feat), golden.tensor("out/x_vis"))
