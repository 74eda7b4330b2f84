"""GridFormer and its evaluation against vectors recorded from the published implementation."""

from __future__ import annotations

import pytest
import torch
from harness import Golden, golden_files, needs_gpu
from torch import Tensor

from pc3d.losses import MarginOccupancy
from pc3d.metrics import point_scores
from pc3d.models import GridFormer, GridFormerDecoder
from pc3d.models.convert import import_gridformer
from pc3d.points import Points

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]


def _packed(batch: Tensor) -> tuple[Tensor, Tensor]:
    return batch.flatten(0, 1), torch.arange(len(batch) + 1, device=batch.device) * batch.shape[1]


def _close(actual: Tensor, expected: Tensor) -> None:
    actual = actual.cpu()
    largest = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual.reshape(expected.shape), expected, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("golden", golden_files("gridformer"))
@torch.no_grad()
def test_every_level_and_the_logits(golden: Golden, device: str) -> None:
    kind = "volume" if golden.meta["kind"] == "grid" else "planes"
    channels = golden.meta["c_dim"]
    network = GridFormer(3, channels, golden.meta["resolution"], kind).eval()
    decoder = GridFormerDecoder(channels)
    published = {f"module.{name}": value for name, value in golden.group("state").items()}
    import_gridformer({"model": published, "epoch_it": 3}, network, decoder)
    network, decoder = network.to(device), decoder.to(device)
    coord, offsets = _packed(golden.tensor("in/points").to(device))
    points = Points(coord, offsets, {"feat": coord})
    _close(network.embed(coord), golden.tensor("out/fc_pos"))
    features = network.forward_features(points)
    for i in range(4):
        _close(features[f"encoder{i}"].get("feat"), golden.tensor(f"out/down{i}/c"))
    for i in range(2):
        _close(features[f"decoder{i}"].get("feat"), golden.tensor(f"out/up{i}/c"))
    deepest: list[Tensor] = []
    network.encoder[-1].register_forward_hook(lambda module, inputs, outputs: deepest.extend(outputs[0]))
    pyramid = network.encode(points)
    names = ["grid"] if kind == "volume" else ["xz", "xy", "yz"]
    for level, grids in zip(("down3", "up0", "up1", "final"), [deepest, *pyramid.levels], strict=True):
        for name, grid in zip(names, grids, strict=True):
            _close(grid, golden.tensor(f"out/{level}/{name}"))
    query, borders = _packed(golden.tensor("in/query").to(device))
    _close(decoder(pyramid, query, borders), golden.tensor("out/logits"))


@pytest.mark.parametrize("golden", golden_files("gridformer"))
def test_margin_losses(golden: Golden) -> None:
    logits, offsets = _packed(golden.tensor("out/logits"))
    occupancy, _ = _packed(golden.tensor("in/occ"))
    for margin, value in golden.meta["margin_loss"].items():
        assert float(MarginOccupancy(float(margin))(logits, occupancy, offsets)) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("golden", golden_files("gridformer"))
def test_scores_of_points(golden: Golden) -> None:
    scores = point_scores(
        *(golden.tensor(f"in/metric_{name}") for name in ("pred", "pred_normals", "gt", "gt_normals"))
    )
    published = golden.meta["metrics"]
    ours = {"accuracy": "accuracy", "completeness": "completeness", "chamfer-L1": "chamfer_l1",
            "chamfer-L2": "chamfer_l2", "normals": "normal_consistency", "f-score": "f_score",
            "f-score-15": "f_score_15", "f-score-20": "f_score_20"}  # fmt: skip
    for theirs, name in ours.items():
        assert getattr(scores, name) == pytest.approx(published[theirs], rel=1e-6, abs=1e-9), name
