"""Sparse convolution layers against dense ones, and the promises of their docstrings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from dense_reference import active_coord, at, dense_conv, kernel, random_grid, volume
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from pc3d import Voxels
from pc3d.ops.backend import use_backend
from pc3d.sparse import (
    SparseConv3d,
    SparseConvTranspose3d,
    SparseInverseConv3d,
    SparseSequential,
    SubMConv3d,
)

triples = lambda low, high: st.tuples(*[st.integers(low, high)] * 3)  # noqa: E731
clouds = st.lists(st.integers(0, 25), min_size=1, max_size=3)
seeds = st.integers(0, 1000)
thorough = settings(max_examples=20, deadline=None)


@pytest.fixture(params=["auto", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_backend(request.param):
        yield


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def same_gradients(out: torch.Tensor, expected: torch.Tensor, *leaves: torch.Tensor) -> None:
    """Equal values, and equal gradients of a random weighted sum."""
    assert_close(out, expected)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    if out.requires_grad:
        got = torch.autograd.grad(out, leaves, upstream)
        assert_close(got, torch.autograd.grad(expected, leaves, upstream, allow_unused=True))


@thorough
@given(counts=clouds, size=triples(1, 3), dilation=triples(1, 2), bias=st.booleans(), seed=seeds)
def test_submanifold_equals_dense(counts, size, dilation, bias, seed):
    voxels = random_grid(counts, 3, seed=seed)
    layer = SubMConv3d(3, 4, size, dilation, bias).double()
    out = layer(voxels)
    assert out.coord is voxels.coord
    # An even kernel reaches one voxel further down than up.
    before = [d * (k // 2) for k, d in zip(size, dilation, strict=True)]
    after = [d * (k - 1 - k // 2) for k, d in zip(size, dilation, strict=True)]
    low, high = [-3] * 3, [3] * 3
    padding = [side for axis in (2, 1, 0) for side in (before[axis], after[axis])]
    dense = F.conv3d(
        F.pad(volume(voxels, low, high), padding), kernel(layer.weight, size), layer.bias, dilation=dilation
    )
    leaves = [voxels.feat, layer.weight, *([layer.bias] if bias else [])]
    same_gradients(out.feat, at(dense, voxels.coord, low), *leaves)


@thorough
@given(
    counts=clouds, size=triples(1, 3), stride=triples(1, 3), padding=triples(0, 2), dilation=triples(1, 2), seed=seeds
)
def test_strided_and_inverse_equal_dense(counts, size, stride, padding, dilation, seed):
    voxels = random_grid(counts, 2, seed=seed)
    layer = SparseConv3d(2, 3, size, stride, padding, dilation, bias=False).double()
    coarse = layer(voxels)
    dense, active, low = dense_conv(voxels, layer.weight, (size, stride, padding, dilation))
    assert torch.equal(coarse.coord, active_coord(active, low))
    same_gradients(coarse.feat, at(dense, coarse.coord, low), voxels.feat, layer.weight)

    inverse = SparseInverseConv3d(3, 2, size, bias=False).double()
    feat = torch.randn(len(coarse), 3, dtype=torch.float64, requires_grad=True)
    fine = inverse(coarse.with_feat(feat))
    assert fine.coord is voxels.coord
    grown = F.conv_transpose3d(
        volume(coarse.with_feat(feat), low, [l + n for l, n in zip(low, active.shape[1:], strict=True)]),
        kernel(inverse.weight, size).transpose(0, 1),
        stride=stride,
        dilation=dilation,
    )
    origin = [l * s - p for l, s, p in zip(low, stride, padding, strict=True)]
    same_gradients(fine.feat, at(grown, voxels.coord, origin), feat, inverse.weight)


@thorough
@given(
    counts=clouds, size=triples(1, 3), stride=triples(1, 3), padding=triples(0, 2), dilation=triples(1, 2), seed=seeds
)
def test_transposed_equals_dense(counts, size, stride, padding, dilation, seed):
    voxels = random_grid(counts, 2, seed=seed)
    voxels.stride = stride
    layer = SparseConvTranspose3d(2, 3, size, stride, padding, dilation, bias=False).double()
    out = layer(voxels)
    low = [-3] * 3
    origin = [l * s - p for l, s, p in zip(low, stride, padding, strict=True)]
    ones = voxels.with_feat(torch.ones(len(voxels), 1, dtype=torch.float64))
    grow = dict(stride=stride, dilation=dilation)
    dense = F.conv_transpose3d(volume(voxels, low, [3] * 3), kernel(layer.weight, size).transpose(0, 1), **grow)
    reached = F.conv_transpose3d(volume(ones, low, [3] * 3), torch.ones(1, 1, *size).double(), **grow)[:, 0] > 0.5
    assert torch.equal(out.coord, active_coord(reached, origin))
    assert out.stride == 1
    same_gradients(out.feat, at(dense, out.coord, origin), voxels.feat, layer.weight)


def test_unbounded_grid_keeps_what_a_bounded_one_drops() -> None:
    coord = torch.tensor([[0, 0, 0, 0], [0, 4, 4, 4]], dtype=torch.int32)
    down = SparseConv3d(1, 1, 2, stride=2)
    feat = torch.ones(2, 1)
    assert down(Voxels(coord, feat, 1)).coord.tolist() == [[0, 0, 0, 0], [0, 2, 2, 2]]
    bounded = down(Voxels(coord, feat, 1, spatial_shape=(5, 5, 5)))
    assert bounded.coord.tolist() == [[0, 0, 0, 0]]
    assert bounded.spatial_shape == (2, 2, 2)
    up = SparseConvTranspose3d(1, 1, 2, stride=2, padding=1)(bounded)
    assert up.spatial_shape == (2, 2, 2)
    assert up.coord.tolist() == [[0, 0, 0, 0]]


def test_grids_carry_their_stride_and_points() -> None:
    voxels = random_grid([20, 0, 5], 2, dtype=torch.float32)
    voxels.point_to_voxel = torch.arange(len(voxels))
    coarse = SparseConv3d(2, 2, 3, stride=(2, 2, 1), padding=1)(voxels)
    assert coarse.stride == (2, 2, 1)
    assert SparseConv3d(2, 2, 2, stride=(1, 1, 2))(coarse).stride == 2
    assert coarse.batch_size == 3
    with pytest.raises(ValueError, match="no points"):
        coarse.to_points()
    fine = SparseInverseConv3d(2, 2, 3)(coarse)
    assert fine.stride == 1
    assert fine.to_points().shape == (len(voxels), 2)


def test_maps_are_built_once_per_grid_and_rule() -> None:
    voxels = random_grid([20], 2, dtype=torch.float32)
    layers = SparseSequential(
        SubMConv3d(2, 2, 3), torch.nn.ReLU(), SubMConv3d(2, 2, 3), SparseConv3d(2, 2, 2, stride=2), SubMConv3d(2, 2, 3)
    )
    first = layers(voxels)
    built = len(voxels.context)
    fine = SparseInverseConv3d(2, 2, 2)(first)
    SubMConv3d(2, 2, 3)(fine)
    second = SparseConv3d(2, 2, 2, stride=2)(fine)
    assert second.coord is first.coord
    assert len(voxels.context) == built
    SubMConv3d(2, 2, 3, dilation=2)(fine)
    assert len(voxels.context) == built + 1


def test_a_thinned_grid_gets_its_own_map() -> None:
    voxels = random_grid([30], 2)
    layer = SubMConv3d(2, 2, 3).double()
    layer(voxels)
    thin = Voxels(voxels.coord[:10], voxels.feat[:10], 1, context=voxels.context)
    fresh = Voxels(voxels.coord[:10], voxels.feat[:10], 1)
    assert_close(layer(thin).feat, layer(fresh).feat)


@pytest.mark.parametrize("counts", [[0], [1], [0, 1, 0]])
def test_tiny_grids(counts: list[int], backend: None) -> None:
    voxels = random_grid(counts, 2, dtype=torch.float32)
    coarse = SparseConv3d(2, 3, 2, stride=2)(SubMConv3d(2, 2, 5)(voxels))
    fine = SparseInverseConv3d(3, 2, 2)(coarse)
    assert len(coarse) == sum(counts)
    assert fine.coord is voxels.coord
    fine.feat.sum().backward()
    assert voxels.feat.grad is not None


@pytest.mark.parametrize("cls", [SubMConv3d, SparseConv3d])
def test_gradcheck(cls: type[SubMConv3d]) -> None:
    voxels = random_grid([6, 3], 2, size=3)
    layer = cls(2, 2, 2).double()
    parameters = tuple(layer.parameters())

    def run(feat, weight, bias):
        replaced = {"weight": weight, "bias": bias}
        return torch.func.functional_call(layer, replaced, voxels.with_feat(feat)).feat

    assert torch.autograd.gradcheck(run, (voxels.feat, *parameters))
    assert torch.autograd.gradgradcheck(run, (voxels.feat, *parameters))


def test_row_order_does_not_matter(backend: None) -> None:
    voxels = random_grid([60, 40], 4, dtype=torch.float32)
    order = torch.randperm(len(voxels))
    shuffled = Voxels(voxels.coord[order], voxels.feat[order], 2)
    net = SparseSequential(
        SubMConv3d(4, 8, 3), SparseConv3d(8, 8, 3, 2, 1), SubMConv3d(8, 8, 3), SparseInverseConv3d(8, 5, 3)
    )
    assert_close(net(voxels).feat[order], net(shuffled).feat, rtol=1e-5, atol=1e-5)


def test_any_thread_count_gives_the_same_bits(backend: None, threads: None) -> None:
    voxels = random_grid([1500, 1300], 19, low=-8, size=16, dtype=torch.float32)
    net = SparseSequential(
        SubMConv3d(19, 40, 3), SparseConv3d(40, 48, 2, 2), SubMConv3d(48, 48, 3), SparseInverseConv3d(48, 33, 2)
    )
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        out = net(Voxels(voxels.coord, voxels.feat, 2)).feat
        leaves = [voxels.feat, *net.parameters()]
        results.append([out, *torch.autograd.grad(out, leaves, torch.cos(out.detach()))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, backend: None) -> None:
    voxels = random_grid([80, 50], 8, dtype=torch.float32)
    layer = SubMConv3d(8, 16, 3)
    expected = layer(voxels).feat
    with torch.autocast("cpu", dtype):
        out = layer(voxels).feat
    assert out.dtype == dtype
    assert_close(out.float(), expected, rtol=0.02, atol=0.02)
    out.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    with pytest.raises(ValueError, match="autocast"):
        layer(voxels.with_feat(voxels.feat.to(dtype)))


def test_default_initialisation() -> None:
    torch.manual_seed(0)
    layer = SparseConv3d(8, 16, 3)
    bound = 1 / (8 * 27) ** 0.5
    for values in (layer.weight, layer.bias):
        assert values is not None
        assert bound * 0.8 < values.abs().max() <= bound
    assert repr(layer) == (
        "SparseConv3d(8, 16, kernel_size=(3, 3, 3), stride=(1, 1, 1), padding=(0, 0, 0), dilation=(1, 1, 1))"
    )
