"""Rotary embedding: complex-number reference, shifts, gradients."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from pc3d.errors import InputError
from pc3d.nn.rope import Rotation, rotary_frequencies, rotate, rotation


def test_is_multiplication_by_a_complex_number() -> None:
    values, position = torch.randn(5, 2, 12), torch.randint(0, 50, (5, 3))
    turned = rotate(values, rotation(position, rotary_frequencies(12, 100.0)))
    for axis in range(3):
        for i in range(2):
            u, v = 4 * axis + i, 4 * axis + i + 2
            angle = position[:, axis, None] * 100.0 ** (-i / 2)
            expected = torch.complex(values[..., u], values[..., v]) * torch.exp(1j * angle)
            assert_close(torch.complex(turned[..., u], turned[..., v]), expected, rtol=1e-4, atol=1e-4)


def test_scores_do_not_feel_a_shift() -> None:
    q, k, frequencies = torch.randn(6, 1, 18), torch.randn(6, 1, 18), rotary_frequencies(18, 100.0)
    position = torch.randint(0, 60, (6, 3))
    scores = []
    for shift in (0, 17):
        by = rotation(position + shift, frequencies)
        scores.append(torch.einsum("qhd,khd->qk", rotate(q, by), rotate(k, by)))
    assert_close(scores[1], scores[0], rtol=1e-4, atol=1e-4)


def test_rotating_back_and_gradients() -> None:
    by = rotation(torch.randn(4, 3, dtype=torch.float64), rotary_frequencies(6, 10.0))
    by = Rotation(by.cos.double(), by.sin.double())
    values = torch.randn(4, 2, 6, dtype=torch.float64, requires_grad=True)
    assert_close(rotate(rotate(values, by), Rotation(by.cos, -by.sin)), values, rtol=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(lambda t: rotate(t, by), values)


def test_half_precision_keeps_its_dtype() -> None:
    by = rotation(torch.randn(4, 3), rotary_frequencies(6, 10.0))
    assert rotate(torch.randn(4, 2, 6).half(), by).dtype == torch.float16


def test_misuse() -> None:
    with pytest.raises(InputError, match="heads of 16 channels"):
        rotary_frequencies(16, 10)
    with pytest.raises(InputError, match="base must be positive"):
        rotary_frequencies(18, 0)
