"""Self-supervised pre-training against vectors recorded from the published implementations."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from harness import Golden, golden_files
from patch_vit import close, packed, point_vit, points_of
from torch import Tensor

from pc3d.losses.patches import patch_distance
from pc3d.models.convert import import_point_vit, import_pretraining
from pc3d.models.heads import MLPHead
from pc3d.models.pretrain import DiscreteVAE, DiscreteVAETraining, PointBERT, PointMAE, PointPQAE
from pc3d.models.pretrain.point_bert import MaskingDraws, centre_graph, gumbel_weights, mix, unequal_use
from pc3d.models.pretrain.point_pqae import ViewDraws
from pc3d.nn.patches import block_mask, sample_centres, select_patches
from pc3d.ops.neighbours import knn
from pc3d.ops.point_sets import nearest_in_sets
from pc3d.tasks import Classification
from pc3d.tasks.heads import LinearHead


def _canonical(patches: Tensor) -> Tensor:
    """Points of each patch (P, S, 3) sorted by rounded squared norm, x, y, z."""
    x, y, z = patches.unbind(-1)
    rows = np.lexsort([key.numpy() for key in (z, y, x, (patches.square().sum(-1) * 1e6).round())], axis=-1)
    return patches.gather(1, torch.from_numpy(rows)[..., None].expand(-1, -1, 3))


@pytest.mark.parametrize("golden", golden_files("pointmae-pretrain*"))
def test_point_mae(golden: Golden) -> None:
    config = golden.meta["config"]
    sizes = config["transformer_config"]
    backbone = point_vit(sizes, config)
    masking = {"rand": "random", "block": "block"}[sizes["mask_type"]]
    method = PointMAE(
        sizes["decoder_depth"],
        sizes["decoder_num_heads"],
        mask_ratio=sizes["mask_ratio"],
        masking=masking,
        distance=config["loss"],
    )
    method.build(backbone)
    assert import_pretraining({"base_model": golden.group("state")}, backbone, method.eval()) == [
        "backbone.cls_pos",
        "backbone.cls_token",
    ]
    points, hidden = points_of(golden), golden.tensor("in/mask").bool()
    patches = backbone.group(points)
    assert torch.equal(patches.centres, golden.tensor("out/center"))
    assert torch.equal(method.draw_mask(patches.centres).sum(1), hidden.sum(1))
    visible = method.encode(backbone, patches, hidden)
    close(visible, golden.tensor("out/x_vis"))
    made = method.rebuild(visible, patches.centres, hidden).flatten(0, 1)
    wanted = select_patches(patches.feat, hidden).flatten(0, 1)
    close(made, golden.tensor("out/rebuilt"))
    close(_canonical(wanted), golden.tensor("out/gt_canonical"))
    close(nearest_in_sets(made, wanted), golden.tensor("out/chamfer_pred_to_gt"))
    for kind in ("cdl1", "cdl2"):
        close(patch_distance(made, wanted, kind), golden.tensor(f"out/loss_{kind}"))
    output = method(backbone, points, hidden=hidden)
    close(output.losses["reconstruction"], golden.tensor("out/loss"))
    output.losses["reconstruction"].backward()
    mine = {
        "mask_token": method.mask_token,
        "increase_dim.0.bias": method.to_points.bias,
        "MAE_encoder.encoder.first_conv.0.bias": backbone.encoder.first_conv[0].bias,
        "decoder_pos_embed.0.weight": method.pos_embed[0].weight,
    }
    for name, parameter in mine.items():
        close(parameter.grad, golden.tensor(f"out/grad/{name}"))


@pytest.mark.parametrize("golden", golden_files("pointmae-pretrain*"))
def test_point_mae_panels(golden: Golden) -> None:
    """The published picture lists all visible points of the batch, then all hidden ones."""
    config = golden.meta["config"]
    sizes = config["transformer_config"]
    backbone = point_vit(sizes, config)
    method = PointMAE(sizes["decoder_depth"], sizes["decoder_num_heads"], mask_ratio=sizes["mask_ratio"])
    method.build(backbone)
    import_pretraining(golden.group("state"), backbone, method.eval())
    hidden = golden.tensor("in/mask").bool()
    panels = method(backbone, points_of(golden), hidden=hidden).panels
    count = panels["visible"].shape[1]
    assert torch.equal(panels["reconstruction"][:, :count], panels["visible"])
    rebuilt = panels["reconstruction"][:, count:]
    parts = golden.tensor("out/vis_full")[0].split([panels["visible"].numel() // 3, rebuilt.numel() // 3])
    close(rebuilt.flatten(0, 1), parts[1])
    seen = panels["visible"].flatten(0, 1)
    torch.testing.assert_close(seen.sort(0).values, parts[0].sort(0).values)


@pytest.mark.parametrize("golden", golden_files("pointpqae-pretrain*"))
def test_point_pqae(golden: Golden) -> None:
    config = golden.meta["config"]
    sizes = config["transformer_config"]
    backbone = point_vit(sizes, config)
    method = PointPQAE(
        sizes["decoder_depth"],
        sizes["decoder_num_heads"],
        min_rate=config["min_crop_rate"],
        distance=config["loss_type"],
    )
    method.build(backbone)
    assert import_pretraining({"base_model": golden.group("state")}, backbone, method.eval()) == []
    draws = ViewDraws(
        tuple(golden.tensor("in/crop_rate").tolist()), golden.tensor("in/crop_center_idx"), golden.tensor("in/angle")
    )
    points = points_of(golden)
    views, delta = method.views(points, draws)
    close(delta, golden.tensor("out/delta"))
    patches = [backbone.group(view) for view in views]
    encoded = method.encode(backbone, patches)
    for i, (view, own) in enumerate(zip(views, patches, strict=True)):
        close(view.coord.unflatten(0, (2, -1)), golden.tensor(f"out/view{i + 1}"))
        assert torch.equal(own.rows[..., 0] - view.offsets[:-1, None], golden.tensor(f"out/fps_idx{i + 1}"))
        close(own.centres, golden.tensor(f"out/center{i + 1}"))
        close(encoded[i], golden.tensor(f"out/tokens{i + 1}"))
        query = method.query(own.centres, (1 - 2 * i) * delta)
        close(query, golden.tensor(f"out/vrpe{i + 1}"))
        close(method.attention(query, encoded[1 - i]), golden.tensor(f"out/query{i + 1}"))
        made = method.rebuild(query, encoded[1 - i])
        close(made.flatten(2), golden.tensor(f"out/predict{i + 1}"))
        for kind in ("cdl1", "cdl2") if i == 0 else ():
            value = patch_distance(made.flatten(0, 1), own.feat.flatten(0, 1), kind)
            close(value, golden.tensor(f"out/view1_{kind}"))
    losses = method(backbone, points, draws=draws).losses
    for i in (1, 2):
        close(losses[f"view{i}"], golden.tensor(f"out/loss{i}"))
    (losses["view1"] + losses["view2"]).backward()
    mine = {
        "PQ_linear.bias": method.to_points.bias,
        "PQAE_encoder.cls_token": backbone.cls_token,
        "PQattn_contrast.q.weight": method.attention.q.weight,
        "PQAE_encoder.encoder.first_conv.0.bias": backbone.encoder.first_conv[0].bias,
    }
    for name, parameter in mine.items():
        close(parameter.grad, golden.tensor(f"out/grad/{name}"))
    method.joint = True
    close(method.encode(backbone, patches)[1], golden.tensor("out/tokens2"))


@pytest.mark.parametrize("golden", golden_files("pointpqae-cls_*"))
def test_point_pqae_classifiers(golden: Golden) -> None:
    config, points = golden.meta["config"], points_of(golden)
    backbone = point_vit(config, config)
    linear = config["type"] == "linear"
    head = (
        LinearHead(backbone.out_channels, config["cls_dim"])
        if linear
        else MLPHead(backbone.out_channels, config["cls_dim"], (256, 256), bias=True)
    ).eval()
    assert import_point_vit({"base_model": golden.group("state")}, backbone, head) == []
    with torch.no_grad():
        feature = backbone(points)
        close(feature, golden.tensor("out/concat_feature"))
        logits = head(feature, points)
        close(logits, golden.tensor("out/logits"))
        close(torch.nn.functional.cross_entropy(logits, golden.tensor("in/label")), golden.tensor("out/loss"))
    task = Classification(backbone, [str(i) for i in range(config["cls_dim"])], head, freeze=[r"^backbone\.(?!cls_)"])
    trained = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    if linear:
        assert trained == {"backbone.cls_token", "backbone.cls_pos", "head.linear.weight", "head.linear.bias"}
        assert len(golden.meta["trainable"]) == len(trained)


@pytest.mark.parametrize("golden", [*golden_files("pointpqae-partseg*"), *golden_files("pointpqae-semseg*")])
def test_point_pqae_segmentation(golden: Golden) -> None:
    config, points = golden.meta["config"], points_of(golden)
    categories = 16 if "category" in points else 0
    widths = (4 * config["trans_dim"], 1024, 512, 256)
    backbone = point_vit(config, config, stages=(3, 7, 11), decoder=widths, categories=categories)
    head = LinearHead(backbone.out_channels, config["cls_dim"]).eval()
    assert import_point_vit(golden.group("state"), backbone, head) == []
    with torch.no_grad():
        tokens = backbone.tokens(points)
        for i, block in enumerate(backbone.blocks):
            tokens = block(tokens)
            if i in backbone.stages:
                close(tokens.feat, golden.tensor(f"out/block{i}"))
        logits = head(backbone(points), points).log_softmax(1)
    expected = golden.tensor("out/log_prob").flatten(0, 1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    target = golden.tensor("in/target").flatten()
    if not categories:
        loss = torch.nn.functional.nll_loss(logits, target, golden.tensor("in/class_weight"))
        torch.testing.assert_close(loss, golden.tensor("out/loss_nll_weighted"), rtol=0, atol=1e-4)


def _tokenizer(config: dict[str, int]) -> DiscreteVAE:
    return DiscreteVAE(
        channels=config["encoder_dims"],
        words=config["num_tokens"],
        word_channels=config["tokens_dims"],
        decoder_channels=config["decoder_dims"],
        patches=config["num_group"],
        patch_points=config["group_size"],
        ignore_origin=True,
    ).eval()


@pytest.mark.parametrize("golden", golden_files("pointbert-dvae*"))
def test_point_bert_tokenizer(golden: Golden) -> None:
    network, method = _tokenizer(golden.meta["config"]), DiscreteVAETraining()
    assert import_pretraining({"base_model": golden.group("state")}, network, method) == []
    points = points_of(golden)
    patches = network.group(points)
    assert torch.equal(patches.centres, golden.tensor("out/center"))
    wanted = patches.feat.flatten(0, 1)
    close(_canonical(wanted), golden.tensor("out/neighborhood_canonical").flatten(0, 1))
    graph = centre_graph(patches.centres)
    assert torch.equal(graph, golden.tensor("out/graph_idx"))
    with torch.no_grad():
        close(network.encoder(patches.feat), golden.tensor("out/patch_features"))
        logits = network.logits(patches, graph)
        close(logits, golden.tensor("out/logits"))
        assert torch.equal(network.words(patches), golden.tensor("out/tokens_argmax"))
        for case, temperature, hard in (("soft_t1", 1.0, False), ("soft_t0625", 0.0625, False), ("hard_t1", 1.0, True)):
            slack = 5e-5 if case == "soft_t0625" else 0.0  # this low a temperature amplifies rounding
            weights = gumbel_weights(logits, temperature, hard, golden.tensor("in/gumbel"))
            sets = dict(zip(("coarse", "fine"), network.decode(weights @ network.codebook, graph), strict=True))
            values = {f"cdl1_{name}": patch_distance(own.flatten(0, 1), wanted, "cdl1") for name, own in sets.items()}
            close(sum(values.values()), golden.tensor(f"out/{case}/loss_recon"), slack)
            close(unequal_use(logits), golden.tensor(f"out/{case}/loss_kl"), slack)
            whole = (sets["fine"] + patches.centres[:, :, None]).flatten(1, 2)
            values |= {f"{k}_whole_fine": patch_distance(whole, golden.tensor("in/pts"), k) for k in ("cdl1", "cdl2")}
            for name, value in (sets | values).items():
                close(value, golden.tensor(f"out/{case}/{name}"), slack)
        code = network.codebook[network.words(patches)]
        close(code, golden.tensor("out/argmax/sampled"))
        close(network.dgcnn_2(code, graph), golden.tensor("out/argmax/dgcnn2"))
        for own, name in zip(network.decode(code, graph), ("coarse", "fine"), strict=True):
            close(own, golden.tensor(f"out/argmax/{name}"))


@pytest.mark.parametrize("golden", golden_files("pointbert-mpm*"))
def test_point_bert_step(golden: Golden) -> None:
    config = golden.meta["config"]
    sizes, words = config["transformer_config"], config["dvae_config"]
    backbone = point_vit({**sizes, "encoder_dims": words["encoder_dims"]}, words)
    tokenizer = _tokenizer(words)
    method = PointBERT(
        tokenizer,
        sizes["cls_dim"],
        config["K"],
        config["T"],
        config["m"],
        sizes["mask_ratio"],
        replace_ratio=sizes["replace_pob"],
        contrast=sizes["moco_loss"],
    )
    method.build(backbone)
    own = {f"dvae.{_published_graph_net(name)}": value for name, value in tokenizer.state_dict().items()}
    assert import_pretraining({"base_model": own | golden.group("state")}, backbone, method.eval()) == []
    tokenizer.words = lambda patches: golden.tensor("in/dvae_logits").argmax(-1)
    points = points_of(golden)
    patches = backbone.group(points)
    assert torch.equal(patches.centres, golden.tensor("out/center"))
    share = golden.tensor("in/mixup_ratio")
    hidden = torch.stack([golden.tensor(f"in/mask_{name}").bool() for name in ("q", "mix", "k")])
    draws = MaskingDraws(hidden, share, golden.tensor("in/mixup_rand") < share[:, None])
    assert torch.equal(mix(patches, draws.own).centres, golden.tensor("out/mix_center"))
    close(method.features(backbone, points), golden.tensor("out/eval_feature"))
    seeds, ratio = golden.tensor("in/block_seed_idx"), golden.tensor("in/block_ratio")
    mask = block_mask(patches.centres, seeds, (ratio * patches.centres.shape[1]).long())
    assert torch.equal(mask, golden.tensor("out/block_mask").bool())
    for name, network, heads, where in (
        ("q", backbone, method.heads, 0),
        ("mix", backbone, method.heads, 1),
    ):
        used = patches if name == "q" else mix(patches, draws.own)
        feature, encoded, asked = method._look(network, heads, used, hidden[where])
        close(feature, torch.nn.functional.normalize(golden.tensor(f"out/cls_{name}"), dim=1))
        logits = heads.lm_head(encoded)
        close(logits[asked], golden.tensor("out/logits_masked" if name == "q" else "out/mix_logits_masked"))
        if name == "q":
            close(logits[~asked], golden.tensor("out/logits_visible"))
    method.training = True  # this module only: batch norm uses its running statistics, momentum and queue move
    losses = method(backbone, points, draws=draws).losses
    close(losses["words"] + losses["mixed_words"] + losses["contrast"], golden.tensor("out/loss_1"))
    close(losses["mixture"], golden.tensor("out/loss_2"))
    torch.stack(list(losses.values())).sum().backward()
    mine = {
        "mask_token": method.heads.mask_token,
        "cls_token": backbone.cls_token,
        "lm_head.bias": method.heads.lm_head.bias,
        "reduce_dim.bias": backbone.reduce_dim.bias,
    }
    for name, parameter in mine.items():
        close(parameter.grad, golden.tensor(f"out/grad/{name}"))
    close(method.queue, golden.tensor("out/queue_after"))
    assert torch.equal(method.queue_ptr, golden.tensor("out/queue_ptr_after"))
    close(method.key_backbone.reduce_dim.weight, golden.tensor("out/k_reduce_dim_weight_after"))


def _published_graph_net(name: str) -> str:
    """The published name of a tokenizer's tensor."""
    name = re.sub(r"\.layers\.(\d)\.(linear|norm)\.", lambda m: f".layer{int(m[1]) + 1}.{int(m[2] == 'norm')}.", name)
    return re.sub(r"^(dgcnn_\d)\.(last|norm)\.", lambda m: f"{m[1]}.layer5.{int(m[2] == 'norm')}.", name)


@pytest.mark.parametrize("golden", golden_files("pointbert-pointops*"))
def test_point_bert_operations(golden: Golden) -> None:
    points, query = points_of(golden), packed(golden.tensor("in/query"))
    count = golden.arrays["out/fps_skip"].shape[1]
    for name, ignore_origin in (("skip", True), ("noskip", False)):
        rows, _ = sample_centres(points.coord, points.offsets, count, ignore_origin)
        local = rows.view(len(points), count) - points.offsets[:-1, None]
        assert torch.equal(local, golden.tensor(f"out/fps_{name}").long())
    k = golden.arrays["out/knn_idx"].shape[2]
    rows, distance = knn(query.coord, query.offsets, points.coord, points.offsets, k)
    local = rows.view(len(points), -1, k) - points.offsets[:-1, None, None]
    assert torch.equal(local, golden.tensor("out/knn_idx").long())
    close(distance.sqrt().view(len(points), -1, k), golden.tensor("out/knn_dist"))
    a, b = (golden.tensor(f"in/ch_{name}").requires_grad_() for name in "ab")
    close(nearest_in_sets(a, b), golden.tensor("out/ch_dist1"))
    close(nearest_in_sets(b, a), golden.tensor("out/ch_dist2"))
    for kind in ("cdl1", "cdl2"):
        value = patch_distance(a, b, kind)
        close(value, golden.tensor(f"out/{kind}"))
        for name, grad in zip("ab", torch.autograd.grad(value, (a, b)), strict=True):
            close(grad, golden.tensor(f"out/{kind}_grad_{name}"))
