"""Sparse pooling against dense windows and plain means."""

from __future__ import annotations

import pytest
import torch
from dense_reference import active_coord, at, dense_conv, random_grid, strided_windows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from pc3d import Voxels
from pc3d.sparse import SparseAvgPool3d, SparseConv3d, SparseGlobalPool, SparseInverseConv3d, SparseMaxPool3d

triples = lambda low, high: st.tuples(*[st.integers(low, high)] * 3)  # noqa: E731


def windows(voxels: Voxels, window: tuple[tuple[int, ...], ...], fill: float) -> Tensor:
    """``(B, C, X, Y, Z, K)``: the cells under every window of a dense volume."""
    (kx, ky, kz), (sx, sy, sz), _, (dx, dy, dz) = window
    dense, _ = strided_windows(voxels, window, fill)
    cells = dense.unfold(2, dx * (kx - 1) + 1, sx).unfold(3, dy * (ky - 1) + 1, sy).unfold(4, dz * (kz - 1) + 1, sz)
    return cells[..., ::dx, ::dy, ::dz].flatten(5)


@settings(max_examples=20, deadline=None)
@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    window=st.tuples(triples(1, 3), triples(1, 3), triples(0, 1), triples(1, 2)),
    seed=st.integers(0, 1000),
)
def test_pooling_equals_dense(counts, window, seed):
    voxels = random_grid(counts, 3, seed=seed)
    ones = torch.ones(torch.Size(window[0]).numel(), 3, 1, dtype=torch.float64)
    _, active, low = dense_conv(voxels, ones, window)

    largest = SparseMaxPool3d(*window)(voxels)
    assert torch.equal(largest.coord, active_coord(active, low))
    expected = at(windows(voxels, window, float("-inf")).amax(-1), largest.coord, low)
    assert torch.equal(largest.feat, expected)

    mean = SparseAvgPool3d(*window)(voxels)
    count = windows(voxels.with_feat(torch.ones_like(voxels.feat)), window, 0.0).sum(-1)
    expected = at(windows(voxels, window, 0.0).sum(-1) / count.clamp(min=1), mean.coord, low)
    assert_close(mean.feat, expected)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    for out, dense in (
        (mean.feat, expected),
        (largest.feat, at(windows(voxels, window, -1e9).amax(-1), mean.coord, low)),
    ):
        got, wanted = (torch.autograd.grad(x, voxels.feat, upstream, retain_graph=True)[0] for x in (out, dense))
        assert_close(got, wanted)


def test_pooling_shares_its_map_with_convolutions() -> None:
    voxels = random_grid([30], 2, dtype=torch.float32)
    pooled = SparseMaxPool3d(2)(voxels)
    assert SparseConv3d(2, 2, 2, stride=2)(voxels).coord is pooled.coord
    assert pooled.stride == 2
    assert SparseInverseConv3d(2, 2, 2)(pooled).coord is voxels.coord


@pytest.mark.parametrize("mode", ["mean", "max", "sum"])
def test_global_pool(mode: str) -> None:
    voxels = random_grid([7, 0, 12], 3)
    out = SparseGlobalPool(mode)(voxels)
    assert out.shape == (3, 3)
    assert torch.equal(out[1], torch.zeros(3, dtype=torch.float64))
    for cloud in (0, 2):
        rows = voxels.feat[voxels.coord[:, 0] == cloud]
        expected = rows.amax(0) if mode == "max" else getattr(rows, mode)(0)
        assert_close(out[cloud], expected)


def test_pooling_gives_the_same_bits_with_any_thread_count() -> None:
    voxels = random_grid([1500], 16, low=-8, size=16, dtype=torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            grid = Voxels(voxels.coord, voxels.feat, 1)
            for pool in (SparseMaxPool3d(3, 2, 1), SparseAvgPool3d(3, 2, 1)):
                feat = pool(grid).feat
                results.append((feat, *torch.autograd.grad(feat, voxels.feat, torch.cos(feat.detach()))))
    finally:
        torch.set_num_threads(before)
    for i in range(2, len(results)):
        assert all(torch.equal(a, b) for a, b in zip(results[i], results[i % 2], strict=True))
