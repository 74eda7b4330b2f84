"""Point-PEFT: neighbourhoods, prompts of similar training clouds, and the bank these come from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pc3d.errors import InputError
from pc3d.models import PointViT
from pc3d.nn.vit import PatchTokens
from pc3d.peft import PointPEFT, attach, prepare
from pc3d.peft.bank import FeatureBank, cloud_ids
from pc3d.peft.point_peft import PointPEFTPart, find_neighbourhoods
from pc3d.points import Points

NAMES = [f"cloud{i}" for i in range(6)]


def clouds(*names: str) -> Points:
    """One cloud of 40 points per name, always the same."""
    coord = torch.cat(
        [torch.rand(40, 3, generator=torch.Generator().manual_seed(int(name[-1]))) * 2 - 1 for name in names]
    )
    meta = [{"name": name} for name in names]
    return Points(coord, torch.arange(len(names) + 1) * 40, {"feat": coord}, meta)


def adapted(**options: Any) -> tuple[PointViT, PointPEFTPart]:
    """A network with trained-looking adapter and full bank, in eval mode."""
    torch.manual_seed(1)
    network = PointViT(channels=12, depth=3, num_heads=2, patches=8, patch_points=6, drop_path=0.5, stages=(2,))
    attach(network, PointPEFT(6, 3, prompts=5, prompt_blocks=2, **options))
    prepare(network, lambda count: [clouds(*NAMES[:4]), clouds(*NAMES[4:count])])
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    part = network.adapters["default"]
    assert isinstance(part, PointPEFTPart)
    return network.eval(), part


@torch.no_grad()
def features(network: PointViT, points: Points) -> Tensor:
    return network(points)


def test_clouds_do_not_see_each_other_but_as_published() -> None:
    network, _ = adapted()
    both, second = features(network, clouds("cloud7", "cloud8")), features(network, clouds("cloud8"))
    torch.testing.assert_close(both[1:], second)
    network, _ = adapted(published_neighbours=True)
    both, first = features(network, clouds("cloud7", "cloud8")), features(network, clouds("cloud7"))
    torch.testing.assert_close(both[:1], first)
    assert not torch.allclose(both[1:], features(network, clouds("cloud8")), atol=1e-3)


def test_order_of_patches_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the first one, with which farthest point sampling begins."""
    network, _ = adapted()
    points = clouds("cloud7", "cloud8")
    before, tokens = features(network, points), network.tokens(points)
    order = torch.tensor([0, 5, 2, 7, 1, 3, 6, 4])
    rows = torch.cat([torch.zeros(1, dtype=torch.int64), order + 1])
    turned = PatchTokens(tokens.feat[:, rows], tokens.position[:, rows], tokens.centres[:, order], 1)
    monkeypatch.setattr(network, "tokens", lambda points: turned)
    torch.testing.assert_close(features(network, points), before)


def test_neighbourhoods_are_of_the_nearest_tokens() -> None:
    coord = torch.randn(3, 11, 3, generator=torch.Generator().manual_seed(0))
    near = find_neighbourhoods(coord, coord[:, 3:], 4, 5)
    assert near.rows.shape == (3, 4, 5)
    flat = coord.flatten(0, 1)
    distance = torch.cdist(flat[near.own], coord)  # (B, M, T)
    expected = distance.topk(5, largest=False).indices + 11 * torch.arange(3)[:, None, None]
    assert torch.equal(near.rows.sort(-1).values, expected.sort(-1).values)
    assert torch.equal(near.rows[..., 0], near.own)
    assert torch.equal(near.own[:, 0], 11 * torch.arange(3)), "begins with the first token"
    inverse = (1 / torch.cdist(coord[:, 3:], flat[near.own]).square()).nan_to_num(posinf=1e8)
    torch.testing.assert_close(near.weight, inverse / inverse.sum(-1, True))
    assert find_neighbourhoods(coord, coord, 4, 50).rows.shape == (3, 4, 11)


def test_query_is_of_the_frozen_network() -> None:
    """Whatever trains in it, and in training mode too: no drop path, no class token."""
    network, part = adapted()
    points = clouds("cloud7", "cloud8")
    plain = PointViT(channels=12, depth=3, num_heads=2, patches=8, patch_points=6, drop_path=0.5, stages=(2,)).eval()
    plain.load_state_dict({name: network.state_dict()[name] for name in plain.state_dict()})
    expected = plain.norm(plain.encode(plain.embed(plain.group(points))).feat).amax(1)
    network.train()
    torch.testing.assert_close(part.query(network, network.tokens(points)), expected)
    assert not torch.allclose(network.norm(expected), plain.norm(expected)), "the adapter is back again"


def test_prompts_are_the_query_its_mean_neighbour_and_its_neighbours() -> None:
    network, part = adapted(half_bank=False)
    points = clouds("cloud7")
    query = part.query(network, network.tokens(points))
    bank = part.bank.features
    torch.testing.assert_close(bank.norm(dim=1), torch.ones(6))
    similarity = torch.nn.functional.normalize(query) @ bank.T
    best, rows = similarity[0].sort(descending=True)
    near = bank[rows[:3]]
    expected = torch.cat([query, best[:3].softmax(0)[None] @ near, near])
    torch.testing.assert_close(part.retrieve(query, points)[0], expected)


def test_a_training_cloud_does_not_find_itself() -> None:
    network, part = adapted()
    points = clouds("cloud2", "cloud9")
    query = part.query(network, network.tokens(points))
    own = part.bank.features[2].float()
    assert torch.equal(part.retrieve(query, points)[0, 2], own), "evaluated, it may"
    network.train()
    found = part.retrieve(query, points)
    assert not (found[0, 2:] == own).all(1).any()
    assert torch.equal(found[1], part.eval().retrieve(query, points)[1]), "no training cloud: nothing to leave out"
    network, part = adapted(exclude_self=False)
    network.train()
    assert torch.equal(part.retrieve(query, points)[0, 2], part.bank.features[2].float())


def test_bank() -> None:
    ids = cloud_ids(clouds("cloud1", "cloud2", "cloud1"))
    assert ids[0] == ids[2] != ids[1]
    assert cloud_ids(Points(torch.zeros(1, 3))) == 0
    bank = FeatureBank(3, 4)
    with pytest.raises(InputError, match="bank of training clouds is empty"):
        bank.retrieve(torch.ones(1, 4), 2)
    with pytest.raises(InputError, match=r"\(2, 4\) features do not fill one of \(3, 4\)"):
        bank.fill(torch.ones(2, 4))
    with pytest.raises(InputError, match="share a name"):
        bank.fill(torch.ones(3, 4), ids)
    bank.fill(torch.eye(4)[:3], torch.tensor([0, 0, 7]))
    assert bank.features.dtype == torch.float16
    near, similarity = bank.retrieve(torch.tensor([[0.0, 1.0, 3.0, 0.0]]).half(), 2)
    assert torch.equal(near[0], torch.eye(4)[[2, 1]])
    torch.testing.assert_close(similarity[0], torch.tensor([3.0, 1.0]) / 10**0.5)
    near, _ = bank.retrieve(torch.tensor([[0.0, 1.0, 3.0, 0.0]]), 1, torch.tensor([7]))
    assert torch.equal(near[0], torch.eye(4)[[1]])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bank.retrieve(torch.tensor([[0.0, 1.0, 3.0, 0.0]]), 2)[1], similarity), "in float32"


def test_wrong_settings_name_the_option() -> None:
    for options, message in (
        ({"rank": 0}, "PointPEFT.rank: 0"),
        ({"prompts": 2}, "PointPEFT.prompts: 2 must be at least 3"),
        ({"bank_size": 8}, "PointPEFT.bank_size: 8 must be at least 9"),
        ({"neighbours": 0}, "PointPEFT.neighbours"),
        ({"prompt_blocks": 0}, "PointPEFT.prompt_blocks"),
        ({"dropout": 1.5}, "PointPEFT.dropout: 1.5"),
    ):
        with pytest.raises(InputError, match=message):
            PointPEFT(**options)
    with pytest.raises(InputError, match="2 patches or more"):
        attach(PointViT(channels=12, num_heads=2, patches=1), PointPEFT())
