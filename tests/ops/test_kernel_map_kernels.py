"""The C++ kernel maps against the plain-torch builders: the same pairs in the same order, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pc3d.errors import InputError
from pc3d.ops.backend import cpu_kernels, use_backend
from pc3d.ops.kernel_map import KernelMap, strided_map, submanifold_map, transposed_map

pytestmark = pytest.mark.skipif(cpu_kernels() is None, reason="C++ kernels are not built")

Map = tuple[Tensor, KernelMap]


def _voxels(count: int, span: int, seed: int = 0, batch: int = 2, low: int = -3) -> Tensor:
    """Up to ``count`` distinct voxels in raster order."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randint(low, low + span, (count, 3), generator=generator)
    clouds = torch.randint(0, batch, (count, 1), generator=generator)
    return torch.cat([clouds, cells], 1).unique(dim=0).int()


def _shuffled(coord: Tensor) -> Tensor:
    return coord[torch.randperm(len(coord), generator=torch.Generator().manual_seed(1))]


CLOUDS = {
    "dense": _voxels(3000, 12),
    "thin": _voxels(500, 400),
    "two chunks of rows": _voxels(9000, 30),
    "shuffled": _shuffled(_voxels(9000, 30)),
    "one voxel": torch.tensor([[3, -7, 0, 9]], dtype=torch.int32),
    "no voxels": torch.zeros(0, 4, dtype=torch.int32),
    "gap in the batch": _voxels(200, 8, batch=1) + torch.tensor([[5, 0, 0, 0]], dtype=torch.int32),
    "far apart": torch.tensor([[0, -(10**6), 0, 0], [0, 10**6, 1, 2**20]], dtype=torch.int32),
    "wide keys": _shuffled(_voxels(3000, 2**18, low=-(2**17))),
    "view": _voxels(300, 8).repeat(1, 2)[:, 4:],
    "edge of int32": torch.tensor([[0, -(2**31), 5, 5], [0, -(2**31) + 1, 5, 5]], dtype=torch.int32),
}
KERNELS = [(3, 3, 3), (1, 1, 1), (5, 3, 1), (1, 5, 3), (2, 2, 2), (3, 2, 3), (5, 5, 5)]


def _same(fast: KernelMap, slow: KernelMap) -> None:
    assert (fast.num_in, fast.num_out) == (slow.num_in, slow.num_out)
    for name in ("offsets", "in_rows", "out_rows"):
        a, b = getattr(fast, name), getattr(slow, name)
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dilation", [(1, 1, 1), (1, 3, 2)])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", CLOUDS)
def test_submanifold_maps(name: str, kernel: tuple[int, int, int], dilation: tuple[int, int, int]) -> None:
    coord = CLOUDS[name]
    fits = name != "edge of int32" or kernel[0] == 1
    maps = []
    for backend in ("reference", "auto"):
        with use_backend(backend):
            if not fits:
                with pytest.raises(InputError, match="too wide a grid"):
                    submanifold_map(coord, kernel, dilation)
                continue
            maps += [submanifold_map(coord, kernel, dilation)]
            maps += [maps[-1].inverse()]
    for slow, fast in zip(maps[:2], maps[2:], strict=True):
        _same(fast, slow)


STRIDED = [
    # kernel, stride, padding, dilation
    ((2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1)),
    ((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
    ((3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    ((3, 1, 2), (3, 1, 2), (0, 2, 1), (1, 1, 1)),
    ((3, 3, 3), (2, 2, 2), (2, 2, 2), (2, 3, 2)),
    ((2, 2, 2), (4, 4, 4), (0, 0, 0), (1, 1, 1)),
]


@pytest.mark.parametrize("shape", [None, (9, 12, 400), (1, 1, 1)])
@pytest.mark.parametrize("window", STRIDED, ids=str)
@pytest.mark.parametrize("build", [strided_map, transposed_map])
@pytest.mark.parametrize("name", [name for name in CLOUDS if name != "edge of int32"])
def test_strided_and_transposed_maps(name: str, build, window, shape) -> None:
    results: list[Map] = []
    for backend in ("reference", "auto"):
        with use_backend(backend):
            results.append(build(CLOUDS[name], *window, spatial_shape=shape))
    (slow_coord, slow), (fast_coord, fast) = results
    assert fast_coord.dtype == torch.int32
    assert torch.equal(fast_coord, slow_coord)
    _same(fast, slow)
    with use_backend("reference"):
        slow_inverse = slow.inverse()
    _same(fast.inverse(), slow_inverse)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 300),
    span=st.integers(1, 60),
    kernel=st.tuples(*[st.integers(1, 4)] * 3),
    stride=st.tuples(*[st.integers(1, 4)] * 3),
    padding=st.tuples(*[st.integers(0, 3)] * 3),
    dilation=st.tuples(*[st.integers(1, 3)] * 3),
    seed=st.integers(0, 100),
)
def test_any_window(count, span, kernel, stride, padding, dilation, seed) -> None:
    coord = _shuffled(_voxels(count, span, seed, batch=3, low=-(seed % 40)))
    with use_backend("reference"):
        expected = submanifold_map(coord, kernel, dilation)
        down_coord, down = strided_map(coord, kernel, stride, padding, dilation)
        up_coord, up = transposed_map(coord, kernel, stride, padding, dilation)
    _same(submanifold_map(coord, kernel, dilation), expected)
    for (wanted_coord, wanted), (got_coord, got) in (
        ((down_coord, down), strided_map(coord, kernel, stride, padding, dilation)),
        ((up_coord, up), transposed_map(coord, kernel, stride, padding, dilation)),
    ):
        assert torch.equal(got_coord, wanted_coord)
        _same(got, wanted)


@pytest.mark.parametrize("order", ["raster", "shuffled"])
def test_any_thread_count_gives_the_same_bits(order: str) -> None:
    coord = _voxels(60_000, 90)
    coord = _shuffled(coord) if order == "shuffled" else coord
    before = torch.get_num_threads()
    maps: list[KernelMap] = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            down_coord, down = strided_map(coord, (3, 3, 3), (2, 2, 2), (1, 1, 1))
            maps += [submanifold_map(coord, (3, 3, 3)), down, down.inverse(), submanifold_map(down_coord, (3, 3, 3))]
    finally:
        torch.set_num_threads(before)
    for i, other in enumerate(maps[4:]):
        _same(other, maps[i % 4])


def test_bad_voxels_are_refused_as_by_the_reference() -> None:
    coord = CLOUDS["dense"]
    twice = torch.cat([coord, coord[10:12]])
    negative = coord - torch.tensor([1, 0, 0, 0], dtype=torch.int32)
    for build in (lambda c: submanifold_map(c, (3, 3, 3)), lambda c: strided_map(c, (2, 2, 2), (2, 2, 2))):
        with pytest.raises(InputError, match=f"2 of {len(twice)} rows repeat another one"):
            build(twice)
        with pytest.raises(InputError, match="field 'batch' holds -1"):
            build(negative)
        with pytest.raises(ValueError, match="must be"):
            build(coord[:, :3])
