"""Scans cut into tiles: every point once, as if predicted whole, through crashes and wrong guesses."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pc3d.data.pipeline import Pipeline
from pc3d.data.tile_plan import Tile, TilePlan, hilbert
from pc3d.datasets.synthetic.aerial import write_aerial
from pc3d.errors import InputError
from pc3d.io import LasIndex, read
from pc3d.io.chunk_cache import ChunkCache, Records
from pc3d.io.las_header import coordinates
from pc3d.io.las_write import LasWriter, new_head
from pc3d.models import SparseUNet
from pc3d.points import Points
from pc3d.tasks import SemanticSegmentation, predict_cloud
from pc3d.tasks.stream_output import ArrayOutput, LasOutput
from pc3d.tasks.streaming import ChunkResult, ScanPoints, StreamingPredictor

laspy = pytest.importorskip("laspy")
pytest.importorskip("lazrs")

CODES = np.array([2, 5, 6, 0])


class Kept:
    """Keeps results in memory: probabilities and the order of the points."""

    def __init__(self, index: LasIndex) -> None:
        self.results: dict[int, ChunkResult] = {}
        self.written: list[int] = []

    def encode(self, number: int, records: Records, result: ChunkResult) -> bytes:
        self.results[number] = result
        return bytes([1])

    def write(self, file: int, blobs: Iterator[tuple[int, bytes]]) -> None:
        self.written.append(len(list(blobs)))

    def column(self, name: str) -> np.ndarray:
        return np.concatenate([getattr(self.results[number], name) for number in sorted(self.results)])


def by_height(cloud: Points, _: torch.Generator) -> torch.Tensor:
    """Probabilities that depend on a point alone."""
    z = cloud.coord[:, 2] / 200
    return torch.stack([z, 1 - z, torch.zeros_like(z)], 1)


def predictor(index: LasIndex, folder: Path, output: Any = None, predict: Any = by_height, **options: Any):
    plan = TilePlan(index, options.pop("side", 40), options.pop("halo", 5), options.pop("max_points", 10**6))
    output = Kept(index) if output is None else output
    cache = options.pop("cache_bytes", 10**6)
    return StreamingPredictor(index, predict, plan, output, folder, {"of": "a test"}, cache, **options), output


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tiles of 100 m with colours, one of them uncompressed; 50 m blocks, of which chunks know nothing."""
    folder = tmp_path_factory.mktemp("scan")
    write_aerial(folder / "a.laz", (700_000, 6_000_000), 100, 1, 7, chunk_size=900)
    write_aerial(folder / "b.las", (700_100, 6_000_000), 100, 1.5, 7)
    write_aerial(folder / "c.laz", (700_000, 6_000_100), 100, 0.5, 7, chunk_size=None)
    return folder


# The plan ------------------------------------------------------------------------------------------------------------


def test_hilbert_curve() -> None:
    cells = sorted(itertools.product(range(16), repeat=2), key=lambda cell: hilbert(*cell, 4))
    assert sorted(hilbert(*cell, 4) for cell in cells) == list(range(256))
    assert all(abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1 for a, b in itertools.pairwise(cells))


def test_leaves_part_the_plane(scan: Path) -> None:
    plan = TilePlan(LasIndex.open(scan), 80, 5, 10**6)
    (first, *_) = sorted(plan.leaves)
    plan.halve(first)
    plan.halve(first.children[2])
    rng = np.random.default_rng(0)
    low, high = plan.bounds[:, :2].min(0), plan.bounds[:, 2:].max(0)
    borders = plan.low + rng.integers(0, 8, (200, 2)) * 20.0
    xy = np.concatenate([rng.random((2000, 2)) * (high - low) + low, borders])
    inside = np.stack([plan.in_tile(plan.place(xy), leaf) for leaf in plan.leaves])
    assert (inside.sum(0) <= 1).all()
    covered = np.zeros(len(xy), bool)
    for bounds in plan.bounds:
        covered |= ((xy >= bounds[:2]) & (xy <= bounds[2:])).all(1)
    assert (inside.sum(0)[covered] == 1).all()
    for leaf in plan.leaves:
        window = plan.in_window(plan.place(xy), leaf)
        assert (window | ~plan.in_tile(plan.place(xy), leaf)).all()
        weight = plan.blend_weight(plan.place(xy), leaf)
        assert (weight[plan.in_tile(plan.place(xy), leaf)] == 1).all()
        assert (weight[~window] < 1e-6).all()


def test_chunks_of_a_tile_reach_it(scan: Path) -> None:
    index = LasIndex.open(scan)
    plan = TilePlan(index, 30, 4, 10**6)
    for number in range(len(index.file)):
        plan.learn(number, coordinates(index.files[index.file[number]].header, index.records(number))[:, :2])
    assert plan.known.all()
    for leaf in plan.leaves:
        listed = set(plan.chunks(leaf).tolist())
        for number in range(len(index.file)):
            xy = coordinates(index.files[index.file[number]].header, index.records(number))[:, :2]
            if plan.in_window(plan.place(xy), leaf).any():
                assert number in listed


def test_octree_bounds_are_known(data_dir: Path) -> None:
    index = LasIndex.open(data_dir / "reader_zoo/simple.copc.laz")
    plan = TilePlan(index, 1000, 10, 10**6)
    assert plan.known.all()


def test_dense_tiles_are_halved_and_empty_ones_left_out(tmp_path: Path) -> None:
    write_aerial(tmp_path / "sparse.laz", (0, 0), 200, 0.2, 6, chunk_size=100)
    write_aerial(tmp_path / "dense.laz", (1000, 0), 200, 3, 6, chunk_size=100)
    plan = TilePlan(LasIndex.open(tmp_path), 200, 10, 10_000)
    levels = {leaf.level for leaf in plan.leaves if plan.box(leaf)[0] >= 1000}
    assert max(leaf.level for leaf in plan.leaves if plan.box(leaf)[0] < 1000) == 0
    assert max(levels) >= 1
    assert not [leaf for leaf in plan.leaves if 400 <= plan.box(leaf)[0] < 800]
    assert not plan.can_halve(Tile(4, 0, 0))
    for side, halo in [(0, 1), (np.nan, 1), (10, -1), (10, np.inf)]:
        with pytest.raises(InputError, match=f"tiles of {side} m"):
            TilePlan(LasIndex.open(tmp_path), side, halo, 100)


def test_a_few_points_of_a_chunk_tell_its_place(scan: Path) -> None:
    index = LasIndex.open(scan)
    one, other = (TilePlan(index, 7, 4, 10**6) for _ in range(2))
    for number in range(len(index.file)):
        xy = coordinates(index.files[index.file[number]].header, index.records(number))[:, :2]
        few = one.outline(xy)
        assert len(few) <= 4 + len(np.unique(np.floor(one.place(xy)), axis=0)) < len(xy)
        assert one.learn(number, few) == other.learn(number, xy)
    assert one.leaves == other.leaves
    assert np.array_equal(one.bounds, other.bounds)


@pytest.mark.parametrize("wrong", ["box", "points"])
def test_no_tiles_in_between(tmp_path: Path, wrong: str) -> None:
    """Neither a header that promises points where none are, nor a stray point far away, makes tiles without end."""
    path = write_aerial(tmp_path / "a.las", (60_000, 70_000), 50, 1, 6)
    file = LasIndex.open(path).files[0]
    data = bytearray(path.read_bytes())
    if wrong == "box":
        struct.pack_into("<d", data, 187, 0.0)  # lowest x
    else:
        struct.pack_into("<2i", data, file.header.points_start + 30 * 7, 800_000, 900_000)  # 8 and 9 km away
    path.write_bytes(data)
    index = LasIndex.open(path)
    run, kept = predictor(index, tmp_path / "work", side=20, halo=2)
    progress = run.run()
    assert progress.tiles == len(run.plan.leaves) < 20
    assert len(kept.column("label")) == index.num_points == 2500


def test_a_box_beyond_all_numbers(tmp_path: Path) -> None:
    path = write_aerial(tmp_path / "a.las", (0, 0), 50, 1, 6)
    data = bytearray(path.read_bytes())
    struct.pack_into("<d", data, 187, -1e300)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"more than 2\^40 tiles away"):
        TilePlan(LasIndex.open(path), 20, 2, 10**6)


def test_cache_keeps_to_its_budget(scan: Path) -> None:
    index = LasIndex.open(scan / "a.laz")
    size = 900 * 36
    with ChunkCache(index, 3 * size) as cache:
        for number in (0, 1, 2, 0, 3):
            assert np.array_equal(cache.get(number), index.records(number))
        assert [number in cache for number in range(5)] == [True, False, True, True, False]
        assert cache.decoded == 4
        cache.get(2)
        cache.decode_ahead([4, 5], keep=[2, 3])
        cache.get(4)
        assert [number in cache for number in range(6)] == [False, False, True, True, True, False]
        assert cache.decoded == 5
        cache.drop(4)
        assert 4 not in cache


# The run -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"side": 17, "halo": 3}, {"side": 500}, {"max_points": 900, "halo": 2}])
def test_every_point_once_and_in_order(scan: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    index = LasIndex.open(scan)
    run, kept = predictor(index, tmp_path, **options)
    reports = []
    progress = run.run(lambda now: reports.append(now.points))
    assert progress.points == reports[-1] == index.num_points == 30_000
    assert reports == sorted(reports)
    assert kept.written == [len(file) for file in index.files]
    z = np.concatenate(
        [coordinates(file.header, file.records(i))[:, 2] for file in index.files for i in range(len(file))]
    )
    np.testing.assert_allclose(kept.column("confidence"), np.maximum(z, 200 - z) / 200, rtol=1e-5)
    assert np.array_equal(kept.column("label"), np.where(z > 100, 0, 1))


def test_halves_at_run_time_keep_to_the_budget(scan: Path, tmp_path: Path) -> None:
    sizes = []

    def predict(cloud: Points, generator: torch.Generator) -> torch.Tensor:
        sizes.append(cloud.num_points)
        return by_height(cloud, generator)

    index = LasIndex.open(scan)
    run, _ = predictor(index, tmp_path, None, predict, side=200, halo=2, max_points=2000)
    run.run()
    assert max(sizes) <= 2000
    assert len({leaf.level for leaf in run.plan.leaves}) > 1


def misleading(path: Path) -> Path:
    """A file whose chunks reach far beyond what their first points tell."""
    rng = np.random.default_rng(0)
    records = np.zeros((8000, 30), np.uint8)
    line = np.arange(8000) / 8000 * 40_000  # along x, but near its end every 7th point is thrown anywhere
    xyz = np.stack([line, rng.integers(0, 1000, 8000), rng.integers(0, 5000, 8000)], 1).astype("<i4")
    stray = ((np.arange(8000) % 7 == 3) & (np.arange(8000) > 6000))[:, None] & np.array([True, False, False])
    xyz = np.where(stray, rng.integers(0, 40_000, (8000, 3)), xyz).astype("<i4")
    records[:, :12] = xyz.view(np.uint8).reshape(-1, 12)
    with LasWriter(path, new_head(6, (0.01,) * 3, (0, 0, 0)), True, 400) as writer:
        writer.write(records)
    return path


@pytest.mark.parametrize("blend", [False, True])
def test_wrong_guesses_are_made_good(tmp_path: Path, blend: bool) -> None:
    """Tiles done without a chunk that turns out to reach into them are done again, with all their points."""
    index = LasIndex.open(misleading(tmp_path / "stray.laz"))
    seen: dict[str, int] = {}

    def predict(cloud: Points, generator: torch.Generator) -> torch.Tensor:
        seen[cloud.meta[0]["name"]] = cloud.num_points
        return by_height(cloud, generator)

    run, kept = predictor(index, tmp_path / "work", None, predict, side=30, halo=3, blend=blend)
    progress = run.run()
    assert progress.repeated > 0
    xyz = coordinates(index.files[0].header, np.concatenate([index.records(i) for i in range(len(index.file))]))
    for leaf in run.plan.leaves:
        window = run.plan.in_window(run.plan.place(xyz[:, :2]), leaf)
        if run.plan.in_tile(run.plan.place(xyz[:, :2]), leaf).any():
            assert seen[f"tile {leaf}"] == window.sum()
    np.testing.assert_allclose(kept.column("confidence"), 1 - xyz[:, 2] / 200, rtol=1e-4)


@pytest.mark.parametrize("guess", ["usual", "none"])
@pytest.mark.parametrize("blend", [False, True])
def test_late_discoveries_change_nothing(
    tmp_path: Path, scan: Path, blend: bool, guess: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is that of a plan which knew the place of every chunk from the start."""
    index = LasIndex.open(misleading(tmp_path / "stray.laz") if guess == "usual" else scan / "a.laz")
    if guess == "none":  # whole tiles are found late
        points = (lambda index, first: (np.concatenate([first, first], 1), np.zeros(len(first), bool)),)
        monkeypatch.setattr("pc3d.data.tile_plan._guess", *points)

    def predict(cloud: Points, generator: torch.Generator) -> torch.Tensor:
        return torch.rand(2, generator=generator).softmax(0).expand(cloud.num_points, 2)  # another one in every tile

    options = {"side": 30, "halo": 12, "blend": blend, "keep_probabilities": True}
    lazy, found = predictor(index, tmp_path / "lazy", None, predict, **options)
    assert lazy.run().repeated > 0 or guess == "none"
    knowing, expected = predictor(index, tmp_path / "knowing", None, predict, **options)
    for number in range(len(index.file)):
        xy = coordinates(index.files[0].header, index.records(number))[:, :2]
        knowing.plan.learn(number, xy)
    assert knowing.run().repeated == 0
    assert np.array_equal(found.column("probabilities"), expected.column("probabilities"))


def test_most_chunks_are_decoded_once(tmp_path: Path) -> None:
    """With a cache for less than a third of the chunks."""
    for number in range(2):
        write_aerial(tmp_path / f"{number}.laz", (500 * number, 0), 500, 0.2, 6, chunk_size=500)
    index = LasIndex.open(tmp_path)
    assert len(index.file) == 200
    run, _ = predictor(index, tmp_path / "work", side=150, halo=4, cache_bytes=60 * 500 * 30)
    assert 200 <= run.run().decoded <= 1.3 * 200


def test_priority(scan: Path, tmp_path: Path) -> None:
    index, order = LasIndex.open(scan), []

    def predict(cloud: Points, generator: torch.Generator) -> torch.Tensor:
        order.append(cloud.meta[0]["name"])
        return by_height(cloud, generator)

    run, kept = predictor(index, tmp_path / "east", None, predict, side=50, priority=lambda tile: tile.column)
    run.run()
    columns = [int(name.split("_")[1]) for name in order]
    assert columns == sorted(columns, reverse=True)
    plain, reference = predictor(index, tmp_path / "curve", side=50)
    plain.run()
    assert np.array_equal(kept.column("confidence"), reference.column("confidence"))

    order.clear()
    changing, _ = predictor(index, tmp_path / "changing", None, predict, side=50, priority=lambda tile: tile.column)

    def turn(progress: Any) -> None:
        changing.priority = lambda tile: -tile.column

    changing.run(turn)
    columns = [int(name.split("_")[1]) for name in order]
    assert columns[0] == max(columns)
    assert columns[1:] == sorted(columns[1:])


# The same as whole-cloud inference -----------------------------------------------------------------------------------


def unet(in_channels: int = 3) -> SemanticSegmentation:
    """A small U-net with strides, whose weights make the neighbourhood matter."""
    torch.manual_seed(0)
    backbone = SparseUNet(in_channels, base_channels=8, channels=[8, 16, 16, 8], layers=[1, 1, 1, 1])
    task = SemanticSegmentation(backbone, ["ground", "tree", "house"]).eval()
    for name, buffer in task.named_buffers():
        if "running_mean" in name:
            buffer.normal_(0, 0.1)
        elif "running_var" in name:
            buffer.uniform_(0.5, 1.5)
    return task


def whole_and_streamed(path: Path, folder: Path, mode: str, **options: Any) -> tuple[torch.Tensor, np.ndarray]:
    task, pipeline = unet(), Pipeline(2.0, ["color"])
    whole = predict_cloud(task, pipeline, read(path), mode=mode)

    def predict(cloud: Points, generator: torch.Generator) -> torch.Tensor:
        return predict_cloud(task, pipeline, cloud, mode=mode, generator=generator)

    run, kept = predictor(LasIndex.open(path), folder, None, predict, keep_probabilities=True, **options)
    run.run()
    return whole, kept.column("probabilities")


def test_cores_equal_whole_cloud_inference(tmp_path: Path) -> None:
    path = write_aerial(tmp_path / "a.laz", (650_000.37, 6_800_000.11), 220, 0.4, 7, chunk_size=800)
    whole, streamed = whole_and_streamed(path, tmp_path / "wide", "fast", side=64, halo=60)
    assert len(streamed) == len(whole) > 19_000
    assert np.abs(streamed - whole.numpy()).max() < 1e-5
    _, narrow = whole_and_streamed(path, tmp_path / "narrow", "fast", side=64, halo=2)
    assert np.abs(narrow - whole.numpy()).max() > 1e-3
    _, blended = whole_and_streamed(path, tmp_path / "blended", "fast", side=64, halo=2, blend=True)
    assert np.abs(blended - whole.numpy()).mean() < np.abs(narrow - whole.numpy()).mean()
    np.testing.assert_allclose(blended.sum(1), 1, rtol=1e-5)


def test_blending_is_the_weighted_mean_of_logits(tmp_path: Path) -> None:
    """Logits that depend on the tile: their mean in the halo, weighted by the cosine."""
    path = write_aerial(tmp_path / "a.laz", (0, 0), 60, 1, 6, chunk_size=500)
    logits = {"tile 0_0_0": 1.0, "tile 0_1_0": -2.0, "tile 0_0_1": 0.5, "tile 0_1_1": 3.0}

    def predict(cloud: Points, _: torch.Generator) -> torch.Tensor:
        value = logits[cloud.meta[0]["name"]]
        return torch.tensor([value + 7, 7.0]).softmax(0).expand(cloud.num_points, 2)

    index = LasIndex.open(path)
    run, kept = predictor(index, tmp_path / "w", None, predict, side=30, halo=6, blend=True, keep_probabilities=True)
    run.run()
    xy = coordinates(index.files[0].header, np.concatenate([index.records(i) for i in range(len(index.file))]))[:, :2]
    outside = np.maximum(np.maximum(0 - xy, xy - 30), 0), np.maximum(30 - xy, 0)  # from columns and rows 0 and 1
    ramp = [0.5 * (1 + np.cos(np.pi * np.minimum(distance / 6, 1))) for distance in outside]
    weights = {f"tile 0_{c}_{r}": ramp[c][:, 0] * ramp[r][:, 1] for c in (0, 1) for r in (0, 1)}
    mean = sum(weights[name] * logits[name] for name in logits) / sum(weights.values())
    np.testing.assert_allclose(kept.column("probabilities")[:, 0], 1 / (1 + np.exp(-mean)), rtol=1e-4)


# Interruption --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def dying(after: int) -> Callable[[Points, torch.Generator], torch.Tensor]:
    left = itertools.count(after, -1)

    def predict(cloud: Points, generator: torch.Generator) -> torch.Tensor:
        if next(left) == 0:
            raise Killed
        return by_height(cloud, generator) * torch.rand((), generator=generator)

    return predict


@pytest.mark.parametrize("blend", [False, True])
@pytest.mark.parametrize("name", ["scan", "stray"])
def test_a_killed_run_goes_on_to_the_same_files(scan: Path, tmp_path: Path, name: str, blend: bool) -> None:
    source = scan if name == "scan" else misleading(tmp_path / "stray.laz")

    def attempt(folder: Path, after: int) -> tuple[list[bytes], int]:
        index = LasIndex.open(source)
        targets = [folder / "out" / f"{file.path.stem}.laz" for file in index.files]
        output = LasOutput(index, targets, CODES)
        run, _ = predictor(index, folder / "work", output, dying(after), side=33, max_points=1500, blend=blend)
        predicted = run.run()
        return [target.read_bytes() for target in targets], predicted.decoded

    expected, all_decoded = attempt(tmp_path / "whole", -1)
    tries, folder = 0, tmp_path / "killed"
    while True:
        try:
            resumed, decoded = attempt(folder, 6)
            break
        except Killed:
            tries += 1
            with (folder / "work/journal.jsonl").open("ab") as journal:
                journal.write(b'{"tile": [0, 1')  # and the last line was cut short
    assert tries > 1
    assert resumed == expected
    assert decoded < all_decoded


def test_lost_pieces_are_made_again(scan: Path, tmp_path: Path) -> None:
    index = LasIndex.open(scan)
    first, _ = predictor(index, tmp_path)
    first.run()
    sorted((tmp_path / "tiles").iterdir())[3].write_bytes(b"short")
    for blob in (tmp_path / "chunks").iterdir():
        blob.unlink()
    again, kept = predictor(index, tmp_path)
    assert again.run().points == index.num_points
    assert sorted(kept.results) == list(range(len(index.file)))


def test_another_run_in_the_folder(scan: Path, tmp_path: Path) -> None:
    index = LasIndex.open(scan)
    predictor(index, tmp_path)
    plan = TilePlan(index, 40, 5, 10**6)
    with pytest.raises(InputError, match="belongs to a run with another input, model or option"):
        StreamingPredictor(index, by_height, plan, Kept(index), tmp_path, {"of": "another"}, 10**6)


# Outputs -------------------------------------------------------------------------------------------------------------


def labels_by_height(path: Path) -> np.ndarray:
    z = laspy.read(path).xyz[:, 2]
    return np.where(z > 100, 2, 5)


@pytest.mark.parametrize("suffix", [".las", ".laz"])
def test_las_output(scan: Path, tmp_path: Path, suffix: str) -> None:
    index = LasIndex.open(scan)
    targets = [tmp_path / f"{file.path.stem}{suffix}" for file in index.files]
    output = LasOutput(index, targets, CODES, probability_fields=["prob_a", "prob_b", "prob_c"])
    predictor(index, tmp_path / "work", output, keep_probabilities=True)[0].run()
    for file, target in zip(index.files, targets, strict=True):
        before, after = laspy.read(file.path), laspy.read(target)
        assert np.array_equal(after.classification, labels_by_height(file.path))
        np.testing.assert_allclose(after["prob_a"] + after["prob_b"], 1, rtol=1e-5)
        assert np.array_equal(after["confidence"], np.maximum(after["prob_a"], after["prob_b"]))
        for name in before.point_format.dimension_names:
            if name != "classification":
                assert np.array_equal(before[name], after[name]), name
        assert len(LasIndex.open(target).file) == len(file) or suffix == ".las"


def test_copc_becomes_laz(data_dir: Path, tmp_path: Path) -> None:
    path = data_dir / "reader_zoo/simple.copc.laz"
    index, target = LasIndex.open(path), tmp_path / "simple.laz"

    def predict(cloud: Points, _: torch.Generator) -> torch.Tensor:
        return torch.nn.functional.one_hot((cloud.coord[:, 2] > 450).long(), 3).float()

    run, _ = predictor(index, tmp_path / "work", LasOutput(index, [target], CODES), predict, side=900, halo=50)
    assert run.run().decoded == len(index.file) == 65
    before, after = laspy.read(path), laspy.read(target)
    assert np.array_equal(before.xyz, after.xyz)
    assert np.array_equal(after.classification, np.where(before.xyz[:, 2] > 450, 5, 2))
    assert not [record for record in [*after.header.vlrs, *after.evlrs] if record.user_id == "copc"]


def test_label_fields(tmp_path: Path) -> None:
    source = write_aerial(tmp_path / "old.laz", (0, 0), 50, 1, 1, chunk_size=1000)
    index = LasIndex.open(source)
    cases = [
        ("classification", [2, 5, 31, 0], "classification", "u1"),
        ("classification", [2, 5, 40, 0], "classification_uint8", "u1"),
        ("prediction", [2, 5, 300, 0], "prediction", "u2"),
        ("intensity", [2, 5, 60_000, 0], "intensity", "u2"),
    ]
    for number, (field, codes, stored, dtype) in enumerate(cases):
        target = tmp_path / f"{number}.las"
        output = LasOutput(index, [target], np.array(codes), field)
        predictor(index, tmp_path / f"work{number}", output)[0].run()
        las = laspy.read(target)
        assert np.array_equal(las[stored], labels_by_height(source))
        assert np.asarray(las[stored]).dtype == dtype
        if stored != "classification":
            assert np.array_equal(las.classification, laspy.read(source).classification)


def test_written_again_over_its_own_fields(scan: Path, tmp_path: Path) -> None:
    """A labelled file labelled anew keeps one confidence."""
    index = LasIndex.open(scan / "b.las")
    first = LasOutput(index, [tmp_path / "first.las"], CODES)
    predictor(index, tmp_path / "one", first)[0].run()
    index = LasIndex.open(tmp_path / "first.las")
    second = LasOutput(index, [tmp_path / "second.las"], CODES)
    predictor(index, tmp_path / "two", second)[0].run()
    assert (tmp_path / "first.las").read_bytes() == (tmp_path / "second.las").read_bytes()


def test_array_output(scan: Path, tmp_path: Path) -> None:
    index = LasIndex.open(scan)
    targets = [tmp_path / f"{file.path.stem}.npy" for file in index.files]
    predictor(index, tmp_path / "work", ArrayOutput(index, targets, CODES))[0].run()
    for file, target in zip(index.files, targets, strict=True):
        rows = np.load(target)
        assert rows.dtype.names == ("label", "confidence")
        assert np.array_equal(rows["label"], labels_by_height(file.path))


def test_points_left_out_get_code_zero(scan: Path, tmp_path: Path) -> None:
    def predict(cloud: Points, generator: torch.Generator) -> torch.Tensor:
        return by_height(cloud, generator) * (torch.arange(cloud.num_points) % 2)[:, None]

    index = LasIndex.open(scan / "a.laz")
    for blend in (False, True):
        target = tmp_path / f"{blend}.laz"
        output = LasOutput(index, [target], CODES)
        predictor(index, tmp_path / f"w{blend}", output, predict, halo=0, side=500, blend=blend)[0].run()
        las = laspy.read(target)
        assert np.array_equal(las.classification > 0, np.arange(10_000) % 2 == 1)
        assert np.array_equal(np.asarray(las["confidence"]) > 0, np.arange(10_000) % 2 == 1)


def test_points_are_those_of_the_reader(scan: Path, tmp_path: Path) -> None:
    """Tiles have the fields, colours and origin that reading the whole file gives."""
    path = scan / "c.laz"
    whole, clouds = read(path), []

    def predict(cloud: Points, generator: torch.Generator) -> torch.Tensor:
        clouds.append(cloud)
        return by_height(cloud, generator)

    predictor(LasIndex.open(path), tmp_path, None, predict, side=1000)[0].run()
    (cloud,) = clouds
    assert cloud.meta[0]["origin"] == whole.meta[0]["origin"]
    assert torch.equal(cloud.coord, whole.coord)
    assert list(cloud.attrs) == list(whole.attrs)
    for name, value in whole.attrs.items():
        assert torch.equal(cloud.attrs[name], value), name


@pytest.mark.parametrize("depth", [8, 16])
def test_depth_of_colors_is_not_told_by_a_black_point(tmp_path: Path, depth: int) -> None:
    path = write_aerial(tmp_path / "a.las", (0, 0), 40, 1, 7)
    header = LasIndex.open(path).files[0].header
    rows = np.frombuffer(path.read_bytes(), np.uint8, offset=header.points_start).reshape(-1, 36).copy()
    colors = rows[:, 30:].view("<u2")
    colors[:] = colors // 257 if depth == 8 else colors
    colors[0] = 0
    path.write_bytes(path.read_bytes()[: header.points_start] + rows.tobytes())
    index = LasIndex.open(path)
    cloud = ScanPoints(index).cloud([(0, index.records(0))], "all", np.zeros(2))
    assert cloud.get("color").max() == 150
    assert torch.equal(cloud.get("color"), read(path).get("color"))


def test_a_scan_too_wide_for_one_origin(tmp_path: Path) -> None:
    write_aerial(tmp_path / "a.laz", (0, 0), 40, 1, 6, scale=0.001)
    write_aerial(tmp_path / "b.laz", (900_000_000, 0), 40, 1, 6, scale=0.001)
    extents = []

    def predict(cloud: Points, generator: torch.Generator) -> torch.Tensor:
        extents.append(float(cloud.coord.abs().max()))
        return by_height(cloud, generator)

    index = LasIndex.open(tmp_path)
    run, _ = predictor(index, tmp_path / "work", None, predict)
    assert run.run().points == index.num_points
    assert max(extents) < 1000
