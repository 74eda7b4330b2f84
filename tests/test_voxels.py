"""How points become voxels, and voxel features points again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pc3d import InputError, Points
from pc3d.voxels import Voxels


def _points(rows: int = 400, seed: int = 0) -> Points:
    generator = torch.Generator().manual_seed(seed)
    coord = torch.rand(rows, 3, generator=generator) * 4 - 2
    offsets = torch.tensor([0, rows // 4, rows // 4, rows])
    feat = torch.randn(rows, 5, generator=generator)
    return Points(coord, offsets, {"feat": feat}, [{"name": f"cloud{i}"} for i in range(3)])


def _points_of(voxels: Voxels, voxel: int) -> Tensor:
    assert voxels.point_to_voxel is not None
    return (voxels.point_to_voxel == voxel).nonzero()[:, 0]


def _is_raster_sorted(coord: Tensor) -> bool:
    rows = [tuple(row) for row in coord.tolist()]
    return rows == sorted(rows)


def test_mean_voxels_hold_the_mean_of_their_points() -> None:
    points = _points()
    voxels = points.voxelize(0.5)
    assert voxels.coord.dtype == torch.int32
    assert voxels.coord.unique(dim=0).shape == voxels.coord.shape
    assert _is_raster_sorted(voxels.coord)
    assert (voxels.batch_size, voxels.stride, voxels.voxel_size) == (3, 1, 0.5)
    assert voxels.point_to_voxel is not None
    assert torch.equal(voxels.coord[voxels.point_to_voxel, 0].long(), points.batch)
    low = torch.stack([cloud.coord.amin(0) for cloud in points if cloud.num_points])
    low = low[(voxels.coord[:, 0] > 1).long()]
    cell_of_low = torch.floor(low / 0.5)
    cells = torch.floor(points.coord / 0.5) - cell_of_low[voxels.point_to_voxel]
    assert torch.equal(cells.int(), voxels.coord[voxels.point_to_voxel, 1:])
    for voxel in range(0, len(voxels), 17):
        expected = points.attrs["feat"][_points_of(voxels, voxel)].mean(0)
        torch.testing.assert_close(voxels.feat[voxel], expected)


def test_first_and_random_voxels_hold_one_of_their_points() -> None:
    points = _points()
    first = points.voxelize(0.5, "first")
    drawn = points.voxelize(0.5, "random", generator=torch.Generator().manual_seed(1))
    again = points.voxelize(0.5, "random", generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn.feat, again.feat)
    assert not torch.equal(drawn.feat, first.feat)
    for voxel in range(len(first)):
        own = points.attrs["feat"][_points_of(first, voxel)]
        assert torch.equal(first.feat[voxel], own[0])
        assert (own == drawn.feat[voxel]).all(1).any()


def test_input_order_follows_the_points() -> None:
    points = _points()
    voxels = points.voxelize(0.5, "first", order="input")
    assert voxels.point_to_voxel is not None
    first_rows = torch.tensor([int(_points_of(voxels, voxel)[0]) for voxel in range(len(voxels))])
    assert torch.equal(first_rows, first_rows.sort().values)
    assert torch.equal(points.attrs["feat"][first_rows], voxels.feat)


def test_mean_is_differentiable_and_comes_back_to_points() -> None:
    points = _points()
    feat = points.attrs["feat"].double().requires_grad_()
    voxels = points.with_attrs(feat=feat).voxelize(1.0)
    back = voxels.to_points()
    assert back.shape == feat.shape
    back.sum().backward()
    torch.testing.assert_close(feat.grad, torch.ones_like(feat))


def test_empty_batch() -> None:
    empty = Points(
        torch.zeros(0, 3), torch.tensor([0, 0, 0]), {"feat": torch.zeros(0, 2), "grid_coord": torch.zeros(0, 3).int()}
    )
    for voxels in (empty.voxelize(0.1), empty.voxels()):
        assert voxels.coord.shape == (0, 4)
        assert voxels.feat.shape == (0, 2)
        assert voxels.batch_size == 2


def test_voxels_of_a_grid_sampled_cloud_share_its_features() -> None:
    points = _points()
    cells = points.voxelize(0.5, "first")
    shuffle = torch.cat([torch.randperm(n) + start for start, n in _runs(cells)])
    sampled = Points(
        torch.zeros(len(cells), 3),
        torch.bincount(cells.coord[:, 0], minlength=3).cumsum(0).new_tensor([0, *_borders(cells)]),
        {"feat": cells.feat[shuffle], "grid_coord": cells.coord[shuffle, 1:]},
    )
    voxels = sampled.voxels()
    assert voxels.feat is sampled.attrs["feat"]
    assert torch.equal(voxels.coord, cells.coord[shuffle])
    assert torch.equal(voxels.to_points(), sampled.attrs["feat"])


def _borders(cells: Voxels) -> list[int]:
    return torch.bincount(cells.coord[:, 0], minlength=cells.batch_size).cumsum(0).tolist()


def _runs(cells: Voxels) -> list[tuple[int, int]]:
    ends = _borders(cells)
    return [(start, end - start) for start, end in zip([0, *ends], ends, strict=False)]


def test_points_that_share_a_cell_are_merged() -> None:
    grid = torch.tensor([[2, 0, 0], [-1, 0, 0], [2, 0, 0], [2, 0, 0]], dtype=torch.int32)
    feat = torch.tensor([[1.0], [2.0], [3.0], [9.0]])
    points = Points(torch.zeros(4, 3), torch.tensor([0, 3, 4]), {"feat": feat, "grid_coord": grid})
    voxels = points.voxels()
    assert voxels.coord.tolist() == [[0, -1, 0, 0], [0, 2, 0, 0], [1, 2, 0, 0]]
    assert voxels.feat[:, 0].tolist() == [2.0, 2.0, 9.0]
    assert voxels.point_to_voxel is not None
    assert voxels.point_to_voxel.tolist() == [1, 0, 1, 2]


def test_errors_name_the_cloud() -> None:
    points = _points()
    with pytest.raises(InputError, match="cloud0 and 2 more: field 'feat' is missing"):
        points.without_attrs("feat").voxelize(0.1)
    with pytest.raises(InputError, match="cloud0 and 2 more: field 'grid_coord' is missing"):
        points.voxels()
    broken = points.coord.clone()
    broken[3] = torch.nan
    with pytest.raises(InputError, match="cloud0 and 2 more: 1 points have non-finite coordinates"):
        points.with_attrs(coord=broken).voxelize(0.1)
    with pytest.raises(InputError, match="cloud0 and 2 more: grid size 1e-08 m cuts axis"):
        points.voxelize(1e-8)
