"""E-3DSNN on packed clouds of different sizes: sizes, independence, options, settings."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from pc3d.errors import InputError
from pc3d.models import E3DSNN
from pc3d.models.convert import import_e3dsnn
from pc3d.nn.spiking import SpikingNeuron
from pc3d.points import Points
from pc3d.tasks.heads import LinearHead

DECODER = {"dec_channels": (8, 8)}


def clouds(counts: list[int], seed: int = 0, extent: int = 11) -> Points:
    generator = torch.Generator().manual_seed(seed)
    cells = torch.cartesian_prod(*[torch.arange(extent)] * 3).int()
    grid = torch.cat([cells[torch.randperm(len(cells), generator=generator)[:n]] for n in counts] or [cells[:0]])
    feat = torch.randn(len(grid), 3, generator=generator)
    return Points(grid.float(), torch.tensor([0, *counts]).cumsum(0), {"grid_coord": grid, "feat": feat})


def network(**changes: object) -> E3DSNN:
    torch.manual_seed(1)
    model = E3DSNN(3, 6, (6, 8), (1, 2), **changes).eval()
    for parameter in model.parameters():  # lively membranes: the published start is almost silent
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("changes", [{}, {**DECODER, "bounded": False}])
def test_a_cloud_does_not_depend_on_its_batch_mates(changes: dict[str, object]) -> None:
    model, points = network(**changes).double(), clouds([150, 0, 1, 80])
    points = points.with_attrs(feat=points.get("feat").double())
    with torch.no_grad():
        together = model(points)
        assert_close(together, torch.cat([model(points[i]) for i in range(len(points))]))
        assert model(points[[]]).shape == (0, model.out_channels)
    assert together.shape == ((points.num_points if changes else 4), model.out_channels)
    assert bool((together[1] == 0).all()) == (not changes)  # an empty cloud has no features


def test_a_bounded_grid_drops_its_odd_last_plane() -> None:
    points = clouds([1331])  # 11 cells along each axis, all taken
    with torch.no_grad():
        stages = network(**DECODER).forward_features(points)
        free = network(**DECODER, bounded=False).forward_features(points)
    assert [len(stages[name]) for name in ("stem", "enc0", "enc1", "dec1", "dec0")] == [1331, 125, 8, 125, 1331]
    assert [len(free[name]) for name in ("stem", "enc0", "enc1", "dec1", "dec0")] == [1331, 216, 27, 216, 1331]


def test_a_grid_too_small_for_the_last_stage() -> None:
    model = network(**DECODER)
    with torch.no_grad():
        stages = model.forward_features(clouds([20], extent=3))
        assert len(stages["enc1"]) == 0
        assert model(clouds([20], extent=3)).shape == (20, 8)


@pytest.mark.parametrize(
    "options",
    [{}, {"surrogate": "triangular", "levels": 2}, {"surrogate": "sigmoid", "decay": 0.9, "learn_threshold": True}],
    ids=str,
)
def test_gradients_reach_every_parameter(options: dict[str, object]) -> None:
    model = network(**DECODER, **options).train()
    for neuron in model.modules():
        if isinstance(neuron, SpikingNeuron) and neuron.threshold is not None:
            neuron.threshold.data.fill_(1.0)
    model(clouds([150, 120])).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


@pytest.mark.parametrize(("size", "millions"), [("T", 1.874), ("S", 3.271), ("L", 17.331), ("H", 46.574)])
def test_published_classifiers(size: str, millions: float) -> None:
    with torch.device("meta"):
        model = E3DSNN.classifier(size)
        head = LinearHead(model.out_channels, 40)
    count = sum(p.numel() for part in (model, head) for p in part.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.0006)


def test_published_segmenter() -> None:
    with torch.device("meta"):
        model = E3DSNN.segmenter()
        head = LinearHead(model.out_channels, 19)
    assert sum(p.numel() for part in (model, head) for p in part.parameters()) / 1e6 == pytest.approx(20.05, abs=0.0006)


def test_features_of_all_stages() -> None:
    model = network(**DECODER)
    stages = model.forward_features(clouds([150]))
    assert [(info.name, info.channels, info.stride) for info in model.feature_info] == [
        (name, voxels.feat.shape[1], voxels.stride) for name, voxels in stages.items()
    ]


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(InputError, match=r"enc_channels \(6, 8\), enc_depths \(1, 2\) and dec_channels \(8,\)"):
        network(dec_channels=(8,))
    with pytest.raises(InputError, match="size 'M' is not one of T, S, L, H"):
        E3DSNN.classifier("M")


def test_import_names_what_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"does not fit this E3DSNN: \d+ missing \(head\.linear\.bias, network"):
        import_e3dsnn({"final.weight": torch.zeros(4, 1, 1, 1, 8)}, network(), LinearHead(8, 4))
