"""Sparse convolution by the package spconv against the reference; on one thread of a CPU, or on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pc3d.ops.backend import use_backend
from pc3d.ops.conv import Epilogue, sparse_conv
from pc3d.ops.kernel_map import KernelMap, strided_map, submanifold_map

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu_kernel


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Its CPU path is wrong on several threads, and its backward asks for a CUDA stream that a CPU build lacks."""
    pytest.importorskip("spconv")
    from spconv.pytorch import ops

    threads = torch.get_num_threads()
    if DEVICE == "cpu":
        monkeypatch.setattr(ops, "get_current_stream", lambda: 0)
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def kernel_maps() -> dict[str, KernelMap]:
    generator = torch.Generator().manual_seed(0)
    coord = torch.randint(-6, 6, (400, 4), generator=generator)
    coord[:, 0] %= 2
    coord = coord.unique(dim=0).int()
    down = strided_map(coord, (2, 2, 2), (2, 2, 2))[1]
    return {
        "submanifold": submanifold_map(coord, (3, 3, 3)),
        "asymmetric": submanifold_map(coord, (3, 1, 2)),
        "pointwise": submanifold_map(coord, (1, 1, 1)),
        "down": down,
        "up": down.inverse(),
        "empty": submanifold_map(coord[:0], (3, 3, 3)),
        "no pairs": KernelMap(*[torch.empty(0, dtype=torch.int32)] * 2, torch.zeros(9, dtype=torch.int64), 5, 30),
    }


def run(kmap: KernelMap, backend) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = (kmap.num_in, 6), (kmap.kernel_volume, 6, 10), (10,)
    operands = [torch.randn(shape, generator=generator).to(DEVICE).requires_grad_() for shape in shapes]
    moved = KernelMap(kmap.in_rows.to(DEVICE), kmap.out_rows.to(DEVICE), kmap.offsets, kmap.num_in, kmap.num_out)
    with use_backend(backend):
        out = sparse_conv(operands[0], operands[1], moved, operands[2], epilogue=Epilogue(relu=True))
        upstream = torch.randn(out.shape, generator=generator).to(DEVICE)
        return [out, *torch.autograd.grad(out, operands, upstream)]


@pytest.mark.parametrize("name", kernel_maps())
def test_equals_the_reference(name: str) -> None:
    kmap = kernel_maps()[name]
    for found, expected in zip(run(kmap, "spconv"), run(kmap, "reference"), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from spconv.pytorch import ops

    calls = []
    original = ops.indice_conv
    monkeypatch.setattr(ops, "indice_conv", lambda *args: calls.append(1) or original(*args))
    run(kernel_maps()["down"], "spconv")
    assert calls == [1]
