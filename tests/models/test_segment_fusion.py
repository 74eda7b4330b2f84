"""Segment-Fusion and offset clustering: what must not change a result, extreme scenes, and instances by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pc3d import InputError, Points
from pc3d.models import StoredLogits
from pc3d.models.heads import KeepLogits, OffsetClustering, SegmentFusion
from pc3d.models.heads.segment_fusion import FusionOutput, Pairs, Scope, SegmentAttention
from pc3d.ops.graph import renumber

CLASSES, WIDTH = 4, 6


def scene(seed: int = 0, counts: tuple[int, ...] = (160, 0, 220), segments: int = 9) -> tuple[Points, Tensor, Tensor]:
    """Points in blobs, one blob a segment, two blobs an instance; features and logits."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(counts)
    blob = torch.randint(0, segments, (total,), generator=generator)
    coord = (
        torch.randn(segments, 3, generator=generator)[blob] * 0.3 + torch.randn(total, 3, generator=generator) * 0.05
    )
    attrs = {"superpoint": blob, "segment": blob % CLASSES, "instance": blob // 2}
    points = Points(coord, torch.tensor([0, *counts]).cumsum(0), attrs)
    return points, *(torch.randn(total, width, generator=generator) for width in (WIDTH, CLASSES))


def head(**options: object) -> SegmentFusion:
    torch.manual_seed(0)
    made = SegmentFusion(**{"channels": 16, "depth": 4, "num_heads": 2, "min_points": 5, **options})
    made.build(WIDTH, CLASSES, [True, True, True, False])
    return made.eval()


def disturbed(**options: object) -> SegmentFusion:
    made = head(**options)
    for parameter in made.fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def test_untrained_it_is_the_vote_of_the_segments():
    points, features, logits = scene()
    output = head()(features, logits, points)
    labels = points.batch * 100 + points.get("superpoint")
    for label in labels.unique():
        mean = logits.softmax(1)[labels == label].mean(0)
        torch.testing.assert_close(
            output.logits[labels == label], (mean + 1e-6).log().expand((labels == label).sum(), -1)
        )
    torch.testing.assert_close(output.logits, output.variants["voting"])


@pytest.mark.parametrize("limit", [1024, 3])
def test_numbers_order_and_place_do_not_matter(limit):
    points, features, logits = scene(counts=(380,))
    network = disturbed(dense_limit=limit)
    with torch.no_grad():
        output = network(features, logits, points)
        order = torch.randperm(380, generator=torch.Generator().manual_seed(1))
        numbers = torch.randperm(9, generator=torch.Generator().manual_seed(2))
        moved = Points(points.coord[order] + 7.0, attrs={"superpoint": numbers[points.get("superpoint")[order]] * 3})
        again = network(features[order], logits[order], moved)
    torch.testing.assert_close(again.logits, output.logits[order], atol=2e-4, rtol=1e-3)
    found, same = (network.instances(o, p)[0].labels(380) for o, p in ((output, points), (again, moved)))
    assert torch.equal(renumber(found[order]), renumber(same))


def test_clouds_do_not_see_each_other():
    points, features, logits = scene()
    network = disturbed()
    with torch.no_grad():
        both = network(features, logits, points)
        alone = network(features[160:], logits[160:], points[2])
    torch.testing.assert_close(both.logits[160:], alone.logits, atol=1e-5, rtol=1e-4)


def test_attention_over_pairs_equals_attention_over_scenes():
    torch.manual_seed(0)
    attention = SegmentAttention(16, 4).double()
    feat, features = torch.randn(7, 16, dtype=torch.float64), torch.randn(7, 7, 8, dtype=torch.float64)
    first, second = torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij")
    pairs = Pairs(first.flatten(), second.flatten(), torch.arange(8) * 7, features.flatten(0, 1))
    dense = attention(feat, Scope([(0, 7, features)], None))
    torch.testing.assert_close(attention(feat, Scope([], pairs)), dense, atol=1e-6, rtol=1e-6)


def test_all_parameters_learn():
    points, features, logits = scene()
    network = head().train()
    output = network(features, logits, points)
    losses = network.losses(output, points)
    assert set(losses) == {"fusion", "affinity", "identity", "points"}
    torch.stack(list(losses.values())).sum().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without
    assert network.fusion["heads"]["semantic"][-1].weight.grad.any()


@pytest.mark.parametrize("case", ["empty", "one point", "one segment", "all ignored", "many segments"])
def test_extreme_scenes(case):
    counts = {"empty": (0,), "one point": (1,), "many segments": (20_000,)}.get(case, (60, 50))
    points, features, logits = scene(counts=counts, segments=1 if case == "one segment" else 9)
    if case == "all ignored":
        points = points.with_attrs(segment=torch.full_like(points.get("segment"), -1))
    if case == "many segments":
        spread = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0)) * 10
        points = Points(spread, attrs={**points.attrs, "superpoint": torch.arange(20_000)})
    network = head(depth=2).train()
    output = network(features.requires_grad_(), logits, points)
    assert output.logits.shape == logits.shape
    assert output.logits.isfinite().all()
    losses = network.losses(output, points)
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert total.isfinite()
    assert features.grad is None or features.grad.isfinite().all()
    if case == "all ignored":
        assert losses["fusion"] == losses["affinity"] == 0
    assert len(network.eval().instances(output, points)) == len(points)


def test_instances_by_hand():
    """Segments in a row: 0 and 1 touch and agree, 2 is another class, 3 is stuff, 4 lies beside 5 without touching."""
    places = torch.tensor([0.0, 0.1, 0.2, 0.3, 5.0, 5.2])
    blob = torch.arange(6).repeat_interleave(20)
    generator = torch.Generator().manual_seed(0)
    coord = torch.randn(120, 3, generator=generator) * 0.02
    coord[:, 0] += places[blob]
    points = Points(coord, attrs={"superpoint": blob})
    network = head(neighbours=5)
    output: FusionOutput = network(torch.zeros(120, WIDTH), torch.zeros(120, CLASSES), points)
    output.graph.voted = output.graph.center
    label = torch.tensor([0, 0, 1, 3, 2, 2])
    output.semantic = torch.nn.functional.one_hot(label, CLASSES) * 9.0
    output.affinity = torch.full_like(output.affinity, 4.0)
    output.identity = torch.ones(6, 1)
    (found,) = network.instances(output, points)
    assert found.classes.tolist() == [0, 1, 2]
    assert found.sizes.tolist() == [40, 20, 40]
    assert found.labels(120)[60:80].eq(-1).all()  # stuff
    sure = float(output.semantic.softmax(1)[0, 0])
    torch.testing.assert_close(found.scores, torch.tensor([sure * torch.tensor(4.0).sigmoid(), sure, sure]))
    output.identity = torch.arange(6.0)[:, None]
    output.affinity = torch.full_like(output.affinity, -4.0)
    (apart,) = network.instances(output, points)
    assert apart.sizes.tolist() == [20] * 5
    output.variants["voting"] = output.semantic[points.get("superpoint")]
    assert network.baseline(output, points)[0].sizes.tolist() == [40, 20, 20, 20]  # what touches and agrees
    network.min_points = 30
    assert len(network.instances(output, points)[0]) == 0


def corner(bend: float) -> Points:
    """Two faces of a box or of a niche, one object, that meet at x = 0: the second turns down by ``bend``."""
    a, b = torch.meshgrid(torch.arange(0.01, 0.2, 0.02), torch.arange(0.0, 0.4, 0.02), indexing="ij")
    a, b = a.flatten(), b.flatten()
    angle = torch.tensor(bend)
    first = torch.stack([-a, b, 0 * a], 1)
    second = torch.stack([a * angle.cos(), b, -a * angle.sin()], 1)
    normals = torch.tensor([[0.0, 0.0, 1.0], [angle.sin(), 0.0, angle.cos()]]).repeat_interleave(len(a), 0)
    return Points(
        torch.cat([first, second]),
        attrs={"superpoint": torch.arange(2).repeat_interleave(len(a)), "normal": normals},
    )


@pytest.mark.parametrize(("bend", "count"), [(1.2, 1), (0.0, 1), (-1.2, 2)])
def test_untrained_it_parts_segments_at_concave_borders(bend, count):
    points = corner(bend)
    network, total = head(), points.num_points
    output = network(torch.zeros(total, WIDTH), torch.eye(CLASSES)[0].expand(total, -1) * 5, points)
    convexity = output.graph.convexity
    torch.testing.assert_close(output.affinity, 10 * (convexity + 0.15))
    if bend:
        assert float(convexity) * bend > 0.3  # the sine of half the bend, twice, lessened by oblique edges
    assert len(network.instances(output, points)[0]) == count
    assert len(network.baseline(output, points)[0]) == 1


def test_what_is_added_to_a_clear_border_costs():
    points = corner(1.4)
    total = points.num_points
    points = points.with_attrs(segment=torch.zeros(total).long(), instance=torch.zeros(total).long())
    network = head(restraint=0.01)
    for added in (0.0, 3.0, -3.0):
        network.fusion["heads"]["affinity"][-1].bias.data.fill_(added)
        output = network(torch.zeros(total, WIDTH), torch.zeros(total, CLASSES), points)
        clear = torch.nn.functional.softplus(-output.affinity).squeeze()
        cost = network.losses(output, points)["affinity"]
        torch.testing.assert_close(cost, 0.5 * (clear + 0.01 * added**2))


def test_a_short_border_does_not_join_what_a_long_one_parts():
    """1 and 2 are one object, 0 another; one doubtful pair (0, 1) is a chance contact of few points."""
    points = corner(0.0)
    third = points.coord[:, 1] < 0.1
    points = points.with_attrs(superpoint=torch.where(points.get("superpoint") == 0, 0, torch.where(third, 1, 2)))
    total = points.num_points
    for linkage, sizes in (("single", [total]), ("sum", [200, 200])):
        network = head(linkage=linkage)
        output = network(torch.zeros(total, WIDTH), torch.eye(CLASSES)[0].expand(total, -1) * 5, points)
        assert output.graph.edges.tolist() == [[0, 1], [0, 2], [1, 2]]
        output.affinity = torch.tensor([0.5, -3.0, 6.0])
        (found,) = network.instances(output, points)
        assert found.sizes.tolist() == sizes
    with pytest.raises(InputError, match="linkage 'mean'"):
        head(linkage="mean")


def test_missing_segments_are_named():
    points, features, logits = scene()
    with pytest.raises(InputError, match="GraphSegments"):
        head()(features, logits, points.without_attrs("superpoint"))


def test_offset_clustering():
    points, features, _ = scene(counts=(300, 200), segments=4)
    network = OffsetClustering(radius=0.05, min_points=5)
    network.build(WIDTH, CLASSES, [True, True, True, False])
    label = points.get("segment")
    logits = torch.nn.functional.one_hot(label, CLASSES) * 9.0
    output = network(features, logits, points)
    output.offset = torch.randn(4, 3)[points.get("superpoint")] * 5 - points.coord  # to one place per segment
    found = network.instances(output, points)
    assert [sorted(part.classes.tolist()) for part in found] == [[0, 1, 2], [0, 1, 2]]
    assert torch.equal(found[0].sizes, label[:300].bincount()[:3])
    losses = network.losses(output, points)
    assert losses["offset"].isfinite()
    nothing = points.with_attrs(segment=torch.full_like(label, -1))
    assert network.losses(output, nothing)["offset"] == 0


def test_foreign_predictions_are_fused():
    points, features, logits = scene()
    points = points.with_attrs(feat=features, other=logits.softmax(1))
    stored = StoredLogits(WIDTH, CLASSES, attribute="other", probabilities=True)
    found = stored(points)
    torch.testing.assert_close(KeepLogits(CLASSES)(found, points).softmax(1), logits.softmax(1), atol=1e-4, rtol=1e-3)
    network = SegmentFusion(channels=16, num_heads=2)
    network.build(stored.out_channels, CLASSES, [True] * CLASSES)
    assert network(found, KeepLogits(CLASSES)(found, points), points).logits.shape == logits.shape
    with pytest.raises(InputError, match="field 'other'"):
        StoredLogits(WIDTH, CLASSES + 1, attribute="other")(points)
