"""Heads of detectors: what their targets say is decoded to the true boxes, and losses are what the papers say."""

from __future__ import annotations

import math

import pytest
import torch

from pc3d.config import instantiate
from pc3d.data.boxes import Boxes
from pc3d.errors import InputError
from pc3d.losses.detection import center_focal, sigmoid_focal, upright_diou
from pc3d.models.heads import Anchor, AnchorHead, CenterHead
from pc3d.models.heads.anchor_head import AnchorOutput, match_anchors
from pc3d.models.heads.center_head import _top, draw_peaks, peak_radius
from pc3d.nn.bev import BevGrid
from pc3d.ops.boxes import wrap_angle

CLASSES = ["Car", "Pedestrian", "Cyclist"]
GRID = BevGrid([0, -8, -3, 16, 8, 1], [0.2, 0.2, 4])


def truth() -> Boxes:
    boxes = torch.tensor(
        [
            [5.1, -3.2, -1.0, 4.1, 1.7, 1.5, 0.1],
            [9.7, 4.3, -0.9, 3.8, 1.6, 1.6, -2.9],
            [12.3, 1.2, -0.6, 0.9, 0.7, 1.8, 1.4],
            [3.3, 6.1, -0.7, 1.8, 0.6, 1.7, -1.2],
        ]
    )
    return Boxes(boxes, torch.tensor([0, 0, 1, 2]))


def empty() -> Boxes:
    return Boxes(torch.zeros(0, 7), torch.zeros(0, dtype=torch.long))


def anchor_head(**options: float) -> AnchorHead:
    torch.manual_seed(0)
    head = AnchorHead(**options)
    head.build(6, CLASSES, GRID, 2)
    return head


def center_head(**options: object) -> CenterHead:
    torch.manual_seed(0)
    head = CenterHead(shared_channels=8, **options)
    head.build(6, CLASSES, GRID, 2)
    return head


def assert_found(found: Boxes, wanted: Boxes) -> None:
    """Every wanted box once, nothing else."""
    assert len(found) == len(wanted)
    near = (found.boxes[:, None, :3] - wanted.boxes[None, :, :3]).norm(dim=2).argmin(1)
    assert sorted(near.tolist()) == list(range(len(wanted)))
    torch.testing.assert_close(found.boxes[:, :6], wanted.boxes[near, :6], atol=1e-4, rtol=1e-4)
    off = wrap_angle(found.boxes[:, 6] - wanted.boxes[near, 6], 0.5, 2 * math.pi)
    assert off.abs().max() < 1e-4
    assert torch.equal(found.labels, wanted.labels[near])


def test_anchor_targets_decode_to_the_boxes() -> None:
    head = anchor_head()
    targets = head.targets(truth())
    directions = torch.zeros(len(targets.labels), 2)
    heading = targets.residuals[:, 6] + head.anchors[:, 6]
    bins = (wrap_angle(heading - 0.78539, 0, 2 * math.pi) / math.pi).long()
    directions[torch.arange(len(bins)), bins] = 1
    logits = torch.full((len(bins), 3), -10.0)
    positive = targets.labels >= 0
    logits[positive, targets.labels[positive]] = 10
    (found,) = head.detections(AnchorOutput(logits[None], targets.residuals[None], directions[None]))
    assert_found(found, truth())
    losses = head.losses(AnchorOutput(logits[None], targets.residuals[None], 20 * directions[None]), [truth()])
    assert all(float(loss) < 1e-3 for loss in losses.values())


def test_anchor_losses_by_hand() -> None:
    head = anchor_head()
    features = torch.randn(2, 6, *GRID.bev_shape(2))
    output = head(features)
    losses = head.losses(output, [truth(), empty()])
    by_hand = dict.fromkeys(losses, 0.0)
    for frame, boxes in enumerate((truth(), empty())):
        labels, residuals = head.targets(boxes)
        positives = max(int((labels >= 0).sum()), 1)
        for a in range(len(labels)):
            label = int(labels[a])
            for k in range(3) if label > -2 else ():
                p = output.classes[frame, a, k].sigmoid().item()
                one = k == label
                by_hand["class"] -= (0.25 * (1 - p) ** 2 * math.log(p) if one else 0.75 * p**2 * math.log(1 - p)) / (
                    2 * positives
                )
            if label < 0:
                continue
            said, wanted = output.residuals[frame, a].tolist(), residuals[a].tolist()
            parts = [s - w for s, w in zip(said[:6], wanted[:6], strict=True)] + [math.sin(said[6] - wanted[6])]
            smooth = [4.5 * d * d if abs(d) < 1 / 9 else abs(d) - 1 / 18 for d in parts]
            by_hand["box"] += 2 * sum(smooth) / (2 * positives)
            heading = wanted[6] + head.anchors[a, 6].item() - 0.78539
            side = int(heading % (2 * math.pi) // math.pi)
            by_hand["direction"] -= 0.2 * output.directions[frame, a].log_softmax(0)[side].item() / (2 * positives)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(by_hand[name], rel=1e-4), name


def test_matching_of_ties_and_hopeless_boxes() -> None:
    anchors = torch.tensor([[0.0, 0, 0, 2, 2, 1, 0], [1, 0, 0, 2, 2, 1, 0], [9, 0, 0, 2, 2, 1, 0]])
    box = torch.tensor([[0.5, 0, 0, 2, 2, 1, 0], [50, 0, 0, 2, 2, 1, 0]])
    # Both anchors overlap by 0.6, below the threshold: claimed all the same. The far box claims nothing.
    assert match_anchors(anchors, box, 0.9, 0.3).tolist() == [0, 0, -1]
    assert match_anchors(anchors, box[:0], 0.9, 0.3).tolist() == [-1, -1, -1]
    between = torch.tensor([[0.5, 0, 0, 2, 2, 1, 0], [0.1, 0, 0, 2, 2, 1, 0]])
    # The first box's greatest overlap is a tie of both anchors; the first anchor has a better box of its own.
    assert match_anchors(anchors, between, 0.9, 0.3).tolist() == [1, 0, -1]
    loose = torch.tensor([[0.2, 0, 0, 2, 2, 1, 0]])
    assert match_anchors(anchors, loose, 0.9, 0.3).tolist() == [0, -2, -1]


def test_anchor_head_starts_as_published() -> None:
    head = anchor_head()
    assert torch.allclose(head.conv_cls.bias, torch.tensor(-math.log(99)))
    assert head.conv_box.weight.std().item() == pytest.approx(0.001, rel=0.2)
    assert [conv.out_channels for conv in (head.conv_cls, head.conv_box, head.conv_dir_cls)] == [18, 42, 12]
    assert set(head.state_dict()) == {f"conv_{n}.{p}" for n in ("cls", "box", "dir_cls") for p in ("weight", "bias")}


def test_anchor_detections_keep_to_their_limits() -> None:
    head = anchor_head(score_threshold=0.5)
    logits, rows = torch.full((1, len(head.anchors), 3), -9.0), torch.tensor([0, 800, 1599]) * 6
    logits[0, rows, 0] = torch.tensor([1.0, 0.0, 2.0])  # far apart; the second is as likely as it must be
    residuals, directions = torch.zeros(1, len(head.anchors), 7), torch.zeros(1, len(head.anchors), 2)
    output = AnchorOutput(logits, residuals, directions)

    def places() -> list[list[float]]:
        return head.detections(output)[0].boxes[:, :2].tolist()

    best_first = head.anchors[rows[[2, 0, 1]], :2].tolist()
    assert places() == best_first
    head.nms_candidates = 2
    assert places() == best_first[:2]
    head.max_boxes = 1
    assert places() == best_first[:1]


def test_center_detections_by_hand() -> None:
    head = center_head(iou=True, iou_powers=[0.5, 0.5, 0.25], score_threshold=0.5, nms_threshold=0.1)
    maps = {name: torch.zeros(1, width, 40, 40) for name, width in head._widths(3).items()}
    maps["hm"] -= 9
    maps["rot"][:, 0] = 1
    maps["hm"][0, 0, 10, 10] = 0  # as likely as the threshold, which is not enough
    maps["hm"][0, 1, 20, 20] = maps["hm"][0, 2, 30, 30] = 2
    maps["iou"][0, 0, 20, 20], maps["iou"][0, 0, 30, 30] = 0.28, -0.5
    maps["center_z"][0, 0, 30, 30] = 10.9  # up to 10 m above the grid
    (found,) = head.detections([maps])
    likely = 1 / (1 + math.exp(-2))
    assert found.labels.tolist() == [1, 2]
    assert found.scores is not None
    assert found.scores.tolist() == pytest.approx([(likely * 0.64) ** 0.5, likely**0.75 * 0.25**0.25])
    assert found.boxes[0].tolist() == pytest.approx([8, 0, 0, 1, 1, 1, 0])
    for option in ("max_boxes", "nms_candidates"):
        setattr(head, option, 1)
        assert head.detections([maps])[0].labels.tolist() == [1]
        head.nms_threshold = [0.1, 0.1, 0.1]
        assert head.detections([maps])[0].labels.tolist() == [1, 2]  # per class
        head.nms_threshold, head.max_boxes = 0.1, 9
    head.nms_candidates = 9
    maps["center_z"][0, 0, 30, 30] = 11.1
    assert head.detections([maps])[0].labels.tolist() == [1]
    values, places = _top(torch.tensor([0.1, 0.5, 0.3, 0.3, 0, 0, 0, 0, 0]), 2)
    assert (values.tolist(), places.tolist()) == (pytest.approx([0.5, 0.3]), [1, 2])


def test_center_head_starts_as_published() -> None:
    branches = center_head(velocity=True).heads_list[0]
    for name in branches.names:
        first, last = (branches.get_submodule(f"{name}.{layer}") for layer in ("0.0", "1"))
        assert torch.equal(last.bias, torch.full_like(last.bias, -2.19 if name == "hm" else 0.0))
        fan_in = 8 * 9  # torch's own start for heat maps, Kaiming's for all others
        assert first.weight.std().item() == pytest.approx((fan_in * (3 if name == "hm" else 0.5)) ** -0.5, rel=0.15)


def test_center_targets_decode_to_the_boxes() -> None:
    head = center_head(iou=True)
    height, width = GRID.bev_shape(2)
    targets = head.targets([truth(), empty()], head.members[0], (height, width))
    widths = {"center": 2, "center_z": 1, "dim": 3, "rot": 2}
    maps = {"hm": torch.logit(targets.heat.clamp(1e-4, 1 - 1e-4)), "iou": torch.ones(2, 1, height, width)}
    for (name, count), values in zip(widths.items(), targets.values.split([2, 1, 3, 2], 1), strict=True):
        flat = torch.zeros(2, count, height * width)
        flat[targets.frame, :, targets.cell] = values
        maps[name] = flat.view(2, count, height, width)
    head.score_threshold = 0.9
    found = head.detections([maps])
    assert_found(found[0], truth())
    assert len(found[1]) == 0
    losses = head.losses([maps], [truth(), empty()])
    assert losses["box"] < 1e-4
    assert losses["iou"] < 1e-4


def test_center_losses_without_objects() -> None:
    head = center_head(iou=True, diou_loss=True)
    features = torch.randn(2, 6, *GRID.bev_shape(2), requires_grad=True)
    losses = head.losses(head(features), [empty(), empty()])
    assert losses["heat"] > 0
    assert all(losses[name] == 0 for name in ("box", "iou", "diou"))
    torch.stack(list(losses.values())).sum().backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()


def test_groups_of_classes_and_limits() -> None:
    head = center_head(groups=[["Cyclist"], ["Car", "Pedestrian"]], nms_threshold=[0.8, 0.6, 0.55])
    assert head.members == [[2], [0, 1]]
    maps = head(torch.randn(1, 6, *GRID.bev_shape(2)))
    assert [group["hm"].shape[1] for group in maps] == [1, 2]
    first, second = (head.targets([truth()], members, (40, 40)) for members in head.members)
    assert (len(first.boxes), len(second.boxes)) == (1, 3)
    assert (first.heat == 1).sum() == 1
    head.score_threshold = 0
    (found,) = head.detections(maps)
    assert set(found.labels.tolist()) == {0, 1, 2}
    assert found.scores is not None
    assert (found.scores.diff() <= 0).all()
    flat = Boxes(truth().boxes * torch.tensor([1, 1, 1, 0, 1, 1, 1]), truth().labels)
    assert len(head.targets([flat], [0, 1], (40, 40)).boxes) == 0
    head.max_objects = 1
    assert len(head.targets([truth()], [0, 1], (40, 40)).boxes) == 1


def test_velocities_are_learned_where_they_are_known() -> None:
    head = center_head(velocity=True)
    boxes = torch.cat([truth().boxes, torch.tensor([[1.0, 2], [math.nan, 0], [3, 4], [5, 6]])], 1)
    output = head(torch.randn(1, 6, *GRID.bev_shape(2)))
    losses = head.losses(output, [Boxes(boxes, truth().labels)])
    assert all(loss.isfinite() for loss in losses.values())
    (found,) = head.detections(output)
    assert found.boxes.shape[1] == 9
    plain = center_head(velocity=True, code_weights=[*[1.0] * 8, 0.2, 0.2])
    assert losses["box"] == plain.losses(output, [Boxes(boxes, truth().labels)])["box"]
    with pytest.raises(InputError, match="no velocities"):
        head.losses(output, [truth()])


def test_peaks() -> None:
    heat = draw_peaks(
        (1, 2, 9, 12), torch.tensor([1, 1, 0]), torch.tensor([[3, 4], [5, 4], [0, 0]]), torch.tensor([2, 3, 2])
    )
    assert (heat == 1).nonzero().tolist() == [[0, 0, 0, 0], [0, 1, 4, 3], [0, 1, 4, 5]]
    sigma = 5 / 6
    assert heat[0, 0, 1, 1].item() == pytest.approx(math.exp(-1 / sigma**2))
    assert heat[0, 0, 3:, :].max() == 0
    assert heat[0, 1, 4, 4].item() == pytest.approx(math.exp(-0.5 / (7 / 6) ** 2))  # the wider one wins
    none = torch.zeros(0, dtype=torch.long)
    assert draw_peaks((1, 1, 4, 4), none, none.view(0, 2), none).sum() == 0
    length, width = torch.tensor([10.0, 0.5]), torch.tensor([4.0, 0.5])
    assert peak_radius(length, width, 0.1).tolist() == [2, 0]


def test_small_losses() -> None:
    logits = torch.tensor([2.0, -1.0, 0.3], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: sigmoid_focal(x, target), logits)
    heat = torch.tensor([1.0, 0.4, 0.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: center_focal(x, heat), logits)
    p = logits.sigmoid().tolist()
    by_hand = (
        -math.log(p[0]) * (1 - p[0]) ** 2 - math.log(1 - p[1]) * p[1] ** 2 * 0.6**4 - math.log(1 - p[2]) * p[2] ** 2
    )
    assert center_focal(logits, heat).item() == pytest.approx(by_hand)
    one = torch.tensor([[0.0, 0, 0, 2, 2, 2, 0.3]])
    for shift, expected in ((0.0, 1.0), (1.0, 4 / 12 - 1 / 17), (4.0, -16 / 44)):
        other = one + torch.tensor([[shift, 0, 0, 0, 0, 0, 1.0]])
        assert upright_diou(one, other).item() == pytest.approx(expected)


def test_options_are_checked() -> None:
    with pytest.raises(InputError, match="none for Tram"):
        AnchorHead().build(4, ["Car", "Tram"], GRID, 2)
    with pytest.raises(InputError, match="same number of headings"):
        AnchorHead([Anchor("Car", (4, 2, 1), -1, 0.6, 0.4, (0,)), Anchor("Van", (4, 2, 1), -1, 0.6, 0.4)]).build(
            4, ["Car", "Van"], GRID, 2
        )
    for wrong in ({"size": (4, 0, 1)}, {"matched": 0.3}, {"unmatched": -0.1}, {"headings": ()}):
        with pytest.raises(InputError, match="'Car' needs"):
            Anchor(**{"name": "Car", "size": (4, 2, 1), "bottom": -1, "matched": 0.6, "unmatched": 0.4, **wrong})
    with pytest.raises(InputError, match="a class has two: Car, Car"):
        AnchorHead([Anchor("Car", (4, 2, 1), -1, 0.6, 0.4)] * 2).build(4, ["Car"], GRID, 2)
    shared = ["max_boxes", "nms_candidates"]
    counts = {AnchorHead: shared, CenterHead: [*shared, "num_conv", "shared_channels", "max_objects", "max_peaks"]}
    for make, names in counts.items():
        for name in names:
            with pytest.raises(InputError, match=f"head.{name} is 0: it must be at least 1"):
                make(**{name: 0})
    for wrong in ({"overlap": 1.0}, {"overlap": 0.0}, {"min_radius": -1}):
        with pytest.raises(InputError, match="must lie between"):
            CenterHead(**wrong)
    for groups in ([["Car"]], [CLASSES, []]):
        with pytest.raises(InputError, match="name every class once"):
            CenterHead(groups=groups).build(4, CLASSES, GRID, 2)
    with pytest.raises(InputError, match=r"nms_threshold has 2"):
        CenterHead(nms_threshold=[0.1, 0.2]).build(4, CLASSES, GRID, 2)
    with pytest.raises(InputError, match=r"code_weights has 8 values, a box 10"):
        CenterHead(velocity=True, code_weights=[1.0] * 8)
    for head in (AnchorHead([Anchor("Car", (4, 2, 1), -1, 0.6, 0.4)]), CenterHead(iou=True)):
        again = instantiate(head.to_config())
        assert again.to_config() == head.to_config()
