"""Attention with contextual relative positions against its formula, pair by pair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pc3d.nn.attention import group_windows
from pc3d.nn.contextual import BinnedWindows, contextual_attention

COUNTS, LONGEST = (4, 1, 3), 5


def case(points: int, dtype: torch.dtype) -> tuple[BinnedWindows, Tensor, list[Tensor]]:
    """Windows of random members, their numbers, and q, k, v and the three tables."""
    generator = torch.Generator().manual_seed(points)
    number = torch.randint(6, (points,), generator=generator)
    bins = torch.stack([torch.randint(count, (points,), generator=generator) for count in COUNTS], 1)
    shapes = [(points, 2, 4)] * 3 + [(2 * LONGEST - 1, 3, 2, 4)] * 3
    tensors = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    windows = group_windows(number, torch.bincount(number, minlength=6))
    return BinnedWindows(windows, bins, COUNTS), number, tensors


def by_pairs(binned: BinnedWindows, number: Tensor, tensors: list[Tensor]) -> Tensor:
    q, k, v, *tables = tensors
    away = binned.bins[:, None] - binned.bins[None] + LONGEST - 1  # (query, key, axis)
    for_query, for_key, for_value = (sum(table[away[..., axis], axis] for axis in range(3)) for table in tables)
    scores = torch.einsum("ihd,jhd->hij", q, k) + torch.einsum("ihd,ijhd->hij", q, for_query)
    scores = scores + torch.einsum("jhd,ijhd->hij", k, for_key)
    share = scores.masked_fill(number[:, None] != number, -torch.inf).softmax(-1)
    return torch.einsum("hij,ijhd->ihd", share, v + for_value)


@pytest.mark.parametrize("backend", ["kernels", "padded", "loop"])
def test_formula_and_gradients(backend: str) -> None:
    dtype = torch.float32 if backend == "kernels" else torch.float64
    binned, number, tensors = case(50, dtype)
    actual, expected = (
        contextual_attention(*tensors[:3], binned, *tensors[3:], backend),
        by_pairs(binned, number, tensors),
    )
    assert_close(actual, expected)
    upstream = torch.randn(actual.shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    for a, b in zip(*(torch.autograd.grad(out, tensors, upstream) for out in (actual, expected)), strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("points", [0, 1])
def test_few_points(points: int) -> None:
    binned, number, tensors = case(points, torch.float32)
    actual = contextual_attention(*tensors[:3], binned, *tensors[3:])
    assert_close(actual, by_pairs(binned, number, tensors))


def test_float32_under_autocast() -> None:
    binned, number, tensors = case(30, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = contextual_attention(*tensors[:3], binned, *tensors[3:])
    assert_close(actual, by_pairs(binned, number, tensors))


def test_short_tables() -> None:
    binned, _, tensors = case(5, torch.float32)
    with pytest.raises(ValueError, match=r"tables of 5 rows are too short for \(4, 1, 3\) bins"):
        contextual_attention(*tensors[:3], binned, *(table[:5] for table in tensors[3:]))
