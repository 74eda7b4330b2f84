from __future__ import annotations

import pytest
import torch
from clouds import random_points, seeded

from pc3d import InputError, Points
from pc3d.data.collate import Collate, mix3d
from pc3d.data.transforms import CenterShift, GridSample

SIZE = 0.5


def samples(count: int, instances: bool = True) -> list[Points]:
    """Grid-sampled clouds of different size; instance numbers start at 0, -1 is none."""
    clouds = []
    for i in range(count):
        cloud = CenterShift()(GridSample(SIZE)(random_points((60 + 10 * i,), seed=i), seeded(i)))
        number = torch.randint(-1, 4, (cloud.num_points,), generator=seeded(i))
        cloud = cloud.with_attrs(origin=torch.full((cloud.num_points,), i))
        cloud.meta[0]["name"] = f"room{i}"
        clouds.append(cloud.with_attrs(instance=number) if instances else cloud)
    return clouds


def test_plain_collate_packs() -> None:
    clouds = samples(3)
    batch = Collate()(clouds)
    assert batch.counts.tolist() == [cloud.num_points for cloud in clouds]
    assert torch.equal(batch.coord, torch.cat([cloud.coord for cloud in clouds]))
    assert [meta["name"] for meta in batch.meta] == ["room0", "room1", "room2"]


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (2, [2]), (4, [2, 2]), (5, [2, 2, 1])])
def test_clouds_merge_in_consecutive_pairs(count: int, sizes: list[int]) -> None:
    clouds = samples(count)
    mixed = mix3d(Points.cat(clouds))
    assert [cloud.get("origin").unique().tolist() for cloud in mixed] == [
        list(range(2 * i, 2 * i + size)) for i, size in enumerate(sizes)
    ]
    assert torch.equal(mixed.coord, torch.cat([cloud.coord for cloud in clouds]))
    assert [meta["name"].count("+") for meta in mixed.meta] == [size - 1 for size in sizes]


def test_instances_of_a_pair_stay_apart() -> None:
    clouds = samples(5)
    before = torch.cat([cloud.get("instance") for cloud in clouds])
    for cloud in mix3d(Points.cat(clouds)):
        number, origin = cloud.get("instance"), cloud.get("origin")
        kept = number[number >= 0]
        owners = torch.stack([kept, origin[number >= 0]], 1).unique(dim=0)
        assert len(owners) == len(owners[:, 0].unique())
    mixed = mix3d(Points.cat(clouds)).get("instance")
    assert torch.equal(mixed == -1, before == -1)


def two(first: list[int], second: list[int]) -> Points:
    clouds = [
        Points(torch.zeros(len(i), 3), attrs={"instance": torch.tensor(i, dtype=torch.int64)}) for i in (first, second)
    ]
    return Points.cat(clouds)


@pytest.mark.parametrize(
    ("first", "second", "distinct", "published"),
    [
        ([0, 2], [0, 1, -1], [0, 2, 3, 4, -1], [0, 2, 2, 3, -1]),
        ([-1, -1], [0, 1, -1], [-1, -1, 0, 1, -1], [-1, -1, -1, 0, -1]),
        ([0, 2], [], [0, 2], [0, 2]),
        ([], [0, -1], [0, -1], [0, -1]),
    ],
)
def test_instance_shift(first: list[int], second: list[int], distinct: list[int], published: list[int]) -> None:
    points = two(first, second)
    assert mix3d(points).get("instance").tolist() == distinct
    assert mix3d(points, "published").get("instance").tolist() == published
    assert points.get("instance").tolist() == first + second


def test_one_draw_decides_for_the_batch() -> None:
    clouds = samples(4, instances=False)
    collate = Collate(mix_prob=0.3, cells="overlay")
    generator = seeded()
    lengths = [len(collate(clouds, generator)) for _ in range(1000)]
    assert set(lengths) == {2, 4}
    assert lengths.count(2) / 1000 == pytest.approx(0.3, abs=0.05)


def has_unique_cells(batch: Points) -> bool:
    cells = torch.cat([batch.batch[:, None], batch.get("grid_coord").long()], 1)
    return len(torch.unique(cells, dim=0)) == len(cells)


def test_cells_are_distinct_by_default() -> None:
    clouds = samples(4)
    mixed = Collate(mix_prob=1.0, grid_size=SIZE)(clouds, seeded())
    assert has_unique_cells(mixed)
    for cloud in mixed:
        assert cloud.get("grid_coord").amin(0).tolist() == [0, 0, 0]
        cell = torch.floor(cloud.coord.double() / SIZE).long()
        assert torch.equal(cloud.get("grid_coord").long(), cell - cell.amin(0))
        assert len(cloud.get("origin").unique()) == 2


def test_published_cells_coincide() -> None:
    clouds = samples(4)
    overlay = Collate(mix_prob=1.0, cells="overlay")(clouds)
    assert torch.equal(overlay.get("grid_coord"), torch.cat([cloud.get("grid_coord") for cloud in clouds]))
    regrid = Collate(mix_prob=1.0, grid_size=SIZE, cells="regrid")(clouds)
    assert regrid.num_points == overlay.num_points
    assert not has_unique_cells(overlay)
    assert not has_unique_cells(regrid)


def test_clouds_without_cells_are_mixed_as_they_are() -> None:
    clouds = [cloud.without_attrs("grid_coord") for cloud in samples(2)]
    mixed = Collate(mix_prob=1.0, grid_size=SIZE)(clouds)
    assert len(mixed) == 1
    assert "grid_coord" not in mixed


def test_grid_size_is_asked_for() -> None:
    with pytest.raises(InputError, match="needs grid_size"):
        Collate(mix_prob=0.5)
