"""Rooms cut into tiles for a pass: which tiles, and that every point gets its own result back."""

from __future__ import annotations

import pytest
import torch

from pc3d.errors import InputError
from pc3d.models import PointCloudMamba
from pc3d.points import Points
from pc3d.tasks import SemanticSegmentation
from pc3d.tasks.tiles import in_tiles, tile_of_point


def _room(count: int, sides: tuple[float, float], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, generator=generator) * torch.tensor([*sides, 3.0]) - 7


@pytest.mark.parametrize(
    ("times", "sides", "cuts"),
    [(1.1, (4, 9), (1, 2)), (4.0, (4, 9), (2, 2)), (6.9, (9, 4), (3, 2)), (11, (4, 9), (3, 4)), (90, (4, 9), (5, 5))],
)
def test_tiles_of_a_room(times: float, sides: tuple[float, float], cuts: tuple[int, int]) -> None:
    coord = _room(1000, sides)
    tile = tile_of_point(coord, int(1000 / times))
    corner = coord[:, :2].amin(0)
    place = (coord[:, :2] - corner) / (coord[:, :2].amax(0) - corner) * torch.tensor(cuts)
    expected = place.floor().minimum(torch.tensor(cuts) - 1.0).long()
    assert torch.equal(tile, expected[:, 0] * cuts[1] + expected[:, 1])
    assert len(tile.unique()) == cuts[0] * cuts[1]


def test_every_point_gets_its_result_and_small_clouds_stay_whole() -> None:
    coords = [_room(100, (4, 9)), _room(1080, (9, 4), 1), _room(0, (1, 1)), _room(120, (2, 2), 2)]
    offsets = torch.tensor([0, *map(len, coords)]).cumsum(0)
    points = Points(torch.cat(coords), offsets, {"row": torch.arange(int(offsets[-1]))})
    sizes = []

    def predict(tile: Points) -> torch.Tensor:
        sizes.append(tile.num_points)
        assert tile.num_points <= 120 or torch.equal(tile.coord.amin(0), torch.zeros(3))
        return tile.get("row")[:, None]

    assert torch.equal(in_tiles(predict, points, 120)[:, 0], points.get("row"))
    assert len(sizes) == 3 + 9
    assert sum(sizes) == points.num_points


def test_the_task_uses_them_outside_training_only() -> None:
    torch.manual_seed(0)
    sizes = {"channels": (8, 8), "layers": (1, 1), "orders": ("xyz", "z"), "reducers": (2, 2), "decoder": (8, 8)}
    backbone = PointCloudMamba(3, 8, neighbours=4, prompts=0, combine_pos=True, **sizes)
    coord = _room(200, (4, 9))
    points = Points(coord, attrs={"feat": coord})
    task = SemanticSegmentation(backbone, ["a", "b"], test_crop=80).eval()
    with torch.no_grad():
        tile = tile_of_point(coord, 80)
        rows = (tile == 0).nonzero()[:, 0]
        part = points.select(rows)
        alone = task(part.replace(coord=part.coord - part.coord.amin(0)))
        torch.testing.assert_close(task.tiled_logits(points)[rows], alone, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(task(points)[rows], alone, atol=1e-4)
    with pytest.raises(InputError, match="test_crop is 0"):
        SemanticSegmentation(backbone, ["a", "b"], test_crop=0)
