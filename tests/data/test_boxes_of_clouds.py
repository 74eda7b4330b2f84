"""Boxes go where their points go."""

from __future__ import annotations

import math

import pytest
import torch

from pc3d import InputError
from pc3d.data import transforms as T
from pc3d.data.boxes import box_tensor, labelled_boxes, mirror_boxes, scale_boxes, turn_boxes
from pc3d.ops.boxes import box_corners, points_in_boxes
from pc3d.points import Points

BOXES = [[10.0, -3, -1, 4, 1.8, 1.5, 0.4], [20, 5, -0.8, 0.8, 0.6, 1.7, -2.0]]


def cloud() -> Points:
    """The corners of two boxes, a little inside, and some other points."""
    corners = box_corners(torch.tensor(BOXES, dtype=torch.float64)).reshape(-1, 3)
    center = torch.tensor(BOXES, dtype=torch.float64)[:, None, :3].expand(-1, 8, -1).reshape(-1, 3)
    inside = (center + 0.99 * (corners - center)).float()
    more = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) * 30 + torch.tensor([0, -40, -1])
    return Points(torch.cat([inside, more]), meta=[{"name": "a", "boxes": BOXES, "box_names": ["Car", "Van"]}])


MOVES = [
    T.RandomFlip(p=1, axes=["y"]),
    T.RandomFlip(p=1, axes=["x"]),
    T.RandomFlip(p=1),
    T.RandomRotate((-0.25, 0.25), center=(0, 0, 0), p=1),
    T.RandomRotate((0.5, 1), p=1),
    T.RandomRotateTargetAngle((0.5,), p=1),
    T.RandomScale((0.5, 0.9)),
    T.RandomShift((1, 2)),
    T.CenterShift(),
    T.PositiveShift(),
]


@pytest.mark.parametrize("move", MOVES, ids=lambda t: type(t).__name__)
def test_points_stay_in_their_boxes(move: T.Transform) -> None:
    before = cloud()
    after = move(before, torch.Generator().manual_seed(1))
    boxes = box_tensor(after.meta[0])
    assert not torch.allclose(boxes, torch.tensor(BOXES, dtype=torch.float64))
    inside = points_in_boxes(after.coord, boxes)
    assert torch.equal(inside, points_in_boxes(before.coord, torch.tensor(BOXES)))
    assert inside[:8, 0].all()
    assert inside[8:16, 1].all()

    # Corners keep their numbers when turned; mirrored ones change sides, but the front stays the front.
    def front(own: torch.Tensor) -> torch.Tensor:
        return box_corners(own)[:, [0, 1, 4, 5]].mean(1)

    local = Points(front(torch.tensor(BOXES, dtype=torch.float64)).float())
    if not isinstance(move, (T.CenterShift, T.PositiveShift)) and getattr(move, "center", ()) is not None:
        moved = move(local, torch.Generator().manual_seed(1)).coord
        torch.testing.assert_close(front(boxes).float(), moved, atol=1e-4, rtol=1e-5)
    assert before.meta[0]["boxes"] == BOXES


@pytest.mark.parametrize(
    "bend",
    [
        T.RandomRotate((0.1, 0.2), "x", p=1),
        T.RandomScale((0.5, 0.9), anisotropic=True),
        T.ElasticDistortion(((1.0, 0.5),), p=1),
        T.UnitShape(),
    ],
    ids=lambda t: type(t).__name__,
)
def test_what_boxes_cannot_follow_drops_them(bend: T.Transform) -> None:
    after = bend(cloud(), torch.Generator().manual_seed(0))
    assert "boxes" not in after.meta[0]
    with pytest.raises(InputError, match="a: has no boxes"):
        labelled_boxes(after, ["Car"])


def test_crops_keep_boxes_by_their_centre() -> None:
    kept = T.CropBox([0, -10, -3, 15, 10, 1])(cloud())
    assert kept.meta[0]["box_names"] == ["Car"]
    assert kept.meta[0]["boxes"] == BOXES[:1]
    assert T.CropBox([0, -10, -3, 15, 10, -2])(cloud()).meta[0]["boxes"] == []


def test_velocities_turn_and_mirror_too() -> None:
    fast = cloud().replace(meta=[{"boxes": [[*BOXES[0], 3.0, 1.0]], "box_names": ["Car"]}])
    quarter = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    turned = box_tensor(turn_boxes(fast, quarter, torch.zeros(3)).meta[0])[0]
    torch.testing.assert_close(turned[7:], torch.tensor([-1.0, 3], dtype=torch.float64))
    assert turned[6] == pytest.approx(0.4 + math.pi / 2)
    mirrored = box_tensor(mirror_boxes(fast, 0).meta[0])[0]
    assert mirrored[7:].tolist() == [-3, 1]
    scaled = box_tensor(scale_boxes(fast, 2.0).meta[0])[0]
    assert scaled.tolist() == [20, -6, -2, 8, 3.6, 3, 0.4, 6, 2]


def test_classes_of_boxes() -> None:
    batch = Points.cat([cloud(), cloud()])
    first, second = labelled_boxes(batch, ["Van", "Car"])
    assert first.labels.tolist() == second.labels.tolist() == [1, 0]
    (only,) = labelled_boxes(cloud(), ["Van"])
    torch.testing.assert_close(only.boxes, torch.tensor(BOXES[1:]))
    (none,) = labelled_boxes(cloud(), ["Tram"])
    assert len(none) == 0
    assert none.boxes.shape == (0, 7)
