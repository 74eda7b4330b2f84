"""Every adapter on every kind of backbone: what it may change, what trains, what is in its file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pc3d.errors import InputError
from pc3d.models import LitePT, PointViT, PTv3, SparseUNet
from pc3d.nn import Backbone
from pc3d.peft import (
    DAPT,
    Adaptation,
    BitFit,
    Bottleneck,
    Combined,
    LinearProbe,
    LoRA,
    NormTuning,
    PointGST,
    Prompts,
    ScaleShift,
    attach,
    attached,
    count_parameters,
    detach,
    disabled,
    load_adapter,
    merge,
    save_adapter,
    use,
)
from pc3d.points import Points

SERIALIZED = {
    "in_channels": 3,
    "stride": [2],
    "enc_depths": [1, 1],
    "enc_channels": [12, 24],
    "enc_num_head": [1, 2],
    "enc_patch_size": [32, 32],
    "dec_depths": [1],
    "dec_channels": [12],
    "dec_num_head": [1],
    "dec_patch_size": [32],
    "shuffle_orders": False,
}
BACKBONES: dict[str, Callable[[], Backbone]] = {
    "vit": lambda: PointViT(
        channels=12, depth=2, num_heads=2, patches=8, patch_points=4, encoder_channels=8, stages=(1,)
    ),
    "spunet": lambda: SparseUNet(3, base_channels=4, channels=(4, 6, 5, 7), layers=(1, 1, 1, 1)),
    "ptv3": lambda: PTv3(**SERIALIZED),
    "mamba": lambda: PTv3(**SERIALIZED, mixer="mamba"),
}
METHODS: dict[str, Callable[[], Adaptation]] = {
    "lora": lambda: LoRA(2, alpha=4.0),
    "bitfit": BitFit,
    "norms": NormTuning,
    "scale": ScaleShift,
    "mlp": lambda: Bottleneck(3),
    "block": lambda: Bottleneck(3, place="block"),
    "both": lambda: Combined([LoRA(2), BitFit()]),
}
PAIRS = [(b, m) for b in BACKBONES for m in METHODS if (b, m) != ("spunet", "mlp")]


def clouds(*counts: int) -> Points:
    generator = torch.Generator().manual_seed(0)
    coord = torch.rand(sum(counts), 3, generator=generator)
    grid = (coord * 12).int()
    attrs = {"feat": coord, "grid_coord": grid}
    return Points(coord, torch.tensor([0, *counts]).cumsum(0), attrs)


POINTS = clouds(60, 45)


def network(name: str, seed: int = 1) -> Backbone:
    torch.manual_seed(seed)
    made = BACKBONES[name]().eval()
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim == 3 and weight.shape[1] > 1:
                weight *= 8  # convolutions start small: gradients would vanish on their way through this few channels
    return made


def features(backbone: Backbone) -> Tensor:
    with torch.no_grad():
        return backbone.eval()(POINTS)


def shake(backbone: Backbone) -> set[str]:
    """Move everything that trains; names of it."""
    trains = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trains.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return set(trains)


@pytest.mark.parametrize(("kind", "how"), PAIRS)
def test_life_of_an_adapter(kind: str, how: str, tmp_path: Path) -> None:
    base, method = network(kind), METHODS[how]()
    state, before = copy.deepcopy(base.state_dict()), features(base)
    entry = attach(base, method)
    assert torch.equal(features(base), before), "the frozen model, bit for bit"
    assert state.keys() <= base.state_dict().keys(), "names of the base stay"
    trains = {name for name, p in base.named_parameters() if p.requires_grad}
    assert trains
    assert trains <= set(entry.added), "only what was added"

    base.train()
    optimizer = torch.optim.AdamW([p for p in base.parameters() if p.requires_grad], 1e-2)
    for _ in range(2):  # of two factors one starts at zero: the other has no gradient at first
        optimizer.zero_grad()
        base(POINTS).square().mean().backward()
        optimizer.step()
    for name, parameter in base.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (name in trains), name
    now = base.state_dict()
    assert all(torch.equal(now[name], value) for name, value in state.items()), "weights and statistics of the base"

    shake(base)
    after = features(base)
    assert not torch.equal(after, before)
    with disabled(base):
        assert torch.equal(features(base), before)
    file, _ = save_adapter(tmp_path / "adapter", base)
    fresh = network(kind)
    assert load_adapter(file, fresh) == "default"
    assert torch.equal(features(fresh), after)
    assert torch.equal(features(copy.deepcopy(fresh)), after)
    with pytest.raises(InputError, match="trained on another"):
        load_adapter(file, network(kind, seed=2))

    twin = copy.deepcopy(base)
    if method.mergeable:
        merge(twin)
        torch.testing.assert_close(features(twin), after, rtol=1e-4, atol=1e-5)
        assert state.keys() <= twin.state_dict().keys()
        extra = twin.state_dict().keys() - state.keys()
        assert all(how == "scale" and name.endswith(".bias") for name in extra)
    else:
        with pytest.raises(InputError, match="cannot be merged"):
            merge(twin)
    detach(base)
    assert base.state_dict().keys() == state.keys()
    assert torch.equal(features(base), before)
    assert not attached(base)


@pytest.mark.parametrize("kind", BACKBONES)
def test_adapters_of_several_names(kind: str, tmp_path: Path) -> None:
    base = network(kind)
    before = features(base)
    attach(base, LoRA(2), "a")
    shake(base)
    first = features(base)
    names = {name for name, p in base.named_parameters() if p.requires_grad}
    attach(base, Combined([LoRA(1), Bottleneck(2, place="block")]), "b")
    assert torch.equal(features(base), first)
    assert not names & shake(base), "an adapter that was there is frozen"
    both = features(base)
    use(base, "a")
    assert torch.equal(features(base), first)
    use(base)
    assert torch.equal(features(base), before)
    use(base, "b")
    alone = features(base)
    file, _ = save_adapter(tmp_path / "b", base, "b")
    fresh = network(kind)
    assert load_adapter(file, fresh, name="other") == "other"
    assert torch.equal(features(fresh), alone)
    use(base, "a", "b")
    assert torch.equal(features(base), both)
    detach(base, "a")
    assert torch.equal(features(base), alone)
    with pytest.raises(InputError, match="no adapter 'a'"):
        use(base, "a")
    with pytest.raises(InputError, match="has an adapter 'b' already"):
        attach(base, LoRA(), "b")


@pytest.mark.parametrize("kind", ["vit", "spunet"])
@pytest.mark.parametrize(("below", "above"), [(ScaleShift, ScaleShift), (ScaleShift, BitFit), (NormTuning, BitFit)])
def test_an_adapter_does_not_depend_on_those_below(
    kind: str, below: type[Adaptation], above: type[Adaptation], tmp_path: Path
) -> None:
    """Nor is it cut short by them: what it adapts, and its file, are those of the network alone."""
    base, alone = network(kind), network(kind)
    attach(base, below(), "a")
    shake(base)
    attach(base, above(), "b")
    attach(alone, above(), "b")
    assert attached(base)["b"].added == attached(alone)["b"].added
    shake(base)
    with pytest.raises(InputError, match="'b' acts together with 'a'"):
        save_adapter(tmp_path / "b", base, "b")
    use(base, "b")
    expected = features(base)
    file, _ = save_adapter(tmp_path / "b", base, "b")
    fresh = network(kind)
    load_adapter(file, fresh)
    assert torch.equal(features(fresh), expected)
    detach(base, "a")
    assert torch.equal(features(base), expected)
    detach(base, "b")
    assert torch.equal(features(base), features(network(kind)))
    assert base.state_dict().keys() == network(kind).state_dict().keys()


def test_a_merge_that_is_refused_changes_nothing_and_one_is_done_whole() -> None:
    base = network("vit")
    before = features(base)
    attach(base, LoRA(2, targets=[r"blocks\.1"]), "a")
    shake(base)
    attach(base, LoRA(2), "b")
    shake(base)
    both, state = features(base), copy.deepcopy(base.state_dict())
    with pytest.raises(InputError, match="'b' lies on another one"):
        merge(base, "b")
    assert all(torch.equal(base.state_dict()[name], value) for name, value in state.items())
    use(base)
    assert torch.equal(features(base), before)
    merge(base, "a")  # although it does not act now
    merge(base, "b")
    torch.testing.assert_close(features(base), both, rtol=1e-4, atol=1e-5)


def test_every_layer_of_lora_has_an_effect() -> None:
    """Also where a fused kernel reads the weight of a layer instead of calling it."""
    for kind in BACKBONES:
        base = network(kind)
        before = features(base)
        attach(base, LoRA(2, targets=["."]))
        ups = {name: p for name, p in base.named_parameters() if name.endswith(".up")}
        assert len(ups) > 8
        for name, up in ups.items():
            torch.nn.init.normal_(up.data, std=10.0)
            assert not torch.equal(features(base), before), f"{kind}: {name}"
            torch.nn.init.zeros_(up.data)


def test_prompts() -> None:
    base = network("vit")
    assert isinstance(base, PointViT)
    tokens = base.tokens(POINTS)
    before = features(base)
    attach(base, Prompts(3))
    assert count_parameters(base).tunable == 2 * 2 * 3 * 12
    given = base.encode(tokens)
    assert given.feat.shape == tokens.feat.shape, "dropped behind every block"
    assert not torch.equal(features(base), before)
    base(POINTS).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in base.parameters() if p.requires_grad)
    detach(base)
    attach(base, Prompts(3, shallow=True))
    given = base.encode(tokens)
    assert given.special == 1 + 3
    expected = base.norm(given.feat)
    assert torch.equal(base(POINTS), torch.cat([expected[:, 0], expected[:, 4:].amax(1)], 1)), "without the prompts"
    with pytest.raises(InputError, match="SparseUNet has none"):
        attach(network("spunet"), Prompts())


def test_published_numbers_of_parameters() -> None:
    """Of Point-MAE: deep prompts 92 160 (360 463 with the head), the linear probe none."""
    with torch.device("meta"):
        base = PointViT(patches=128)
        attach(base, Prompts(10))
        assert count_parameters(base).tunable == 12 * 2 * 10 * 384
        detach(base)
        attach(base, LinearProbe())
        assert str(count_parameters(base)) == "0 of 21,825,792 parameters train (0.00 %)"
        detach(base)
        attach(base, LoRA(8, targets=["qkv"], ranks={r"blocks\.0\.": 4}))
        assert count_parameters(base).tunable == (11 * 8 + 4) * (384 + 3 * 384)


def test_a_probed_network_gives_the_same_features_in_training() -> None:
    base = PointViT(channels=12, depth=2, num_heads=2, patches=8, patch_points=4, stages=(1,), drop_path=0.9)
    attach(base, LinearProbe())
    with torch.no_grad():
        assert torch.equal(base.train()(POINTS), base.eval()(POINTS))


def test_an_attempt_that_fails_changes_nothing() -> None:
    base = network("spunet")
    state = copy.deepcopy(base.state_dict())
    for method, message in (
        (Bottleneck(4), "has no mlp for a Bottleneck"),
        (LoRA(targets=["qkv"]), "that 'qkv' matches"),
        (Prompts(), "see all tokens"),
        (Combined([LoRA(), Prompts()]), "see all tokens"),
    ):
        with pytest.raises(InputError, match=message):
            attach(base, method)
    assert base.state_dict().keys() == state.keys()
    assert all(p.requires_grad for p in base.parameters())
    assert not attached(base)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (BitFit(["qkv"]), "BitFit finds no bias in 2 layers"),
        (LoRA(ranks={"head": 3}), "LoRA.ranks: 'head' matches none of the 8 layers"),
        (Combined([PointGST(3, 4), Prompts(2)]), "around 'blocks.0' would do nothing: PointGST runs"),
        (Combined([Bottleneck(2), DAPT(2)]), "around 'blocks.0.mlp' would do nothing: DAPT runs"),
    ],
)
def test_what_would_do_nothing_is_refused(method: Adaptation, message: str) -> None:
    base = network("vit")
    state, before = base.state_dict(), features(base)
    with pytest.raises(InputError, match=message):
        attach(base, method)
    assert base.state_dict().keys() == state.keys()
    assert torch.equal(features(base), before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRA(alpha=0), r"LoRA\.alpha: 0 must be positive"),
        (lambda: LoRA(ranks={"(": 2}), r"LoRA\.ranks: '\(' is no regular expression: missing \)"),
        (lambda: attach(network("vit"), BitFit(["["])), r"BitFit\.targets: '\[' is no regular expression"),
        (lambda: Bottleneck(dropout=2), r"Bottleneck\.dropout: 2 is no probability"),
        (lambda: DAPT(dropout=-1), r"DAPT\.dropout: -1 is no probability"),
    ],
)
def test_wrong_settings_of_adapters_name_the_option(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_half_precision_keeps_small_differences() -> None:
    base = network("vit").to(torch.bfloat16)
    attach(base, LoRA(2))
    assert all(p.dtype == torch.float32 for p in base.parameters() if p.requires_grad)
    merge(base)
    assert all(p.dtype == torch.bfloat16 for p in base.parameters())


def test_litept_blocks_take_adapters() -> None:
    torch.manual_seed(0)
    options = {**SERIALIZED, "enc_rope_freq": [100.0] * 2, "dec_rope_freq": [100.0]}
    options |= {"enc_conv": [True, False], "enc_attn": [True, True], "dec_conv": [True], "dec_attn": [True]}
    base = LitePT(**options).eval()
    before = features(base)
    attach(base, Bottleneck(2, place="block"))
    assert torch.equal(features(base), before)
    shake(base)
    assert not torch.equal(features(base), before)
