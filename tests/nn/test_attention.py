"""Windows and attention inside them: padding rule, backends, independence of batch mates."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pc3d.errors import InputError
from pc3d.nn import attention
from pc3d.nn.attention import RelativePositionBias, Windows, split_windows, window_attention
from pc3d.nn.rope import rotary_frequencies, rotation

K = 8
SIZES = [1, K - 1, K, K + 1, 2 * K, 2 * K + 1]


def borders(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def windows_of(counts: list[int], size: int = K, seed: int = 0) -> Windows:
    """Windows along a random order inside each cloud."""
    offsets, generator = borders(counts), torch.Generator().manual_seed(seed)
    parts = [torch.randperm(n, generator=generator) + start for n, start in zip(counts, offsets.tolist(), strict=False)]
    order = torch.cat(parts)
    return split_windows(offsets, size).along(order, order.argsort())


def qkv(rows: int, heads: int = 2, dim: int = 6, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, heads, dim, generator=generator).requires_grad_() for _ in range(3)]


def test_padding_rule() -> None:
    windows = split_windows(borders([5, 0, 11]), 4)
    # 5 points: the last one, then slots 1 to 3 of the window before; 11 points likewise.
    expected = [0, 1, 2, 3, 4, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 12]
    assert windows.rows.tolist() == expected
    assert windows.groups == ((5, 4),)
    assert windows.rows[windows.slots].tolist() == list(range(16))
    assert windows.slots.tolist() == [0, 1, 2, 3, 4, *range(8, 19)]


def test_short_clouds_are_windows_of_their_own() -> None:
    windows = split_windows(borders([3, 9, 1, 3]), 4)
    assert windows.groups == ((3, 4), (2, 3), (1, 1))
    assert windows.rows.tolist() == [3, 4, 5, 6, 7, 8, 9, 10, 11, 8, 9, 10, 0, 1, 2, 13, 14, 15, 12]
    assert windows.lengths().tolist() == [4, 4, 4, 3, 3, 1]


def test_equal_windows_shrink_to_the_smallest_cloud() -> None:
    windows = split_windows(borders([7, 0, 3]), 4, equal=True)
    assert windows.groups == ((4, 3),)
    assert windows.rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 7, 8, 9]


@pytest.mark.parametrize("n", SIZES)
def test_each_point_sees_its_window(n: int) -> None:
    q, k, v = (t.detach() for t in qkv(n))
    out = window_attention(q, k, v, split_windows(borders([n]), K))
    for row in range(n):
        start = row - row % K
        seen = torch.arange(start, min(start + K, n))
        if n > K and len(seen) < K:
            seen = torch.cat([seen, torch.arange(start - K + len(seen), start)])
        weights = torch.einsum("hd,khd->hk", q[row], k[seen]).mul(q.shape[-1] ** -0.5).softmax(1)
        assert_close(out[row], torch.einsum("hk,khd->hd", weights, v[seen]))


@pytest.mark.parametrize("options", ["plain", "bias", "rope", "both"])
@pytest.mark.parametrize("chunked", [False, True])
def test_backends_agree(options: str, chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if chunked:
        monkeypatch.setattr(attention, "_FUSED_CHUNK", 1)
        monkeypatch.setattr(attention, "_BIAS_CHUNK", 1)
    counts = [0, *SIZES, 0, 3]
    windows, total = windows_of(counts), sum(counts)
    cells = torch.randint(0, 40, (total, 3), generator=torch.Generator().manual_seed(1))
    table = RelativePositionBias(K, 2)
    arguments = {}
    if options in ("bias", "both"):
        arguments["bias"] = lambda rows: table(cells[rows])
    if options in ("rope", "both"):
        arguments["rope"] = rotation(cells, rotary_frequencies(6, 10))
    results = []
    for backend in ("loop", "padded", *(["kernels"] if "bias" not in arguments else [])):
        tensors = qkv(total)
        table.rpe_table.grad = None
        out = window_attention(*tensors, windows, backend=backend, **arguments)
        out.mul(torch.arange(out.numel()).view_as(out).sin()).sum().backward()
        results.append([out, *(t.grad for t in tensors)] + ([table.rpe_table.grad] if "bias" in arguments else []))
    for other in results[1:]:
        for reference, actual in zip(results[0], other, strict=True):
            assert_close(actual, reference, rtol=1e-4, atol=1e-5)


def test_flex_agrees() -> None:
    counts = [3, 2 * K + 1, K]
    windows, tensors = windows_of(counts), [t.detach() for t in qkv(sum(counts), dim=16)]
    expected = window_attention(*tensors, windows, backend="loop")
    for _ in range(2):  # the second time with the plan of the first
        assert_close(window_attention(*tensors, windows, backend="flex"), expected, rtol=1e-4, atol=1e-5)


def test_batch_mates_do_not_matter() -> None:
    counts = [5, 2 * K + 3, 1, K]
    offsets, tensors = borders(counts), [t.detach() for t in qkv(sum(counts))]
    together = window_attention(*tensors, split_windows(offsets, K))
    for b, n in enumerate(counts):
        own = [t[offsets[b] : offsets[b + 1]] for t in tensors]
        assert_close(together[offsets[b] : offsets[b + 1]], window_attention(*own, split_windows(borders([n]), K)))


def test_no_points() -> None:
    tensors = qkv(0)
    assert window_attention(*tensors, split_windows(borders([0, 0]), K)).shape == (0, 2, 6)
    assert split_windows(borders([]), K).groups == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_upcast(dtype: torch.dtype) -> None:
    windows, tensors = windows_of([20]), [t.detach().to(dtype) for t in qkv(20)]
    exact = window_attention(*(t.float() for t in tensors), windows)
    assert_close(window_attention(*tensors, windows, upcast=True), exact)
    with torch.autocast("cpu", dtype=dtype):
        assert_close(window_attention(*(t.float() for t in tensors), windows, upcast=True), exact)
        assert window_attention(*(t.float() for t in tensors), windows).dtype == dtype
    assert_close(window_attention(*tensors, windows).float(), exact, rtol=0.05, atol=0.05)


def test_memory_of_the_bias_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_BIAS_CHUNK", 2 * 3 * K * K)
    seen = []

    def bias(rows: Tensor) -> Tensor:
        seen.append(len(rows))
        return torch.zeros(len(rows), 2, rows.shape[1], rows.shape[1])

    window_attention(*(t.detach() for t in qkv(8 * K)), split_windows(borders([8 * K]), K), bias=bias)
    assert seen == [3, 3, 2]


def test_misuse() -> None:
    tensors, windows = qkv(4), split_windows(borders([4]), K)
    with pytest.raises(InputError, match="window size must be at least 1, got 0"):
        split_windows(borders([4]), 0)
    with pytest.raises(InputError, match="'varlen' cannot run: queries are on cpu"):
        window_attention(*tensors, windows, backend="varlen")
    with pytest.raises(InputError, match="takes no bias"):
        window_attention(*tensors, windows, bias=lambda rows: rows, backend="flex")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["padded", "flex", "varlen"])
def test_gpu_agrees(backend: str) -> None:
    if backend == "varlen" and find_spec("flash_attn") is None:
        pytest.skip("flash_attn is not installed")
    dtype = torch.bfloat16 if backend == "varlen" else torch.float32
    counts = [40, 200, 128, 0, 7]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(sum(counts), 2, 32, generator=generator).requires_grad_() for _ in range(3)]
    expected = window_attention(*tensors, split_windows(borders(counts), 64), backend="loop")
    expected.sin().sum().backward()
    moved = [t.detach().cuda().to(dtype).requires_grad_() for t in tensors]
    actual = window_attention(*moved, split_windows(borders(counts).cuda(), 64), backend=backend)
    actual.float().sin().sum().backward()
    tolerance = 5e-2 if backend == "varlen" else 1e-4
    assert_close(actual.float().cpu(), expected, rtol=tolerance, atol=tolerance)
    for here, there in zip(tensors, moved, strict=True):
        assert_close(there.grad.float().cpu(), here.grad, rtol=tolerance, atol=tolerance)
