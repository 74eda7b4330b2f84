"""Selective scan (Mamba), state-space duality (Mamba-2) and causal convolution over packed clouds.

Tokens of all clouds lie behind each other, ``(T, channels)``; ``offsets`` says where clouds begin. Nothing is padded,
states start anew at every cloud, and ``reverse`` walks each cloud from its end without copying it.

Everything is computed in float32 (float64 inputs: in float64) and cast back to the dtype of the input. On the CPU,
float32 and half inputs go to the C++ kernels, which keep one state per 64 tokens and compute the others again in the
backward pass: memory grows with length x channels, whatever the size of the state. Their results do not depend on the
number of threads. On a GPU they go to the packages mamba-ssm (clouds of one length) and causal-conv1d where installed,
else the scan goes to :mod:`pc3d.ops.scan_triton`, which works alike. Everything else goes to the plain-PyTorch
reference, token by token.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pc3d.ops import scan_packages
from pc3d.ops.backend import cpu_kernels, on_cpu_kernels, on_package, on_triton

_LARGEST_STATE = 256


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    offsets: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Selective scan of Mamba (Gu and Dao 2023, arXiv 2312.00752, section 3).

    With ``step = delta + delta_bias`` (after a softplus, if asked): ``h_t = exp(step_t A) h_{t-1} + step_t B_t u_t``
    and ``y_t = C_t h_t + D u_t``, times ``silu(z_t)``. Differentiable in every tensor but ``offsets``, once.

    Args:
        u, delta, z: ``(T, channels)``.
        A: ``(channels, N)``, or ``(channels, 1)``: one rate for all N states of a channel. N <= 256 in the kernels.
        B, C: ``(T, G, N)``, each group serving ``channels / G`` consecutive channels; or ``(channels, N)``, the same
            for every token.
        offsets: ``(S + 1,)`` int64, cloud s is rows ``offsets[s]:offsets[s + 1]``; empty clouds allowed.
        D, delta_bias: ``(channels,)``.
        initial_state: ``(S, channels, N)`` before the first token (in reverse: the last row); zeros by default.
        reverse: each cloud from its last token to its first.

    Returns:
        ``y (T, channels)`` in the dtype of ``u``, and the state after the last token of each cloud,
        ``(S, channels, N)`` float32; the initial one for an empty cloud.

    Raises:
        ValueError: if shapes do not fit each other.
    """
    _check_scan(u, delta, A, B, C, offsets, D, z, delta_bias, initial_state)
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    # Casts are part of the graph: gradients come back in the dtype of each input.
    tensors: Any = [None if t is None else t.to(wide) for t in (u, delta, A, B, C, D, z, delta_bias, initial_state)]
    if wide == torch.float32 and B.shape[-1] <= _LARGEST_STATE and on_cpu_kernels(u, offsets):
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        y, last, _ = _scan(*tensors, offsets, delta_softplus, reverse, save)
    elif (
        wide == torch.float32
        and on_package("mamba_ssm", u)
        and scan_packages.serves_scan(tensors[2], B, offsets, initial_state)
    ):
        y, last = scan_packages.scan(*tensors[:8], offsets, delta_softplus, reverse)  # type: ignore[call-arg]
    elif wide == torch.float32 and on_triton(u, offsets) and _triton_serves(B, C):
        from pc3d.ops import scan_triton

        rates = tensors[2].expand(-1, B.shape[-1])
        y, last, _, _ = scan_triton.scan(*tensors[:2], rates, *tensors[3:], offsets, delta_softplus, reverse)
    else:
        y, last = _reference(*tensors, offsets, delta_softplus, reverse)  # type: ignore[call-arg]
    return y.to(u.dtype), last


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    offsets: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_state: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """State-space duality of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): one rate per head of P channels.

    The same recurrence as :func:`selective_scan`, with ``step`` and ``A`` shared by the channels of a head.

    Args:
        x, z: ``(T, H, P)``.
        dt: ``(T, H)``; ``dt_bias`` ``(H,)`` is added, then softplus if asked, then the clamp to ``dt_limit``.
        A: ``(H,)``.
        B, C: ``(T, G, N)``, each group serving ``H / G`` consecutive heads.
        offsets: ``(S + 1,)`` int64.
        D: ``(H,)`` or ``(H, P)``.
        initial_state: ``(S, H, P, N)``.

    Returns:
        ``y (T, H, P)`` in the dtype of ``x``, and the last states ``(S, H, P, N)`` float32.

    Raises:
        ValueError: if shapes do not fit each other.
    """
    if x.ndim != 3 or dt.shape != x.shape[:2] or A.shape != x.shape[1:2]:
        raise ValueError(
            f"x (T, H, P) {tuple(x.shape)}, dt (T, H) {tuple(dt.shape)}, A (H,) {tuple(A.shape)} do not fit"
        )
    tokens, heads, width = x.shape
    step = dt.to(torch.float64 if dt.dtype == torch.float64 else torch.float32)
    if dt_bias is not None:
        step = step + dt_bias
    if dt_softplus:
        step = F.softplus(step)
    if dt_limit != (0.0, float("inf")):
        step = step.clamp(*dt_limit)
    if D is not None:
        D = D.reshape(heads, -1).expand(heads, width).reshape(-1)
    y, last = selective_scan(
        x.reshape(tokens, -1),
        step.repeat_interleave(width, 1),
        A.repeat_interleave(width)[:, None],
        B,
        C,
        offsets,
        D,
        None if z is None else z.reshape(tokens, -1),
        initial_state=None if initial_state is None else initial_state.flatten(1, 2),
        reverse=reverse,
    )
    return y.view(tokens, heads, width), last.view(len(last), heads, width, -1)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, silu: bool = False, reverse: bool = False
) -> Tensor:
    """Causal depth-wise convolution over the tokens of each cloud; zeros before its first token.

    ``y_t = bias + sum_k weight[:, k] x_{t - W + 1 + k}``, then SiLU if asked. Differentiable.

    Args:
        x: ``(T, channels)``.
        weight: ``(channels, W)``; bias ``(channels,)`` or None.
        offsets: ``(S + 1,)`` int64.
        reverse: each cloud from its last token to its first.

    Returns:
        ``(T, channels)`` in the dtype of ``x``.

    Raises:
        ValueError: if shapes do not fit each other.
    """
    if x.ndim != 2 or weight.ndim != 2 or len(weight) != x.shape[1]:
        raise ValueError(f"x (T, channels) {tuple(x.shape)} does not fit weight (channels, W) {tuple(weight.shape)}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows, taps, shift = x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)
    if wide == torch.float32 and on_cpu_kernels(x, offsets):
        y = _conv(rows, taps.t(), shift, offsets, silu, reverse)
    elif wide == torch.float32 and on_package("causal_conv1d", x) and scan_packages.serves_conv(x, taps.shape[1]):
        y = scan_packages.conv(rows, taps, shift, offsets, silu, reverse)
    else:
        y = _conv_reference(rows, taps, shift, offsets, reverse)
        y = F.silu(y) if silu else y
    return y.to(x.dtype)


def _triton_serves(B: Tensor, C: Tensor) -> bool:
    from pc3d.ops import scan_triton

    return scan_triton.serves(B, C)


def _conv_reference(rows: Tensor, taps: Tensor, bias: Tensor | None, offsets: Tensor, reverse: bool) -> Tensor:
    """Tap after tap over all tokens at once; any device, any dtype."""
    place, width = _place_in_cloud(offsets, len(rows), reverse), taps.shape[1]
    y = rows * taps[:, -1] if bias is None else torch.addcmul(bias, rows, taps[:, -1])
    for back in range(1, min(width, len(rows))):
        shifted = rows.roll(-back if reverse else back, 0) * (place >= back)[:, None]
        y = torch.addcmul(y, shifted, taps[:, width - 1 - back])
    return y


def _place_in_cloud(offsets: Tensor, tokens: int, reverse: bool) -> Tensor:
    """``(T,)`` tokens of the same cloud that come before each one in the walk."""
    row = torch.arange(tokens, device=offsets.device)
    borders = offsets[1:] if reverse else offsets[:-1]
    border = torch.repeat_interleave(borders, offsets.diff(), output_size=tokens)
    return border - 1 - row if reverse else row - border


def _check_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    offsets: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    if u.ndim != 2 or A.ndim != 2 or B.ndim not in (2, 3):
        raise ValueError(
            f"u must be (T, channels), A (channels, N), B (T, G, N) or (channels, N): "
            f"got {tuple(u.shape)}, {tuple(A.shape)}, {tuple(B.shape)}"
        )
    if offsets.ndim != 1 or len(offsets) < 1 or offsets.dtype != torch.int64:
        raise ValueError(f"offsets must be (S + 1,) int64, got {tuple(offsets.shape)} {offsets.dtype}")
    (tokens, channels), state = u.shape, B.shape[-1]
    groups = B.shape[1] if B.ndim == 3 else 1
    if groups < 1 or channels % groups:
        raise ValueError(f"{channels} channels do not divide into the {groups} groups of B")
    coefficients = (tokens, groups, state) if B.ndim == 3 else (channels, state)
    wanted: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("delta", delta, (tokens, channels)),
        ("A", A, (channels, 1 if A.shape[1] == 1 else state)),
        ("B", B, coefficients),
        ("C", C, coefficients),
        ("D", D, (channels,)),
        ("z", z, (tokens, channels)),
        ("delta_bias", delta_bias, (channels,)),
        ("initial_state", initial_state, (len(offsets) - 1, channels, state)),
    ]
    for name, tensor, shape in wanted:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {shape} to fit u {tuple(u.shape)}, got {tuple(tensor.shape)}")


@torch.library.custom_op("pc3d::selective_scan", mutates_args=())
def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    offsets: Tensor,
    softplus: bool,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``y``, last states, and the states ``(tiles, channels, N)`` the backward pass starts from (if ``save``)."""
    kernels = _kernels(u)
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    last = u.new_zeros(len(offsets) - 1, *_states(u, B)) if initial_state is None else initial_state.detach().clone()
    saved = u.new_empty(kernels.scan_tiles(offsets, reverse), *_states(u, B)) if save else None
    kernels.scan_forward(*_for_kernels(inputs), offsets, B.ndim == 2, softplus, reverse, y, last, saved)
    return y, last, u.new_empty(0) if saved is None else saved


@torch.library.custom_op("pc3d::selective_scan_backward", mutates_args=())
def _scan_backward(
    grad: Tensor,
    grad_last: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    offsets: Tensor,
    saved: Tensor,
    softplus: bool,
    reverse: bool,
) -> list[Tensor]:
    """Gradients of the nine inputs; an empty tensor for one that is None."""
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    grads = [None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]
    du, ddelta, da, db, dc, dskip, dz, dbias, dinitial = grads
    if dinitial is not None:  # an empty cloud hands its gradient through
        dinitial.zero_() if grad_last is None else dinitial.copy_(grad_last)
    skip, bias = (u.new_empty(u.shape[1]) if g is None else g for g in (dskip, dbias))
    pairs = [t[None] if t is not None and t.ndim == 2 else t for t in (db, dc)]
    upstream = [None if t is None else t.detach().contiguous() for t in (grad, grad_last)]
    _kernels(u).scan_backward(
        *upstream, *_for_kernels(inputs), offsets, saved, B.ndim == 2, softplus, reverse,
        du, ddelta, da, *pairs, skip, bias, dz, dinitial,
    )  # fmt: skip
    return [u.new_empty(0) if g is None else g for g in grads]


def _kernels(u: Tensor) -> ModuleType:
    kernels = cpu_kernels(u)
    if kernels is None:
        raise RuntimeError("the C++ kernels do not load, or were switched off between forward and backward")
    return kernels


def _for_kernels(inputs: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Plain contiguous tensors; coefficients that do not depend on the token get a first axis of one."""
    plain = _plain(*inputs)
    return [t[None] if i in (3, 4) and t is not None and t.ndim == 2 else t for i, t in enumerate(plain)]


def _plain(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().contiguous() for t in tensors]


def _states(u: Tensor, B: Tensor) -> tuple[int, int]:
    return u.shape[1], B.shape[-1]


@_scan.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    offsets: Tensor,
    softplus: bool,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = torch.library.get_ctx().new_dynamic_size()
    return torch.empty_like(u), u.new_empty(len(offsets) - 1, *_states(u, B)), u.new_empty(tiles, *_states(u, B))


@_scan_backward.register_fake
def _(
    grad: Tensor,
    grad_last: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    offsets: Tensor,
    saved: Tensor,
    softplus: bool,
    reverse: bool,
) -> list[Tensor]:
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return [u.new_empty(0) if t is None else torch.empty_like(t) for t in inputs]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.softplus, ctx.reverse, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_last: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, offsets, saved = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(inputs[0])
    grads = _scan_backward(grad, grad_last, *inputs, offsets, saved, ctx.softplus, ctx.reverse)
    return *(None if t is None else g for t, g in zip(inputs, grads, strict=True)), None, None, None, None


_scan.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("pc3d::causal_conv1d", mutates_args=())
def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, silu: bool, reverse: bool) -> Tensor:
    """``weight`` is ``(W, channels)``."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _kernels(x).conv1d_forward(*_plain(x, weight, bias), offsets, silu, reverse, y)
    return y


@torch.library.custom_op("pc3d::causal_conv1d_backward", mutates_args=())
def _conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; that of a missing bias too."""
    dx, dweight, dbias = _conv_results(x, weight)
    _kernels(x).conv1d_backward(*_plain(grad, x, weight, bias), offsets, silu, reverse, dx, dweight, dbias)
    return dx, dweight, dbias


def _conv_results(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight))
    return dx, dweight, x.new_empty(x.shape[1])


@_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, silu: bool, reverse: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_conv_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _conv_results(x, weight)


def _setup_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_conv(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, offsets = ctx.saved_tensors
    dx, dweight, dbias = _conv_backward(grad, x, weight, bias, offsets, ctx.silu, ctx.reverse)
    return dx, dweight, None if bias is None else dbias, None, None, None


_conv.register_autograd(_differentiate_conv, setup_context=_setup_conv)


def _reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    offsets: Tensor,
    softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Token by token, all clouds abreast; any device, any dtype."""
    step = delta if delta_bias is None else delta + delta_bias
    if softplus:
        step = F.softplus(step)
    lengths = offsets.diff()
    longest_first = lengths.argsort(descending=True, stable=True)
    state = u.new_zeros(len(lengths), *_states(u, B)) if initial_state is None else initial_state[longest_first]
    if len(u):
        rows = _rows_by_step(offsets, longest_first, reverse)
        per_step = [len(row) for row in rows]
        along = torch.cat(rows)
        constant, per_group = B.ndim == 2, u.shape[1] // B.shape[-2]
        tokens = [t[along].split(per_step) for t in ((u, step) if constant else (u, step, B, C))]
        outputs = []
        for x, width, *coefficients in zip(*tokens, strict=True):
            b, c = (B, C) if constant else (t.repeat_interleave(per_group, 1) for t in coefficients)
            now = torch.exp(width[..., None] * A) * state[: len(x)] + (width * x)[..., None] * b
            outputs.append((now * c).sum(-1))
            state = torch.cat([now, state[len(x) :]])
        y = torch.cat(outputs)[along.argsort()]
    else:
        y = u.clone()
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * F.silu(z)
    return y, state[longest_first.argsort()].clone()


def _rows_by_step(offsets: Tensor, longest_first: Tensor, reverse: bool) -> list[Tensor]:
    """The rows of the t-th token of every cloud that has one, clouds in the order given."""
    first, last = offsets[:-1][longest_first], offsets[1:][longest_first] - 1
    lengths = last - first + 1
    active = (lengths > torch.arange(int(lengths[0]), device=lengths.device)[:, None]).sum(1).tolist()
    return [last[:count] - t if reverse else first[:count] + t for t, count in enumerate(active)]
