"""Selective scan, SSD and causal convolution: kernels against a loop in float64, gradients, packing, threads."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pc3d.ops.backend import cpu_kernels, use_backend
from pc3d.ops.scan import causal_conv1d, selective_scan, ssd

CLOUDS = {
    "one": [37],
    "several": [5, 0, 64, 1, 130],
    "short": [3] * 40,
    "none": [],
    "empty": [0, 0],
    "tiles": [64, 128, 1],
}
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "bare": {"D": None, "z": None, "delta_bias": None, "softplus": False},
    "groups": {"groups": 3, "channels": 21},
    "constant": {"groups": 0},
    "one rate": {"rates": 1},
    "one rate, constant": {"rates": 1, "groups": 0},
    "one state": {"state": 1},
    "many channels": {"channels": 75},
    "initial": {"initial": True},
    "stiff": {"scale": 30.0},
}
needs_kernels = pytest.mark.skipif(cpu_kernels() is None, reason="the C++ extension is not built")


def _offsets(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def _inputs(counts: list[int], dtype: torch.dtype = torch.float32, **case: Any) -> dict[str, Any]:
    tokens, channels, state = sum(counts), case.get("channels", 6), case.get("state", 5)
    groups, rates, scale = case.get("groups", 1), case.get("rates", state), case.get("scale", 1.0)
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    coefficients = (tokens, groups, state) if groups else (channels, state)
    softplus = case.get("softplus", True)
    raw = torch.rand(tokens, channels, generator=generator, dtype=torch.float64) * scale - (1.0 if softplus else 0.0)
    inputs: dict[str, Any] = {
        "u": randn(tokens, channels),
        "delta": raw.to(dtype).requires_grad_(),
        "A": (-torch.rand(channels, rates, generator=generator, dtype=torch.float64) * 4).to(dtype).requires_grad_(),
        "B": randn(*coefficients),
        "C": randn(*coefficients),
        "offsets": _offsets(counts),
        "D": randn(channels),
        "z": randn(tokens, channels),
        "delta_bias": randn(channels),
        "delta_softplus": softplus,
        "initial_state": randn(len(counts), channels, state) if case.get("initial") else None,
    }
    return inputs | {name: None for name in ("D", "z", "delta_bias") if name in case}


def _loop(inputs: dict[str, Any], reverse: bool = False) -> tuple[Tensor, Tensor]:
    """The recurrence written out, one cloud and one token after another."""
    u, A, B, C = (inputs[name] for name in ("u", "A", "B", "C"))
    channels, state = u.shape[1], B.shape[-1]
    if B.ndim == 3:
        B, C = (t.repeat_interleave(channels // B.shape[1], 1) for t in (B, C))
    else:
        B, C = (t.expand(len(u), channels, state) for t in (B, C))
    step = inputs["delta"] if inputs["delta_bias"] is None else inputs["delta"] + inputs["delta_bias"]
    step = F.softplus(step) if inputs["delta_softplus"] else step
    rows: dict[int, Tensor] = {}
    last = []
    borders = inputs["offsets"].tolist()
    for cloud, (start, end) in enumerate(itertools.pairwise(borders)):
        h = u.new_zeros(channels, state) if inputs["initial_state"] is None else inputs["initial_state"][cloud]
        for t in reversed(range(start, end)) if reverse else range(start, end):
            h = torch.exp(step[t][:, None] * A) * h + step[t][:, None] * B[t] * u[t][:, None]
            y = (h * C[t]).sum(-1)
            y = y if inputs["D"] is None else y + inputs["D"] * u[t]
            rows[t] = y if inputs["z"] is None else y * F.silu(inputs["z"][t])
        last.append(h)
    y = torch.stack([rows[t] for t in range(len(u))]) if len(u) else u[:0]
    return y, torch.stack(last) if last else u.new_zeros(0, channels, state)


def _gradients(y: Tensor, last: Tensor, inputs: dict[str, Any], with_last: bool = True) -> dict[str, Tensor]:
    names = [name for name, t in inputs.items() if isinstance(t, Tensor) and t.requires_grad]
    generator = torch.Generator().manual_seed(5)
    total = (y.double() * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum()
    if with_last:
        total = total + (last.double() * torch.randn(last.shape, generator=generator, dtype=torch.float64)).sum()
    found = torch.autograd.grad(total, [inputs[name] for name in names], allow_unused=True)
    return {n: torch.zeros_like(inputs[n]) if g is None else g for n, g in zip(names, found, strict=True)}


def _close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * max(largest, 1e-3))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("counts", CLOUDS.values(), ids=CLOUDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_scan_and_gradients_equal_a_loop(backend: str, case: str, counts: list[int], reverse: bool) -> None:
    inputs = _inputs(counts, **CASES[case])
    exact = {k: v.detach().double().requires_grad_(v.requires_grad) if isinstance(v, Tensor) and k != "offsets" else v
             for k, v in inputs.items()}  # fmt: skip
    expected = _loop(exact, reverse)
    with use_backend(backend):
        actual = selective_scan(**inputs, reverse=reverse)
        gradients = _gradients(*actual, inputs) if sum(counts) else {}
    for a, e in zip(actual, expected, strict=True):
        _close(a, e, 2e-6)
    for name, gradient in _gradients(*expected, exact).items() if sum(counts) else ():
        _close(gradients[name], gradient, 1e-5)


@needs_kernels
@pytest.mark.parametrize("counts", CLOUDS.values(), ids=CLOUDS)
def test_packed_equals_cloud_by_cloud_exactly(counts: list[int]) -> None:
    inputs = _inputs(counts, channels=19)
    y, last = selective_scan(**inputs)
    for cloud, (start, end) in enumerate(zip(inputs["offsets"][:-1], inputs["offsets"][1:], strict=True)):
        part = {k: v[start:end] if k in ("u", "delta", "z", "B", "C") else v for k, v in inputs.items()}
        alone = selective_scan(**part | {"offsets": _offsets([int(end - start)])})
        assert torch.equal(alone[0], y[start:end])
        assert torch.equal(alone[1][0], last[cloud])


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_reverse_equals_flipping_each_cloud(backend: str) -> None:
    inputs = _inputs([7, 0, 65, 1])
    rows = torch.cat(
        [torch.arange(a, b).flip(0) for a, b in zip(inputs["offsets"][:-1], inputs["offsets"][1:], strict=True)]
    )
    flipped = {k: v[rows] if k in ("u", "delta", "z", "B", "C") else v for k, v in inputs.items()}
    with use_backend(backend):
        y, last = selective_scan(**inputs, reverse=True)
        expected = selective_scan(**flipped)
    tolerance = 0 if backend == "auto" else 1e-6  # torch rounds the exponential by its place in a tensor
    _close(y, expected[0][rows], tolerance)
    _close(last, expected[1], tolerance)


@needs_kernels
def test_the_same_bits_for_any_number_of_threads() -> None:
    inputs = _inputs([900, 20, 3000, 0, 400], channels=70, groups=2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            out = selective_scan(**inputs)
            found.append([*out, *_gradients(*out, inputs).values()])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("case", ["full", "groups", "constant", "one rate", "initial"])
def test_gradcheck_in_double(case: str) -> None:
    inputs = _inputs([4, 0, 3], torch.float64, **(CASES[case] | {"channels": 3, "state": 2}))
    names = [name for name, t in inputs.items() if isinstance(t, Tensor) and t.requires_grad]

    def scan(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(**inputs | dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(scan, [inputs[name] for name in names])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_computed_in_float(dtype: torch.dtype) -> None:
    halves = _inputs([40, 30], dtype)
    wide: dict[str, Any] = {
        k: v.detach().float() if isinstance(v, Tensor) and k != "offsets" else v for k, v in halves.items()
    }
    y, last = selective_scan(**halves)
    expected = selective_scan(**wide)
    assert y.dtype == dtype
    assert last.dtype == torch.float32
    assert torch.equal(y, expected[0].to(dtype))
    assert torch.equal(last, expected[1])


@needs_kernels
def test_nothing_of_size_length_by_channels_by_state_is_kept() -> None:
    inputs = _inputs([2048], channels=8, state=64)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        selective_scan(**inputs)
    assert max(sizes) <= 2048 * 64  # B and C themselves; the states would be 8 times that


@needs_kernels
def test_compiled_without_a_graph_break() -> None:
    inputs = _inputs([40, 30])
    expected = selective_scan(**inputs)[0]
    torch._dynamo.reset()
    compiled = torch.compile(lambda **kw: selective_scan(**kw)[0], backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(**inputs), expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"delta": torch.zeros(7, 5)}, r"delta must be \(7, 6\)"),
        ({"A": torch.zeros(6, 4)}, r"A must be \(6, 5\)"),
        ({"B": torch.zeros(7, 4, 5)}, "6 channels do not divide into the 4 groups"),
        ({"offsets": torch.zeros(2)}, "offsets must be"),
        ({"initial_state": torch.zeros(2, 6, 5)}, "initial_state must be"),
    ],
)
def test_wrong_shapes_are_named(changed: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan(**_inputs([7]) | changed)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_ssd_equals_a_loop_over_tokens(backend: str) -> None:
    generator = torch.Generator().manual_seed(1)
    heads, width, state, groups, offsets = 6, 3, 4, 2, _offsets([9, 0, 70])
    x, z = (torch.randn(79, heads, width, generator=generator) for _ in range(2))
    dt, A, D = (
        torch.randn(79, heads, generator=generator),
        -torch.rand(heads, generator=generator),
        torch.rand(heads, width),
    )
    B, C = (torch.randn(79, groups, state, generator=generator) for _ in range(2))
    bias, initial = torch.randn(heads, generator=generator), torch.randn(3, heads, width, state, generator=generator)
    with use_backend(backend):
        y, last = ssd(x, dt, A, B, C, offsets, D, z, bias, True, (0.05, 0.6), initial)
    step = F.softplus(dt + bias).clamp(0.05, 0.6)
    for cloud, (start, end) in enumerate(itertools.pairwise(offsets)):
        h = initial[cloud]
        for t in range(start, end):
            b, c = (v[t].repeat_interleave(heads // groups, 0)[:, None] for v in (B, C))
            h = torch.exp(step[t] * A)[:, None, None] * h + (step[t][:, None] * x[t])[..., None] * b
            _close(y[t], ((h * c).sum(-1) + D * x[t]) * F.silu(z[t]), 1e-5)
        _close(last[cloud], h, 1e-5)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, silu: bool, reverse: bool) -> Tensor:
    """Cloud after cloud with torch's convolution."""
    parts = [x[:0]]
    for start, end in itertools.pairwise(offsets):
        cloud = x[start:end].flip(0) if reverse else x[start:end]
        width, channels = weight.shape[1], len(weight)
        y = F.conv1d(F.pad(cloud.T, (width - 1, 0)), weight[:, None], bias, groups=channels).T if len(cloud) else cloud
        parts.append(y.flip(0) if reverse else y)
    return F.silu(torch.cat(parts)) if silu else torch.cat(parts)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("width", [1, 3, 4])
@pytest.mark.parametrize("counts", CLOUDS.values(), ids=CLOUDS)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_causal_convolution_equals_torch(
    backend: str, counts: list[int], width: int, silu: bool, reverse: bool
) -> None:
    generator, channels = torch.Generator().manual_seed(2), 11
    shapes = (sum(counts), channels), (channels, width), (channels,)
    leaves = [torch.randn(*s, generator=generator).requires_grad_() for s in shapes]
    leaves = leaves[: 2 + silu]  # without a bias too
    exact = [t.detach().double().requires_grad_() for t in leaves]
    arguments: list[Any] = [None] * (3 - len(leaves)) + [_offsets(counts), silu, reverse]
    expected = _convolve(*exact, *arguments)
    with use_backend(backend):
        actual = causal_conv1d(*leaves, *arguments)
        upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
        found = torch.autograd.grad(actual, leaves, upstream.float())
    _close(actual, expected, 1e-6)
    wanted = torch.autograd.grad(expected, exact, upstream, allow_unused=True, materialize_grads=True)
    for a, e in zip(found, wanted, strict=True):
        _close(a, e, 2e-6)


@needs_kernels
def test_convolution_is_exact_per_cloud_and_for_any_number_of_threads() -> None:
    counts, generator = [900, 1, 0, 5000, 64], torch.Generator().manual_seed(4)
    x, weight, bias = (torch.randn(*s, generator=generator).requires_grad_() for s in ((5965, 20), (20, 4), (20,)))
    offsets, upstream, found = _offsets(counts), torch.randn(5965, 20, generator=generator), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            y = causal_conv1d(x, weight, bias, offsets, silu=True)
            found.append([y, *torch.autograd.grad(y, [x, weight, bias], upstream)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    for start, end in itertools.pairwise(offsets):
        alone = causal_conv1d(x[start:end], weight, bias, _offsets([int(end - start)]), silu=True)
        assert torch.equal(alone, found[0][0][start:end])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_convolution_of_halves_is_computed_in_float(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    x, weight = (torch.randn(*s, generator=generator).to(dtype) for s in ((50, 6), (6, 4)))
    y = causal_conv1d(x, weight, None, _offsets([20, 30]))
    assert y.dtype == dtype
    assert torch.equal(y, causal_conv1d(x.float(), weight.float(), None, _offsets([20, 30])).to(dtype))


def test_convolution_gradcheck_in_double() -> None:
    generator = torch.Generator().manual_seed(4)
    leaves = [
        torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in ((7, 2), (2, 3), (2,))
    ]
    assert torch.autograd.gradcheck(lambda *t: causal_conv1d(*t, _offsets([4, 0, 3]), True, True), leaves)


@needs_kernels
def test_convolution_compiles_without_a_graph_break() -> None:
    x, weight, offsets = torch.randn(50, 6), torch.randn(6, 4), _offsets([20, 30])
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: causal_conv1d(*t, offsets, True), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, weight, None), causal_conv1d(x, weight, None, offsets, True))
