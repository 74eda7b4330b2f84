"""Voting against a brute-force version of the protocol, one-pass mode, tiles, and clouds that do not fit."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from tiny import CLASSES, TinyBackbone, cloud, pipeline, tiny_task

from pc3d import InputError, Points
from pc3d.data.pipeline import Pipeline
from pc3d.data.transforms import AssembleFeatures, CenterShift, CropBox, GridSample, NormalizeColor, RandomScale
from pc3d.tasks import MismatchError, SemanticSegmentation, labels_of, predict_cloud
from pc3d.tasks.augmentations import augmentation_passes, s3dis_augmentations, scannet_augmentations


@pytest.fixture
def task() -> SemanticSegmentation:
    return tiny_task().eval()


def published_votes(task: SemanticSegmentation, points: Points, scales: list[float]) -> torch.Tensor:
    """The protocol written as loops over cells and their members."""
    votes = torch.zeros(points.num_points, len(CLASSES), dtype=torch.float64)
    for scale in scales:
        center = CenterShift()(points)
        scaled = center.with_attrs(coord=center.coord * scale)
        cells: dict[tuple[int, ...], list[int]] = {}
        for row, cell in enumerate((scaled.coord.double() / 0.25).floor().long().tolist()):
            cells.setdefault(tuple(cell), []).append(row)
        for fragment in range(max(map(len, cells.values()))):
            rows = torch.tensor([members[fragment % len(members)] for members in cells.values()])
            sample = AssembleFeatures(["coord", "color"])(NormalizeColor()(scaled.select(rows)))
            with torch.no_grad():
                votes[rows] += task(sample).double().softmax(1)
    return votes


def test_votes_are_those_of_the_published_protocol(task: SemanticSegmentation) -> None:
    points, scales = cloud(0), [0.9, 1.0, 1.1]
    votes = published_votes(task, points, scales)
    probabilities = predict_cloud(task, pipeline(), points, [[RandomScale([s, s])] for s in scales])
    torch.testing.assert_close(probabilities.double(), votes / votes.sum(1, keepdim=True), rtol=1e-5, atol=1e-6)
    assert probabilities.dtype == torch.float32


def test_packing_fragments_changes_nothing(task: SemanticSegmentation) -> None:
    one = predict_cloud(task, pipeline(), cloud(1))
    for per_pass in (2, 3, 100):
        torch.testing.assert_close(predict_cloud(task, pipeline(), cloud(1), fragments_per_pass=per_pass), one)


def test_fragments_are_made_one_at_a_time(task: SemanticSegmentation, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref] = []
    most = 0

    def counting(self: Pipeline, *args: object) -> Iterator[Points]:
        nonlocal most
        for fragment in original(self, *args):
            alive.append(weakref.ref(fragment.coord))
            most = max(most, sum(reference() is not None for reference in alive))
            yield fragment
            del fragment

    original = Pipeline.fragments
    monkeypatch.setattr(Pipeline, "fragments", counting)
    predict_cloud(task, pipeline(), cloud(2, 1500), fragments_per_pass=2)
    assert len(alive) > 6
    assert most <= 4  # two of the pass before, two of the one in the making


def test_one_pass_shares_the_prediction_of_a_cell(task: SemanticSegmentation) -> None:
    points = cloud(3)
    sampled = pipeline().evaluate(points)
    with torch.no_grad():
        expected = task(sampled).softmax(1)[sampled.source_rows()]
    torch.testing.assert_close(predict_cloud(task, pipeline(), points, mode="fast"), expected)


@pytest.mark.parametrize("mode", ["vote", "fast"])
def test_tiles_are_stitched_in_order(mode) -> None:
    class ByHeight(TinyBackbone):  # depends on nothing but the point itself: tiles must not change it
        def forward(self, points: Points) -> torch.Tensor:
            return self.block(points.get("feat")[:, 2:3].expand(-1, 8))

    task = SemanticSegmentation(ByHeight(), CLASSES).eval()
    lines = Pipeline(0.05, ["coord", "color"])
    points = cloud(4, 500)
    whole = predict_cloud(task, lines, points)
    tiled = predict_cloud(task, lines, points, mode=mode, tile=0.7, overlap=0.2)
    torch.testing.assert_close(tiled, whole, rtol=1e-4, atol=1e-2 if mode == "fast" else 1e-5)
    torch.testing.assert_close(predict_cloud(task, lines, points, tile=100.0), whole)


def test_points_that_prepare_removes_have_no_label(task: SemanticSegmentation) -> None:
    lines = Pipeline(0.25, ["coord", "color"], prepare=[CropBox([0, 0, 0, 1, 2, 2])])
    points = cloud(5)
    removed = points.coord[:, 0] > 1
    for mode in ("vote", "fast"):
        labels = labels_of(predict_cloud(task, lines, points, mode=mode))
        assert torch.equal(labels == -1, removed)


def test_a_first_sampling_in_prepare_is_mapped_back(task: SemanticSegmentation) -> None:
    lines = Pipeline(0.5, ["coord", "color"], prepare=[GridSample(0.25, pick="first", inverse=True)])
    points = cloud(6)
    fine = GridSample(0.25, pick="first", inverse=True)(points)
    expected = predict_cloud(task, Pipeline(0.5, ["coord", "color"]), fine.replace(source=None))[fine.source_rows()]
    torch.testing.assert_close(predict_cloud(task, lines, points), expected)
    fast = predict_cloud(task, lines, points, mode="fast")
    torch.testing.assert_close(fast.sum(1), torch.ones(points.num_points))


def test_voting_on_a_finer_grid_is_mapped_back_and_seen_by_voting_only(task: SemanticSegmentation) -> None:
    plain, reduced = (Pipeline(0.5, ["coord", "color"], vote_grid_size=size) for size in (None, 0.25))
    points = cloud(6)
    fine = GridSample(0.25, pick="first", inverse=True)(points)
    assert fine.num_points < points.num_points
    expected = predict_cloud(task, plain, fine.replace(source=None))[fine.source_rows()]
    torch.testing.assert_close(predict_cloud(task, reduced, points), expected)
    assert not torch.allclose(predict_cloud(task, plain, points), expected)
    scaled = [[RandomScale([1.3, 1.3])]]
    augmented = predict_cloud(task, plain, fine.replace(source=None), scaled)[fine.source_rows()]
    torch.testing.assert_close(predict_cloud(task, reduced, points, scaled), augmented)
    assert torch.equal(*(predict_cloud(task, lines, points, mode="fast") for lines in (plain, reduced)))
    with pytest.raises(InputError, match=r"vote_grid_size 0.5 must lie between 0 and grid_size 0.5"):
        Pipeline(0.5, ["coord"], vote_grid_size=0.5)


def test_one_point(task: SemanticSegmentation) -> None:
    for mode in ("vote", "fast"):
        assert predict_cloud(task, pipeline(), cloud(7, 1), mode=mode).sum().item() == pytest.approx(1)


def test_the_mode_of_the_task_is_kept(task: SemanticSegmentation) -> None:
    task.train()
    first, second = predict_cloud(task, pipeline(), cloud(8)), predict_cloud(task, pipeline(), cloud(8))
    assert task.training
    assert torch.equal(first, second)  # dropout was off


def test_clouds_that_do_not_fit_are_refused(task: SemanticSegmentation) -> None:
    points = cloud(9)
    with pytest.raises(MismatchError, match=r"cloud9: field 'color' is missing \(it has: coord, segment") as caught:
        predict_cloud(task, pipeline(), points.without_attrs("color"))
    assert "missing" in caught.value.table
    assert "coord" in caught.value.table
    assert "\n" not in str(caught.value)
    with pytest.raises(MismatchError, match="field 'color' has shape"):
        predict_cloud(task, pipeline(), points.with_attrs(color=points.get("color")[:, :2]))
    with pytest.raises(InputError, match=r"'feat' is \(\d+, 3\), TinyBackbone takes \(N, 6\)"):
        predict_cloud(task, Pipeline(0.25, ["coord"]), points)
    with pytest.raises(InputError, match="cloud9: holds no points"):
        predict_cloud(task, pipeline(), points.select(torch.zeros(200, dtype=torch.bool)))
    broken = points.coord.clone()
    broken[17, 1] = torch.nan
    with pytest.raises(InputError, match=r"'coord' holds 1 non-finite points .first: 17"):
        predict_cloud(task, pipeline(), points.replace(coord=broken))
    with pytest.raises(InputError, match="one cloud at a time, got 2"):
        predict_cloud(task, pipeline(), Points.cat([points, points]))
    with pytest.raises(InputError, match="mode 'fast' is a single pass"):
        predict_cloud(task, pipeline(), points, [[]], mode="fast")
    with pytest.raises(InputError, match=r"overlap 1.0 without tile"):
        predict_cloud(task, pipeline(), points, overlap=1.0)
    with pytest.raises(InputError, match="tile is -1"):
        predict_cloud(task, pipeline(), points, tile=-1.0)


def apply(passes: list, coord: list[float]) -> list[list[float]]:
    points = Points(torch.tensor([coord, [-v for v in coord]]))
    moved = []
    for transforms in passes:
        result = points
        for transform in transforms:
            result = transform(result, torch.Generator())
        moved.append(result.coord[0])
    return torch.stack(moved).tolist()


def test_published_augmentations() -> None:
    turns = [[1.0, 2.0, 3.0], [-2.0, 1.0, 3.0], [-1.0, -2.0, 3.0], [2.0, -1.0, 3.0]]
    scannet = [[scale * v for v in turn] for scale in (1.0, 0.95, 1.05) for turn in turns] + [[-1.0, -2.0, 3.0]]
    torch.testing.assert_close(torch.tensor(apply(scannet_augmentations(), [1.0, 2.0, 3.0])), torch.tensor(scannet))
    s3dis = [[flip * s, flip * 2 * s, 3 * s] for flip in (1, -1) for s in (0.9, 0.95, 1.0, 1.05, 1.1)]
    torch.testing.assert_close(torch.tensor(apply(s3dis_augmentations(), [1.0, 2.0, 3.0])), torch.tensor(s3dis))
    assert len(augmentation_passes("scannet")) == 13
    assert len(augmentation_passes("s3dis")) == 10
    assert len(augmentation_passes("turns")) == 12
    assert augmentation_passes(None) == [[]]
