"""The grid of detectors against arithmetic done by hand."""

from __future__ import annotations

import pytest
import torch

from pc3d.config import instantiate
from pc3d.errors import InputError
from pc3d.nn.bev import BevGrid
from pc3d.points import Points


def grid() -> BevGrid:
    return BevGrid([0, -2, -3, 4, 2, 1], [0.5, 0.25, 4])


def test_shapes_and_centers():
    second = BevGrid([0, -40, -3, 70.4, 40, 1], [0.05, 0.05, 0.1])
    assert second.shape == (1408, 1600, 40)
    assert second.bev_shape(8) == (200, 176)
    assert BevGrid([0, -39.68, -3, 69.12, 39.68, 1], [0.16, 0.16, 4]).shape == (432, 496, 1)
    centers = grid().cell_centers(4)
    assert grid().shape == (8, 16, 1)
    assert centers.shape == (4, 2, 2)
    assert centers[0, 0].tolist() == [1.0, -1.5]
    assert centers[3, 1].tolist() == [3.0, 1.5]
    assert grid().bev_shape(3) == (6, 3)
    assert instantiate(grid().to_config()) == grid()


@pytest.mark.parametrize(
    ("point_range", "voxel_size", "words"),
    [
        ([0, 0, 0, 1, 1], [1, 1, 1], "needs 6"),
        ([0, 0, 0, 1, 1, float("nan")], [1, 1, 1], "needs 6 finite"),
        ([0, 0, 0, 1, 1, 1], [1, 0, 1], "positive"),
        ([0, 0, 0, 1, 1, 1], [1, 0.3, 1], "along y"),
        ([0, 0, 2, 1, 1, 1], [1, 1, 1], "along z"),
    ],
)
def test_bad_grids_are_refused(point_range, voxel_size, words):
    with pytest.raises(InputError, match=words):
        BevGrid(point_range, voxel_size)


def test_voxels_hold_means_of_points_inside():
    first = torch.tensor([[0.0, -2, 0], [0.4, -1.8, 1], [0.1, -2, -3], [3.99, 1.99, 0], [4.0, 0, 0], [1, 3, 0]])
    first[1, 2] = 0.99
    clouds = [Points(coord, attrs={"feat": coord.clone()}) for coord in (first, first[:0], first[4:], first[3:4])]
    kept, voxels = grid().voxelize(Points.cat(clouds))
    assert voxels.coord.tolist() == [[0, 0, 0, 0], [0, 7, 15, 0], [3, 7, 15, 0]]
    assert kept.counts.tolist() == [4, 0, 0, 1]
    torch.testing.assert_close(voxels.feat[0], first[:3].mean(0))
    assert voxels.point_to_voxel is not None
    assert voxels.point_to_voxel.tolist() == [0, 0, 0, 1, 2]
    assert kept.get("feat")[:4, 0].tolist() == first[:4, 0].tolist()
    assert voxels.batch_size == 4
    assert voxels.spatial_shape == (8, 16, 1)


def test_stray_points_fall_outside():
    coord = torch.tensor([[float("nan"), 0, 0], [float("inf"), 0, 0], [1e30, 0, 0], [-1e30, 0, 0], [1, 1, 0]])
    kept, voxels = grid().voxelize(Points(coord, attrs={"feat": torch.zeros(5, 1)}))
    assert kept.num_points == len(voxels) == 1


def test_limits_keep_the_first_points_and_voxels():
    column = torch.tensor([3, 1, 1, 3, 0, 1, 3, 2])
    coord = torch.stack([column * 0.5 + 0.1, torch.zeros(8), torch.zeros(8)], 1)
    cloud = Points(coord, attrs={"feat": torch.arange(8.0)[:, None]})
    both = Points.cat([cloud, cloud])
    kept, voxels = grid().voxelize(both, max_points=2, max_voxels=3)
    assert kept.get("feat")[:, 0].tolist() == [4, 1, 2, 0, 3] * 2
    assert voxels.coord[:, :2].tolist() == [[0, 0], [0, 1], [0, 3], [1, 0], [1, 1], [1, 3]]
    assert voxels.feat[:3, 0].tolist() == [4, 1.5, 1.5]
    assert grid().voxelize(both, max_voxels=9)[0].num_points == 16
    for limit in ("max_points", "max_voxels"):
        with pytest.raises(InputError, match=f"{limit} is 0"):
            grid().voxelize(both, **{limit: 0})
