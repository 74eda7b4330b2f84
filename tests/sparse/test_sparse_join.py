"""Joining and pruning grids, and dense volumes: values, gradients, and which maps survive."""

from __future__ import annotations

import pytest
import torch
from dense_reference import kernel, random_grid, volume
from torch import Tensor, nn
from torch.testing import assert_close

from pc3d import Voxels
from pc3d.sparse import (
    FeatureWise,
    SparseConv3d,
    SparseConvTranspose3d,
    SparseInverseConv3d,
    SubMConv3d,
    add,
    bounds,
    cat,
    from_dense,
    multiply,
    prune,
    to_dense,
)

LOW, HIGH = [-3] * 3, [3] * 3


def dense(voxels: Voxels) -> Tensor:
    return volume(voxels, LOW, HIGH)


def two_grids() -> tuple[Voxels, Voxels]:
    return random_grid([30, 0, 9], 4, seed=1), random_grid([20, 5, 9], 4, seed=2)


@pytest.mark.parametrize("join", [cat, add, multiply])
def test_different_voxels_join_like_volumes(join) -> None:
    a, b = two_grids()
    joined = join(a, b)
    combine = {cat: lambda p, q: torch.cat([p, q], 1), add: torch.add, multiply: torch.mul}[join]
    assert_close(dense(joined), combine(dense(a), dense(b)))
    present = {tuple(c) for grid in (a, b) for c in grid.coord.tolist()}
    assert {tuple(c) for c in joined.coord.tolist()} == present
    assert len(joined) == len(present)
    assert torch.equal(joined.coord[: len(a)], a.coord)
    upstream = torch.randn_like(joined.feat)
    got = torch.autograd.grad(joined.feat, (a.feat, b.feat), upstream)
    volume_gradient = dense(joined.with_feat(upstream))
    assert_close(got, torch.autograd.grad(combine(dense(a), dense(b)), (a.feat, b.feat), volume_gradient))
    again = join(a, b)
    assert again.coord is joined.coord, "layers after it share their maps"
    layer = SubMConv3d(joined.feat.shape[1], 3, 3).double()
    fresh = Voxels(joined.coord.clone(), joined.feat, 3)
    assert_close(layer(joined).feat, layer(fresh).feat)


def test_the_grid_stays_the_first_one_where_the_other_adds_nothing() -> None:
    fine = random_grid([30, 8], 4)
    down, up = SparseConv3d(4, 4, 2, 2).double(), SparseInverseConv3d(8, 4, 2).double()
    coarse = down(fine)
    shuffled = torch.randperm(len(coarse))
    other = Voxels(coarse.coord[shuffled], coarse.feat[shuffled], 2, stride=2)
    joined = cat(coarse, other)
    assert joined.coord is coarse.coord
    assert_close(joined.feat, torch.cat([coarse.feat, coarse.feat], 1))
    assert up(joined).coord is fine.coord
    assert torch.equal(add(coarse, coarse, coarse).feat, coarse.feat + coarse.feat + coarse.feat)
    same = cat(coarse, coarse)
    assert same.coord is coarse.coord


def test_a_grid_joined_with_others_has_no_way_back() -> None:
    fine = random_grid([30], 4)
    coarse = SparseConv3d(4, 4, 2, 2).double()(fine)
    coord = torch.tensor([[0, 90, 0, 0]], dtype=torch.int32)
    far = Voxels(coord, torch.ones(1, 4, dtype=torch.float64), 1, stride=2)
    with pytest.raises(ValueError, match="no strided layer made"):
        SparseInverseConv3d(8, 4, 2).double()(cat(coarse, far))


def test_pruning_keeps_maps_right_and_the_way_back() -> None:
    fine = random_grid([60, 20], 4)
    down, up = SparseConv3d(4, 5, 3, 2, 1).double(), SparseInverseConv3d(5, 3, 3, bias=False).double()
    coarse = down(fine)
    keep = torch.rand(len(coarse), generator=torch.Generator().manual_seed(0)) < 0.4
    thin = prune(coarse, keep)
    assert torch.equal(thin.coord, coarse.coord[keep])
    out = up(thin)
    assert out.coord is fine.coord
    zeroed = coarse.with_feat(torch.where(keep[:, None], coarse.feat, 0))
    assert_close(out.feat, up(zeroed).feat)
    layer = SubMConv3d(5, 2, 3).double()
    layer(coarse)
    assert_close(layer(thin).feat, layer(Voxels(coarse.coord[keep], thin.feat, 2)).feat)
    assert len(prune(coarse, torch.zeros(len(coarse), dtype=torch.bool))) == 0
    assert_close(up(prune(thin, torch.ones(len(thin), dtype=torch.bool))).feat, out.feat)


def test_a_pruned_input_grid_has_no_points() -> None:
    grid = random_grid([5], 2)
    grid.point_to_voxel = torch.arange(5)
    with pytest.raises(ValueError, match="no points"):
        prune(grid, torch.ones(5, dtype=torch.bool)).to_points()


@pytest.mark.parametrize("padding", [0, 1])
def test_transposed_onto_existing_voxels(padding: int) -> None:
    """Only the voxels of the target, with the values of the generative layer there."""
    target = random_grid([40, 12], 2, seed=3)
    coarse = random_grid([15, 20], 4, low=-2, size=4)
    coarse.stride = 2
    layer = SparseConvTranspose3d(4, 3, 3, stride=2, padding=padding, bias=False).double()
    out = layer(coarse, target)
    assert out.coord is target.coord
    assert_close(dense(out), dense(layer(coarse)) * (dense(target) != 0).any(1, keepdim=True))
    assert out.feat.abs().sum() > 0
    upstream = torch.randn_like(out.feat)
    (gradient,) = torch.autograd.grad(out.feat, layer.weight, upstream)
    grown = torch.nn.functional.conv_transpose3d(
        volume(coarse, [-2] * 3, [2] * 3), kernel(layer.weight, (3, 3, 3)).transpose(0, 1), stride=2
    )
    batch, *cells = (target.coord.long() + torch.tensor([0, *[4 + padding] * 3])).T
    inside = torch.stack([(c >= 0) & (c < grown.shape[2]) for c in cells]).all(0)
    x, y, z = (c[inside] for c in cells)
    values = grown.permute(0, 2, 3, 4, 1)[batch[inside], x, y, z]
    assert_close(out.feat[inside], values)
    assert_close(gradient, torch.autograd.grad(values, layer.weight, upstream[inside])[0])


def test_transposed_onto_refuses_another_stride() -> None:
    grid = random_grid([5], 2)
    grid.stride = 4
    with pytest.raises(ValueError, match="leads to stride 2; the target has 1 clouds of stride 1"):
        SparseConvTranspose3d(2, 2, 2, stride=2).double()(grid, random_grid([5], 2))


def test_dense_volumes() -> None:
    grid = random_grid([30, 0, 7], 3, low=-5)
    low, shape = bounds(grid)
    full = to_dense(grid, low, shape)
    assert full.shape == (3, 3, *shape)
    assert_close(full, volume(grid, low, [l + s for l, s in zip(low, shape, strict=True)]))
    assert_close(to_dense(grid, low), full)
    back = from_dense(full, low=low, stride=2)
    order = torch.tensor(sorted(range(len(grid)), key=lambda i: grid.coord[i].tolist()))
    assert torch.equal(back.coord, grid.coord[order])
    assert (back.batch_size, back.stride) == (3, 2)
    assert_close(back.feat, grid.feat[order])
    upstream = torch.randn_like(back.feat)
    (gradient,) = torch.autograd.grad(back.feat, grid.feat, upstream)
    assert_close(gradient[order], upstream)
    assert to_dense(grid, low, shape, fill=-1.0).amin() <= -1
    everything = from_dense(full, mask=torch.ones(3, *shape, dtype=torch.bool))
    assert len(everything) == 3 * shape[0] * shape[1] * shape[2]


def test_dense_volume_of_a_bounded_grid() -> None:
    coord = torch.tensor([[1, 2, 0, 3]], dtype=torch.int32)
    grid = Voxels(coord, torch.ones(1, 2), 2, spatial_shape=(4, 5, 6))
    assert to_dense(grid).shape == (2, 2, 4, 5, 6)
    empty = Voxels(coord[:0], torch.ones(0, 2), 2)
    assert bounds(empty) == ((0, 0, 0), (0, 0, 0))
    assert to_dense(empty, shape=(2, 2, 2)).abs().sum() == 0


def test_an_ordinary_layer_as_a_sparse_one() -> None:
    grid = random_grid([30], 4)
    norm = nn.BatchNorm1d(4).double()
    out = FeatureWise(norm)(grid)
    assert out.coord is grid.coord
    assert_close(out.feat, nn.BatchNorm1d(4).double()(grid.feat))
