"""The point transformer over patches: sizes, packing, gradients, errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pc3d.errors import InputError
from pc3d.models import PointViT
from pc3d.models.convert import import_point_vit
from pc3d.models.heads import MLPHead
from pc3d.nn.patches import group_patches
from pc3d.points import Points

LEVELS = {"levels": (6, 4), "stages": (0, 1, 2), "categories": 3}
SIZES = {"channels": 12, "depth": 3, "num_heads": 2, "patches": 6, "patch_points": 4, "stages": (0, 2)}


def _points(counts: list[int], channels: int = 3) -> Points:
    generator = torch.Generator().manual_seed(0)
    coord = torch.rand(sum(counts), 3, generator=generator) * 2 - 1
    feat = torch.cat([coord, torch.rand(sum(counts), channels - 3, generator=generator)], 1)
    category = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return Points(coord, torch.tensor([0, *counts]).cumsum(0), {"feat": feat, "category": category})


def _network(**changes: object) -> PointViT:
    torch.manual_seed(1)
    return PointViT(**(SIZES | changes)).eval()


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_published_sizes() -> None:
    network = PointViT()
    assert _count(network) == 21_825_024 + 2 * 384  # and the class token with its position
    assert _count(network) + _count(MLPHead(768, 15, (256, 256), bias=True)) == 22_093_327
    bert = PointViT(encoder_channels=256)
    assert _count(bert) == 22_065_960 - (768 * 256 + 256) - (256 * 40 + 40)
    rates = [block.drop_path.p for block in network.blocks]
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("changes", [{}, {"decoder": (16, 8, 8, 8), "categories": 3, "in_channels": 5}, LEVELS])
def test_a_cloud_does_not_depend_on_its_batch_mates(changes: dict[str, object]) -> None:
    network, points = _network(**changes), _points([40, 6, 90], int(changes.get("in_channels", 3)))
    with torch.no_grad():
        together = network(points)
        alone = torch.cat([network(points[i]) for i in range(3)])
    assert together.shape == (136 if changes else 3, network.out_channels)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_levels_want_as_many_points() -> None:
    network = _network(**LEVELS | {"levels": (20, 4)})
    with pytest.raises(InputError, match="10 points, the decoder wants 20 or more"):
        network(_points([30, 10]))


def test_only_the_first_point_of_a_cloud_matters_for_its_order() -> None:
    network, points = _network(), _points([50])
    rows = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randperm(49) + 1])
    shuffled = Points(points.coord[rows], points.offsets, {"feat": points.get("feat")[rows]})
    with torch.no_grad():
        torch.testing.assert_close(network(shuffled), network(points), rtol=1e-4, atol=1e-5)


def test_positions_are_added_before_every_block() -> None:
    network, points = _network(), _points([30])
    tokens = network.tokens(points)
    with torch.no_grad():
        for block in network.blocks:  # blocks that add nothing of their own
            nn.init.zeros_(block.attn.proj.weight)
            nn.init.zeros_(block.mlp.fc2.weight)
        out = network.encode(tokens)
    torch.testing.assert_close(out.feat, tokens.feat + 3 * tokens.position)


@pytest.mark.parametrize("changes", [{}, {"encoder_channels": 9}, {"decoder": (16, 8, 8, 8), "categories": 2}, LEVELS])
def test_gradients_reach_every_parameter(changes: dict[str, object]) -> None:
    network = _network(drop_path=0.0, **changes).train()
    network(_points([40, 30])).square().sum().backward()
    missing = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


def test_features_of_stages() -> None:
    network, points = _network(), _points([40, 30])
    found = network.forward_features(points)
    assert list(found) == [info.name for info in network.feature_info] == ["block0", "block2"]
    for stage in found.values():
        assert stage.get("feat").shape == (12, 12)
        assert stage.offsets.tolist() == [0, 6, 12]


def test_patches_near_the_origin_repeat_as_published() -> None:
    near = torch.rand(8, 3, generator=torch.Generator().manual_seed(0)) * 0.01
    coord = torch.cat([near, torch.tensor([[0.5, 0, 0], [0, 0.5, 0]])])
    points = Points(coord, attrs={"feat": coord})
    taken = group_patches(points, 5, 2, ignore_origin=True).rows[0, :, 0].tolist()
    assert taken[0] == 0
    assert sorted(taken[1:3]) == [8, 9]
    assert taken[3:] == [8, 8]  # nothing else may be taken: the lowest of those that may
    assert len(set(group_patches(points, 5, 2).rows[0, :, 0].tolist())) == 5


def test_a_wrong_checkpoint_is_described() -> None:
    network, state = _network(), {"MAE_encoder.norm.weight": torch.zeros(13), "strange": torch.zeros(1)}
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(InputError, match=r"missing.*unexpected.*strange.*of another shape"):
        import_point_vit(state, network)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 2}, "the coordinates come first"),
        ({"stages": (0, 3)}, "must rise within the 3 blocks"),
        ({"patches": 0}, "PointViT.patches: 0 must be at least 1"),
        ({"drop_path": 2}, "drop_path: 2 is no probability"),
        ({"num_heads": 5}, "channels 12 do not divide into num_heads 5"),
        ({"decoder": (8, 8)}, "must be four widths"),
        ({"categories": 2}, "only a decoder"),
        ({"levels": (8, 4)}, "which reads three stages"),
        (LEVELS | {"decoder": (8, 8, 8, 8)}, "belongs to a decoder of its own"),
        (LEVELS | {"levels": (4, 8)}, "two numbers of points that fall"),
    ],
)
def test_wrong_arguments(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _network(**changes)


def test_too_few_points() -> None:
    with pytest.raises(InputError, match=r"5 points do not make 6 patches of 4.*6 or more"):
        _network()(_points([40, 5]))
