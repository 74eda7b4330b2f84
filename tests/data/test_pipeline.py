from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import pytest
import torch
from clouds import random_points, seeded

from pc3d import InputError
from pc3d.config import instantiate
from pc3d.data.pipeline import Pipeline
from pc3d.data.transforms import (
    CenterShift,
    CropBox,
    GridSample,
    NormalizeColor,
    OutdoorAugment,
    RandomScale,
    ShufflePoints,
    SphereCrop,
    Transform,
)
from pc3d.points import Points

SIZE = 0.4


def pipeline(**changes: object) -> Pipeline:
    parts = {
        "grid_size": SIZE,
        "features": ["coord", "color"],
        "prepare": [CenterShift()],
        "augment": [OutdoorAugment()],
        "crop": [SphereCrop(60)],
        "finish": [NormalizeColor()],
    }
    return Pipeline(**{**parts, **changes})


def _fragments(points: Points, augmentation: Sequence[Transform] = (), **changes: object) -> Iterator[Points]:
    ours = pipeline(**changes)
    return ours.fragments(ours.prepare_vote(points), augmentation)


def test_config_round_trip() -> None:
    original = pipeline()
    config = json.loads(json.dumps(original.to_config()))
    again = instantiate(config)
    assert again.to_config() == config
    points = random_points()
    assert torch.equal(again.train(points, seeded(1)).get("feat"), original.train(points, seeded(1)).get("feat"))
    assert original.in_channels == 6


def test_training_sample() -> None:
    points = random_points((500, 30))
    sample = pipeline().train(points, seeded())
    assert sample.counts[0] == 60
    assert 0 < sample.counts[1] <= 30
    assert sample.get("feat").shape == (sample.num_points, 6)
    torch.testing.assert_close(sample.get("feat")[:, 3:], points.get("color")[sample.get("id")] / 255)
    assert torch.equal(sample.get("feat")[:, :3], sample.coord)
    assert torch.equal(sample.get("segment"), points.get("segment")[sample.get("id")])
    cells = torch.cat([sample.batch[:, None], sample.get("grid_coord")], 1)
    assert len(torch.unique(cells, dim=0)) == len(cells)


def test_training_augments_before_sampling_and_evaluation_does_not_augment() -> None:
    points = random_points()
    centered = CenterShift()(points).coord
    twice = pipeline(augment=[RandomScale((2.0, 2.0))], crop=[])
    sample = twice.train(points, seeded())
    torch.testing.assert_close(sample.coord, 2 * centered[sample.get("id")])
    cell = torch.floor(sample.coord.double() / SIZE).int()
    assert torch.equal(sample.get("grid_coord"), cell - cell.amin(0))
    evaluated = twice.evaluate(points)
    torch.testing.assert_close(evaluated.coord, centered[evaluated.get("id")])


def test_training_depends_on_the_generator_only() -> None:
    points = random_points()
    first, again, other = (pipeline().train(points, seeded(s)).get("feat") for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_evaluation_is_deterministic_and_leads_back_to_every_prepared_point() -> None:
    points = random_points((500, 0, 30))
    first, again = pipeline().evaluate(points), pipeline().evaluate(points)
    assert torch.equal(first.get("feat"), again.get("feat"))
    assert first.source is not None
    assert torch.equal(first.source.get("segment"), points.get("segment"))
    assert torch.equal(first.source.coord, CenterShift()(points).coord)
    assert first.source.get("color").max() > 1  # finish does not touch the source
    same_cell = first.get("grid_coord")[first.source_rows()]
    expected = GridSample(SIZE).__call__(first.source, seeded()).num_points
    assert expected == first.num_points
    distance = (first.coord[first.source_rows()] - first.source.coord).abs()
    assert distance.max() < SIZE
    assert same_cell.shape == (530, 3)


def test_evaluation_refuses_to_lose_points_after_sampling() -> None:
    with pytest.raises(InputError, match=r"pipeline\.finish removes or reorders"):
        pipeline(finish=[ShufflePoints()]).evaluate(random_points())


def test_fragments_cover_every_point_and_name_its_row() -> None:
    points = random_points()
    seen = torch.zeros(points.num_points, dtype=torch.int64)
    for fragment in _fragments(points):
        rows = fragment.get("index")
        seen[rows] += 1
        assert torch.equal(fragment.get("id"), rows)
        assert torch.equal(fragment.get("feat")[:, 3:], points.get("color")[rows] / 255)
    assert seen.min() >= 1


def test_fragments_are_augmented_as_told() -> None:
    points = random_points()
    plain = next(iter(_fragments(points)))
    scaled = next(iter(_fragments(points, [RandomScale((2.0, 2.0))])))
    assert scaled.coord.amax(0)[2] == pytest.approx(2 * CenterShift()(points).coord.amax(0)[2].item(), abs=0.8)
    assert scaled.num_points > plain.num_points


def test_fragment_rows_count_in_the_raw_cloud() -> None:
    points = random_points()
    box = CropBox((10, -5, 1, 12, -2, 3))
    rows = torch.cat([f.get("index") for f in _fragments(points, prepare=[box, CenterShift()])])
    assert torch.equal(rows.unique(), box(points).get("id"))
