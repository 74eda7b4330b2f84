"""The Triton kernels of sparse convolution against the reference: interpreted, or on a GPU where there is one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pc3d.errors import InputError
from pc3d.ops.backend import use_backend
from pc3d.ops.coir import Field, encode
from pc3d.ops.conv import Epilogue, Flows, sparse_conv
from pc3d.ops.flows import Way
from pc3d.ops.kernel_map import KernelMap, strided_map, submanifold_map
from pc3d.sparse.flows import planned_conv
from pc3d.sparse.table import use_dataflow

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu_kernel


def coordinates(voxels: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randint(0, 2, (voxels, 1), generator=generator)
    coord = torch.cat([batch, torch.randint(-5, 5, (voxels, 3), generator=generator)], 1).unique(dim=0)
    return coord[torch.randperm(len(coord), generator=generator)].int()


def kernel_maps() -> dict[str, KernelMap]:
    coord = coordinates(150)
    down = strided_map(coord, (2, 2, 2), (2, 2, 2))[1]
    return {
        "submanifold": submanifold_map(coord, (3, 3, 3)),
        "large kernel": submanifold_map(coord[:40], (5, 5, 5)),
        "down": down,
        "up": down.inverse(),
        "one voxel": submanifold_map(coord[:1], (3, 3, 3)),
        "empty": submanifold_map(coord[:0], (3, 3, 3)),
        "no pairs": KernelMap(*[torch.empty(0, dtype=torch.int32)] * 2, torch.zeros(9, dtype=torch.int64), 5, 30),
    }


MAPS = kernel_maps()


def run(kmap: KernelMap, cin: int, cout: int, dtype: torch.dtype, backend, flows: Flows | None = None) -> list[Tensor]:
    """Output, and gradients of features, weight and bias."""
    generator = torch.Generator().manual_seed(1)
    shapes = (kmap.num_in, cin), (kmap.kernel_volume, cin, cout), (cout,)
    operands = [torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_() for shape in shapes]
    rows = [t.to(DEVICE) for t in (kmap.in_rows, kmap.out_rows)]
    moved = KernelMap(*rows, kmap.offsets, kmap.num_in, kmap.num_out)
    with use_backend(backend):
        out = sparse_conv(operands[0], operands[1], moved, operands[2], flows)
        upstream = torch.randn(out.shape, generator=generator).to(DEVICE, dtype)
        return [out, *torch.autograd.grad(out, operands, upstream)]


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(("cin", "cout"), [(3, 5), (33, 40)])
def test_equals_the_reference(name, cin, cout):
    found, expected = (run(MAPS[name], cin, cout, torch.float32, backend) for backend in ("triton", "reference"))
    for left, right in zip(found, expected, strict=True):
        scale = max(1.0, float(right.abs().max())) if right.numel() else 1.0
        torch.testing.assert_close(left, right, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs(dtype):
    found, expected = (run(MAPS["submanifold"], 16, 16, dtype, backend) for backend in ("triton", "reference"))
    for left, right in zip(found, expected, strict=True):
        assert left.dtype == dtype
        ulp = torch.finfo(dtype).eps * right.float().abs().clamp(min=1)
        assert ((left.float() - right.float()).abs() <= 2 * ulp).all()


def test_the_kernels_are_used_and_float64_is_not_theirs(monkeypatch):
    from pc3d.ops import conv_triton

    calls = []
    original = conv_triton.forward
    monkeypatch.setattr(conv_triton, "forward", lambda *args: calls.append(1) or original(*args))
    kmap = MAPS["down"]
    run(kmap, 4, 4, torch.float32, "triton")
    assert len(calls) == 2  # forward and input gradient
    run(kmap, 4, 4, torch.float64, "triton")
    assert len(calls) == 2


FLOWS = ["os@16", "os@128wall", "os@32w64", "os@64walls2", "os@32w64s3", "fod", "ws"]


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("name", ["submanifold", "large kernel", "up"])
def test_every_flow_equals_the_reference(flow: str, name: str) -> None:
    flows = Flows(flow, flow, "ws" if flow == "ws" else "fod")
    found = run(MAPS[name], 9, 20, torch.float32, "triton", flows)
    for left, right in zip(found, run(MAPS[name], 9, 20, torch.float32, "reference"), strict=True):
        torch.testing.assert_close(left, right, atol=1e-5 * float(right.detach().abs().max()), rtol=0)


def test_flows_of_one_device_only() -> None:
    with pytest.raises(InputError, match="'os@512' exists on the CPU only"):
        run(MAPS["submanifold"], 4, 4, torch.float32, "triton", Flows("os@512"))
    if DEVICE == "cpu":
        for flow in ("os@64", "fod", "os@128wall"):
            with pytest.raises(InputError, match=f"'{flow}' exists on a GPU only"):
                run(MAPS["submanifold"], 4, 4, torch.float32, "auto", Flows(flow))


def test_a_layer_follows_forced_flows_and_finishes_by_itself() -> None:
    kmap, feat, weight = MAPS["submanifold"], torch.randn(MAPS["submanifold"].num_in, 4), torch.randn(27, 4, 8)
    after = Epilogue(torch.rand(8), torch.rand(8), relu=True)
    with torch.no_grad(), use_backend("triton"), use_dataflow("fwd=os@32w64s2"):
        found = planned_conv(feat, weight, replace(kmap, plans={}), None, after)
    with torch.no_grad(), use_backend("reference"):
        torch.testing.assert_close(found, planned_conv(feat, weight, kmap, None, after), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["os@64wall", "os@32w16s3", "os@16"])
def test_tiles_name_the_offsets_they_have(name: str) -> None:
    from pc3d.ops.conv_triton import plan

    kmap, way = MAPS["large kernel"], Way.parse(name)
    table = torch.zeros(kmap.kernel_volume, kmap.num_out, dtype=torch.bool)
    table[torch.repeat_interleave(torch.arange(kmap.kernel_volume), kmap.offsets.diff()), kmap.out_rows.long()] = True
    corf = encode(kmap, Field.CORF)
    masks, starts, partners, orders, pointer, lists, *_ = plan(corf, kmap.offsets, way)
    tiles, parts = -(-kmap.num_out // way.tile), max(4, way.splits)
    assert len(orders) == parts
    assert torch.equal(partners, corf.partners)
    for part, order in enumerate(orders):
        assert order.sort().values.tolist() == list(range(kmap.num_out))
        inside = range(kmap.kernel_volume * part // parts, kmap.kernel_volume * (part + 1) // parts)
        assert torch.equal(starts[part], starts[0] + table[: inside[0]].sum(0))
        for place, k in enumerate(inside):
            assert torch.equal((masks[part] >> place & 1).bool(), table[k])
        for tile in range(tiles):
            rows = order[tile * way.tile : (tile + 1) * way.tile].long()
            begin, end = pointer[part * (tiles + 1) + tile :][:2].tolist()
            assert lists[begin:end].tolist() == [k for k in inside if table[k, rows].any()]
        if isinstance(way.window, int):
            assert ((order // way.window).diff() >= 0).all()
        if way.window is None:
            assert order.tolist() == list(range(kmap.num_out))


def test_many_chunks_of_pairs(monkeypatch):
    from pc3d.ops import conv_triton

    monkeypatch.setattr(conv_triton, "_CHUNK", 16)
    coord = coordinates(120, seed=3)
    found = run(submanifold_map(coord, (3, 3, 3)), 8, 8, torch.float32, "triton")
    expected = run(submanifold_map(coord, (3, 3, 3)), 8, 8, torch.float32, "reference")
    torch.testing.assert_close(found[2], expected[2], atol=1e-4, rtol=1e-4)
