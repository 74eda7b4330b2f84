"""Methods of pre-training: masks, what may depend on what, gradients, sizes, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pc3d.errors import InputError
from pc3d.losses.patches import patch_distance
from pc3d.models import PointViT
from pc3d.models.pretrain import DiscreteVAE, DiscreteVAETraining, PointBERT, PointMAE, PointPQAE
from pc3d.models.pretrain.point_bert import gumbel_weights, mix, unequal_use
from pc3d.models.pretrain.point_pqae import ViewDraws
from pc3d.points import Points

SIZES = {"channels": 24, "depth": 2, "num_heads": 2, "patches": 10, "patch_points": 6, "stages": (1,), "drop_path": 0.0}


def points(batch: int = 3, count: int = 50, seed: int = 0) -> Points:
    coord = torch.rand(batch * count, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return Points(coord, torch.arange(batch + 1) * count, {"feat": coord})


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def point_mae(**options: object) -> tuple[PointViT, PointMAE]:
    torch.manual_seed(0)
    backbone = PointViT(**SIZES)
    method = PointMAE(depth=2, num_heads=2, **options)
    method.build(backbone)
    return backbone.eval(), method.eval()


def test_point_mae_has_the_published_size() -> None:
    backbone, method = PointViT(), PointMAE()
    method.build(backbone)
    assert count(backbone) - 2 * 384 == 21_825_024
    assert count(backbone) - 2 * 384 + count(method) == 29_006_432
    assert [round(block.drop_path.p, 4) for block in method.blocks] == [0, 0.0333, 0.0667, 0.1]


@pytest.mark.parametrize("masking", ["random", "block"])
def test_every_cloud_hides_as_many_patches(masking: str) -> None:
    backbone, method = point_mae(masking=masking, mask_ratio=0.65)
    centres = backbone.group(points(40)).centres
    hidden = method.draw_mask(centres)
    assert hidden.sum(1).eq(6).all()
    assert hidden.float().mean(0).min() > 0.1  # no patch is always seen
    if masking == "block":  # the hidden ones are the nearest to one of them
        distance = torch.cdist(centres, centres)
        inner = distance.masked_fill(~hidden[:, None], 0).amax(2)
        outer = distance.masked_fill(hidden[:, None], torch.inf).amin(2)
        assert ((inner <= outer) & hidden).any(1).all()


@pytest.mark.parametrize("embed_hidden", [True, False])
def test_what_is_visible_does_not_know_the_hidden_points(embed_hidden: bool) -> None:
    backbone, method = point_mae(embed_hidden=embed_hidden)
    patches = backbone.group(points())
    hidden = method.draw_mask(patches.centres)
    before = method.encode(backbone, patches, hidden)
    patches.feat[hidden] *= 3
    torch.testing.assert_close(method.encode(backbone, patches, hidden), before)
    made = method.rebuild(before, patches.centres, hidden)
    moved = patches.centres + hidden[..., None] * 0.5
    assert not torch.allclose(method.rebuild(before, moved, hidden), made, atol=1e-5)


def test_point_mae_learns_a_batch_by_heart() -> None:
    backbone, method = point_mae()
    clouds = points(4)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *method.parameters()], lr=3e-3)
    losses = []
    backbone.train()
    hidden = method.draw_mask(backbone.group(clouds).centres)
    for _ in range(60):
        output = method(backbone, clouds, hidden=hidden)
        loss = output.losses["reconstruction"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 4
    assert set(output.panels) == {"visible", "reconstruction", "truth"}
    assert output.panels["reconstruction"].shape == output.panels["truth"].shape == (4, 60, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mask_ratio": 0.05}, "none or all"), ({"masking": "half"}, "half"), ({"distance": "emd"}, "cdl2, cdl1, cos")],
)
def test_wrong_settings_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        point_mae(**options)


def test_patch_distances() -> None:
    made = torch.tensor([[[0.0, 0, 0], [1, 0, 0]]], requires_grad=True)
    wanted = torch.tensor([[[0.0, 0, 0], [3, 0, 0]]])
    values: dict[str, Tensor] = {kind: patch_distance(made, wanted, kind) for kind in ("cdl2", "cdl1")}
    assert float(values["cdl2"]) == pytest.approx(1 / 2 + 4 / 2)
    assert float(values["cdl1"]) == pytest.approx((1 / 2 + 2 / 2) / 2, abs=1e-5)
    values["cdl1"].backward()
    assert made.grad is not None
    assert made.grad.isfinite().all()  # also at the exact hit
    assert float(patch_distance(wanted, 2 * wanted, "cos")) == pytest.approx(-1)
    shuffled = wanted.flip(1)
    assert float(patch_distance(shuffled, wanted, "cdl2")) == 0


def point_pqae(**options: object) -> tuple[PointViT, PointPQAE]:
    torch.manual_seed(0)
    backbone = PointViT(**SIZES)
    method = PointPQAE(depth=2, num_heads=2, linear_init="zero-mean", **options)
    method.build(backbone)
    return backbone.eval(), method.eval()


def test_point_pqae_has_the_published_size_and_start() -> None:
    backbone, method = PointViT(), PointPQAE()
    before = backbone.encoder.first_conv[0].weight.clone()
    method.build(backbone)
    assert (count(backbone), count(method.attention)) == (21_825_792, 590_208)
    unused = 3 * 128 + 128 + 128 * 384 + 384
    assert count(backbone) + count(method) == 29_597_024 - unused
    assert torch.equal(backbone.encoder.first_conv[0].weight, before)
    for weight in (backbone.blocks[3].mlp.fc1.weight, method.to_points.weight):
        assert float(weight.mean()) == pytest.approx(0.02, abs=1e-3)


def test_views_of_point_pqae() -> None:
    _, method = point_pqae(rotate=False)
    clouds = points(3, 60)
    draws = method.draw(clouds)
    (first, second), delta = method.views(clouds, draws)
    for view, rate, centers in zip((first, second), draws.rates, draws.centers, strict=True):
        coord = view.coord.unflatten(0, (3, -1))
        assert coord.shape[1] == int(60 * rate)
        torch.testing.assert_close(coord.amin(1), torch.full((3, 3), -1.0))
        torch.testing.assert_close(coord.amax(1), torch.full((3, 3), 1.0), atol=1e-4, rtol=0)
        middle = clouds.coord.unflatten(0, (3, -1))[torch.arange(3), centers]
        low, high = _box(clouds, middle, coord.shape[1])
        torch.testing.assert_close(coord[:, 0], 2 * (middle - low) / (high - low) - 1, atol=1e-4, rtol=0)
    swapped = ViewDraws(draws.rates[::-1], draws.centers.flip(0), draws.angles.flip(0))
    torch.testing.assert_close(method.views(clouds, swapped)[1], -delta)
    flat = points(3, 60).replace(coord=clouds.coord * torch.tensor([1.0, 0, 1]))
    assert method.views(flat, draws)[0][0].coord[:, 1].abs().max() == 0
    whole = point_pqae(rotate=False, min_rate=1.0)[1]
    view = whole.views(clouds, whole.draw(clouds))[0][0].coord.unflatten(0, (3, -1))
    size = clouds.coord.unflatten(0, (3, -1))
    torch.testing.assert_close(view.amax(1) - view.amin(1), size.amax(1) - size.amin(1))


def _box(clouds: Points, middle: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    coord = clouds.coord.unflatten(0, (len(middle), -1))
    rows = (coord - middle[:, None]).square().sum(-1).argsort(1)[:, :keep]
    kept = coord.gather(1, rows[..., None].expand(-1, -1, 3))
    return kept.amin(1), kept.amax(1)


def test_views_of_point_pqae_turn_about_y_also_in_mixed_precision() -> None:
    backbone, method = point_pqae()
    clouds = points(2, 60)
    draws = method.draw(clouds)
    (plain, *_), _ = method.views(clouds, ViewDraws(draws.rates, draws.centers, torch.zeros(2, 2)))
    with torch.autocast("cpu", torch.bfloat16):
        (turned, *_), _ = method.views(clouds, draws)
        sum(method.train()(backbone.train(), clouds, draws=draws).losses.values()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in backbone.parameters())
    cos, sin, zero = draws.angles[0].cos(), draws.angles[0].sin(), torch.zeros(2)
    turn = torch.stack([cos, zero, sin, zero, zero + 1, zero, -sin, zero, cos], -1).view(2, 3, 3)
    torch.testing.assert_close(turned.coord, (plain.coord.unflatten(0, (2, -1)) @ turn).flatten(0, 1))


def test_swapped_views_swap_the_losses() -> None:
    backbone, method = point_pqae()
    clouds = points(2, 60)
    draws = method.draw(clouds)
    losses = method(backbone, clouds, draws=draws).losses
    swapped = ViewDraws(draws.rates[::-1], draws.centers.flip(0), draws.angles.flip(0))
    other = method(backbone, clouds, draws=swapped).losses
    torch.testing.assert_close(losses["view1"], other["view2"])
    torch.testing.assert_close(losses["view2"], other["view1"])
    sum(losses.values()).backward()
    assert backbone.cls_token is not None
    assert backbone.cls_token.grad is not None  # only through attention
    assert backbone.cls_token.grad.abs().sum() > 0


def test_point_pqae_wants_clouds_of_one_size_and_enough_points() -> None:
    backbone, method = point_pqae()
    clouds = points(2, 30)
    uneven = Points(clouds.coord, torch.tensor([0, 20, 60]), {"feat": clouds.coord})
    with pytest.raises(InputError, match="FixedPoints"):
        method(backbone, uneven)
    with pytest.raises(InputError, match="patches"):
        method(backbone, points(2, 10))
    with pytest.raises(InputError, match="12"):
        PointPQAE().build(PointViT(**{**SIZES, "channels": 20}))


def tokenizer(**options: int) -> DiscreteVAE:
    sizes = {"channels": 16, "words": 20, "word_channels": 12, "decoder_channels": 16, "patches": 10, "patch_points": 8}
    return DiscreteVAE(**(sizes | options))


def point_bert(**options: object) -> tuple[PointViT, PointBERT]:
    torch.manual_seed(0)
    backbone = PointViT(**{**SIZES, "patch_points": 8, "encoder_channels": 16})
    method = PointBERT(tokenizer(), 8, **{"queue": 10, "momentum": 0.9, **options})
    method.build(backbone)
    return backbone, method


def test_point_bert_has_the_published_sizes() -> None:
    with torch.device("meta"):
        network = DiscreteVAE()
        backbone = PointViT(encoder_channels=256)
        method = PointBERT(tokenizer(patches=64, patch_points=32, words=8192))
        method.build(backbone)
    assert count(network) == 27_620_891
    assert count(backbone) + count(method.heads) == 25_472_896


def test_schedules_of_the_tokenizer() -> None:
    method = DiscreteVAETraining()
    assert [round(method.temperature(n), 5) for n in (0, 10_000, 60_000, 110_000)] == [1, 0.97706, 0.3864, 0.0625]
    assert [method.weight(n) for n in (0, 9_999, 10_000)] == [0, 0, 0]
    assert method.weight(60_000) == pytest.approx(0.05)
    assert method.weight(110_000) == pytest.approx(0.1)


def test_the_tokenizer_learns_and_uses_its_words() -> None:
    torch.manual_seed(0)
    network, method = tokenizer(), DiscreteVAETraining(kl_start=0, kl_steps=1)
    clouds = points(2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for step in range(25):
        output = method(network, clouds, step)
        loss = torch.stack(list(output.losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(output.losses["reconstruction"].detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert float(unequal_use(torch.zeros(2, 3, 5))) == pytest.approx(0, abs=1e-6)
    assert network(clouds).shape == (2, 16)
    assert network.forward_features(clouds)["patches"].num_points == 20


def test_gumbel_weights_are_those_of_the_given_noise() -> None:
    logits, noise = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5)
    hard = gumbel_weights(logits, 0.5, True, noise)
    assert torch.equal(hard.detach().round().argmax(-1), (logits + noise).argmax(-1))
    torch.testing.assert_close(hard.sum(-1), torch.ones(2, 3))
    (hard * torch.arange(5.0)).sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0


def test_masks_of_point_bert() -> None:
    backbone, method = point_bert(mask_ratio=[0.25, 0.45])
    hidden = method.draw_mask(backbone.group(points(60)).centres)
    assert set(hidden.sum(1).tolist()) == {2, 3, 4}
    method.masking = "random"
    shares = method.draw_mask(torch.zeros(20, 2000, 3)).float().mean(1)
    assert shares.min() > 0.2
    assert shares.max() < 0.5
    assert shares.max() - shares.min() < 0.08, "one share for all clouds"


def test_replaced_tokens_of_point_bert_are_asked_for_too() -> None:
    backbone, method = point_bert(replace_ratio=1.0)
    patches = backbone.group(points(2))
    hidden = torch.arange(10).expand(2, 10) < 3
    backbone.eval()
    torch.manual_seed(0)
    _, encoded, asked = method._look(backbone, method.heads, patches, hidden)
    assert bool(asked.all())
    method.replace_ratio = 0.0
    _, plain, asked = method._look(backbone, method.heads, patches, hidden)
    assert torch.equal(asked, hidden)
    assert not torch.allclose(plain, encoded)


def test_a_mixture_keeps_patches_centres_and_words_together() -> None:
    backbone, _ = point_bert()
    patches = backbone.group(points(3))
    own = torch.rand(3, 10) < 0.5
    mixed = mix(patches, own)
    for b in range(3):
        for g in range(10):
            source = b if own[b, g] else 2 - b
            assert torch.equal(mixed.centres[b, g], patches.centres[source, g])
            assert torch.equal(mixed.feat[b, g], patches.feat[source, g])


def test_keys_follow_and_the_queue_turns() -> None:
    backbone, method = point_bert(contrast=True, replace_ratio=0.2)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1)
    method.start(backbone)
    pairs = zip(method.key_backbone.parameters(), backbone.parameters(), strict=True)
    assert all(torch.equal(key, query) for key, query in pairs)
    with torch.no_grad():
        backbone.norm.bias.add_(1.0)
    before = method.key_backbone.norm.bias.clone()
    queue = method.queue.clone()
    for _ in range(3):
        output = method(backbone, points(4))
    torch.testing.assert_close(method.key_backbone.norm.bias, before + (1 - 0.9**3))
    assert int(method.queue_ptr) == 12 % 10
    assert not torch.equal(method.queue, queue)
    torch.testing.assert_close(method.queue.norm(dim=0), torch.ones(10))
    assert set(output.losses) == {"words", "mixed_words", "mixture", "contrast"}
    torch.stack(list(output.losses.values())).sum().backward()
    assert not any(p.requires_grad for p in (*method.tokenizer.parameters(), *method.key_backbone.parameters()))
    assert method.heads.mask_token.grad is not None
    method.eval()
    state = {name: value.clone() for name, value in method.state_dict().items()}
    method(backbone.eval(), points(4))
    assert all(torch.equal(state[name], value) for name, value in method.state_dict().items())


def test_the_tokenizers_batch_statistics_are_an_option() -> None:
    for batch_statistics in (True, False):
        _, method = point_bert(batch_statistics=batch_statistics)
        assert method.train().tokenizer.training is batch_statistics


def test_a_tokenizer_begins_the_second_stage() -> None:
    backbone, method = point_bert()
    trained = tokenizer()
    state = method.initial_state({f"backbone.{name}": value for name, value in trained.state_dict().items()})
    pair = nn.ModuleDict({"backbone": backbone, "method": method})
    assert pair.load_state_dict(state, strict=False).unexpected_keys == []
    assert torch.equal(backbone.encoder.second_conv[3].weight, trained.encoder.second_conv[3].weight)
    assert torch.equal(method.tokenizer.codebook, trained.codebook)
    again = {"backbone.norm.weight": torch.ones(24), "method.queue": method.queue}
    assert method.initial_state(again) == again


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mask_ratio": [0.5, 0.2]}, "rising"), ({"masking": "some"}, "some"), ({"queue": 0}, "queue 0")],
)
def test_wrong_settings_of_point_bert_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        point_bert(**options)


def test_a_tokenizer_of_other_patches_is_refused() -> None:
    backbone = PointViT(**SIZES)
    with pytest.raises(InputError, match="of the tokenizer"):
        PointBERT(tokenizer(), 8).build(backbone)
    with pytest.raises(InputError, match="multiple of 4"):
        tokenizer(patch_points=6)
