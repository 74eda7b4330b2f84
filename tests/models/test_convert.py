"""Published weights: kernel layouts, the pointwise rule, strict loading with a report."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from pc3d import InputError, Voxels
from pc3d.models import SparseUNet
from pc3d.models.convert import KernelLayout, export_sparse_unet, import_sparse_unet
from pc3d.models.convert.kernels import detect_layout, read_kernel, stored_shape, write_kernel
from pc3d.sparse import SparseConv3d, SparseConvolution, SparseInverseConv3d, SubMConv3d

TINY = {"base_channels": 4, "channels": (4, 6, 5, 7), "layers": (1, 1, 1, 1)}


def network(seed: int = 0) -> tuple[SparseUNet, nn.Linear]:
    torch.manual_seed(seed)
    return SparseUNet(3, **TINY), nn.Linear(7, 9)


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("cls", [SubMConv3d, SparseConv3d, SparseInverseConv3d])
@pytest.mark.parametrize("size", [(2, 2, 2), (3, 3, 3), (3, 2, 1)])
def test_every_layout_by_its_definition(cls: type[SparseConvolution], size: tuple[int, int, int]) -> None:
    """One distinct number per element of the kernel, looked up where each library keeps it."""
    conv = cls(5, 4, size)
    volume = size[0] * size[1] * size[2]
    weight = torch.arange(volume * 20.0).reshape(volume, 5, 4)
    stored = {layout: write_kernel(weight, conv, layout) for layout in KernelLayout}
    x_fastest = {KernelLayout.MINKOWSKI: True, KernelLayout.TORCHSPARSE: volume % 2 == 1}
    for k, (x, y, z) in enumerate(torch.cartesian_prod(*map(torch.arange, size)).tolist()):
        for i, o in ((0, 0), (4, 1), (2, 3)):
            value = weight[k, i, o]
            assert stored[KernelLayout.KRSC][o, x, y, z, i] == value
            assert stored[KernelLayout.RSCK][x, y, z, i, o] == value
            assert stored[KernelLayout.RSKC][x, y, z, o, i] == value
            for layout, fastest in x_fastest.items():
                row = (z * size[1] + y) * size[0] + x if fastest else k
                assert stored[layout][row, i, o] == value
    for layout, kernel in stored.items():
        assert tuple(kernel.shape) == stored_shape(conv, layout)
        assert torch.equal(read_kernel(kernel, conv, layout), weight)


@pytest.mark.parametrize("layout", [KernelLayout.KRSC, KernelLayout.RSCK, KernelLayout.RSKC])
def test_pointwise_kernels_are_read_from_memory(layout: KernelLayout) -> None:
    conv = SubMConv3d(5, 4, 1, bias=False)
    stored = torch.randn(stored_shape(conv, layout))
    with torch.no_grad():
        conv.weight.copy_(read_kernel(stored, conv, layout))
    feat = torch.randn(6, 5)
    coord = torch.arange(6, dtype=torch.int32)[:, None] * torch.tensor([0, 1, 1, 1], dtype=torch.int32)
    assert_close(conv(Voxels(coord, feat, 1)).feat, feat @ stored.flatten().reshape(5, 4))
    assert torch.equal(write_kernel(conv.weight.detach(), conv, layout), stored)


@pytest.mark.parametrize("layout", [*KernelLayout][:3])
@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone."])
def test_round_trip_is_exact(layout: KernelLayout, prefix: str) -> None:
    net, head = network()
    state = export_sparse_unet(net, head, layout, prefix)
    assert tuple(state[f"{prefix}final.weight"].shape) == stored_shape(SubMConv3d(7, 9, 1), layout)
    other, other_head = network(seed=1)
    assert not same(other, net)
    assert import_sparse_unet({"state_dict": state, "epoch": 3}, other, other_head) is layout
    assert same(other, net)
    assert same(other_head, head)


def test_a_backbone_alone_leaves_the_last_layer_out() -> None:
    net, head = network()
    other, _ = network(seed=1)
    import_sparse_unet(export_sparse_unet(net, head), other)
    assert same(other, net)


def changed(state: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    new = {**state, **{f"backbone.{name.replace('__', '.')}": value for name, value in changes.items()}}
    return {name: value for name, value in new.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_input__0__weight": None}, r"1 missing \(conv_input.0.weight\)"),
        ({"extra": torch.zeros(1)}, r"1 unexpected \(extra\)"),
        ({"conv_input__1__bias": torch.zeros(5)}, r"1 of another shape \(conv_input.1.bias \(5,\) instead of \(4,\)\)"),
        ({"final__weight": torch.zeros(8, 1, 1, 1, 7)}, r"final.weight \(8, 1, 1, 1, 7\) instead of \(9, 1, 1, 1, 7\)"),
    ],
)
def test_what_does_not_match_is_reported_and_nothing_loaded(changes: dict[str, Tensor | None], message: str) -> None:
    net, head = network()
    other, other_head = network(seed=1)
    untouched, _ = network(seed=1)
    with pytest.raises(InputError, match=message):
        import_sparse_unet(changed(export_sparse_unet(net, head), **changes), other, other_head)
    assert same(other, untouched)


def test_long_reports_are_cut() -> None:
    with pytest.raises(InputError, match=r"missing \(.*, .*, .*, .* and \d+ more\)") as caught:
        import_sparse_unet({}, *network())
    assert "\n" not in str(caught.value)


def test_ambiguous_layouts_are_refused() -> None:
    square = {"a": SubMConv3d(4, 4, 3)}
    stored = {"a": torch.zeros(3, 3, 3, 4, 4)}
    with pytest.raises(InputError, match="RSCK, RSKC"):
        detect_layout(stored, square)
    assert detect_layout({"a": torch.zeros(4, 3, 3, 3, 4)}, square) is KernelLayout.KRSC
