"""Depth-wise sparse convolution: C++ and Triton kernels, the reference, and dense convolution, compared."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pc3d.ops.backend import cpu_kernels, use_backend
from pc3d.ops.depthwise import depthwise_conv
from pc3d.ops.kernel_map import KernelMap, strided_map, submanifold_map
from pc3d.sparse import DepthwiseSubMConv3d, from_dense, to_dense
from pc3d.voxels import Voxels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def kernel_maps(voxels: int) -> dict[str, KernelMap]:
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(0, 2, (voxels, 1), generator=generator)
    coord = torch.cat([batch, torch.randint(-8, 8, (voxels, 3), generator=generator)], 1).unique(dim=0).int()
    down = strided_map(coord, (2, 2, 2), (2, 2, 2))[1]
    return {
        "submanifold": submanifold_map(coord, (3, 3, 3)),
        "down": down,
        "up": down.inverse(),
        "empty": submanifold_map(coord[:0], (3, 3, 3)),
        "no pairs": KernelMap(*[torch.empty(0, dtype=torch.int32)] * 2, torch.zeros(9, dtype=torch.int64), 5, 300),
    }


def run(kmap: KernelMap, channels: int, dtype: torch.dtype, backend, device: str = "cpu") -> list[Tensor]:
    """Output, and gradients of features, weight and bias."""
    generator = torch.Generator().manual_seed(1)
    shapes = (kmap.num_in, channels), (kmap.kernel_volume, channels), (channels,)
    operands = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    moved = KernelMap(kmap.in_rows.to(device), kmap.out_rows.to(device), kmap.offsets, kmap.num_in, kmap.num_out)
    with use_backend(backend):
        out = depthwise_conv(operands[0], operands[1], moved, operands[2])
        upstream = torch.randn(out.shape, generator=generator).to(device, dtype)
        return [out, *torch.autograd.grad(out, operands, upstream)]


def assert_all_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for left, right in zip(found, expected, strict=True):
        assert left.dtype == right.dtype
        scale = max(1.0, float(right.detach().abs().max())) if right.numel() else 1.0
        torch.testing.assert_close(left, right, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize("name", kernel_maps(10))
@pytest.mark.parametrize("channels", [1, 7, 48])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_kernels_equal_the_reference(name, channels, dtype, tolerance):
    if cpu_kernels() is None:
        pytest.skip("the C++ extension is not built")
    kmap = kernel_maps(2500)[name]
    found, expected = (run(kmap, channels, dtype, backend) for backend in ("auto", "reference"))
    assert_all_close(found, expected, tolerance)


@pytest.mark.gpu_kernel
@pytest.mark.parametrize("name", kernel_maps(10))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_equals_the_reference(name, dtype):
    pytest.importorskip("triton")
    kmap = kernel_maps(120)[name]
    found, expected = (run(kmap, 9, dtype, backend, DEVICE) for backend in ("triton", "reference"))
    assert_all_close(found, expected, 1e-5 if dtype == torch.float32 else 5e-3)


def test_bits_do_not_depend_on_threads():
    kmap, before = kernel_maps(2500)["submanifold"], torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run(kmap, 24, torch.float32, "auto"))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(left, right) for left, right in zip(result, results[0], strict=True))


def test_gradients_in_float64():
    kmap = kernel_maps(30)["down"]
    feat = torch.randn(kmap.num_in, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(kmap.kernel_volume, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: depthwise_conv(x, w, kmap), (feat, weight))
    assert torch.autograd.gradgradcheck(lambda x, w: depthwise_conv(x, w, kmap), (feat, weight))


def test_a_layer_equals_a_dense_depthwise_convolution():
    torch.manual_seed(0)
    dense = torch.randn(2, 5, 6, 7, 8)
    voxels = from_dense(dense)
    layer = DepthwiseSubMConv3d(5)
    kernel = layer.weight.T.reshape(5, 1, 3, 3, 3)
    expected = F.conv3d(dense, kernel, layer.bias, padding=1, groups=5)
    torch.testing.assert_close(to_dense(layer(voxels)), expected, atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused():
    coord = torch.tensor([[0, 0, 0, 0]], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"feat \(1, 4\) and weight"):
        DepthwiseSubMConv3d(3)(Voxels(coord, torch.ones(1, 4), 1))
    with pytest.raises(ValueError, match="cast one of them"):
        DepthwiseSubMConv3d(4)(Voxels(coord, torch.ones(1, 4).half(), 1))
