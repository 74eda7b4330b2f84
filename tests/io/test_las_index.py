"""Headers, chunk tables and octrees by our own parser, against laspy and lazrs, on good files and on bad ones."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pc3d.datasets.synthetic.aerial import write_aerial
from pc3d.errors import InputError
from pc3d.io.las_header import coordinates
from pc3d.io.las_index import CHUNK_POINTS, LasFile, LasIndex
from pc3d.io.las_records import columns_of, extra_bytes_entry, record_fields, with_fields
from pc3d.io.las_write import LasWriter, head_of, new_head
from pc3d.io.laz_chunks import decode_table

laspy = pytest.importorskip("laspy")
lazrs = pytest.importorskip("lazrs")

FORMATS = (0, 2, 3, 6, 7)


def check_points(path: Path) -> LasFile:
    """All chunks of a file hold what laspy reads from it."""
    file, las = LasFile(path), laspy.read(path)
    records = np.concatenate([file.records(i) for i in range(len(file))])
    assert np.array_equal(coordinates(file.header, records), las.xyz)
    firsts = coordinates(file.header, file.first_records)
    assert np.array_equal(firsts, las.xyz[file.first_rows])
    columns = columns_of(file.header, record_fields(file.header), records)
    names = [name for name in las.point_format.dimension_names if name not in "XYZ"]
    assert list(columns) == names
    for name in names:
        expected = np.asarray(las[name])
        assert columns[name].dtype == expected.dtype, name
        assert np.array_equal(columns[name], expected), name
    return file


def patched(path: Path, place: int, layout: str, *values: object) -> Path:
    data = bytearray(path.read_bytes())
    struct.pack_into(layout, data, place if place >= 0 else len(data) + place, *values)
    path.write_bytes(data)
    return path


@pytest.fixture
def laz(tmp_path: Path) -> Path:
    """Five chunks of 1,000 points, the last one smaller."""
    return write_aerial(tmp_path / "scan.laz", (650_000, 6_860_000), 65, 1.1, 6, chunk_size=1000)


@pytest.mark.parametrize("suffix", [".las", ".laz"])
@pytest.mark.parametrize("point_format", FORMATS)
def test_formats(tmp_path: Path, point_format: int, suffix: str) -> None:
    path = write_aerial(tmp_path / f"a{suffix}", (100, 200), 50, 1.5, point_format, chunk_size=1000)
    file = check_points(path)
    assert len(file) == (4 if suffix == ".laz" else 1)
    assert file.chunks.counts.sum() == file.header.num_points == 3750
    assert (file.header.low <= coordinates(file.header, file.records(0)).min(0)).all()


@pytest.mark.parametrize("point_format", [3, 7])
def test_chunks_of_any_size(tmp_path: Path, point_format: int) -> None:
    path = write_aerial(tmp_path / "a.laz", (0, 0), 140, 0.5, point_format, chunk_size=None)
    file = check_points(path)
    assert len(file) == 9
    assert len(set(file.chunks.counts.tolist())) == 1
    records = [file.records(i)[:count] for i, count in enumerate([1, 1000, 7, 300])]
    with LasWriter(tmp_path / "b.laz", new_head(point_format, (0.01,) * 3, (0, 0, 0)), True, None) as writer:
        for part in records:
            writer.write(part)
    assert check_points(tmp_path / "b.laz").chunks.counts.tolist() == [1, 1000, 7, 300]


def test_uncompressed_files_are_cut_into_runs(tmp_path: Path) -> None:
    file = check_points(write_aerial(tmp_path / "a.las", (0, 0), 100, 11, 0))
    assert file.chunks.counts.tolist() == [CHUNK_POINTS, CHUNK_POINTS, 10_000]


def test_little_is_read(tmp_path: Path) -> None:
    path = write_aerial(tmp_path / "a.laz", (0, 0), 200, 20, 6, chunk_size=5000)
    file = LasFile(path)
    assert len(file) == 160
    assert file.bytes_read < 8192
    for _ in range(2):  # they are read once
        assert file.first_records.shape == (160, 30)
    assert file.bytes_read < 8192 + 160 * 30


def test_place_of_the_table_at_the_end(laz: Path) -> None:
    expected = LasFile(laz).chunks
    start = LasFile(laz).header.points_start
    (place,) = struct.unpack_from("<q", laz.read_bytes(), start)
    patched(laz, start, "<q", -1)
    laz.write_bytes(laz.read_bytes() + struct.pack("<q", place))
    assert np.array_equal(LasFile(laz).chunks.sizes, expected.sizes)
    check_points(laz)


@pytest.mark.parametrize("point_format", [1, 3, 6, 7, 8])
@pytest.mark.parametrize("place", [0, -1, 10**12])
def test_without_a_table_the_chunks_are_walked(tmp_path: Path, point_format: int, place: int) -> None:
    path = write_aerial(tmp_path / "a.laz", (0, 0), 50, 0.9, point_format, chunk_size=1000)
    expected = LasFile(path)
    table = struct.unpack_from("<q", path.read_bytes(), expected.header.points_start)[0]
    path.write_bytes(path.read_bytes()[:table])  # the writer was killed before it could write its table
    patched(path, expected.header.points_start, "<q", place)
    with pytest.warns(UserWarning, match="its chunks are looked for from the start"):
        file = LasFile(path)
    for name in ("counts", "starts", "sizes"):
        assert np.array_equal(getattr(file.chunks, name), getattr(expected.chunks, name)), name
    assert np.array_equal(file.records(2), expected.records(2))


def test_walked_chunks_of_any_size(tmp_path: Path) -> None:
    path = write_aerial(tmp_path / "a.laz", (0, 0), 100, 0.5, 6, chunk_size=None)
    expected = LasFile(path)
    patched(path, expected.header.points_start, "<q", 0)
    with pytest.warns(UserWarning, match="no chunk table"):
        assert np.array_equal(LasFile(path).chunks.counts, expected.chunks.counts)
    path = write_aerial(tmp_path / "b.laz", (0, 0), 100, 0.5, 1, chunk_size=None)
    patched(path, LasFile(path).header.points_start, "<q", 0)
    with pytest.warns(UserWarning, match="no chunk table"), pytest.raises(InputError, match="cannot be found"):
        LasFile(path)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), min_size=1, max_size=80)
    | st.lists(st.tuples(st.integers(40_000, 60_000), st.integers(100_000, 400_000)), min_size=1, max_size=400)
)
def test_table_code(table: list[tuple[int, int]]) -> None:
    """What lazrs codes, we decode: any 32-bit integers, long tables whose models are rescaled."""
    for variable in (True, False):
        buffer = io.BytesIO()
        lazrs.write_chunk_table(buffer, table, lazrs.LazVlr.new_for_compression(6, 0, variable))
        counts, sizes = decode_table(buffer.getvalue()[8:], len(table), variable)
        assert sizes.tolist() == [size for _, size in table]
        assert not variable or counts.tolist() == [count for count, _ in table]


def test_long_table() -> None:
    rng = np.random.default_rng(0)
    table = [(50_000, int(size)) for size in rng.integers(1, 2**31, 6000)]
    buffer = io.BytesIO()
    lazrs.write_chunk_table(buffer, table, lazrs.LazVlr.new_for_compression(6, 0, True))
    counts, sizes = decode_table(buffer.getvalue()[8:], len(table), True)
    assert list(zip(counts.tolist(), sizes.tolist(), strict=True)) == table


@pytest.mark.parametrize("suffix", [".las", ".laz"])
def test_no_points(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"empty{suffix}"
    with LasWriter(path, new_head(6, (0.01,) * 3, (0, 0, 0)), suffix == ".laz"):
        pass
    assert laspy.read(path).header.point_count == 0
    file = LasFile(path)
    assert len(file) == 0
    assert file.first_records.shape == (0, 30)
    index = LasIndex.open(path)
    assert (index.num_points, len(index.boxes), index.first_points().shape) == (0, 0, (0, 3))


def test_huge_offsets(tmp_path: Path) -> None:
    path = write_aerial(tmp_path / "far.laz", (-8_400_000_000, 9_700_000_000), 50, 1, 6, chunk_size=1000, scale=0.001)
    file = check_points(path)
    low = coordinates(file.header, file.records(0)).min(0)
    assert -8_400_000_000 <= low[0] < -8_399_999_950
    assert 9_700_000_000 <= low[1] < 9_700_000_050


def test_real_files(data_dir: Path) -> None:
    paths = sorted(path for path in data_dir.rglob("*") if path.suffix in (".las", ".laz"))
    assert len(paths) > 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in paths:
            if path.stat().st_size < 1_000_000:
                check_points(path)


def test_octree(data_dir: Path) -> None:
    file = LasFile(data_dir / "reader_zoo/simple.copc.laz")
    octree = file.octree
    assert octree is not None
    assert octree.count.sum() == file.header.num_points
    assert octree.key[:, 0].min() == 0
    assert np.array_equal(octree.start, file.chunks.starts)
    for chunk in range(len(file)):
        coord = coordinates(file.header, file.records(chunk))
        low, high = file.chunk_bounds[chunk].reshape(2, 3)
        assert ((coord >= low - 1e-6) & (coord <= high + 1e-6)).all()
    with laspy.CopcReader.open(file.path) as reader:
        root = reader.query(level=0)
    assert octree.count[octree.key[:, 0] == 0].sum() == len(root)


def test_damaged_octree(data_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "simple.copc.laz"
    good = (data_dir / "reader_zoo/simple.copc.laz").read_bytes()
    at = LasFile(data_dir / "reader_zoo/simple.copc.laz").header.points_end + 60  # first entry of the hierarchy
    start, _, count = struct.unpack_from("<Qii", good, at + 16)
    for values in ((start + 1, 1, count), (10**12, 1, count), (start, 1, count + 1)):
        path.write_bytes(good)
        with pytest.raises(InputError, match=r"damaged: COPC node \[.*\] has \d+ points at byte"):
            LasFile(patched(path, at + 16, "<Qii", *values))


def test_folder(tmp_path: Path) -> None:
    write_aerial(tmp_path / "b.laz", (50, 0), 50, 1, 6, chunk_size=1000)
    write_aerial(tmp_path / "below/a.LAS", (0, 0), 50, 1, 3)
    (tmp_path / "notes.txt").write_text("no scan")
    (tmp_path / ".work").mkdir()
    for name in (".b.0a1b2c3d.tmp.laz", ".work/0.laz"):
        (tmp_path / name).write_text("not written to its end")
    index = LasIndex.open(tmp_path)
    assert [file.path.name for file in index.files] == ["b.laz", "a.LAS"]
    assert index.file.tolist() == [0, 0, 0, 1]
    assert index.chunk.tolist() == [0, 1, 2, 0]
    assert index.counts.tolist() == [1000, 1000, 500, 2500]
    assert index.records(2).shape == (500, 30)
    assert np.array_equal(index.first_points()[3], laspy.read(tmp_path / "below/a.LAS").xyz[0])
    with pytest.raises(InputError, match="no LAS or LAZ file"):
        LasIndex.open([])


# Damage --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "layout", "values", "message"),
    [
        (0, "<4s", (b"LASX",), "no LAS/LAZ header"),
        (25, "<B", (7,), "LAS 1.7 with point format 6 is not known"),
        (104, "<B", (11,), "point format 11 is not known"),
        (96, "<I", (10**9,), "truncated or damaged: 1 records before byte 1000000000"),
        (100, "<I", (10**6,), "truncated or damaged: 1000000 records before byte"),
        (105, "<H", (7,), "damaged: points of 7 bytes"),
        (131, "<d", (0.0,), r"scales \[0.0, 0.01"),
        (155, "<d", (np.nan,), r"offsets \[nan"),
        (179, "<d", (-np.inf,), "header has a bounding box"),
        (235, "<QI", (10**15, 1), "1 records at byte 1000000000000000"),
    ],
)
def test_corrupt_headers(laz: Path, place: int, layout: str, values: tuple, message: str) -> None:
    with pytest.raises(InputError, match=f"scan.laz: .*{message}"):
        LasFile(patched(laz, place, layout, *values))


@pytest.mark.filterwarnings("ignore:.*looked for from the start")
def test_truncated_files(tmp_path: Path, laz: Path) -> None:
    las = write_aerial(tmp_path / "scan.las", (0, 0), 50, 1, 0)
    for path in (las, laz):
        data = path.read_bytes()
        for size in (0, 3, 100, 240, 300, len(data) // 2):
            path.write_bytes(data[:size])
            with pytest.raises(InputError, match=f"{path.name}: "):
                LasFile(path)
    with pytest.raises(InputError, match=r"none.las: cannot be read: No such file"):
        LasFile(tmp_path / "none.las")


def test_damaged_chunk(laz: Path) -> None:
    start = int(LasFile(laz).chunks.starts[2])
    patched(laz, start + 30, "<10I", *[2**32 - 1] * 10)
    file = LasFile(laz)
    assert len(file.records(1)) == 1000
    with pytest.raises(InputError, match=r"scan.laz: chunk 2 is damaged"):
        file.records(2)


@pytest.mark.filterwarnings("ignore:.*looked for from the start")
@pytest.mark.parametrize("point_format", [1, 6])
def test_any_damage_is_an_input_error(tmp_path: Path, point_format: int) -> None:
    path = write_aerial(tmp_path / "scan.laz", (0, 0), 50, 0.4, point_format, chunk_size=200)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    head = LasFile(path).header.points_start + 8
    table = struct.unpack_from("<q", good, head - 8)[0]
    places = np.concatenate([rng.integers(0, head, 150), rng.integers(table, len(good), 50)])
    for place in places:
        data = bytearray(good)
        data[place] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        with contextlib.suppress(InputError):  # any other error fails the test
            file = LasFile(path)
            assert len(file.first_records) == len(file)
            assert file.chunks.counts.sum() == file.header.num_points


def test_without_lazrs(tmp_path: Path, laz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    las = write_aerial(tmp_path / "scan.las", (0, 0), 50, 1, 0)
    monkeypatch.setitem(__import__("sys").modules, "lazrs", None)
    assert len(LasFile(las).records(0)) == 2500
    file = LasFile(laz)
    assert len(file.first_records) == 5
    with pytest.raises(InputError, match=r"scan.laz: LAZ needs lazrs: pip install pc3d\[las\]"):
        file.records(0)


# Writing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["simple.copc.laz", "1_4_w_evlr.laz", "extrabytes.las", "fullwave.laz", "simple.las"])
@pytest.mark.parametrize("suffix", [".las", ".laz"])
def test_rewritten_with_new_fields(data_dir: Path, tmp_path: Path, name: str, suffix: str) -> None:
    file = LasFile(data_dir / "reader_zoo" / name)
    fields = record_fields(file.header)
    out = tmp_path / f"out{suffix}"
    head = head_of(file.header).with_extra_bytes(extra_bytes_entry("confidence", np.dtype("f4")), 4)
    with LasWriter(out, head, suffix == ".laz") as writer:
        for chunk in range(len(file)):
            records = file.records(chunk)
            columns = {
                "classification": np.full(len(records), 7),
                "confidence": np.arange(len(records), dtype=np.float32),
            }
            writer.write(with_fields(records, fields, columns, ["confidence"]))
    before, after = laspy.read(file.path), laspy.read(out)
    check_points(out)
    for dimension in before.point_format.dimension_names:
        if dimension != "classification":
            assert np.array_equal(before[dimension], after[dimension]), dimension
    assert (after.classification == 7).all()
    starts = np.repeat(file.first_rows, file.chunks.counts)
    assert np.array_equal(after["confidence"], np.arange(len(starts)) - starts)
    assert np.array_equal(before.header.mins, after.header.mins)
    assert before.header.generating_software == after.header.generating_software
    assert len(before.header.vlrs) >= len(after.header.vlrs) - 1
    kept = [record.record_data_bytes() for record in before.evlrs or [] if record.user_id != "copc"]
    assert [record.record_data_bytes() for record in after.evlrs or []] == kept


def test_a_new_header_tells_the_truth(tmp_path: Path) -> None:
    for point_format in FORMATS:
        las = laspy.read(write_aerial(tmp_path / "a.laz", (5, 7), 50, 0.4, point_format))
        assert np.allclose(las.header.mins, las.xyz.min(0))
        assert np.allclose(las.header.maxs, las.xyz.max(0))
        assert las.header.number_of_points_by_return[0] == len(las.points) == las.header.point_count
