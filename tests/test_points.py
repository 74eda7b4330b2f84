import copy
import pickle

import numpy as np
import pytest
import torch

from pc3d import InputError, Points
from pc3d.points import check_offsets


def batch(*counts, source=False):
    """Clouds of ``counts`` points; ``label`` numbers the points of the batch, ``coord`` is its label in x."""
    total = sum(counts)
    label = torch.arange(total)
    coord = torch.stack([label.float(), label.float() * 2, -label.float()], dim=1)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    attrs = {"label": label, "color": coord.abs()}
    meta = [{"name": f"cloud{i}", "origin": (float(i), 0.0, 0.0)} for i in range(len(counts))]
    return Points(coord, offsets, attrs, meta, with_inverse(counts) if source else None)


def with_inverse(counts):
    """A source with two points for each sampled point, in reversed order inside each cloud."""
    inverse = torch.cat([torch.arange(count).flip(0).repeat_interleave(2) for count in counts])
    return Points(
        torch.zeros(len(inverse), 3), torch.tensor([0, *(2 * c for c in counts)]).cumsum(0), {"inverse": inverse}
    )


def check(points, labels, counts):
    """The whole state of a batch whose rows are the points ``labels``."""
    assert points.get("label").tolist() == labels
    assert points.coord[:, 0].tolist() == labels
    assert points.get("color")[:, 1].tolist() == [2 * label for label in labels]
    assert points.counts.tolist() == counts
    assert points.offsets.tolist() == np.cumsum([0, *counts]).tolist()
    assert len(points) == len(points.meta) == len(counts)
    assert points.num_points == len(labels)


def test_one_cloud_by_default():
    points = Points(torch.zeros(5, 3))
    assert points.offsets.tolist() == [0, 5]
    assert points.meta == [{}]
    assert points.batch.tolist() == [0] * 5
    assert points.describe() == "point cloud"


def test_batch_with_empty_members():
    points = batch(0, 3, 0, 0, 2, 0)
    assert points.batch.tolist() == [1, 1, 1, 4, 4]
    assert points.counts.tolist() == [0, 3, 0, 0, 2, 0]
    check(points[1], [0, 1, 2], [3])
    check(points[0], [], [0])
    check(points[-2], [3, 4], [2])
    assert [len(cloud.coord) for cloud in points] == [0, 3, 0, 0, 2, 0]


def test_no_points_and_no_clouds():
    empty = batch(0, 0)
    assert empty.num_points == 0
    check(Points.cat([empty, batch(2)]), [0, 1], [0, 0, 2])
    check(empty.select(torch.zeros(0, dtype=torch.bool)), [], [0, 0])
    for none in (batch(2, 3)[0:0], batch(2, 3)[[]], batch(2)[5:], batch(2, source=True)[1:]):
        check(none, [], [])
        assert none.batch.tolist() == []
        check(Points.cat([none, batch(2)]), [0, 1], [2])
        assert list(none) == []
    assert len(batch(2, source=True)[0:0].source) == 0


@pytest.mark.parametrize(
    ("key", "labels", "counts", "names"),
    [
        (slice(0, 2), [0, 1, 2, 3, 4], [2, 3], ["cloud0", "cloud1"]),
        (slice(None, None, -1), [5, 2, 3, 4, 0, 1], [1, 3, 2], ["cloud2", "cloud1", "cloud0"]),
        ([2, 0, 2], [5, 0, 1, 5], [1, 2, 1], ["cloud2", "cloud0", "cloud2"]),
        (np.array([1]), [2, 3, 4], [3], ["cloud1"]),
        (torch.tensor([-1, 0]), [5, 0, 1], [1, 2], ["cloud2", "cloud0"]),
    ],
)
def test_slices_and_lists(key, labels, counts, names):
    chosen = batch(2, 3, 1)[key]
    check(chosen, labels, counts)
    assert [entry["name"] for entry in chosen.meta] == names


def test_a_single_cloud_is_a_view():
    points = batch(2, 3)
    points[1].coord[0] = 77
    points[1].attrs["label"][1] = 88
    assert points.coord[2].tolist() == [77, 77, 77]
    assert points.get("label")[3] == 88
    for outside in (2, -3):
        with pytest.raises(IndexError, match=f"cloud {outside} of a batch of 2"):
            points[outside]


def test_select_by_mask():
    points = batch(2, 3, 1)
    check(points.select(torch.tensor([False, True, False, False, False, True])), [1, 5], [1, 0, 1])
    for mask in (torch.ones(5, dtype=torch.bool), torch.ones(6, 1, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"a mask of shape \(.*\) for 6 points"):
            points.select(mask)


def test_select_by_index():
    points = batch(2, 3, 1)
    check(points.select(torch.tensor([1, 0, 4, 4, 2, 5])), [1, 0, 4, 4, 2, 5], [2, 3, 1])
    check(points.select(torch.tensor([3])), [3], [0, 1, 0])
    check(points.select(torch.zeros(0, dtype=torch.int64)), [], [0, 0, 0])
    check(batch(4).select(torch.tensor([3, 0, 0])), [3, 0, 0], [3])
    with pytest.raises(ValueError, match="mixes the points of several clouds"):
        points.select(torch.tensor([2, 1]))
    with pytest.raises((IndexError, RuntimeError)):
        points.select(torch.tensor([6]))


def test_select_drops_the_source_and_keeps_meta():
    points = batch(2, 3, source=True)
    chosen = points.select(torch.tensor([0, 3]))
    assert chosen.source is None
    assert [entry["name"] for entry in chosen.meta] == ["cloud0", "cloud1"]


def test_cat_is_the_inverse_of_iteration():
    points = batch(2, 0, 3, source=True)
    again = Points.cat(list(points))
    check(again, [0, 1, 2, 3, 4], [2, 0, 3])
    assert again.meta == points.meta
    assert torch.equal(again.source.get("inverse"), points.source.get("inverse"))
    assert again.source.counts.tolist() == [4, 0, 6]
    check(Points.cat([batch(1), batch(2, 1)]), [0, 0, 1, 2], [1, 2, 1])


def test_cat_drops_a_source_that_some_do_not_have():
    assert Points.cat([batch(1, source=True), batch(1)]).source is None


def test_cat_orders_attributes_by_name():
    a = Points(torch.zeros(1, 3), attrs={"a": torch.ones(1), "b": torch.zeros(1)})
    b = Points(torch.zeros(1, 3), attrs={"b": torch.zeros(1), "a": torch.ones(1)})
    assert Points.cat([a, b]).get("a").tolist() == [1, 1]


def test_cat_errors_name_files_and_fields():
    a, b = batch(1), batch(2)
    b.meta[0]["path"] = "scans/b.ply"
    with pytest.raises(InputError, match=r"cloud0 and scans/b\.ply differ in fields: color$"):
        Points.cat([a, b.without_attrs("color")])
    with pytest.raises(InputError, match=r"differ in field 'color': \(3,\) and \(\) per point"):
        Points.cat([a, b.with_attrs(color=torch.zeros(2))])
    with pytest.raises(ValueError, match="empty list"):
        Points.cat([])


def test_source_rows():
    points = batch(2, 0, 3, source=True)
    rows = points.source_rows()
    assert rows.tolist() == [1, 1, 0, 0, 4, 4, 3, 3, 2, 2]
    assert points[2].source_rows().tolist() == [2, 2, 1, 1, 0, 0]
    assert points[[2, 0]].source_rows().tolist() == [2, 2, 1, 1, 0, 0, 4, 4, 3, 3]
    with pytest.raises(ValueError, match="have no source"):
        batch(2).source_rows()


def test_attributes():
    points = batch(2)
    assert "coord" in points
    assert "label" in points
    assert "normal" not in points
    assert points.get("coord") is points.coord
    with pytest.raises(InputError, match=r"cloud0: field 'normal' is missing \(it has: coord, label, color\)"):
        points.get("normal")
    more = points.with_attrs(segment=torch.tensor([1, 2]), coord=points.coord + 1)
    assert more.coord[:, 0].tolist() == [1, 2]
    assert points.coord[:, 0].tolist() == [0, 1]
    assert "segment" not in points
    assert set(more.without_attrs("segment", "absent").attrs) == {"label", "color"}
    assert repr(more) == "Points(1 clouds, 2 points, [label(), color(3,), segment()], cpu)"
    assert batch(1, 1, 1).describe() == "cloud0 and 2 more"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coord": torch.zeros(4, 2)}, r"coord must be \(N, 3\), got \(4, 2\)"),
        ({"coord": torch.zeros(3)}, r"coord must be \(N, 3\)"),
        ({"attrs": {"label": torch.zeros(3)}}, "attribute 'label' has 3 rows for 4 points"),
        ({"attrs": {"coord": torch.zeros(4, 3)}}, "'coord' is not an attribute"),
        ({"attrs": {"label": torch.zeros(4, device="meta")}}, "attribute 'label' is on meta, coord on cpu"),
        ({"offsets": torch.tensor([0, 3])}, r"offsets must rise from 0 to 4, got \[0, 3\]"),
        ({"offsets": torch.tensor([1, 4])}, "offsets must rise"),
        ({"offsets": torch.tensor([0, 3, 2, 4])}, "offsets must rise"),
        ({"offsets": torch.tensor([0, 4], dtype=torch.int32)}, r"must be \(B \+ 1,\) int64"),
        ({"offsets": torch.zeros(0, dtype=torch.int64)}, r"must be \(B \+ 1,\) int64"),
        ({"meta": [{}, {}]}, "meta has 2 entries for 1 clouds"),
        ({"source": batch(1, 1)}, "source has 2 clouds, the sampled batch 1"),
    ],
)
def test_construction_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Points(**{"coord": torch.zeros(4, 3), **arguments})


def test_check_offsets_accepts_empty_segments():
    check_offsets(torch.tensor([0, 0, 3, 3]), rows=3)
    check_offsets(torch.tensor([0]), rows=0)


def test_clone_shares_nothing_and_detach_shares_values():
    points = batch(2, source=True).with_attrs(feat=torch.ones(2, 1, requires_grad=True))
    copied = points.clone()
    copied.coord[:] = 9
    copied.source.attrs["inverse"][:] = 9
    assert points.coord[:, 0].tolist() == [0, 1]
    assert points.source.get("inverse").tolist() == [1, 1, 0, 0]
    assert not points.detach().get("feat").requires_grad
    assert points.detach().get("feat").data_ptr() == points.get("feat").data_ptr()


def test_pickle_and_deepcopy():
    points = batch(2, 1, source=True)
    for again in (pickle.loads(pickle.dumps(points)), copy.deepcopy(points)):
        check(again, [0, 1, 2], [2, 1])
        assert again.meta == points.meta
        assert torch.equal(again.source_rows(), points.source_rows())


def on_device(points, device):
    tensors = [points.coord, points.offsets, *points.attrs.values(), points.source.coord, *points.source.attrs.values()]
    return all(tensor.device.type == device for tensor in tensors)


def test_to_moves_every_tensor():
    moved = batch(2, 1, source=True).to("meta")
    assert moved.device.type == "meta"
    assert on_device(moved, "meta")
    assert moved.meta[1]["name"] == "cloud1"


@pytest.mark.gpu
def test_device_round_trip():
    points = batch(2, 0, 3, source=True)
    moved = points.pin_memory().to("cuda", non_blocking=True)
    assert on_device(moved, "cuda")
    assert moved.batch.tolist() == points.batch.tolist()
    assert moved.source_rows().tolist() == points.source_rows().tolist()
    check(moved[2].cpu(), [2, 3, 4], [3])
    check(Points.cat([moved, moved[0]]).cpu(), [0, 1, 2, 3, 4, 0, 1], [2, 0, 3, 2])
    check(moved.select(torch.tensor([1, 4], device="cuda")).cpu(), [1, 4], [1, 0, 1])
