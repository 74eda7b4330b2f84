"""What holds for every transform: config round trip, seeds, batches, empty clouds, labels that follow."""

from __future__ import annotations

import json

import pytest
import torch
from clouds import random_points, seeded

import pc3d.data.transforms as T
from pc3d import Points
from pc3d.config import instantiate

TRANSFORMS = [
    T.AssembleFeatures(["coord", "color", "segment"]),
    T.CenterShift(apply_z=False),
    T.ChromaticAutoContrast(p=0.7, blend=0.5),
    T.ChromaticJitter(p=0.7, std=0.1),
    T.ChooseSegments("color"),
    T.ChromaticTranslation(p=0.7, ratio=0.1),
    T.Compose([T.CenterShift(), T.RandomScale((0.5, 2.0))]),
    T.Corrupt("cutout", 3, points=150),
    T.CropBox((10, -5, 1, 13, -3, 2)),
    T.DropAttribute("color", p=0.7, value=127.5),
    T.ElasticDistortion(((0.5, 0.1), (1.0, 0.4)), p=0.8),
    T.EstimateNormals(k=8),
    T.EstimateNormals(k=8, toward=(0.0, 0.0, 5.0)),
    T.FixedPoints(40, "random"),
    T.FixedPoints(25, "farthest", inverse=True),
    T.GraphSegments(k=[0.05, 0.2], min_size=5, color_weight=0.5),
    T.GridSample(0.3),
    T.GridSample(0.3, "center", inverse=True, key_order="fnv"),
    T.HeightAboveLowest("y", output="over_y"),
    T.HeightAboveGround(cell=0.5, window=2.0, output="z_above"),
    T.IndoorAugment(dropout_p=1.0, elastic=False),
    T.LevelPlane(distance=0.2, sensor=(1.0, 0.0, 9.0), tries=20),
    T.LocalGeometry(k=8, features=["normal", "planarity"]),
    T.MarkBoundary(),
    T.NormalizeColor("signed"),
    T.OutdoorAugment(scale=(0.95, 1.05)),
    T.PointClip((10, -5, 1, 13, -3, 2)),
    T.PositiveShift(),
    T.RandomDropout(ratio=0.3, p=0.7),
    T.RandomFlip(p=0.7),
    T.RandomJitter(sigma=0.1, clip=0.15),
    T.RandomRotate((-0.5, 0.25), "x", center=(1, 2, 3), p=0.7),
    T.RandomRotateTargetAngle((0.5, 1.0), "y", p=0.7),
    T.RandomScale((0.5, 2.0)),
    T.RandomScale((0.5, 2.0), anisotropic=True),
    T.RandomShift((-0.3, 0.1)),
    T.ScaleAttribute("segment", 2.0, 1.0, output="twice"),
    T.ScanAndQueries(40),
    T.ShufflePoints(),
    T.ColumnCrop(0.5, more_than=5),
    T.SphereCrop(rate=0.4),
    T.UnitShape("box"),
]
every_transform = pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: type(t).__name__)


def assert_same(left: Points, right: Points) -> None:
    assert torch.equal(left.offsets, right.offsets)
    assert set(left.attrs) == set(right.attrs)
    assert left.meta == right.meta
    for name in ("coord", *left.attrs):
        torch.testing.assert_close(left.get(name), right.get(name), rtol=0, atol=0)
    assert (left.source is None) == (right.source is None)
    if left.source is not None and right.source is not None:
        assert_same(left.source, right.source)


def test_every_transform_is_listed() -> None:
    others = {"Transform", "CloudTransform", "PasteObjects"}  # the last needs files, see test_object_database.py
    assert {type(t).__name__ for t in TRANSFORMS} == set(T.__all__) - others


@every_transform
def test_config_round_trip(transform: T.Transform) -> None:
    config = json.loads(json.dumps(transform.to_config()))
    assert config["class_path"] == f"pc3d.data.transforms.{type(transform).__name__}"
    again = instantiate(config)
    assert again.to_config() == config
    points = random_points()
    assert_same(transform(points, seeded(3)), again(points, seeded(3)))


@every_transform
def test_same_seed_same_result(transform: T.Transform) -> None:
    points = random_points((200, 100))
    assert_same(transform(points, seeded(5)), transform(points, seeded(5)))


@every_transform
def test_without_generator_torch_seed_counts(transform: T.Transform) -> None:
    points = random_points((200, 100))
    torch.manual_seed(1)
    first = transform(points)
    torch.manual_seed(1)
    assert_same(first, transform(points))


@pytest.mark.parametrize(
    "transform", [t for t in TRANSFORMS if not isinstance(t, T.Compose)], ids=lambda t: type(t).__name__
)
def test_batch_equals_single_clouds(transform: T.Transform) -> None:
    points = random_points((200, 1, 150))
    generator = seeded(7)
    singles = Points.cat([transform(cloud, generator) for cloud in points])
    assert_same(transform(points, seeded(7)), singles)


@every_transform
@pytest.mark.parametrize("counts", [(0,), (1,), (0, 30, 0)], ids=str)
def test_empty_and_tiny_clouds(transform: T.Transform, counts: tuple[int, ...]) -> None:
    points = random_points(counts)
    result = transform(points, seeded())
    assert len(result) == len(counts)
    if isinstance(transform, T.FixedPoints):  # repeats the points of a smaller cloud
        assert result.counts.tolist() == [transform.count if n else 0 for n in counts]
    else:
        assert bool((result.counts <= points.counts).all())
    assert set(result.attrs) == set(transform(random_points((30,)), seeded()).attrs)
    assert bool(torch.isfinite(result.coord).all())


@every_transform
def test_input_is_untouched(transform: T.Transform) -> None:
    points = random_points((200, 100))
    before = points.clone()
    meta = [dict(entry) for entry in points.meta]
    transform(points, seeded())
    assert_same(points, before)
    assert points.meta == meta


@every_transform
def test_labels_follow_their_points(transform: T.Transform) -> None:
    points = random_points((300, 200))
    result = transform(points, seeded(2))
    rows = result.get("id")
    assert torch.equal(result.get("segment"), points.get("segment")[rows])
    assert torch.equal(result.batch, points.batch[rows])


@pytest.mark.gpu
@every_transform
def test_cuda_gives_the_cpu_result(transform: T.Transform) -> None:
    points = random_points((200, 0, 150))
    on_cpu, on_gpu = transform(points, seeded(4)), transform(points.to("cuda"), seeded(4)).cpu()
    for name in ("coord", *on_cpu.attrs):
        torch.testing.assert_close(on_gpu.get(name), on_cpu.get(name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transform", [T.ChromaticAutoContrast(p=0), T.ChromaticJitter(), T.NormalizeColor()])
def test_missing_color_is_one_clear_error(transform: T.Transform) -> None:
    with pytest.raises(ValueError, match="cloud0: field 'color' is missing"):
        transform(random_points().without_attrs("color"), seeded())


def test_compose_hands_the_generator_on() -> None:
    points = random_points()
    generator = seeded(9)
    one_by_one = T.RandomFlip()(T.RandomScale()(points, generator), generator)
    assert_same(T.Compose([T.RandomScale(), T.RandomFlip()])(points, seeded(9)), one_by_one)


def test_indoor_set_is_the_published_one() -> None:
    steps = [(type(t).__name__, t.to_config()["init_args"]) for t in T.IndoorAugment().transforms]
    tilt = [-1 / 64, 1 / 64]
    assert steps == [
        ("CenterShift", {"apply_z": True}),
        ("RandomDropout", {"ratio": 0.2, "p": 0.2}),
        ("RandomRotate", {"angle": [-1, 1], "axis": "z", "center": [0, 0, 0], "p": 0.5}),
        ("RandomRotate", {"angle": tilt, "axis": "x", "center": None, "p": 0.5}),
        ("RandomRotate", {"angle": tilt, "axis": "y", "center": None, "p": 0.5}),
        ("RandomScale", {"scale": [0.9, 1.1], "anisotropic": False}),
        ("RandomFlip", {"p": 0.5, "axes": ["x", "y"]}),
        ("RandomJitter", {"sigma": 0.005, "clip": 0.02}),
        ("ElasticDistortion", {"distortion": [[0.2, 0.4], [0.8, 1.6]], "p": 0.95}),
        ("ChromaticAutoContrast", {"p": 0.2, "blend": None}),
        ("ChromaticTranslation", {"p": 0.95, "ratio": 0.05}),
        ("ChromaticJitter", {"p": 0.95, "std": 0.05}),
    ]
    assert "ElasticDistortion" not in str([type(t) for t in T.IndoorAugment(elastic=False).transforms])
    assert "Chromatic" not in str([type(t) for t in T.IndoorAugment(color=False).transforms])


def test_outdoor_set_is_the_published_one() -> None:
    names = [type(t).__name__ for t in T.OutdoorAugment().transforms]
    assert names == ["RandomRotate", "RandomScale", "RandomFlip", "RandomJitter"]
