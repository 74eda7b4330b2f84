"""Points and grids: attention in cells against a dense masked softmax, reading grids, packed batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pc3d import InputError, Points
from pc3d.models import GridFormer, GridFormerDecoder
from pc3d.nn.point_grid import CellAttention, GridFrame, GridKind, Places

KINDS: list[GridKind] = ["volume", "planes"]


def random_places(dimensions: int, counts: list[int], seed: int = 0) -> Places:
    unit = torch.rand(sum(counts), dimensions, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return Places(unit, torch.tensor([0, *counts]).cumsum(0))


def dense_attention(
    layer: CellAttention, key: Tensor, value: Tensor, grid: Tensor, places: Places, batch: Tensor
) -> Tensor:
    """Every point against every cell, points of other cells masked out."""
    resolution, dimensions, channels = grid.shape[-1], places.unit.shape[1], grid.shape[1]
    corner = (places.unit * resolution).floor()
    strides = torch.tensor([float(resolution**axis) for axis in range(dimensions)], dtype=torch.float64)
    cells = resolution**dimensions
    inside = (corner @ strides + batch * cells)[None] == torch.arange(len(grid) * cells)[:, None]
    asked = grid.flatten(2).transpose(1, 2).reshape(-1, channels)
    place = layer.position(places.unit - corner / resolution)
    rows = inside.nonzero()[:, 1].new_tensor(inside.long().argmax(0).tolist())
    score = layer.weight(key - layer.query(asked)[rows] + place)
    share = score[None].masked_fill(~inside[..., None], -torch.inf).softmax(1).nan_to_num(0)
    out = torch.einsum("pnj,ngj->pgj", share, (value + place).view(len(key), 8, -1)).flatten(1)
    return out.view(len(grid), cells, channels).transpose(1, 2).view(grid.shape)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_attention_and_gradients_equal_a_dense_masked_softmax(dimensions: int) -> None:
    torch.manual_seed(1)
    counts = [40, 0, 25]
    places, batch = random_places(dimensions, counts), torch.repeat_interleave(torch.tensor(counts))
    layer = CellAttention(16, dimensions).double().eval()
    key, value = (torch.randn(65, 16, dtype=torch.float64, requires_grad=True) for _ in range(2))
    grid = torch.randn(3, 16, *[3] * dimensions, dtype=torch.float64, requires_grad=True)
    inputs = key, value, grid, *layer.parameters()
    out = layer(key, value, grid, places.cells(3))
    expected = dense_attention(layer, key, value, grid, places, batch)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    for grad, wanted in zip(
        torch.autograd.grad((out * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(grad, wanted)
    assert not out[1].any()


def test_a_cell_of_thousands_of_points_in_bfloat16() -> None:
    torch.manual_seed(0)
    places = Places(torch.rand(6000, 3) * 0.1, torch.tensor([0, 6000]))
    layer = CellAttention(8, 3).eval()
    key, value, grid = torch.randn(6000, 8) * 100, torch.randn(6000, 8), torch.randn(1, 8, 4, 4, 4)
    expected = layer(key, value, grid, places.cells(4))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(key, value, grid, places.cells(4))
    assert out.isfinite().all()
    torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_grids_are_read_as_grid_sample_reads_them(dimensions: int) -> None:
    places = random_places(dimensions, [7, 0, 4])
    grid = torch.randn(3, 5, *[6] * dimensions, dtype=torch.float64)
    out = places.sample(grid)
    for rows, cloud in ((slice(0, 7), 0), (slice(7, 11), 2)):
        at = (2 * places.unit[rows] - 1).view(1, *[1] * (dimensions - 1), -1, dimensions)
        expected = F.grid_sample(grid[cloud : cloud + 1], at, padding_mode="border", align_corners=True)
        torch.testing.assert_close(out[rows], expected.view(5, -1).T)


def test_cells_put_the_first_coordinate_last_and_means_in_place() -> None:
    places = Places(torch.tensor([[0.6, 0.1, 0.9], [0.6, 0.2, 0.8]]), torch.tensor([0, 2]))
    grid = places.cells(2).mean(torch.tensor([[1.0], [3.0]]))
    assert grid.nonzero().tolist() == [[0, 0, 1, 0, 1]]
    assert grid.sum() == 2


def test_points_beyond_the_frame_count_to_its_outermost_cells() -> None:
    coord = torch.tensor([[-0.6, 0.0, 0.6], [0.56, -9.0, 0.0]])
    (volume,) = GridFrame("volume").places(coord, torch.tensor([0, 2]))
    assert volume.unit[0].tolist() == pytest.approx([0, 0.5, 0.999])
    planes = GridFrame("planes").places(coord, torch.tensor([0, 2]))
    assert planes[0].unit[0].tolist() == pytest.approx([0, 1 - 1e-5])  # xz
    assert planes[2].unit[1].tolist() == pytest.approx([0, 0.5])  # yz
    with pytest.raises(InputError, match="kind 'plane'"):
        GridFrame("plane")


def shapes(counts: list[int], seed: int = 0) -> Points:
    coord = torch.rand(sum(counts), 3, generator=torch.Generator().manual_seed(seed)) - 0.5
    return Points(coord, torch.tensor([0, *counts]).cumsum(0), {"feat": coord})


@pytest.mark.parametrize("kind", KINDS)
def test_clouds_of_a_batch_do_not_see_each_other(kind: GridKind) -> None:
    torch.manual_seed(0)
    network, decoder = GridFormer(3, 8, 8, kind).eval(), GridFormerDecoder(8).eval()
    batch = shapes([50, 90, 1])
    query = torch.rand(30, 3) - 0.5
    with torch.no_grad():
        together = decoder(network.encode(batch), query.repeat(3, 1), torch.tensor([0, 30, 60, 90]))
        alone = [decoder(network.encode(cloud), query, torch.tensor([0, 30])) for cloud in batch]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)
    assert network(batch).shape == (141, network.out_channels)
    with torch.no_grad():
        beside, nothing = (decoder(network.encode(shapes(counts)), query, torch.tensor([0, 30, 30][: len(counts) + 1]))
                           for counts in ([0, 5], [0]))  # fmt: skip
    torch.testing.assert_close(beside, nothing)


@pytest.mark.parametrize("kind", KINDS)
def test_every_trained_parameter_gets_a_gradient(kind: GridKind) -> None:
    """Data-parallel training waits for every one of them."""
    torch.manual_seed(0)
    network, decoder = GridFormer(3, 8, 8, kind), GridFormerDecoder(8)
    decoder(network.encode(shapes([60, 60])), torch.rand(20, 3) - 0.5, torch.tensor([0, 10, 20])).sum().backward()
    for module in (network, decoder):
        for name, parameter in module.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
    frozen = [name for name, parameter in network.named_parameters() if not parameter.requires_grad]
    assert frozen
    assert all(name.startswith("decoder.2.mixing.") for name in frozen)


@pytest.mark.parametrize("kind", KINDS)
def test_networks_run_in_bfloat16(kind: GridKind) -> None:
    torch.manual_seed(0)
    network, decoder = GridFormer(3, 8, 8, kind).eval(), GridFormerDecoder(8).eval()
    batch, query, offsets = shapes([60, 40]), torch.rand(20, 3) - 0.5, torch.tensor([0, 10, 20])
    with torch.no_grad():
        expected = decoder(network.encode(batch), query, offsets)
        with torch.autocast("cpu", torch.bfloat16):
            out = decoder(network.encode(batch), query, offsets)
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(InputError, match="multiple of 8"):
        GridFormer(3, 12, 16)
    with pytest.raises(InputError, match="multiple of 4"):
        GridFormer(3, 8, 18)
    with pytest.raises(InputError, match="cannot share"):
        CellAttention(12, 2)
    with pytest.raises(InputError, match="'feat' is"):
        GridFormer(6, 8, 8)(shapes([5]))
