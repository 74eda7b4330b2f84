from __future__ import annotations

import itertools

import pytest
import torch
from clouds import random_points, seeded

from pc3d import InputError, Points
from pc3d.data.transforms import ColumnCrop, CropBox, GridSample, RandomDropout, ShufflePoints, SphereCrop
from pc3d.data.transforms.sampling import fnv_keys

SIZE = 0.4
every_pick = pytest.mark.parametrize("pick", ["random", "first", "center"])
every_order = pytest.mark.parametrize("key_order", ["raster", "fnv"])


def cells_of(points: Points) -> torch.Tensor:
    """``(N, 4)`` [cloud, cell], cell counted as GridSample counts it, by the plain definition."""
    rows = []
    for number, cloud in enumerate(points):
        cell = torch.floor(cloud.coord.double() / SIZE).long()
        cell = cell - cell.amin(0) if len(cell) else cell
        rows.append(torch.cat([torch.full((len(cell), 1), number), cell], 1))
    return torch.cat(rows)


@every_pick
@every_order
def test_grid_sample_keeps_one_point_of_every_cell(pick: str, key_order: str) -> None:
    points = random_points((400, 0, 300))
    sampled = GridSample(SIZE, pick, key_order=key_order)(points, seeded())
    cells = cells_of(points)
    rows = sampled.get("id")
    assert torch.equal(torch.cat([sampled.batch[:, None], sampled.get("grid_coord")], 1), cells[rows])
    assert len(torch.unique(cells[rows], dim=0)) == len(rows) == len(torch.unique(cells, dim=0))
    assert sampled.get("grid_coord").dtype == torch.int32
    assert sampled.source is None


@every_pick
@every_order
def test_inverse_leads_every_point_to_its_cell(pick: str, key_order: str) -> None:
    points = random_points((400, 0, 300))
    sampled = GridSample(SIZE, pick, inverse=True, key_order=key_order)(points, seeded())
    assert sampled.source is not None
    assert torch.equal(sampled.source.get("id"), points.get("id"))
    assert torch.equal(sampled.source.coord, points.coord)
    stand_ins = sampled.get("id")[sampled.source_rows()]
    assert torch.equal(cells_of(points)[stand_ins], cells_of(points))


def test_first_pick_is_the_lowest_row() -> None:
    points = random_points()
    sampled = GridSample(SIZE, "first", inverse=True)(points)
    rows = sampled.source_rows()
    lowest = torch.full((sampled.num_points,), 10**6).scatter_reduce(0, rows, points.get("id"), "amin")
    assert torch.equal(sampled.get("id"), lowest)


def test_center_pick_is_the_point_nearest_to_the_cell_center() -> None:
    points = random_points()
    sampled = GridSample(SIZE, "center", inverse=True)(points)
    distance = (points.coord / SIZE - torch.floor(points.coord / SIZE) - 0.5).norm(dim=1)
    best = distance[sampled.get("id")][sampled.source_rows()]
    assert bool((distance >= best - 1e-5).all())


def column(counts: tuple[int, ...]) -> Points:
    """A cloud with ``counts[i]`` points in cell ``(i, 0, 0)`` of a 1 m grid."""
    x = torch.cat([torch.full((n,), i + 0.5) for i, n in enumerate(counts)])
    return Points(
        torch.stack([x, torch.full_like(x, 0.5), torch.full_like(x, 0.5)], 1), attrs={"id": torch.arange(len(x))}
    )


def test_random_pick_is_even() -> None:
    clouds = Points.cat([column((3, 5))] * 2000)
    first_cell = GridSample(1.0)(clouds, seeded()).get("id").view(2000, 2)[:, 0]
    share = torch.bincount(first_cell, minlength=3) / 2000
    torch.testing.assert_close(share, torch.full((3,), 1 / 3), atol=0.04, rtol=0)


def test_published_pick_is_a_draw_below_the_largest_count_modulo_the_count() -> None:
    clouds = Points.cat([column((3, 5)), column((3,))] * 2000)
    picked = GridSample(1.0, key_order="fnv")(clouds, seeded())
    first_cell = picked.get("id")[picked.get("grid_coord")[:, 0] == 0].view(2000, 2)
    share = torch.bincount(first_cell[:, 0], minlength=3) / 2000
    torch.testing.assert_close(share, torch.tensor([0.4, 0.4, 0.2]), atol=0.04, rtol=0)
    share = torch.bincount(first_cell[:, 1], minlength=3) / 2000  # the largest count is that of the own cloud
    torch.testing.assert_close(share, torch.full((3,), 1 / 3), atol=0.04, rtol=0)


def fnv_of(cell: tuple[int, ...]) -> int:
    value = 14695981039346656037
    for number in cell:
        value = value * 1099511628211 % 2**64 ^ number
    return value


def test_fnv_order_is_that_of_the_unsigned_hash() -> None:
    points = random_points((300, 200))
    points = points.with_attrs(coord=points.coord * 10_000)  # the highest bit of the hash differs among far cells only
    for cloud in GridSample(SIZE, key_order="fnv")(points, seeded()):
        keys = [fnv_of(tuple(cell)) for cell in cloud.get("grid_coord").tolist()]
        assert keys == sorted(keys)
        assert keys[0] < 2**63 < keys[-1]
        assert [k % 2**64 for k in fnv_keys(cloud.get("grid_coord")).tolist()] == keys


def test_raster_order() -> None:
    for cloud in GridSample(SIZE)(random_points((300, 200)), seeded()):
        cells = cloud.get("grid_coord").tolist()
        assert cells == sorted(cells)


@every_order
def test_fragments_hold_member_f_modulo_count_of_every_cell(key_order: str) -> None:
    points = random_points((300,))
    cells = [tuple(row) for row in cells_of(points)[:, 1:].tolist()]
    members: dict[tuple, list[int]] = {}
    for row, cell in enumerate(cells):
        members.setdefault(cell, []).append(row)
    fragments = list(GridSample(SIZE, key_order=key_order).fragments(points))
    assert len(fragments) == max(map(len, members.values()))
    for number, fragment in enumerate(fragments):
        assert torch.equal(fragment.get("index"), fragment.get("id"))
        assert torch.equal(fragment.get("grid_coord"), fragments[0].get("grid_coord"))
        for row, cell in zip(fragment.get("index").tolist(), fragment.get("grid_coord").tolist(), strict=True):
            assert row == members[tuple(cell)][number % len(members[tuple(cell)])]


def test_fragments_are_made_one_at_a_time() -> None:
    crowd = Points(torch.zeros(100_000, 3))  # 100 000 fragments of one point
    few = list(itertools.islice(GridSample(1.0).fragments(crowd), 3))
    assert [fragment.get("index").tolist() for fragment in few] == [[0], [1], [2]]


def test_fragments_of_nothing_and_of_a_batch() -> None:
    assert list(GridSample(1.0).fragments(random_points((0,)))) == []
    with pytest.raises(ValueError, match="one cloud at a time"):
        next(GridSample(1.0).fragments(random_points((5, 5))))


def test_sphere_crop_keeps_the_nearest_points_by_distance() -> None:
    points = random_points()
    cropped = SphereCrop(120)(points, seeded(3))
    assert cropped.num_points == 120
    distance = (points.coord - cropped.coord[0]).norm(dim=1)
    kept = distance[cropped.get("id")]
    assert kept[0] == 0
    assert bool((kept.diff() >= 0).all())
    dropped = torch.ones(len(distance), dtype=torch.bool)
    dropped[cropped.get("id")] = False
    assert distance[dropped].min() >= kept.max()


def test_sphere_crop_center_is_any_point() -> None:
    points = Points.cat([random_points((10,))] * 2000)
    centers = SphereCrop(1)(points, seeded()).get("id")
    torch.testing.assert_close(torch.bincount(centers, minlength=10) / 2000, torch.full((10,), 0.1), atol=0.03, rtol=0)


def test_sphere_crop_by_rate_and_of_small_clouds() -> None:
    points = random_points((100, 11, 50))
    assert SphereCrop(rate=0.6)(points, seeded()).counts.tolist() == [60, 6, 30]
    cropped = SphereCrop(50)(points, seeded())
    assert cropped.counts.tolist() == [50, 11, 50]
    assert torch.equal(cropped[1].get("id"), points[1].get("id"))


@pytest.mark.parametrize("arguments", [{}, {"max_points": 5, "rate": 0.5}])
def test_sphere_crop_wants_one_of_two_sizes(arguments: dict) -> None:
    with pytest.raises(InputError, match="max_points or rate"):
        SphereCrop(**arguments)


def test_dropout_keeps_a_share_of_the_points_with_probability_p() -> None:
    points = random_points((11,) * 1000)
    counts = RandomDropout(ratio=0.2, p=0.3)(points, seeded()).counts
    assert set(counts.tolist()) == {11, 8}
    assert (counts == 8).float().mean() == pytest.approx(0.3, abs=0.04)


def test_dropout_drops_every_point_alike_and_keeps_the_order() -> None:
    points = Points.cat([random_points((10,))] * 1000)
    kept = RandomDropout(ratio=0.5, p=1)(points, seeded())
    torch.testing.assert_close(torch.bincount(kept.get("id")) / 1000, torch.full((10,), 0.5), atol=0.06, rtol=0)
    assert bool((kept.get("id").view(1000, 5).diff(dim=1) > 0).all())


def test_shuffle_is_a_permutation_inside_each_cloud() -> None:
    points = random_points((100, 60))
    shuffled = ShufflePoints()(points, seeded())
    for before, after in zip(points, shuffled, strict=True):
        assert not torch.equal(after.get("id"), before.get("id"))
        assert torch.equal(after.get("id").sort().values, before.get("id"))


def test_crop_box_removes_what_point_clip_would_move() -> None:
    points = random_points((300, 200))
    low, high = torch.tensor([11.0, -4.0, 1.5]), torch.tensor([13.0, -3.0, 2.0])
    cropped = CropBox([*low.tolist(), *high.tolist()])(points)
    inside = ((points.coord >= low) & (points.coord <= high)).all(1)
    assert torch.equal(cropped.get("id"), points.get("id")[inside])


def test_column_around_a_point() -> None:
    points = random_points((600, 0, 500))
    cropped = ColumnCrop(0.8, more_than=10)(points, seeded())
    assert cropped.counts[1] == 0
    for before, after in zip(points, cropped, strict=True):
        if not before.num_points:
            continue
        rows = [before.get("id").tolist().index(i) for i in after.get("id").tolist()]
        shift = (before.coord[rows] - after.coord)[0]
        torch.testing.assert_close(before.coord[rows], after.coord + shift)
        assert shift[2] == 0
        assert (before.coord[:, :2] == shift[:2]).all(1).any(), "the middle is a point of the cloud"
        inside = ((before.coord - shift)[:, :2].abs() <= 0.4).all(1)
        assert inside.nonzero()[:, 0].tolist() == rows
        assert len(rows) > 10
        moved = torch.tensor(after.meta[0]["origin"]) - torch.tensor(before.meta[0].get("origin", (0.0, 0.0, 0.0)))
        torch.testing.assert_close(moved.float(), shift)


def test_fullest_of_the_columns_that_were_drawn() -> None:
    coord = torch.cat([torch.zeros(5, 3), torch.ones(20, 3), 5 * torch.ones(2, 3)])
    cropped = ColumnCrop(1.0, more_than=100, tries=60)(Points(coord), seeded())
    assert cropped.num_points == 20
    for options in ({"size": 0.0}, {"tries": 0}):
        with pytest.raises(InputError, match="ColumnCrop"):
            ColumnCrop(**options)
