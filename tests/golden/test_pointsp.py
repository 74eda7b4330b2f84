"""PointSP against the published implementation, with its random draws."""

from __future__ import annotations

import pytest
import torch
from harness import Golden, golden_files
from torch import Tensor
from torch.testing import assert_close

from pc3d.models.backbones.pct import group_features
from pc3d.nn.patches import sample_centres
from pc3d.nn.robust_sampling import (
    NEIGHBOURS,
    balanced_drop,
    drop_pool,
    filtered_farthest_points,
    isolation,
    normals,
    tangent_points,
)
from pc3d.ops.neighbours import knn

FILES = golden_files("pointsp")


def clouds(golden: Golden) -> tuple[Tensor, Tensor, int]:
    """Packed coordinates, their borders, and the size of a cloud."""
    xyz = golden.tensor("in/xyz")
    return xyz.flatten(0, 1), torch.arange(len(xyz) + 1) * xyz.shape[1], xyz.shape[1]


@pytest.mark.parametrize("golden", FILES)
def test_isolation(golden: Golden) -> None:
    coord, offsets, size = clouds(golden)
    found, out = isolation(coord, offsets), golden.group("out")
    assert torch.equal(found.count.view(-1, size).float(), out["isolation_count"])
    assert torch.equal(found.inlier.view(-1, size).float(), out["below_median_flag"])
    assert torch.equal(found.inliers.view(-1, size).float(), out["neighbour_flag_count"])
    assert_close(found.weight.view(-1, size), out["weights"], rtol=0, atol=1e-8)


@pytest.mark.parametrize("golden", FILES)
def test_key_points(golden: Golden) -> None:
    coord, offsets, size = clouds(golden)
    out, points = golden.group("out"), golden.meta["npoint"]
    # The recorded choice among tied weights is not ours: take it from the file.
    weight = out["ffps_weights_masked"].flatten()
    starts = golden.tensor("in/ffps_start")
    rows, borders = filtered_farthest_points(coord, offsets, weight, points, starts, ignore_origin=True)
    assert borders.tolist() == [i * points for i in range(len(offsets))]
    local = rows.view(-1, points) - offsets[:-1, None]
    assert torch.equal(local, out["ffps_idx"].long())
    assert torch.equal(coord[rows].view(-1, points, 3), out["ffps_new_xyz"])
    rows, _ = sample_centres(coord, offsets, points, ignore_origin=True)
    assert torch.equal(rows.view(-1, points) - offsets[:-1, None], out["fps_idx"].long())
    # Ours filters as many, none heavier than one that stays.
    left_out = out["ffps_weights_masked"] < 0
    assert left_out.sum(1).tolist() == [size - int(0.95 * size)] * len(left_out)


@pytest.mark.parametrize("golden", FILES)
def test_groups_of_point_cloud_transformer(golden: Golden) -> None:
    coord, offsets, _ = clouds(golden)
    rows = (golden.tensor("out/ffps_idx").long() + offsets[:-1, None]).flatten()
    borders = torch.arange(len(offsets)) * golden.meta["npoint"]
    near, _ = knn(coord[rows], borders, coord, offsets, 32)
    found = group_features(golden.tensor("in/feat").flatten(0, 1), rows, near).amax(1)
    assert_close(found, golden.tensor("out/ffps_group_feat_max").flatten(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("golden", FILES)
def test_normals(golden: Golden) -> None:
    coord, offsets, size = clouds(golden)
    found = normals(coord, knn(coord, offsets, coord, offsets, NEIGHBOURS)[0]).view(-1, size, 3)
    agreement = (found * golden.tensor("out/o3d_normals")).sum(-1).abs()
    assert_close(agreement, torch.ones_like(agreement), rtol=0, atol=1e-4)


@pytest.mark.parametrize("golden", FILES)
def test_new_points(golden: Golden) -> None:
    coord, offsets, size = clouds(golden)
    rows, squared = knn(coord, offsets, coord, offsets, NEIGHBOURS)
    normal, out = golden.tensor("in/normal").flatten(0, 1), golden.group("out")
    made = tangent_points(coord, normal, rows, squared, golden.tensor("in/interp_rand_k").flatten())
    assert_close(made.view(-1, size, 3), out["interp_xyz"], rtol=0, atol=1e-6)
    made = tangent_points(coord, normal, rows, squared, golden.tensor("in/up_rand_k").flatten()).view(-1, size, 3)
    chosen = golden.tensor("in/up_perm")[: out["up_xyz"].shape[1] - size]
    both = torch.cat([coord.view(-1, size, 3), made[:, chosen]], 1)
    assert_close(both, out["up_xyz"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("golden", FILES)
def test_drop(golden: Golden) -> None:
    coord, _, size = clouds(golden)
    keep, score = float(golden.tensor("in/drop_ratio_keep")), float(golden.tensor("in/drop_global_score"))
    ranks = golden.tensor("in/drop_perm")
    assert drop_pool(size, keep, score)[1] == len(ranks)
    for cloud, centre, expected in zip(
        coord.view(-1, size, 3), golden.tensor("in/drop_center").tolist(), golden.tensor("out/drop_xyz"), strict=True
    ):
        assert torch.equal(cloud[balanced_drop(cloud, keep, score, centre, ranks)], expected)
