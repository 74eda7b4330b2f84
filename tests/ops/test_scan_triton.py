"""The Triton scan against the reference: interpreted, or on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pc3d.ops.backend import use_backend
from pc3d.ops.scan import selective_scan, ssd

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu_kernel
CLOUDS = {"one chunk": (20,), "several": (70, 0, 1, 64, 130), "empty": (0, 0)}


def operands(tokens: int, clouds: int, channels: int, groups: int, states: int, rates: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    made = {
        "u": randn(tokens, channels),
        "delta": randn(tokens, channels),
        "A": -randn(channels, rates).abs() - 0.1,
        "B": randn(tokens, groups, states),
        "C": randn(tokens, groups, states),
        "D": randn(channels),
        "z": randn(tokens, channels),
        "delta_bias": randn(channels),
        "initial_state": randn(clouds, channels, states),
    }
    return {name: value.to(DEVICE).requires_grad_() for name, value in made.items()}


def run(sizes: tuple[int, ...], backend, drop: tuple[str, ...] = (), **options: object) -> list[Tensor]:
    """Output, last states and all gradients."""
    offsets = torch.tensor([0, *sizes]).cumsum(0).to(DEVICE)
    shape = {"channels": 4, "groups": 2, "states": 3, "rates": 3}
    shape.update({name: options.pop(name) for name in list(options) if name in shape})
    tensors = operands(int(offsets[-1]), len(sizes), **shape)
    kept = {name: value for name, value in tensors.items() if name not in drop}
    softplus = bool(options.pop("softplus", True))
    with use_backend(backend):
        y, last = selective_scan(**kept, offsets=offsets, delta_softplus=softplus, **options)
        weights = (torch.linspace(-1, 2, t.numel(), device=DEVICE).view_as(t) for t in (y, last))
        loss = sum((t * w).sum() for t, w in zip((y, last), weights, strict=True))
        grads = torch.autograd.grad(loss, list(kept.values()), allow_unused=True, materialize_grads=True)
    return [y, last, *grads]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for left, right in zip(found, expected, strict=True):
        scale = max(1.0, float(right.abs().max())) if right.numel() else 1.0
        torch.testing.assert_close(left, right, atol=2e-5 * scale, rtol=0)


@pytest.mark.parametrize("clouds", CLOUDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_equals_the_reference(clouds, reverse):
    found, expected = (run(CLOUDS[clouds], backend, reverse=reverse) for backend in ("triton", "reference"))
    assert_same(found, expected)


@pytest.mark.parametrize(
    "drop", [("D",), ("z",), ("delta_bias",), ("initial_state",), ("D", "z", "delta_bias", "initial_state")]
)
def test_optional_inputs(drop):
    # Without softplus steps may be negative and states grow: keep clouds short.
    found, expected = (run((9, 5), backend, drop, softplus="D" not in drop) for backend in ("triton", "reference"))
    assert_same(found, expected)


def test_one_rate_per_channel_and_uneven_splits():
    shape = {"channels": 10, "groups": 2, "states": 4, "rates": 1}
    found, expected = (run((40, 30), backend, **shape) for backend in ("triton", "reference"))
    assert_same(found, expected)


def test_ssd_takes_the_kernels_too(monkeypatch):
    from pc3d.ops import scan_triton

    calls = []
    original = scan_triton.scan
    monkeypatch.setattr(scan_triton, "scan", lambda *args: calls.append(1) or original(*args))
    generator = torch.Generator().manual_seed(0)
    x, dt = torch.randn(30, 2, 3, generator=generator), torch.rand(30, 2, generator=generator)
    coefficients = [torch.randn(30, 1, 4, generator=generator) for _ in range(2)]
    arguments = [t.to(DEVICE) for t in (x, dt, torch.tensor([-1.0, -0.5]), *coefficients, torch.tensor([0, 12, 30]))]
    results = []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            results.append(list(ssd(*arguments)))
    assert_same(*results)
    assert calls == [1]
