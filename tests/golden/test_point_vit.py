"""Point-MAE and Point-BERT encoders against vectors recorded from the published implementations."""

from __future__ import annotations

import pytest
import torch
from harness import Golden, golden_files
from torch import Tensor

from pc3d.models import PointViT
from pc3d.models.convert import import_point_vit
from pc3d.models.heads import MLPHead
from pc3d.nn.patches import group_patches
from pc3d.nn.vit import PatchTokens
from pc3d.points import Points
from pc3d.tasks.heads import LinearHead


def _points(golden: Golden) -> Points:
    batch = golden.tensor("in/pts").contiguous()
    coord = batch.flatten(0, 1)
    attrs = {"feat": coord}
    if "in/onehot" in golden.arrays:
        attrs["category"] = golden.tensor("in/onehot")[:, 0].argmax(1).repeat_interleave(batch.shape[1])
    return Points(coord, torch.arange(len(batch) + 1) * batch.shape[1], attrs)


def _network(config: dict[str, int], **changes: object) -> PointViT:
    encoder = config.get("encoder_dims", config["trans_dim"])
    sizes = {
        "channels": config["trans_dim"],
        "depth": config["depth"],
        "num_heads": config["num_heads"],
        "patches": config["num_group"],
        "patch_points": config["group_size"],
        "encoder_channels": encoder if encoder != config["trans_dim"] else None,
        "stages": (config["depth"] - 1,),
        "ignore_origin": True,
    }
    return PointViT(**(sizes | changes)).eval()  # type: ignore[arg-type]


def _close(actual: Tensor, expected: Tensor) -> None:
    bound = 1e-5 + 3e-6 * float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound)


def _without_head(golden: Golden) -> dict[str, Tensor]:
    state = golden.group("state")
    return {name: value for name, value in state.items() if not name.startswith("cls_head_finetune.")}


@pytest.mark.parametrize("golden", golden_files("pointmae-cls*"))
def test_point_mae_classifier(golden: Golden) -> None:
    config, points = golden.meta["config"], _points(golden)
    network = _network(config)
    head = MLPHead(network.out_channels, config["cls_dim"], (256, 256), bias=True).eval()
    assert import_point_vit(golden.group("state"), network, head) == []
    with torch.no_grad():
        patches = group_patches(points, network.patch_count, network.patch_points, ignore_origin=True)
        assert torch.equal(patches.centres, golden.tensor("out/center"))
        _close(network.encoder(patches.feat), golden.tensor("out/patch_tokens"))
        feature = network(points)
        _close(feature, golden.tensor("out/concat_feature"))
        _close(head(feature, points), golden.tensor("out/logits"))


@pytest.mark.parametrize("golden", golden_files("pointbert-cls*"))
def test_point_bert_encoder(golden: Golden) -> None:
    points, network = _points(golden), _network(golden.meta["config"])
    import_point_vit(_without_head(golden), network)
    with torch.no_grad():
        patches = group_patches(points, network.patch_count, network.patch_points, ignore_origin=True)
        local = patches.rows - points.offsets[:-1, None, None]
        assert torch.equal(local[..., 0], golden.tensor("out/fps_idx"))
        assert torch.equal(local.sort(-1).values, golden.tensor("out/knn_idx_sorted"))
        tokens = network.tokens(points)
        _close(tokens.patches, golden.tensor("out/reduced_tokens"))
        _close(tokens.position[:, 1:], golden.tensor("out/pos"))
        for i, block in enumerate(network.blocks):
            tokens = block(tokens)
            _close(tokens.feat, golden.tensor(f"out/block{i}"))
        _close(network(points), golden.tensor("out/concat_feature"))


@pytest.mark.parametrize("golden", golden_files("pointmae-partseg*"))
def test_point_mae_part_segmentation(golden: Golden) -> None:
    config, points = golden.meta["config"], _points(golden)
    widths = (4 * config["trans_dim"], 1024, 512, 256)
    network = _network(config, stages=(3, 7, 11), decoder=widths, categories=16)
    head = LinearHead(network.out_channels, config["cls_dim"]).eval()
    assert import_point_vit({"model_state_dict": golden.group("state")}, network, head) == []
    with torch.no_grad():
        tokens = network.tokens(points)
        for i, block in enumerate(network.blocks):
            tokens = block(tokens)
            if i in network.stages:
                _close(tokens.feat, golden.tensor(f"out/block{i}"))
        logits = head(network(points), points).log_softmax(1)
    expected = golden.tensor("out/log_prob").flatten(0, 1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("golden", golden_files("pointmae-pretrain*"))
def test_visible_patches_of_a_pretraining(golden: Golden) -> None:
    meta = golden.meta["config"]
    config = {**meta["transformer_config"], **{key: meta[key] for key in ("num_group", "group_size")}}
    network, points = _network(config), _points(golden)
    new = import_point_vit({"base_model": golden.group("state")}, network)
    assert new == ["network.cls_pos", "network.cls_token"]
    visible = ~golden.tensor("in/mask").bool()
    with torch.no_grad():
        patches = group_patches(points, network.patch_count, network.patch_points, ignore_origin=True)
        feat = network.encoder(patches.feat)
        _close(feat, golden.tensor("out/patch_tokens"))
        seen = [t[visible].unflatten(0, (len(visible), -1)) for t in (feat, network.pos_embed(patches.centres))]
        centres = patches.centres[visible].unflatten(0, (len(visible), -1))
        _close(seen[1], golden.tensor("out/pos_visible"))
        _close(network.norm(network.encode(PatchTokens(*seen, centres)).feat), golden.tensor("out/x_vis"))
