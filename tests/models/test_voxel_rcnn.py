"""Voxel R-CNN's second stage, and E-3DSNN's detector: pooling, targets, losses and published names."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from detectors import GRID, clouds, small_second
from torch import nn

from pc3d.config import instantiate
from pc3d.data.boxes import Boxes
from pc3d.errors import InputError
from pc3d.models import SECOND, E3DSNNDetector
from pc3d.models.convert import import_openpcdet
from pc3d.models.convert.kernels import KernelLayout, write_kernel
from pc3d.models.heads import AnchorHead, CenterHead, PooledLevel, VoxelRCNNHead
from pc3d.models.heads.voxel_rcnn_head import VoxelPool, box_places, corner_loss, corrected, seen_from
from pc3d.nn.backbone import FeatureInfo
from pc3d.nn.bev import BevGrid
from pc3d.nn.spiking import SpikingNeuron
from pc3d.ops.boxes import box_iou, box_iou_table, encode_boxes
from pc3d.ops.voxel_query import voxel_query
from pc3d.sparse import SparseConvolution
from pc3d.tasks import Detection
from pc3d.tasks.heads import Suppression
from pc3d.voxels import Voxels

LEVELS = [PooledLevel("conv2", 0.6, 5, 4), PooledLevel("conv4", 2.0, 3, 4)]


def spiking() -> E3DSNNDetector:
    return E3DSNNDetector(4, GRID, (4, 4, 8, 8, 8), (1, 1, 1), 5, None, (1, 1), (8, 8), (8, 8))


def task(backbone: nn.Module, **options: object) -> Detection:
    torch.manual_seed(0)
    refine = VoxelRCNNHead(LEVELS, 3, 16, samples=16, score_threshold=0.0, **options)
    return Detection(backbone, ["Car", "Pedestrian", "Cyclist"], AnchorHead(), refine)


def boxes(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.tensor([1.0, -2, -1.5, 1, 0.5, 1, -math.pi])
    high = torch.tensor([5.0, 2, -0.5, 4, 2, 2, math.pi])
    return low + torch.rand(count, 7, generator=generator) * (high - low)


def found(rows: torch.Tensor, labels: list[int] | None = None) -> Boxes:
    kinds = torch.zeros(len(rows), dtype=torch.long) if labels is None else torch.tensor(labels, dtype=torch.long)
    return Boxes(rows, kinds, torch.linspace(0.9, 0.1, len(rows)))


def test_places_inside_a_box() -> None:
    box = torch.tensor([[1.0, 2, 3, 4, 2, 6, math.pi / 2]])
    places = box_places(box, 2)[0]
    # Along the box's x first: forward is +y here, its left side -x.
    expected = [[x, y, z] for y in (1, 3) for x in (1.5, 0.5) for z in (1.5, 4.5)]
    torch.testing.assert_close(places, torch.tensor(expected))


def test_boxes_come_back_from_what_is_learned() -> None:
    own, wanted = boxes(50), boxes(50, 1)
    local = torch.cat([torch.zeros(50, 3), own[:, 3:6], torch.zeros(50, 1)], 1)
    again = corrected(own, encode_boxes(seen_from(own, wanted), local))
    torch.testing.assert_close(again[:, :6], wanted[:, :6], atol=1e-4, rtol=1e-4)
    turned = (again[:, 6] - wanted[:, 6]) / math.pi
    torch.testing.assert_close(turned, turned.round(), atol=1e-4, rtol=0)  # fronts are not told from backs
    assert (seen_from(own, wanted)[:, 6].abs() <= math.pi / 2 + 1e-6).all()
    torch.testing.assert_close(corner_loss(again, wanted), torch.zeros(50), atol=1e-6, rtol=0)
    moved = wanted + torch.tensor([0.1, 0, 0, 0, 0, 0, math.pi])
    torch.testing.assert_close(corner_loss(moved, wanted), torch.full((50,), 0.1**2 / 2), atol=1e-5, rtol=0)


def test_tables_of_overlaps_equal_pairs() -> None:
    a, b = boxes(6), boxes(5, 1)
    pairs = [box_iou(own[None], other[None])[0] for own in a for other in b]
    torch.testing.assert_close(box_iou_table(a, b).flatten(), torch.stack(pairs))


@pytest.mark.parametrize("spikes", [None, 4])
def test_pooling_as_published(spikes: int | None) -> None:
    torch.manual_seed(0)
    neuron = None if spikes is None else lambda: SpikingNeuron(spikes)
    pool = VoxelPool(3, PooledLevel("level", 1.2, 6, 3, 2), neuron).eval()
    for norm in (m for m in pool.modules() if isinstance(m, nn.BatchNorm1d)):
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    coord = torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(4), torch.arange(3)).int()
    coord = coord[torch.randperm(len(coord))[:60]]
    voxels, center = Voxels(coord, torch.randn(60, 3) * 2, 2), coord[:, 1:] + 0.5
    places = torch.rand(12, 3) * torch.tensor([4, 4, 3])
    places[-1] += 50
    cells = torch.cat([torch.arange(12)[:, None] % 2, places.floor().long()], 1).int()
    expected = []
    act = (lambda x: (x.clamp(0, 4) + 0.5).floor()) if spikes else torch.relu
    for cell, place in zip(cells, places, strict=True):
        order = sorted(range(60), key=lambda row: coord[row, [3, 2, 1]].tolist())
        rows = [r for r in order if coord[r, 0] == cell[0] and (center[r] - place).norm() <= 1.2][:3]
        if rows:
            known, way = pool.enter(voxels.feat[rows]), center[rows] - place
        else:
            known, way = torch.zeros(1, 6), torch.zeros(1, 3)
        best = act(known + pool.way(way)).amax(0, keepdim=True)
        linear, norm = (m for m in pool.leave if isinstance(m, (nn.Linear, nn.BatchNorm1d)))
        expected.append(norm(linear(act(best))) if spikes else norm(linear(best)).relu())
    torch.testing.assert_close(pool(voxels, center, cells, places), torch.cat(expected), atol=1e-5, rtol=1e-5)
    nowhere = Voxels(coord[:0], voxels.feat[:0], 2)
    torch.testing.assert_close(pool(nowhere, center[:0], cells, places), expected[-1].expand(12, -1))


def test_training_of_the_pool_equals_the_layers_it_is_made_of() -> None:
    torch.manual_seed(0)
    pool = VoxelPool(3, PooledLevel("level", 1.2, 6, 5, 2), None)
    nn.init.uniform_(pool.way[1].weight, -2, 2)
    nn.init.normal_(pool.way[1].bias)
    plain = copy.deepcopy(pool)
    coord = torch.cartesian_prod(torch.arange(2), torch.arange(5), torch.arange(5), torch.arange(4)).int()
    coord = coord[torch.randperm(len(coord))[:150]]
    voxels, center = Voxels(coord, torch.randn(150, 3), 2), coord[:, 1:] + 0.5
    places = torch.rand(60, 3) * torch.tensor([5, 5, 4])
    places[-3:] += 50
    cells = torch.cat([torch.arange(60)[:, None] % 2, places.floor().long()], 1).int()
    rows = voxel_query(coord, center, cells, places, 2, 1.2, 5)
    way = torch.where(rows[..., None] >= 0, center[rows] - places[:, None], 0.0)
    known = torch.where(rows[..., None] >= 0, plain.enter(voxels.feat)[rows], 0.0)
    expected = plain.leave((known + plain.way(way.flatten(0, 1)).view(60, 5, 6)).relu().amax(1))
    found = pool(voxels, center, cells, places)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    factors = torch.randn_like(found)
    (found * factors).sum().backward()
    (expected * factors).sum().backward()
    for (name, own), other in zip(pool.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, atol=1e-4, rtol=1e-4, msg=name)
    torch.testing.assert_close(dict(pool.named_buffers()), dict(plain.named_buffers()))


def test_places_are_not_rounded_under_autocast() -> None:
    """Far from the origin bfloat16 tells no neighbours apart; only what the voxels say is rounded."""
    torch.manual_seed(0)
    pool = VoxelPool(3, PooledLevel("level", 1.5, 6, 5, 2), None).eval()
    coord = torch.cartesian_prod(torch.arange(1), torch.arange(5), torch.arange(5), torch.arange(4)).int()
    voxels, center = Voxels(coord, torch.zeros(len(coord), 3), 1), coord[:, 1:] + 60.5
    cells = coord[::7]
    places = center[::7] + 0.3
    table = {}
    hook = pool.activation.register_forward_hook(lambda _, given, out: table.setdefault(len(table), given[0]))
    pool(voxels, center, cells, places)
    with torch.autocast("cpu", torch.bfloat16):
        pool(voxels, center, cells, places)
    hook.remove()
    torch.testing.assert_close(table[1].float(), table[0], atol=1e-5, rtol=1e-5)


def test_samples() -> None:
    head = VoxelRCNNHead(samples=10)
    truth = Boxes(boxes(2), torch.tensor([0, 1]))
    exact = truth.boxes.repeat(10, 1)
    far = boxes(30, 3) + torch.tensor([50.0, 0, 0, 0, 0, 0, 0])
    near = truth.boxes.repeat(5, 1) * torch.tensor([1, 1, 1, 1, 0.4, 1, 1])  # overlap 0.4
    proposals = Boxes(torch.cat([exact, far, near]), torch.tensor([0, 1] * 10 + [0] * 30 + [0, 1] * 5))
    torch.manual_seed(0)
    drawn = head.sample(proposals, truth)
    assert [int(v) for v in ((drawn.overlap > 0.9).sum(), (drawn.overlap == 0).sum())] == [5, 1]  # and 4 hard ones
    torch.testing.assert_close(drawn.overlap[5:9], torch.full((4,), 0.4), atol=1e-5, rtol=0)
    near_rows = drawn.overlap > 0
    torch.testing.assert_close(drawn.matched[near_rows][:, :3], drawn.boxes[near_rows][:, :3])
    swapped = head.sample(Boxes(exact, torch.tensor([1, 0] * 10)), truth)
    assert (swapped.overlap == 0).all()  # of another class
    assert (head.sample(Boxes(exact, torch.tensor([0, 1] * 10)), truth).overlap > 0.9).sum() == 10
    nothing = Boxes(truth.boxes[:0], truth.labels[:0])
    assert (head.sample(proposals, nothing).overlap == 0).all()
    assert len(head.sample(nothing, truth).boxes) == 0


def test_losses_of_perfect_and_of_wrong_corrections(monkeypatch: pytest.MonkeyPatch) -> None:
    head = VoxelRCNNHead(samples=8)
    truth = Boxes(boxes(3), torch.tensor([0, 0, 0]))
    shifted = truth.boxes + torch.tensor([0.05, 0.03, -0.04, 0.1, 0.05, 0, 0.02])
    proposals = found(torch.cat([shifted, boxes(6, 2) + torch.tensor([90.0, 0, 0, 0, 0, 0, 0])]))
    overlap = box_iou(shifted, truth.boxes)
    assert (overlap > 0.55).all()

    def perfect(levels, own):
        own = own[0]
        near = (own[:, None, :3] - truth.boxes[:, :3]).norm(dim=2).argmin(1)
        local = torch.cat([torch.zeros_like(own[:, :3]), own[:, 3:6], torch.zeros_like(own[:, 6:])], 1)
        residuals = encode_boxes(seen_from(own, truth.boxes[near]), local)
        quality = ((box_iou(own, truth.boxes[near]) - 0.25) / 0.5).clamp(1e-6, 1 - 1e-6)
        return torch.logit(quality).float(), residuals + head.off

    monkeypatch.setattr(VoxelRCNNHead, "forward", lambda self, *args: perfect(*args))
    head.off = 0.0
    losses = head.losses({}, [proposals], [truth])
    assert set(losses) == {"refine_class", "refine_box", "refine_corner"}
    assert losses["refine_box"] < 1e-6
    assert losses["refine_corner"] < 1e-6
    head.off = torch.tensor([0.0, 0, 0, 0, 0, 0, 1.0])
    losses = head.losses({}, [proposals], [truth])
    assert losses["refine_box"] == pytest.approx(1 - 0.5 / 9, abs=1e-5)  # smooth L1 of 1, per positive box
    assert losses["refine_corner"] > 0.1


@pytest.mark.parametrize("make", [small_second, spiking])
@pytest.mark.parametrize("spikes", [None, 4])
def test_a_task_learns_and_finds(make, spikes: int | None) -> None:
    model = task(make(), spikes=spikes)
    points, truth = clouds(400, 300), [Boxes(boxes(2), torch.tensor([0, 2])), Boxes(boxes(0), torch.tensor([]).long())]
    output, levels = model._outputs(points)
    proposals = model.head.proposals(output, model.refine.training_suppression)
    assert all(0 < len(own) <= 512 and not own.boxes.requires_grad for own in proposals)
    proposals[0] = Boxes(
        torch.cat([truth[0].boxes + 0.01, proposals[0].boxes]), torch.cat([truth[0].labels, proposals[0].labels])
    )
    torch.manual_seed(1)
    losses = model.refine.losses(levels, proposals, truth)
    sum((model.head.losses(output, truth) | losses).values()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert losses["refine_corner"] > 0
    model.eval()
    with torch.no_grad():
        together = model(points)
        alone = model(points[0])[0]
    assert [len(own) > 0 for own in together] == [True, True]
    torch.testing.assert_close(together[0].boxes, alone.boxes, atol=1e-3, rtol=1e-3)
    again = instantiate(model.refine.to_config())
    again.build(GRID, model.backbone.feature_info)
    again.load_state_dict(model.refine.state_dict())
    assert again.to_config() == model.refine.to_config()


def test_nothing_to_refine() -> None:
    model = task(small_second())
    none = Boxes(torch.zeros(0, 7), torch.zeros(0, dtype=torch.long), torch.zeros(0))
    _, levels = model._outputs(clouds(300, 200))
    losses = model.refine.losses(levels, [none, none], [none, none])
    assert set(losses) == {"refine_class", "refine_box", "refine_corner"}
    assert all(float(loss) == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.refine.parameters())
    assert [len(own) for own in model.refine.eval().detections(levels, [none, none])] == [0, 0]
    apart = boxes(3) + torch.tensor([[0.0], [20], [40]]) * torch.eye(7)[0]
    assert [len(own) for own in model.refine.detections(levels, [none, found(apart)])] == [0, 3]
    far = found(boxes(2) + torch.tensor([float("inf"), 0, 0, 0, 0, 0, 0]))
    model.refine.detections(levels, [far, none])


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(InputError, match="CenterHead proposes nothing"):
        Detection(small_second(), ["Car"], CenterHead(), VoxelRCNNHead(LEVELS))
    with pytest.raises(InputError, match=r"no level conv9 \(it has conv1, conv2, conv3, conv4\)"):
        Detection(small_second(), ["Car"], AnchorHead(), VoxelRCNNHead([PooledLevel("conv9", 1.0)]))
    for options, message in [
        ({"samples": 0}, "refine.samples is 0: it must be at least 1"),
        ({"grid_size": 0}, "refine.grid_size is 0"),
        ({"positive_share": 1.5}, "refine.positive_share is 1.5: it must lie between 0 and 1"),
        ({"dropout": 1.0}, "refine.dropout is 1.0"),
    ]:
        with pytest.raises(InputError, match=message):
            VoxelRCNNHead(**options)
    for wrong in ((0, 0.5, 5), (5, 1.5, 5), (5, 0.5, 0)):
        with pytest.raises(InputError, match=r"suppression\."):
            Suppression(*wrong)
    with pytest.raises(InputError, match=r"refine\.levels\.radius is 0"):
        PooledLevel("conv2", 0.0)
    with pytest.raises(InputError, match="must rise"):
        VoxelRCNNHead(score_overlap=(0.5, 0.5))
    with pytest.raises(InputError, match=r"E3DSNNDetector: grid has 15 voxels along z, 16 at least"):
        E3DSNNDetector(4, BevGrid([0, 0, 0, 16, 16, 1.5], [0.1, 0.1, 0.1]))
    with pytest.raises(InputError, match="five widths"):
        E3DSNNDetector(4, GRID, (4, 4, 4))


def test_published_sizes() -> None:
    """Counted over the published configurations for cars."""
    kitti = BevGrid([0, -40, -3, 70.4, 40, 1], [0.05, 0.05, 0.1])
    with torch.device("meta"):
        plain = SECOND(4, kitti, neck_channels=(64, 128), up_channels=(128, 128))
        spikes = E3DSNNDetector(4, kitti)
        refine = VoxelRCNNHead()
        refine.build(kitti, plain.feature_info)
    assert (plain.out_channels, plain.stride, plain.neck.blocks[0][1].in_channels) == (256, 8, 256)
    assert (spikes.out_channels, spikes.stride, spikes.neck.blocks[0][2].in_channels) == (256, 8, 256)
    assert plain.feature_info == spikes.feature_info
    assert plain.feature_info[1] == FeatureInfo("conv2", 32, 2)
    assert refine.shared[0].in_features == 6**3 * 96
    sizes = [sum(p.numel() for p in part.parameters()) for part in (refine, plain, spikes)]
    assert sizes == [5_650_280, 1_931_200, 2_941_696]


@pytest.mark.parametrize("spikes", [None, 4])
def test_published_names(spikes: int | None) -> None:
    model, other = (task(small_second() if spikes is None else spiking(), spikes=spikes) for _ in range(2))
    convs = {f"{n}.weight": m for n, m in model.backbone.named_modules() if isinstance(m, SparseConvolution)}
    state = {}
    for name, value in model.backbone.state_dict().items():
        stored = write_kernel(value, convs[name], KernelLayout.KRSC, "zyx") if name in convs else value
        state[name.replace("encoder.", "backbone_3d.").replace("neck.", "backbone_2d.")] = stored
    state |= {f"dense_head.{name}": value for name, value in model.head.state_dict().items()}
    for name, value in model.refine.state_dict().items():
        for ours, theirs in [
            ("pools.", "roi_grid_pool_layers."), (".enter.", ".mlps_in.0."), (".way.", ".mlps_pos.0."),
            (".leave.", ".mlps_out.0."), ("shared.", "shared_fc_layer."), ("class_layers.", "cls_fc_layers."),
            ("box_layers.", "reg_fc_layers."), ("class_out.", "cls_pred_layer."), ("box_out.", "reg_pred_layer."),
        ]:  # fmt: skip
            name = name.replace(ours, theirs)
        if ".mlps_" in name and value.ndim == 2:  # 1x1 convolutions there, of one or two axes
            value = value[:, :, None, None] if "pos" in name else value[:, :, None]
        state[f"roi_head.{name}"] = value
    first = 0 if spikes is None else 1  # a neuron stands before each layer
    published = {
        f"roi_head.shared_fc_layer.{4 + first}.weight", f"roi_head.cls_fc_layers.{1 + first}.running_mean",
        f"roi_head.roi_grid_pool_layers.1.mlps_out.0.{first}.weight",
        "roi_head.roi_grid_pool_layers.0.mlps_in.0.1.bias",
        "roi_head.cls_pred_layer.bias", "roi_head.reg_pred_layer.weight", f"backbone_2d.blocks.1.{1 + first}.weight",
        f"backbone_2d.deblocks.0.{first}.weight", "backbone_3d.conv_input.0.weight", "backbone_3d.conv_out.1.bias",
        "backbone_3d.conv2.blocks.0.voxel_block.4.weight" if spikes else "backbone_3d.conv2.1.0.weight",
        "backbone_3d.conv3.down.1.weight" if spikes else "backbone_3d.conv3.0.0.weight",
        "backbone_3d.conv_input.6.weight" if spikes else "backbone_3d.conv_input.1.weight",
        "backbone_3d.conv1.0.1.weight" if spikes else "backbone_3d.conv1.0.0.weight",
    }  # fmt: skip
    assert published <= state.keys()
    import_openpcdet({"model_state": state}, other.backbone, other.head, refine=other.refine)
    torch.testing.assert_close(dict(other.state_dict()), dict(model.state_dict()))
    import_openpcdet(state, other.backbone, other.head)  # without the second stage
    del state["roi_head.cls_pred_layer.bias"]
    with pytest.raises(InputError, match=r"1 missing \(refine.class_out.bias\)"):
        import_openpcdet(state, other.backbone, other.head, refine=other.refine)


def test_the_best_of_overlapping_boxes_stays() -> None:
    own = boxes(1).repeat(3, 1)
    own[2, 0] += 20
    kept = Suppression(3, 0.5, 5)(Boxes(own, torch.tensor([0, 1, 2]), torch.tensor([0.2, 0.9, 0.5])))
    assert kept.labels.tolist() == [1, 2]
    assert Suppression(1, 0.5, 5)(found(own)).labels.tolist() == [0]
    assert len(Suppression(3, 0.5, 1)(found(own))) == 1
