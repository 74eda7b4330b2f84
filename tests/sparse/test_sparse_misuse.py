"""Misuse of the sparse layers, one row per mistake: each is refused with the value and what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pc3d import Voxels
from pc3d.sparse import (
    SparseConv3d,
    SparseConvTranspose3d,
    SparseInverseConv3d,
    SparseMaxPool3d,
    SubMConv3d,
    add,
    cat,
    from_dense,
    multiply,
    prune,
    to_dense,
)


def cells(*rows: tuple[int, int, int, int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def grid(coord: Tensor | None = None, channels: int = 2, batch_size: int = 1, stride: int = 1) -> Voxels:
    coord = cells((0, 0, 0, 0), (0, 1, 0, 0), (0, 5, 2, 3)) if coord is None else coord
    return Voxels(coord, torch.ones(len(coord), channels), batch_size, stride=stride)


WIDE = cells((0, -(2**31), -(2**31), -(2**31)), (0, 2**31 - 1, 2**31 - 1, 2**31 - 1))
EDGE = cells((0, 2**31 - 1, 0, 0), (0, 0, 0, 0))
MISUSE: dict[str, tuple[Callable[[], object], str]] = {
    "inverse of an input grid": (lambda: SparseInverseConv3d(2, 2, 2)(grid()), "no strided layer made"),
    "inverse of another kernel": (
        lambda: SparseInverseConv3d(2, 2, 3)(SparseConv3d(2, 2, 2, 2)(grid())),
        r"kernel \(3, 3, 3\) on a grid made with kernel \(2, 2, 2\)",
    ),
    "transposed below the input": (lambda: SparseConvTranspose3d(2, 2, 2, 2)(grid()), "stride is a multiple"),
    "transposed onto another stride": (
        lambda: SparseConvTranspose3d(2, 2, 2, 2)(grid(stride=4), grid()),
        "leads to stride 2; the target has 1 clouds of stride 1",
    ),
    "transposed onto another batch": (
        lambda: SparseConvTranspose3d(2, 2, 2, 2)(grid(stride=2), grid(batch_size=2)),
        "on 1 clouds of stride 2 leads to stride 1; the target has 2 clouds",
    ),
    "too wide for keys": (lambda: SubMConv3d(2, 2, 3)(grid(WIDE)), "too wide a grid"),
    "too wide to stride": (lambda: SparseConv3d(2, 2, 2, 2)(grid(WIDE)), "too wide a grid"),
    "too wide to join": (lambda: cat(grid(WIDE[:1]), grid(WIDE[1:])), "too wide a grid"),
    "neighbours beyond int32": (lambda: SubMConv3d(2, 2, 3)(grid(EDGE)), "too wide a grid"),
    "grown beyond int32": (lambda: SparseConvTranspose3d(2, 2, 2, 2)(grid(EDGE, stride=2)), "too wide a grid"),
    "duplicates": (
        lambda: SubMConv3d(2, 2, 3)(grid(cells((0, 1, 2, 3), (0, 0, 0, 0), (0, 1, 2, 3)))),
        r"1 of 3 rows repeat another one \(first \[batch, x, y, z\] = \[0, 1, 2, 3\]\)",
    ),
    "duplicates, strided": (lambda: SparseMaxPool3d(2)(grid(cells((0, 1, 1, 1), (0, 1, 1, 1)))), "rows repeat"),
    "duplicates, joined": (lambda: add(grid(), grid(cells((0, 1, 1, 1), (0, 1, 1, 1)))), "rows repeat"),
    "negative batch": (lambda: SubMConv3d(2, 2, 3)(grid(cells((-1, 0, 0, 0)))), "field 'batch' holds -1"),
    "float coordinates": (lambda: SubMConv3d(2, 2, 3)(grid(torch.zeros(1, 4))), r"must be \(M, 4\) int32"),
    "three columns": (lambda: SubMConv3d(2, 2, 3)(grid(torch.zeros(1, 3, dtype=torch.int32))), r"must be \(M, 4\)"),
    "joined batch sizes": (lambda: cat(grid(), grid(batch_size=2)), "batch_size 1 and 2"),
    "joined strides": (lambda: add(grid(), grid(stride=2)), "stride 1 and 2"),
    "joined dtypes": (
        lambda: cat(grid(), grid().with_feat(torch.ones(3, 2, dtype=torch.float64))),
        "dtype torch.float32 and torch.float64",
    ),
    "added widths": (lambda: add(grid(), grid(channels=3)), "2 and 3 channels"),
    "multiplied widths": (lambda: multiply(grid(), grid(channels=1)), "2 and 1 channels"),
    "nothing to join": (lambda: cat(), "no grids"),
    "channels": (lambda: SubMConv3d(3, 2, 3)(grid()), r"feat \(3, 2\) does not fit weight .* \(27, 3, 2\)"),
    "channels, strided": (lambda: SparseConv3d(3, 2, 2, 2)(grid()), "does not fit weight"),
    "dtype": (lambda: SubMConv3d(2, 2, 3).double()(grid()), "cast one of them, or use autocast"),
    "rows": (lambda: grid().with_feat(torch.ones(2, 2)), "feat has 2 rows for 3 voxels"),
    "mask length": (lambda: prune(grid(), torch.ones(2, dtype=torch.bool)), r"keep must be \(3,\) bool"),
    "mask dtype": (lambda: prune(grid(), torch.ones(3)), "got .* torch.float32"),
    "outside the volume": (
        lambda: to_dense(grid(), shape=(2, 2, 2)),
        r"to \(5, 2, 3\) do not fit .* set low and shape",
    ),
    "below the volume": (lambda: to_dense(grid(cells((0, -1, 0, 0)))), r"from \(-1, 0, 0\) .* set low and shape"),
    "volume without channels": (lambda: from_dense(torch.ones(1, 2, 2, 2)), r"must be \(B, C, X, Y, Z\)"),
    "mask of a volume": (
        lambda: from_dense(torch.ones(1, 1, 2, 2, 2), torch.ones(1, 2, 2, 3, dtype=torch.bool)),
        r"mask must be \(1, 2, 2, 2\) bool",
    ),
    "kernel of zero": (lambda: SubMConv3d(2, 2, 0), "kernel_size must be three integers >= 1, got 0"),
    "two strides": (lambda: SparseConv3d(2, 2, 2, (2, 2)), "stride must be three integers"),
    "negative padding": (lambda: SparseConv3d(2, 2, 2, 2, -1), "padding must be three integers >= 0"),
}


@pytest.mark.parametrize("mistake", MISUSE)
def test_misuse_is_refused(mistake: str) -> None:
    run, message = MISUSE[mistake]
    with pytest.raises(ValueError, match=message) as caught:
        run()
    assert "\n" not in str(caught.value)
