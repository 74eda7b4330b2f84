"""Many random voxel sets, thread counts and forked processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from dense_reference import at, dense_conv, kernel, random_grid, volume
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from pc3d import InputError, Voxels
from pc3d.sparse import SparseConv3d, SparseInverseConv3d, SparseSequential, SubMConv3d

# Lowest corners of islands: far from each other, even (so that strides keep them apart), up to the range of the keys.
FAR = 2**18
corners = st.lists(st.tuples(*[st.sampled_from([-FAR, -1024, 0, 1024, FAR])] * 3), min_size=1, max_size=3, unique=True)
edge_corners = st.sampled_from(
    [[(-(2**31) + 16, 0, 0), (2**31 - 64, 0, 0)], [(0, 0, 2**31 - 64)], [(0, -(2**31) + 16, 8)]]
)
clouds = st.lists(st.one_of(st.just(0), st.just(1), st.integers(2, 40)), min_size=1, max_size=3)


@st.composite
def voxel_sets(draw: st.DrawFn) -> tuple[Voxels, list[tuple[Tensor, Voxels]]]:
    """A batch of voxels in random order, and its islands: rows, and the same voxels moved near the origin."""
    counts = draw(clouds)
    islands, coords, feats, first = [], [], [], 0
    for number, corner in enumerate(draw(st.one_of(corners, edge_corners))):
        near = random_grid([max(c - number, 0) for c in counts], 3, seed=draw(st.integers(0, 10**6)))
        islands.append((torch.arange(first, first + len(near)), near))
        coords.append((near.coord.long() + torch.tensor([0, *corner])).int())
        feats.append(near.feat.detach())
        first += len(near)
    order = torch.randperm(first, generator=torch.Generator().manual_seed(first))
    row_of = torch.empty_like(order)
    row_of[order] = torch.arange(first)
    voxels = Voxels(torch.cat(coords)[order], torch.cat(feats)[order].float(), len(counts))
    return voxels, [(row_of[rows], near) for rows, near in islands]


def equals_dense(drawn: tuple[Voxels, list[tuple[Tensor, Voxels]]], size: int, seed: int) -> None:
    """Submanifold, strided and inverse layers on all islands at once are dense convolutions of each."""
    voxels, islands = drawn
    torch.manual_seed(seed)
    same, down = SubMConv3d(3, 4, size), SparseConv3d(4, 5, 2, stride=2)
    up = SparseInverseConv3d(5, 3, 2, bias=False)
    window = ((2,) * 3, (2,) * 3, (0,) * 3, (1,) * 3)
    middle = same(voxels)
    coarse = down(middle)
    fine = up(coarse)
    assert fine.coord is voxels.coord
    coarse_rows = 0
    for rows, near in islands:
        weight, bias = same.weight.detach().double(), same.bias
        assert bias is not None
        dense = F.conv3d(volume(near, [-3] * 3, [3] * 3), kernel(weight, (size,) * 3), bias.double(), padding=size // 2)
        expected = at(dense, near.coord, [-3] * 3)
        assert_close(middle.feat[rows].double(), expected, rtol=1e-4, atol=1e-5)
        strided, active, low = dense_conv(near.with_feat(expected), down.weight.double(), window)
        assert down.bias is not None
        strided = strided + down.bias.double()[:, None, None, None]
        coarse_rows += int(active.sum())
        grown = F.conv_transpose3d(
            strided * active[:, None], kernel(up.weight.double(), (2, 2, 2)).transpose(0, 1), stride=2
        )
        back = at(grown, near.coord, [2 * l for l in low])
        assert_close(fine.feat[rows].double(), back, rtol=1e-4, atol=1e-4)
    assert len(coarse) == coarse_rows
    refuses_duplicates(voxels)


def refuses_duplicates(voxels: Voxels) -> None:
    if len(voxels) == 0:
        return
    again = Voxels(torch.cat([voxels.coord, voxels.coord[:1]]), torch.cat([voxels.feat, voxels.feat[:1]]), 3)
    with pytest.raises(InputError, match="rows repeat"):
        SubMConv3d(3, 4, 3)(again)
    with pytest.raises(InputError, match="rows repeat"):
        SparseConv3d(3, 4, 2, 2)(again)


@settings(max_examples=40)
@given(drawn=voxel_sets(), size=st.sampled_from([1, 3, 5]), seed=st.integers(0, 100))
def test_random_voxel_sets_equal_dense(drawn, size, seed):
    equals_dense(drawn, size, seed)


@pytest.mark.slow
@settings(max_examples=1000)
@given(drawn=voxel_sets(), size=st.sampled_from([1, 3, 5]), seed=st.integers(0, 100))
def test_a_thousand_random_voxel_sets_equal_dense(drawn, size, seed):
    equals_dense(drawn, size, seed)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rounds", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_repeated_steps_give_the_same_bits(rounds: int, threads: None) -> None:
    """Maps, features and all gradients; threads are more than the cores of most machines."""
    torch.manual_seed(0)
    voxels = random_grid([1200, 900], 12, size=14, dtype=torch.float32)
    net = SparseSequential(
        SubMConv3d(12, 32, 3), SparseConv3d(32, 40, 2, 2), SubMConv3d(40, 40, 3), SparseInverseConv3d(40, 20, 2)
    )
    first: list[Tensor] = []
    for _ in range(rounds):
        for count in (1, 2, 4, 8):
            torch.set_num_threads(count)
            out = net(Voxels(voxels.coord, voxels.feat, 2)).feat
            found = [out, *torch.autograd.grad(out, [voxels.feat, *net.parameters()], torch.cos(out.detach()))]
            first = first or found
            assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("piece", [0, *(pytest.param(piece, marks=pytest.mark.slow) for piece in range(1, 11))])
def test_forked_processes_build_maps(piece: int, threads: None) -> None:
    """As a DataLoader worker does, after the parent has used its threads; 1,000 processes per slow piece."""
    torch.set_num_threads(2)
    voxels = random_grid([400, 300], 4, size=12, dtype=torch.float32, seed=piece)
    net = SparseSequential(SubMConv3d(4, 8, 3), SparseConv3d(8, 8, 2, 2), SparseInverseConv3d(8, 4, 2))
    with torch.no_grad():
        expected = net(voxels).feat
        for number in range(1000 if piece else 20):
            if number % 50 == 0:
                net(Voxels(voxels.coord, voxels.feat, 2))
            child = os.fork()
            if child == 0:
                forked_build(net, voxels, expected)
            _, status = os.waitpid(child, 0)
            assert status == 0, f"process {number}: wait status {status} ({signal.SIGALRM.value} is a deadlock)"


def forked_build(net: SparseSequential, voxels: Voxels, expected: Tensor) -> None:
    """Ends the process: exit code 0 if a fresh grid gives the expected features within 20 s."""
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        torch.set_num_threads(1)  # what a DataLoader worker sets; torch's own operators need it after a fork
        code = 0 if torch.equal(net(Voxels(voxels.coord, voxels.feat, 2)).feat, expected) else 2
    finally:
        os._exit(code)
