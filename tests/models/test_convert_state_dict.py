"""State dicts of other engines: each layout against a dense convolution of the same kernel, names, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from pc3d import InputError, Voxels
from pc3d.models.convert import KernelLayout, convert_state_dict
from pc3d.models.convert.kernels import Columns, write_kernel
from pc3d.sparse import (
    SparseConv3d,
    SparseConvolution,
    SparseConvTranspose3d,
    SparseInverseConv3d,
    SparseSequential,
    SubMConv3d,
)

SPCONV = (KernelLayout.KRSC, KernelLayout.RSCK, KernelLayout.RSKC)
FLAT = (KernelLayout.MINKOWSKI, KernelLayout.TORCHSPARSE)


def store(dense: Tensor, layout: KernelLayout) -> Tensor:
    """What an engine stores of the kernel ``(Cout, Cin, k0, k1, k2)`` along its coordinate columns, tap by tap."""
    cout, cin, *size = dense.shape
    shapes = {KernelLayout.KRSC: (cout, *size, cin), KernelLayout.RSCK: (*size, cin, cout)}
    shapes |= {KernelLayout.RSKC: (*size, cout, cin), KernelLayout.FVDB: (cout, cin, *size)}
    stored = torch.empty(shapes.get(layout, (size[0] * size[1] * size[2], cin, cout)), dtype=dense.dtype)
    first_fastest = layout is KernelLayout.MINKOWSKI or size[0] * size[1] * size[2] % 2 == 1
    for a, b, c in itertools.product(*map(range, size)):
        tap = dense[:, :, a, b, c]
        if layout is KernelLayout.KRSC:
            stored[:, a, b, c] = tap
        elif layout is KernelLayout.RSCK:
            stored[a, b, c] = tap.T
        elif layout is KernelLayout.RSKC:
            stored[a, b, c] = tap
        elif layout is KernelLayout.FVDB:
            stored[:, :, a, b, c] = tap
        elif first_fastest:
            stored[(c * size[1] + b) * size[0] + a] = tap.T
        else:
            stored[(a * size[1] + b) * size[2] + c] = tap.T
    return stored


def full_grid(extent: tuple[int, int, int], channels: int) -> tuple[Voxels, Tensor]:
    """Every cell of a box as voxels, and the same features as ``(1, C, X, Y, Z)``."""
    coord = torch.cartesian_prod(torch.zeros(1, dtype=torch.int64), *map(torch.arange, extent)).int()
    feat = torch.randn(len(coord), channels, dtype=torch.float64)
    return Voxels(coord, feat, 1), feat.reshape(1, *extent, channels).permute(0, 4, 1, 2, 3)


def rows(volume: Tensor) -> Tensor:
    return volume[0].flatten(1).T


def load(conv: SparseConvolution, kernel: Tensor, layout: KernelLayout, columns: Columns) -> None:
    name = "0.kernel" if layout in FLAT else "0.weight"
    net = SparseSequential(conv)
    net.load_state_dict(convert_state_dict({name: kernel}, net, layout, columns=columns))


@pytest.mark.parametrize("columns", ["xyz", "zyx"])
@pytest.mark.parametrize("layout", KernelLayout)
@pytest.mark.parametrize("size", [(3, 3, 3), (3, 5, 1)])
def test_submanifold_kernels(layout: KernelLayout, columns: Columns, size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    kernel = torch.randn(4, 3, *size, dtype=torch.float64)
    conv = SubMConv3d(3, 4, size, bias=False).double()
    load(conv, store(kernel if columns == "xyz" else kernel.permute(0, 1, 4, 3, 2), layout), layout, columns)
    voxels, volume = full_grid((4, 5, 3), 3)
    assert_close(conv(voxels).feat, rows(F.conv3d(volume, kernel, padding=[k // 2 for k in size])))


@pytest.mark.parametrize("columns", ["xyz", "zyx"])
@pytest.mark.parametrize("layout", KernelLayout)
def test_strided_and_inverse_kernels(layout: KernelLayout, columns: Columns) -> None:
    torch.manual_seed(0)
    size = (2, 2, 1)
    down, up = SparseConv3d(3, 4, size, size, bias=False).double(), SparseInverseConv3d(4, 3, size, bias=False).double()
    voxels, volume = full_grid((4, 6, 3), 3)
    first, second = torch.randn(4, 3, *size, dtype=torch.float64), torch.randn(3, 4, *size, dtype=torch.float64)
    for conv, kernel in ((down, first), (up, second)):
        load(conv, store(kernel if columns == "xyz" else kernel.permute(0, 1, 4, 3, 2), layout), layout, columns)
    coarse, dense = down(voxels), F.conv3d(volume, first, stride=size)
    assert_close(coarse.feat, rows(dense))
    assert_close(up(coarse).feat, rows(F.conv_transpose3d(dense, second.transpose(0, 1), stride=size)))


@pytest.mark.parametrize("size", [(3, 3, 3), (2, 4, 1)])
@pytest.mark.parametrize("layout", KernelLayout)
def test_columns_are_written_back(layout: KernelLayout, size: tuple[int, int, int]) -> None:
    kernel = torch.randn(4, 3, *size)
    conv = SparseConv3d(3, 4, size)
    weight = kernel.permute(2, 3, 4, 1, 0).reshape(conv.weight.shape)
    assert torch.equal(write_kernel(weight, conv, layout, "zyx"), store(kernel.permute(0, 1, 4, 3, 2), layout))
    assert torch.equal(write_kernel(weight, conv, layout), store(kernel, layout))


@pytest.mark.parametrize("layout", [*FLAT, KernelLayout.FVDB])
def test_pointwise_kernels_are_matrices(layout: KernelLayout) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(3, 4, dtype=torch.float64)
    conv = SubMConv3d(3, 4, 1, bias=False).double()
    load(conv, matrix if layout in FLAT else matrix.T.reshape(4, 3, 1, 1, 1), layout, "xyz")
    voxels, _ = full_grid((2, 2, 2), 3)
    assert_close(conv(voxels).feat, voxels.feat @ matrix)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = SubMConv3d(3, 4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)


def minkowski_state(block: Block) -> dict[str, Tensor]:
    state = {f"norm.bn.{name}": value for name, value in block.norm.state_dict().items()}
    state |= {"head.linear.weight": block.head.weight, "head.linear.bias": block.head.bias}
    kernel = write_kernel(block.conv.weight.detach(), block.conv, KernelLayout.MINKOWSKI)
    assert block.conv.bias is not None
    return state | {"conv.kernel": kernel, "conv.bias": block.conv.bias.detach()[None]}


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_whole_minkowski_network() -> None:
    torch.manual_seed(0)
    source, target = Block(), Block()
    nn.init.normal_(source.norm.running_mean)
    state = {f"module.{name}": value for name, value in minkowski_state(source).items()}
    target.load_state_dict(convert_state_dict({"state_dict": state, "epoch": 7}, target, KernelLayout.MINKOWSKI))
    assert same(source, target)


def test_names_are_mapped_by_rules() -> None:
    torch.manual_seed(0)
    source, target = Block(), Block()
    layout = KernelLayout.TORCHSPARSE
    foreign = {f"net.stem.{name.replace('conv', '0')}": value for name, value in source.state_dict().items()}
    foreign["net.stem.0.kernel"] = write_kernel(foreign.pop("net.stem.0.weight"), source.conv, layout)
    foreign["aux.weight"] = torch.zeros(1)
    rules = [(r"^net\.stem\.", ""), (r"^0\.", "conv."), (r"^aux\..*", "")]
    target.load_state_dict(convert_state_dict(foreign, target, layout, rules))
    assert same(source, target)
    with pytest.raises(InputError, match="both renamed to 'conv'; change rename"):
        convert_state_dict(foreign, target, layout, [(r".*conv.*|.*stem\.0.*", "conv")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv.kernel": None}, r"1 missing \(conv.weight\)"),
        ({"extra": torch.zeros(1)}, r"1 unexpected \(extra\)"),
        ({"conv.kernel": torch.zeros(27, 4, 3)}, r"conv.weight \(27, 4, 3\) instead of \(27, 3, 4\)"),
        ({"norm.bn.weight": torch.zeros(5)}, r"norm.weight \(5,\) instead of \(4,\)"),
    ],
)
def test_what_does_not_match_is_reported(changes: dict[str, Tensor | None], message: str) -> None:
    state = {name: value for name, value in {**minkowski_state(Block()), **changes}.items() if value is not None}
    with pytest.raises(InputError, match=message):
        convert_state_dict(state, Block(), KernelLayout.MINKOWSKI)


OTHER_VOXELS = {
    "3, stride 2": SparseConv3d(2, 2, 3, 2, 1),
    "3, stride 3": SparseConv3d(2, 2, 3, 3),
    "1, stride 2": SparseConv3d(2, 2, 1, 2),
    "2, stride 2, padding": SparseConv3d(2, 2, 2, 2, 1),
    "2, stride 2, dilation": SparseConv3d(2, 2, 2, 2, 0, 2),
    "3, stride 1, growing": SparseConv3d(2, 2, 3, 1, 1),
    "inverse of 3": SparseInverseConv3d(2, 2, 3),
    "transposed 3": SparseConvTranspose3d(2, 2, 3, 2, 1),
    "even at stride 1": SubMConv3d(2, 2, 2),
}


@pytest.mark.parametrize("layout", [*FLAT, KernelLayout.FVDB])
@pytest.mark.parametrize("name", OTHER_VOXELS)
def test_layers_on_other_voxels_are_refused(name: str, layout: KernelLayout) -> None:
    net = nn.ModuleDict({"down": OTHER_VOXELS[name]})
    weight = "kernel" if layout in FLAT else "weight"
    state = {f"down.{weight}": torch.zeros(len(OTHER_VOXELS[name].weight), 2, 2), "down.bias": torch.zeros(2)}
    with pytest.raises(InputError, match=rf"layer 'down' .*{layout.value} applies this kernel to other voxels"):
        convert_state_dict(state, net, layout)


@pytest.mark.parametrize("layout", SPCONV)
def test_spconv_layers_are_never_refused(layout: KernelLayout) -> None:
    for conv in OTHER_VOXELS.values():
        kernel = write_kernel(conv.weight.detach(), conv, layout)
        state = convert_state_dict({"weight": kernel, "bias": torch.zeros(2)}, conv, layout)
        assert torch.equal(state["weight"], conv.weight)


def test_a_renamed_entry_is_pointed_at() -> None:
    network = nn.ModuleDict({"linear": nn.Linear(4, 8), "norm_layer": nn.BatchNorm1d(8)})
    state = {name.replace("norm_layer", "norm_layers"): value for name, value in network.state_dict().items()}
    with pytest.raises(InputError, match=r"'norm_layer\.bias' may be 'norm_layers\.bias' in the file"):
        convert_state_dict(state, network, KernelLayout.KRSC)
