"""The C++ kernels of sparse convolution against the plain-PyTorch reference, and the reference's own gradients."""

from __future__ import annotations

import itertools
import multiprocessing

import pytest
import torch
from torch import Tensor

from pc3d.ops import conv
from pc3d.ops.backend import cpu_kernels, use_backend
from pc3d.ops.conv import Epilogue, sparse_conv
from pc3d.ops.kernel_map import KernelMap, strided_map, submanifold_map

SHAPES = [(1, 1), (2, 3), (3, 8), (4, 32), (5, 20), (8, 16), (16, 17), (33, 31), (64, 64), (65, 40), (96, 130)]


@pytest.fixture(scope="module")
def kernels():
    module = cpu_kernels()
    if module is None:
        pytest.skip("the C++ extension is not built")
    return module


def random_coord(voxels: int, extent: int = 11, seed: int = 0) -> Tensor:
    """Distinct voxels of two clouds, negative coordinates among them, in no order."""
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randint(0, 2, (voxels, 1), generator=generator)
    coord = torch.cat([batch, torch.randint(-extent, extent, (voxels, 3), generator=generator)], 1).unique(dim=0)
    return coord[torch.randperm(len(coord), generator=generator)].int()


def kernel_maps() -> dict[str, KernelMap]:
    coord = random_coord(2500)
    down = strided_map(coord, (2, 2, 2), (2, 2, 2))[1]
    overlapping = strided_map(coord, (3, 3, 3), (2, 2, 2), (1, 1, 1))[1]
    return {
        "submanifold": submanifold_map(coord, (3, 3, 3)),
        "submanifold sorted": submanifold_map(coord[_raster(coord)], (3, 3, 3)),
        "pointwise": submanifold_map(coord, (1, 1, 1)),
        "large kernel": submanifold_map(coord[:700], (5, 5, 5)),
        "dilated asymmetric": submanifold_map(coord, (3, 1, 2), (2, 1, 1)),
        "down": down,
        "up": down.inverse(),
        "overlapping": overlapping,
        "one voxel": submanifold_map(coord[:1], (3, 3, 3)),
        "empty": submanifold_map(coord[:0], (3, 3, 3)),
        "no pairs": KernelMap(*[torch.empty(0, dtype=torch.int32)] * 2, torch.zeros(9, dtype=torch.int64), 5, 300),
    }


def _raster(coord: Tensor) -> Tensor:
    return ((coord[:, 0] * 64 + coord[:, 1]) * 64 + coord[:, 2]).mul(64).add(coord[:, 3]).argsort()


MAPS = kernel_maps()


def operands(kmap: KernelMap, cin: int, cout: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(cin * 1000 + cout)
    shapes = [(kmap.num_in, cin), (kmap.kernel_volume, cin, cout), (cout,)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def run(kmap: KernelMap, feat: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Output and the gradients of a fixed random functional of it."""
    out = sparse_conv(feat, weight, kmap, bias)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    inputs = [feat, weight] if bias is None else [feat, weight, bias]
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal to ``tolerance`` times the largest value: sums are taken in another order."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(("cin", "cout"), SHAPES)
def test_kernels_equal_the_reference(kernels, name, cin, cout):
    arguments = operands(MAPS[name], cin, cout)
    fast = run(MAPS[name], *arguments)
    with use_backend("reference"):
        expected = run(MAPS[name], *arguments)
    for actual, reference, tolerance in zip(fast, expected, (1e-5, 1e-5, 1e-4, 1e-5), strict=True):
        assert_close(actual, reference, tolerance)


def test_the_fast_path_is_taken(kernels, monkeypatch):
    """Otherwise every comparison here would compare the reference with itself."""
    monkeypatch.setattr(conv, "pair_runs", lambda offsets: pytest.fail("the reference ran"))
    for name in ("submanifold", "down"):
        run(MAPS[name], *operands(MAPS[name], 4, 8))


@pytest.mark.parametrize("name", ["submanifold", "overlapping", "up"])
@pytest.mark.parametrize(
    ("cin", "cout", "dtype"),
    [(4, 32, torch.float32), (33, 31, torch.float32), (64, 64, torch.float32), (33, 40, torch.bfloat16)],
)
def test_bits_do_not_depend_on_threads(kernels, name, cin, cout, dtype):
    arguments = operands(MAPS[name], cin, cout, dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7, 7):
            torch.set_num_threads(threads)
            results.append(run(MAPS[name], *arguments))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for actual, first in zip(result, results[0], strict=True):
            assert torch.equal(actual, first)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_weight_gradient_of_many_pairs_does_not_depend_on_threads(kernels, dtype, tolerance):
    """One offset of many pairs: its input channels are shared out."""
    rows = torch.arange(20_000, dtype=torch.int32)
    kmap = KernelMap(rows.flip(0).contiguous(), rows, torch.tensor([0, len(rows)]), len(rows), len(rows))
    arguments = operands(kmap, 60, 24, dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(kmap, *arguments)
        torch.set_num_threads(3)
        three = run(kmap, *arguments)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    with use_backend("reference"):
        expected = run(kmap, *arguments)
    assert_close(one[2].float(), expected[2].float(), tolerance)


@pytest.mark.parametrize("transposed", [False, True])
def test_instruction_sets_agree(kernels, transposed):
    """AVX-512 and AVX2 to the bit (fused multiply-adds in one order), the baseline to rounding."""
    kmap, bias = MAPS["submanifold"], torch.randn(40)
    feat, weight, _ = (t.detach() for t in operands(kmap, 65, 40))
    weight = weight.transpose(1, 2).contiguous().transpose(1, 2) if transposed else weight
    plan = conv._plan(kernels, kmap.in_rows, kmap.out_rows, kmap.offsets, kmap.num_in, kmap.num_out)
    outs, grads = {}, {}
    for isa in kernels.conv_isas():
        outs[isa], grads[isa] = torch.empty(kmap.num_out, 40), torch.empty(27, 65, 40)
        kernels.conv_forward(feat, weight, bias, *plan, outs[isa], isa=isa)
        kernels.conv_weight_grad(feat, outs[isa], *plan, grads[isa], isa)
    with use_backend("reference"):
        expected = sparse_conv(feat, weight, kmap, bias)
    for isa, out in outs.items():
        assert_close(out, expected, 1e-5)
        assert_close(grads[isa], grads["generic"], 1e-4)
    if "avx512" in outs:
        assert torch.equal(outs["avx512"], outs["avx2"])
    for missing in ("mmx", "avx512bf16"):
        with pytest.raises(ValueError, match=f"no '{missing}' kernels"):
            kernels.conv_forward(feat, weight, bias, *plan, outs["generic"], isa=missing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["submanifold", "down", "one voxel", "empty", "no pairs"])
@pytest.mark.parametrize("cout", [1, 16, 40, 130])
def test_an_epilogue_equals_layers_of_their_own(kernels, dtype, name, cout):
    kmap = MAPS[name]
    feat, weight, bias = (t.detach().to(dtype) for t in operands(kmap, 9, cout))
    generator = torch.Generator().manual_seed(2)
    scale, shift = torch.randn(2, cout, generator=generator)
    residual = torch.randn(kmap.num_out, cout, generator=generator).to(dtype)
    for parts in ({"scale": scale, "shift": shift}, {"residual": residual}, {"relu": True}):
        _check_epilogue(Epilogue(**parts), feat, weight, kmap, bias)
    _check_epilogue(Epilogue(scale, shift, residual, True), feat, weight, kmap, bias)


def _check_epilogue(epilogue: Epilogue, feat: Tensor, weight: Tensor, kmap: KernelMap, bias: Tensor) -> None:
    layers = epilogue(sparse_conv(feat, weight, kmap, bias))
    with torch.no_grad():
        fused = sparse_conv(feat, weight, kmap, bias, epilogue=epilogue)
    assert_close(fused, layers, 1e-6 if feat.dtype == torch.float32 else 2e-2)
    with_gradient = sparse_conv(feat, weight.requires_grad_(), kmap, bias, epilogue=epilogue)
    assert torch.equal(with_gradient, layers)
    assert with_gradient.requires_grad


def test_bits_of_a_column_do_not_depend_on_the_others(kernels):
    """The last columns, which fill no register, are finished as the others are."""
    kmap = MAPS["submanifold"]
    feat, weight, bias = (t.detach() for t in operands(kmap, 9, 48))
    scale, shift = torch.randn(2, 48, generator=torch.Generator().manual_seed(2))
    plan = conv.conv_plans(feat, kmap)[0]
    outs = {}
    for isa, cout in itertools.product(kernels.conv_isas(), (48, 45, 35)):
        outs[cout] = torch.empty(kmap.num_out, cout)
        first = [t[..., :cout].contiguous() for t in (weight, bias, scale, shift)]
        kernels.conv_forward(feat, *first[:2], *plan, outs[cout], *first[2:], isa=isa)
        assert torch.equal(outs[cout], outs[48][:, :cout])


def test_not_a_number_passes_an_epilogue(kernels):
    kmap = MAPS["pointwise"]
    feat = torch.ones(kmap.num_in, 8, dtype=torch.bfloat16)
    feat[3] = torch.nan
    feat[4] = torch.inf
    with torch.no_grad():
        out = sparse_conv(feat, torch.eye(8, dtype=torch.bfloat16)[None], kmap, epilogue=Epilogue(relu=True))
    assert out[3].isnan().all()
    assert out[4].isnan().all()  # inf * 0
    assert torch.equal(out[5:], feat[5:])


@pytest.mark.parametrize("cin", [7, 8, 40])
def test_bfloat16_is_read_exactly_and_rounded_once(kernels, cin):
    """Ties, subnormal and huge values included."""
    kmap = MAPS["pointwise"]
    feat = torch.randint(-(2**15), 2**15, (kmap.num_in, cin), generator=torch.Generator().manual_seed(0))
    feat = feat.short().view(torch.bfloat16)
    feat[~feat.isfinite()] = 1.0
    for factor in (1.0, 1 + 2**-9, 3 * 2**-9):
        wide = sparse_conv(feat.float(), factor * torch.eye(cin)[None], kmap)
        plan = conv.conv_plans(feat, kmap)[0]
        out = torch.empty(kmap.num_out, cin, dtype=torch.bfloat16)
        kernels.conv_forward(feat, factor * torch.eye(cin)[None], None, *plan, out, isa=kernels.conv_isas()[0])
        assert torch.equal(out, wide.bfloat16())


@pytest.mark.parametrize(("cin", "cout"), [(1, 20), (3, 16), (33, 40), (64, 64), (301, 33)])
@pytest.mark.parametrize("name", ["submanifold", "down", "one voxel", "empty", "no pairs"])
def test_instruction_sets_agree_on_bfloat16(kernels, name, cin, cout):
    """Pairs of channels in one instruction, where the CPU has it: rows and maps of odd lengths included."""
    kmap = MAPS[name]
    feat, weight, bias = (t.detach().bfloat16() for t in operands(kmap, cin, cout))
    upstream = torch.randn(kmap.num_out, cout, generator=torch.Generator().manual_seed(1)).bfloat16()
    plan = conv.conv_plans(feat, kmap)[0]
    wide = sparse_conv(feat.float(), weight.float(), kmap, bias.float())
    expected = None
    for isa in reversed(kernels.conv_isas(bf16=True)):
        out, grad = torch.empty(kmap.num_out, cout, dtype=torch.bfloat16), torch.empty(weight.shape)
        kernels.conv_forward(feat, weight.float(), bias.float(), *plan, out, isa=isa)
        kernels.conv_weight_grad(feat, upstream, *plan, grad, isa)
        assert_close(out.float(), wide, 2**-8)
        expected = grad if expected is None else expected
        assert_close(grad, expected, 1e-5)


def test_matrix_tiles_are_shared_with_torch(kernels):
    """CPUs with AMX: torch's products set the same registers up in their own way."""
    generator = torch.Generator().manual_seed(0)
    square, kmap = torch.randn(300, 300, generator=generator).bfloat16(), MAPS["submanifold"]
    feat, weight, _ = (t.detach().bfloat16() for t in operands(kmap, 40, 40))
    product, out = square @ square, sparse_conv(feat, weight, kmap)
    for _ in range(3):
        assert torch.equal(square @ square, product)
        assert torch.equal(sparse_conv(feat, weight, kmap), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_is_summed_in_float32_and_rounded_once(kernels, dtype):
    kmap = MAPS["submanifold"]
    arguments = [t.detach().to(dtype).requires_grad_() for t in operands(kmap, 32, 24)]
    wide = [t.detach().float().requires_grad_() for t in arguments]
    actual, expected = run(kmap, *arguments), run(kmap, *wide)
    rounding = torch.finfo(dtype).eps / 2 * expected[0].abs() + 1e-6 * expected[0].abs().max()
    assert ((actual[0].float() - expected[0]).abs() <= rounding).all()
    for half, full in zip(actual[1:], expected[1:], strict=True):
        assert_close(half.float(), full, 2e-2)


def test_non_contiguous_operands(kernels):
    kmap = MAPS["submanifold"]
    feat, weight, bias = (t.detach() for t in operands(kmap, 12, 20))
    views = [
        torch.stack([feat, feat], 2)[..., 1],
        weight.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        torch.stack([bias, bias], 1)[:, 0],
    ]
    assert not any(view.is_contiguous() for view in views)
    views = [view.requires_grad_() for view in views]
    for actual, expected in zip(run(kmap, *views), run(kmap, *operands(kmap, 12, 20)), strict=True):
        assert_close(actual, expected, 1e-6)


def test_maps_in_any_order_of_pairs(kernels):
    """A map whose pairs are shuffled within each offset convolves the same."""
    kmap = MAPS["overlapping"]
    order = torch.cat([a + torch.randperm(b - a) for a, b in itertools.pairwise(kmap.offsets.tolist())])
    shuffled = KernelMap(kmap.in_rows[order], kmap.out_rows[order], kmap.offsets, kmap.num_in, kmap.num_out)
    arguments = operands(kmap, 9, 16)
    for actual, expected in zip(run(shuffled, *arguments), run(kmap, *arguments), strict=True):
        assert_close(actual, expected, 1e-4)


@pytest.mark.parametrize(
    ("in_rows", "out_rows", "offsets", "message"),
    [
        ([0, 3], [0, 1], [0, 2], "outside"),
        ([0, 1], [0, 9], [0, 2], "outside"),
        ([0, -1], [0, 1], [0, 2], "outside"),
        ([0, 1], [1, 1], [0, 2], "twice"),
        ([0, 1, 2], [1, 0, 1], [0, 3], "twice"),
        ([0, 1], [0, 1], [0, 1], "ascend"),
        ([0, 1], [0, 1], [0, 2, 1, 2], "ascend"),
    ],
)
def test_wrong_maps_are_refused(kernels, in_rows, out_rows, offsets, message):
    rows = [torch.tensor(r, dtype=torch.int32) for r in (in_rows, out_rows)]
    kmap = KernelMap(*rows, torch.tensor(offsets), 3, 2)
    with pytest.raises(ValueError, match=message):
        sparse_conv(torch.ones(3, 4), torch.ones(kmap.kernel_volume, 4, 4), kmap)


def test_gradients_in_float64():
    kmap = strided_map(random_coord(14, extent=2), (3, 2, 1), (2, 2, 1), (1, 0, 0))[1]
    feat, weight, bias = operands(kmap, 2, 3, torch.float64)

    def function(feat: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return sparse_conv(feat, weight, kmap, bias)

    assert torch.autograd.gradcheck(function, (feat, weight, bias))
    assert torch.autograd.gradgradcheck(function, (feat, weight, bias))


def test_second_gradients_of_the_kernels(kernels):
    kmap = MAPS["overlapping"]

    def second(feat: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        out = sparse_conv(feat, weight, kmap, bias)
        first = torch.autograd.grad(out.square().sum(), [feat, weight], create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), [feat, weight]))

    arguments = operands(kmap, 6, 10)
    fast = second(*arguments)
    with use_backend("reference"):
        expected = second(*arguments)
    for actual, reference in zip(fast, expected, strict=True):
        assert_close(actual, reference, 1e-4)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_registration_of_the_operator(backend):
    """Schema, fake kernels, autograd registration: what torch.compile relies on."""
    kmap = submanifold_map(random_coord(200, extent=4), (3, 3, 3))
    feat, weight, bias = operands(kmap, 5, 6)
    with use_backend(backend):
        plans = conv.conv_plans(feat, kmap)
        pairs = (kmap.in_rows, kmap.out_rows, kmap.offsets)
        torch.library.opcheck(conv._sparse_conv, (feat, weight, bias, *pairs, kmap.num_out, *plans, "os,os,fod"))
        torch.library.opcheck(conv._weight_grad, (feat, torch.randn(kmap.num_out, 6), *pairs, *plans, "os,os,fod"))


def test_autocast_casts_once(kernels):
    kmap = MAPS["submanifold"]
    arguments = operands(kmap, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        actual = sparse_conv(arguments[0], arguments[1], kmap, arguments[2])
    expected = sparse_conv(arguments[0].bfloat16(), arguments[1].bfloat16(), kmap, arguments[2].bfloat16())
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)


def test_plans_are_built_once_and_inverse_plans_only_for_gradients(kernels):
    kmap = submanifold_map(random_coord(300), (3, 3, 3))
    arguments = operands(kmap, 4, 4)
    with torch.no_grad():
        sparse_conv(*arguments[:2], kmap)
    assert "conv_inverse" not in kmap.plans
    plan = kmap.plans["conv"]
    sparse_conv(*arguments[:2], kmap)
    assert kmap.plans["conv"] is plan
    assert "conv_inverse" in kmap.plans


def _compare_in_child(arguments: list[Tensor], expected: bytes) -> None:
    with torch.no_grad():
        out = sparse_conv(arguments[0], arguments[1], MAPS["submanifold"], arguments[2])
    if out.numpy().tobytes() != expected:
        raise SystemExit(3)


def test_forked_workers_convolve(kernels):
    """The OpenMP pool of the parent does not survive a fork; a child must neither hang nor differ."""
    arguments = operands(MAPS["submanifold"], 8, 8)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected = run(MAPS["submanifold"], *arguments)[0].numpy().tobytes()
        child = multiprocessing.get_context("fork").Process(target=_compare_in_child, args=(arguments, expected))
        child.start()
        child.join(timeout=60)
        assert child.exitcode == 0
    finally:
        torch.set_num_threads(before)
        if child.is_alive():
            child.kill()
