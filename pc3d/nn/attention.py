"""Attention inside windows of a serialized cloud, one function for every backend.

Wu et al., "Point Transformer V3: Simpler, Faster, Stronger", CVPR 2024 (section 4.2): a window is a run of points along
a space-filling curve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pc3d.errors import InputError
from pc3d.nn.rope import Rotation, rotate
from pc3d.ops.attention import attend, on_attention_kernels

Backend = Literal["auto", "kernels", "padded", "loop", "flex", "varlen"]
"""``kernels``: ours in C++ (CPU, no bias). ``padded``: fused attention of PyTorch over windows of equal size. ``loop``:
window by window, every step written out; the reference. ``flex``: FlexAttention with a block mask (GPU). ``varlen``:
one flash-attention kernel over windows of any size (GPU, half precision, no bias)."""

WindowBias = Callable[[Tensor], Tensor]
"""``(W, L)`` int64 rows of W windows to what is added to their scores, ``(W, H, L, L)`` as (query, key)."""

_BIAS_CHUNK = 1 << 24  # most scores (windows x heads x L x L) for which a bias is laid out at once
_FUSED_CHUNK = 1 << 24  # most values of a gathered q, k or v at once


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows on the points of a packed batch; slots are the places in all windows, window after window.

    Windows are grouped by length, longest first, so that those of a group stack to ``(count, length)``.

    Attributes:
        rows: ``(S,)`` int64, the point in each slot. Some points fill a second slot, see :func:`split_windows`.
        slots: ``(N,)`` int64, the slot whose result is each point's result.
        groups: ``(count, length)`` of each group, together S slots.
    """

    rows: Tensor
    slots: Tensor
    groups: tuple[tuple[int, int], ...]
    plans: dict[Any, Any] = field(default_factory=dict, repr=False)

    def along(self, order: Tensor, inverse: Tensor) -> Windows:
        """The same windows on points that are visited in another order.

        Args:
            order: ``(N,)`` int64, the row at each position; clouds stay together and in their order.
            inverse: ``(N,)`` int64, the position of each row.
        """
        rows, slots = order.index_select(0, self.rows), self.slots.index_select(0, inverse)
        return replace(self, rows=rows, slots=slots)

    def lengths(self) -> Tensor:
        """``(W,)`` int64 on the CPU: slots of each window."""
        groups = torch.tensor(self.groups, dtype=torch.int64).view(-1, 2)
        return torch.repeat_interleave(groups[:, 1], groups[:, 0])


def split_windows(offsets: Tensor, size: int, equal: bool = False) -> Windows:
    """Windows of consecutive points.

    A cloud of ``n <= size`` points is one window of ``n`` slots. A longer one makes ``ceil(n / size)`` full windows; in
    the last one the ``r = n % size`` points left over come first, and the slots behind them hold the points in the
    same slots of the window before (those points keep the result of that window).

    Args:
        offsets: ``(B + 1,)`` int64 cloud borders; empty clouds have no window.
        size: most slots of a window.
        equal: shrink ``size`` to the smallest cloud that is not empty, so that all windows are equally long. This is
            what the published models do without flash attention; a cloud's windows then depend on its batch.

    Raises:
        InputError: if ``size`` is not positive.
    """
    if size < 1:
        raise InputError(f"attention: the window size must be at least 1, got {size}")
    counts = offsets.diff().tolist()
    if equal:
        size = min([size, *(n for n in counts if n)])
    # Long clouds first, then by length; the sort is stable, so clouds of one length stay in order.
    clouds = sorted((b for b, n in enumerate(counts) if n), key=lambda b: -min(counts[b], size))
    num_slots = [n if n <= size else -(-n // size) * size for n in counts]
    groups: dict[int, int] = {}
    base, bases = 0, [0] * len(counts)
    for b in clouds:
        length = min(counts[b], size)
        groups[length] = groups.get(length, 0) + num_slots[b] // length
        bases[b] = base
        base += num_slots[b]

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=offsets.device)

    per_slot = torch.repeat_interleave(tensor(clouds), tensor([num_slots[b] for b in clouds]), output_size=base)
    first, length = offsets[:-1][per_slot], offsets.diff()[per_slot]
    place = torch.arange(base, device=offsets.device) - tensor(bases)[per_slot]
    rows = first + torch.where(place < length, place, place - size)

    total, device = sum(counts), offsets.device
    per_row = torch.repeat_interleave(torch.arange(len(counts), device=device), offsets.diff(), output_size=total)
    slots = torch.arange(total, device=device) + (tensor(bases) - offsets[:-1])[per_row]
    return Windows(rows, slots, tuple((count, length) for length, count in groups.items()))


def group_windows(number: Tensor, counts: Tensor) -> Windows:
    """Windows of points that carry the same number, wherever they lie in the batch; every point fills one slot.

    Args:
        number: ``(N,)`` int64, the window of each point, below W.
        counts: ``(W,)`` int64, points of each window.
    """
    sorted_counts, by_length = counts.sort(descending=True, stable=True)
    rank = torch.empty_like(by_length)
    rank[by_length] = torch.arange(len(by_length), device=rank.device)
    rows = rank[number].argsort(stable=True)
    slots = torch.empty_like(rows)
    slots[rows] = torch.arange(len(rows), device=rows.device)
    lengths, times = sorted_counts[sorted_counts > 0].unique_consecutive(return_counts=True)
    return Windows(rows, slots, tuple(zip(times.tolist(), lengths.tolist(), strict=True)))


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Windows,
    bias: WindowBias | None = None,
    rope: Rotation | None = None,
    scale: float | None = None,
    upcast: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """``softmax(scale * q k^T + bias) v`` among the points of each window.

    Never builds scores of all windows at once: memory grows with N, not with N times the window size. What a cloud
    gets depends on nothing but its own windows.

    Args:
        q, k, v: ``(N, H, D)`` rows in the order of the points; ``v`` may be narrower, ``(N, H, E)``.
        windows: which points see each other.
        bias: added to the scores, computed for some windows at a time, and again in the backward pass.
        rope: rotates queries and keys first.
        scale: None is ``D ** -0.5``.
        upcast: compute in float32 even for half-precision input or under autocast.
        backend: see :data:`Backend`; ``auto`` is ``kernels`` on the CPU and ``varlen`` where windows differ in length,
            if they can run, else ``padded``.

    Returns:
        ``(N, H, E)``, in float32 where ``upcast``; empty input gives empty output.

    Raises:
        InputError: if a backend is asked for that cannot run here, or with these options.
    """
    if rope is not None:
        q, k = rotate(q, rope), rotate(k, rope)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=torch.is_autocast_enabled(q.device.type) and not upcast):
        if upcast:
            q, k, v = q.float(), k.float(), v.float()
        if not windows.groups:
            return v
        name = _choose(q, windows, bias) if backend == "auto" else backend
        if name == "kernels":
            return _by_kernels(q, k, v, windows, bias, scale)
        return _BACKENDS[name](q, k, v, windows, bias, scale).index_select(0, windows.slots)


class RelativePositionBias(nn.Module):
    """Learned bias of the differences of cells along each axis (Point Transformer V3, ``enable_rpe``).

    ``bias(q, k) = sum_axis table[axis][clamp(cell_q - cell_k, -B, B)]`` with ``B = int(2 * (4 * size) ** (1 / 3))``.

    Args:
        window_size: configured window size (windows may be shorter).
        num_heads: heads H.
    """

    def __init__(self, window_size: int, num_heads: int) -> None:
        super().__init__()
        self.bound = int(2 * (4 * window_size) ** (1 / 3))
        self.rpe_table = nn.Parameter(torch.empty(3 * (2 * self.bound + 1), num_heads))
        nn.init.trunc_normal_(self.rpe_table, std=0.02)

    def forward(self, cells: Tensor) -> Tensor:
        """``(W, H, L, L)`` from the cells ``(W, L, 3)`` int of W windows."""
        bias = None
        for axis, table in enumerate(self.rpe_table.chunk(3)):
            place = cells[:, :, axis].long()
            difference = (place[:, :, None] - place[:, None]).clamp(-self.bound, self.bound)
            term = F.embedding(difference + self.bound, table)
            bias = term if bias is None else bias + term
        assert bias is not None
        return bias.permute(0, 3, 1, 2)


# Backends: q, k (N, H, D), v (N, H, E) -> results of all slots (S, H, E) ----------------------------------------------


def _choose(q: Tensor, windows: Windows, bias: WindowBias | None) -> str:
    if bias is None and on_attention_kernels(q):
        return "kernels"
    many = len(windows.groups) > 2
    return "varlen" if many and bias is None and _varlen_problem(q) is None else "padded"


def _by_kernels(q: Tensor, k: Tensor, v: Tensor, windows: Windows, bias: WindowBias | None, scale: float) -> Tensor:
    """Of all points ``(N, H, E)`` already."""
    if bias is not None or not on_attention_kernels(q):
        problem = "it takes no bias" if bias is not None else f"not for {q.dtype} on {q.device.type}, or not built"
        raise InputError(f"attention: backend 'kernels' cannot run: {problem}; use 'padded'")
    values = F.pad(v, (0, q.shape[-1] - v.shape[-1]))  # the kernels know one width
    return attend(q, k, values, windows.rows, windows.slots, windows.groups, scale)[..., : v.shape[-1]]


def _padded(q: Tensor, k: Tensor, v: Tensor, windows: Windows, bias: WindowBias | None, scale: float) -> Tensor:
    results = []
    for rows in _chunks(windows, q, bias):
        if bias is not None and torch.is_grad_enabled():
            out = checkpoint(_attend, q, k, v, rows, bias, scale, use_reentrant=False)
        else:
            out = _attend(q, k, v, rows, bias, scale)
        results.append(out)
    return torch.cat(results)


def _attend(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, bias: WindowBias | None, scale: float) -> Tensor:
    """Results ``(W * L, H, D)`` of the windows ``rows`` ``(W, L)``."""
    flat = rows.flatten()
    mask = None if bias is None else bias(rows).to(q.dtype)
    q, k, v = (t.index_select(0, flat).view(*rows.shape, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).flatten(0, 1)


def _chunks(windows: Windows, q: Tensor, bias: WindowBias | None) -> Iterator[Tensor]:
    """Rows ``(W, L)`` of some windows of one length after the other."""
    start = 0
    for count, length in windows.groups:
        stop = start + count * length
        if bias is None:
            at_once = max(1, _FUSED_CHUNK // (length * q.shape[1] * q.shape[2]))
        else:
            at_once = max(1, _BIAS_CHUNK // (length * length * q.shape[1]))
        yield from windows.rows[start:stop].view(count, length).split(at_once)
        start = stop


def _loop(q: Tensor, k: Tensor, v: Tensor, windows: Windows, bias: WindowBias | None, scale: float) -> Tensor:
    results = []
    for rows in windows.rows.split(windows.lengths().tolist()):
        scores = torch.einsum("qhd,khd->hqk", q[rows] * scale, k[rows])
        if bias is not None:
            scores = scores + bias(rows[None])[0]
        results.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1).to(v.dtype), v[rows]))
    return torch.cat(results)


def _flex(q: Tensor, k: Tensor, v: Tensor, windows: Windows, bias: WindowBias | None, scale: float) -> Tensor:
    if bias is not None:
        raise InputError("attention: backend 'flex' takes no bias; use 'padded'")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if "flex" not in windows.plans:
        number = torch.repeat_interleave(windows.lengths()).to(q.device)

        def same_window(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return number[query] == number[key]

        slots = len(windows.rows)
        windows.plans["flex"] = create_block_mask(same_window, None, None, slots, slots, device=q.device.type)
    q, k, v = (t.index_select(0, windows.rows).transpose(0, 1)[None] for t in (q, k, v))
    attend: Any = _compiled(flex_attention) if q.is_cuda else flex_attention
    return attend(q, k, v, block_mask=windows.plans["flex"], scale=scale)[0].transpose(0, 1)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _varlen(q: Tensor, k: Tensor, v: Tensor, windows: Windows, bias: WindowBias | None, scale: float) -> Tensor:
    problem = "it takes no bias" if bias is not None else _varlen_problem(q)
    if problem is not None:
        raise InputError(f"attention: backend 'varlen' cannot run: {problem}; use 'padded'")
    from flash_attn import flash_attn_varlen_func

    lengths = windows.lengths()
    borders = F.pad(lengths.cumsum(0), (1, 0)).to(q.device, torch.int32)
    longest = int(lengths.max())
    half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else q.dtype
    q, k, v = (t.index_select(0, windows.rows).to(half) for t in (q, k, v))
    return flash_attn_varlen_func(q, k, v, borders, borders, longest, longest, softmax_scale=scale)


def _varlen_problem(q: Tensor) -> str | None:
    """Why flash attention cannot run on these queries, or None."""
    from importlib.util import find_spec

    if q.device.type != "cuda":
        return f"queries are on {q.device.type}, it needs a CUDA device"
    half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else q.dtype
    if half not in (torch.float16, torch.bfloat16):
        return f"queries are {half}, it needs float16 or bfloat16"
    return "package flash_attn is not installed" if find_spec("flash_attn") is None else None


_BACKENDS: dict[str, Callable[..., Tensor]] = {"padded": _padded, "loop": _loop, "flex": _flex, "varlen": _varlen}
