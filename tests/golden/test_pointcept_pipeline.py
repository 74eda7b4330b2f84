"""Losses, grid sampling, fragments, metrics and Mix3D against recorded outputs of the published pipeline."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from harness import Golden, golden_files
from numpy.testing import assert_allclose, assert_array_equal

from pc3d import Points
from pc3d.data.collate import Collate
from pc3d.data.transforms import GridSample
from pc3d.data.transforms.sampling import fnv_keys
from pc3d.losses import CrossEntropy, Lovasz
from pc3d.metrics import SegmentationMetrics
from pc3d.ops.voxelize import grid_coords

pytestmark = pytest.mark.parametrize("golden", golden_files("pointcept-pipeline"))


def tensor(golden: Golden, name: str) -> torch.Tensor:
    return torch.from_numpy(golden.arrays[name].copy())


@pytest.mark.parametrize(("name", "criterion"), [("ce", CrossEntropy()), ("lovasz", Lovasz())])
def test_loss_and_gradient(golden: Golden, name: str, criterion: torch.nn.Module) -> None:
    logits = tensor(golden, "in/logits").requires_grad_()
    loss = criterion(logits, tensor(golden, "in/labels"))
    loss.backward()
    assert_allclose(loss.item(), golden.arrays[f"out/loss_{name}"], rtol=1e-5)
    assert_allclose(logits.grad.numpy(), golden.arrays[f"out/loss_grad_{name}"], rtol=1e-4, atol=1e-7)


def in_published_member_order(golden: Golden) -> Points:
    """The recorded cloud with its rows so sorted that our stable order inside a cell is the recorded one.

    The published order inside a cell is that of an unstable sort; the recorded fragments tell it.
    """
    fragments = golden.arrays["out/grid_frag_index"]
    rows: list[int] = []
    for members in fragments.T:
        rows += list(dict.fromkeys(members.tolist()))
    index = torch.tensor(rows)
    return Points(tensor(golden, "in/coord")[index], attrs={"index": index})


def test_fnv_keys(golden: Golden) -> None:
    cloud = Points(tensor(golden, "in/coord"))
    cells = grid_coords(cloud.coord, cloud.offsets, golden.meta["config"]["grid_size"])
    assert_array_equal(fnv_keys(cells).numpy(), golden.arrays["out/grid_fnv"])


def test_inverse_and_cells(golden: Golden) -> None:
    sample = GridSample(golden.meta["config"]["grid_size"], pick="first", inverse=True, key_order="fnv")
    sampled = sample(Points(tensor(golden, "in/coord")))
    assert sampled.source is not None
    assert_array_equal(sampled.source.get("inverse").numpy(), golden.arrays["out/grid_inverse"])
    assert_array_equal(sampled.get("grid_coord").numpy(), golden.arrays["out/grid_grid_coord0"])


def test_fragments(golden: Golden) -> None:
    cloud = in_published_member_order(golden)
    fragments = list(GridSample(golden.meta["config"]["grid_size"], key_order="fnv").fragments(cloud))
    assert len(fragments) == int(golden.arrays["out/grid_fragments"])
    index = torch.stack([fragment.get("index") for fragment in fragments])
    assert_array_equal(index.numpy(), golden.arrays["out/grid_frag_index"])
    for fragment in fragments:
        assert_array_equal(fragment.get("grid_coord").numpy(), golden.arrays["out/grid_grid_coord0"])


def test_fragments_in_our_order_hold_the_same_cells(golden: Golden) -> None:
    cloud = Points(tensor(golden, "in/coord"))
    inverse = golden.arrays["out/grid_inverse"]
    ours = [f.get("index").numpy() for f in GridSample(golden.meta["config"]["grid_size"]).fragments(cloud)]
    published = golden.arrays["out/grid_frag_index"]
    assert len(ours) == len(published)
    votes = np.bincount(np.concatenate(ours), minlength=cloud.num_points)
    expected = np.bincount(published.ravel(), minlength=cloud.num_points)
    assert votes.min() >= 1
    for cell in range(inverse.max() + 1):  # who gets the extra votes inside a cell is unspecified
        assert_array_equal(np.sort(votes[inverse == cell]), np.sort(expected[inverse == cell]))


class RecordedDraw(GridSample):
    """Grid sampling with the random numbers of ``numpy.random.seed(seed)``."""

    def __init__(self, size: float, seed: int) -> None:
        super().__init__(size, inverse=True, key_order="fnv")
        self.numbers = np.random.RandomState(seed)

    def _draw(self, high: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        assert (high == high.max()).all()
        return torch.from_numpy(self.numbers.randint(0, int(high.max()), len(high)))


def test_training_draw(golden: Golden) -> None:
    cloud = in_published_member_order(golden)
    sampled = RecordedDraw(golden.meta["config"]["grid_size"], golden.meta["seed"])(cloud)
    assert_array_equal(sampled.get("index").numpy(), golden.arrays["out/grid_train_index"])
    assert_array_equal(sampled.get("grid_coord").numpy(), golden.arrays["out/grid_train_grid_coord"])
    assert sampled.source is not None
    in_file_order = torch.empty_like(cloud.get("index"))
    in_file_order[cloud.get("index")] = sampled.source.get("inverse")
    assert_array_equal(in_file_order.numpy(), golden.arrays["out/grid_train_inverse"])


def test_iou_counts_and_scores(golden: Golden) -> None:
    metrics = SegmentationMetrics(golden.meta["config"]["classes"])
    metrics.update(tensor(golden, "in/pred"), tensor(golden, "in/labels"))
    scores = metrics.compute()
    hits, truth = scores.confusion.diag(), scores.confusion.sum(1)
    assert_array_equal(hits.numpy(), golden.arrays["out/iou_intersection"])
    assert_array_equal(truth.numpy(), golden.arrays["out/iou_target"])
    assert_array_equal((truth + scores.confusion.sum(0) - hits).numpy(), golden.arrays["out/iou_union"])
    for ours, name in ((scores.miou, "mIoU"), (scores.macc, "mAcc"), (scores.all_acc, "allAcc")):
        assert_allclose(ours, golden.arrays[f"out/iou_{name}"], rtol=1e-9)


def batch(golden: Golden) -> list[Points]:
    clouds = []
    for i in range(len(golden.meta["config"]["batch_sizes"])):
        attrs = {name: tensor(golden, f"in/batch{i}_{name}") for name in ("grid_coord", "segment", "instance")}
        clouds.append(Points(tensor(golden, f"in/batch{i}_coord"), attrs=attrs))
    return clouds


def test_plain_collate(golden: Golden) -> None:
    assert_array_equal(Collate()(batch(golden)).offsets[1:].numpy(), golden.arrays["out/mix_plain_offset"])


def test_mix3d_as_published(golden: Golden) -> None:
    mixed = Collate(mix_prob=1.0, cells="overlay", instances="published")(batch(golden))
    assert_array_equal(mixed.offsets[1:].numpy(), golden.arrays["out/mix_mixed_offset"])
    assert_array_equal(mixed.get("instance").numpy(), golden.arrays["out/mix_mixed_instance"])
    assert_array_equal(mixed.get("grid_coord").numpy(), golden.arrays["out/mix_mixed_grid_coord"])


def test_mix3d_regridded_as_published(golden: Golden) -> None:
    mixed = Collate(mix_prob=1.0, grid_size=0.25, cells="regrid")(batch(golden))
    assert_array_equal(mixed.get("grid_coord").numpy(), golden.arrays["out/mix_regrid_grid_coord"])
