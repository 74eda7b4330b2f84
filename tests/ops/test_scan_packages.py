"""The way to mamba-ssm and causal-conv1d, with stand-ins that compute what their kernels do in their layouts."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pc3d.ops import scan as ops
from pc3d.ops.backend import use_backend


def _selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> tuple[Tensor, Tensor]:
    """``(batch, channels, L)``; B and C ``(batch, groups, N, L)`` or ``(channels, N)``; no gradient of the state."""
    assert all(t is None or t.is_contiguous() for t in (u, delta, B, C, z))
    assert return_last_state
    step = delta + delta_bias[:, None] if delta_bias is not None else delta
    step = F.softplus(step) if delta_softplus else step
    per = u.shape[1] // B.shape[1]
    state, outputs = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        b, c = (v if v.ndim == 2 else v[..., t].repeat_interleave(per, 1) for v in (B, C))
        state = torch.exp(step[..., t, None] * A) * state + (step[..., t] * u[..., t])[..., None] * b
        outputs.append((state * c).sum(-1))
    y = torch.stack(outputs, -1)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), state.detach()


def _causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor, activation: str | None = None
) -> Tensor:
    """``x (batch, channels, L)`` with channels last in memory, ``seq_idx (batch, L)`` int32."""
    assert x.stride(1) == 1
    assert seq_idx.dtype == torch.int32
    y = torch.zeros_like(x) if bias is None else bias[:, None].expand_as(x[0])[None]
    width = weight.shape[1]
    for back in range(width):
        moved = F.pad(x, (back, 0))[..., : x.shape[2]]
        same = F.pad(seq_idx, (back, 0), value=-1)[:, : x.shape[2]] == seq_idx
        y = y + weight[:, width - 1 - back, None] * moved * same[:, None]
    return F.silu(y) if activation == "silu" else y


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins installed; the names of those that are asked to serve."""
    asked: list[str] = []
    scan_interface, conv = ModuleType("mamba_ssm.ops.selective_scan_interface"), ModuleType("causal_conv1d")
    scan_interface.selective_scan_fn = _selective_scan_fn
    conv.causal_conv1d_fn = _causal_conv1d_fn
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, scan_interface.__name__, scan_interface)
    monkeypatch.setitem(sys.modules, "causal_conv1d", conv)
    for part in ("scan", "conv"):
        original = getattr(ops.scan_packages, part)
        monkeypatch.setattr(
            ops.scan_packages, part, lambda *args, own=original, name=part: asked.append(name) or own(*args)
        )
    return asked


def _both(monkeypatch: pytest.MonkeyPatch, run) -> list[list[Tensor]]:
    results = []
    for installed in (False, True):
        monkeypatch.setattr(ops, "on_package", lambda *_, there=installed: there)
        with use_backend("reference"):
            results.append(run())
    return results


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("groups", [0, 1, 2])
def test_scan_of_equally_long_clouds(monkeypatch, packages: list[str], groups: int, reverse: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (12, groups, 3) if groups else (4, 3)
    sizes = [(12, 4), (12, 4), (4, 3), shape, shape, (4,), (12, 4), (4,)]
    leaves = [torch.randn(*size, generator=generator).requires_grad_() for size in sizes]
    offsets = torch.tensor([0, 4, 8, 12])

    def run() -> list[Tensor]:
        u, delta, A, B, C, D, z, bias = leaves
        y, last = ops.selective_scan(u, delta, -A.abs(), B, C, offsets, D, z, bias, True, reverse=reverse)
        return [y, last.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    expected, found = _both(monkeypatch, run)
    assert packages == ["scan"]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_last_state_has_no_wrong_gradient(monkeypatch, packages: list[str]) -> None:
    monkeypatch.setattr(ops, "on_package", lambda *_: True)
    u, B = torch.rand(6, 2, requires_grad=True), torch.rand(6, 1, 3)
    with use_backend("reference"):
        _, last = ops.selective_scan(u, torch.rand(6, 2), -torch.rand(2, 3), B, B, torch.tensor([0, 3, 6]))
    with pytest.raises(RuntimeError, match="no gradient for the last state"):
        last.sum().backward()


@pytest.mark.parametrize("change", ["ragged", "initial", "one rate"])
def test_what_the_package_cannot_do_goes_elsewhere(monkeypatch, packages: list[str], change: str) -> None:
    monkeypatch.setattr(ops, "on_package", lambda *_: True)
    offsets = torch.tensor([0, 2, 6] if change == "ragged" else [0, 3, 6])
    initial = torch.rand(2, 2, 3) if change == "initial" else None
    A, B = -torch.rand(2, 1 if change == "one rate" else 3), torch.rand(6, 1, 3)
    with use_backend("reference"):
        ops.selective_scan(torch.rand(6, 2), torch.rand(6, 2), A, B, B, offsets, initial_state=initial)
    assert packages == []


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_convolution_of_any_clouds(monkeypatch, packages: list[str], silu: bool, reverse: bool) -> None:
    generator, offsets = torch.Generator().manual_seed(0), torch.tensor([0, 5, 5, 6, 20])
    leaves = [torch.randn(*size, generator=generator).requires_grad_() for size in ((20, 8), (8, 4), (8,))]

    def run() -> list[Tensor]:
        y = ops.causal_conv1d(*leaves, offsets, silu, reverse)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    expected, found = _both(monkeypatch, run)
    assert packages == ["conv"]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
