import numpy as np
import pytest
import torch
from io_clouds import assert_same_cloud

from pc3d import InputError, Points
from pc3d.io import read, write

laspy = pytest.importorskip("laspy")
pytest.importorskip("lazrs")

WKT = 'LOCAL_CS["site frame"]'


def make(path, count=50, version="1.4", point_format=7, extra=()):
    """An airborne-like file: centimetres at UTM coordinates, a coordinate system, one extended record."""
    header = laspy.LasHeader(version=version, point_format=point_format)
    header.scales, header.offsets = np.full(3, 0.01), np.array([0.0, 0.0, 100.0])
    header.generating_software = "a scanner"
    header.vlrs.append(laspy.vlrs.known.WktCoordinateSystemVlr(WKT))
    for params, _ in extra:
        header.add_extra_dim(params)
    las = laspy.LasData(header, points=laspy.ScaleAwarePointRecord.zeros(count, header=header))
    rng = np.random.default_rng(0)
    las.X, las.Y, las.Z = (
        rng.integers(77_000_000, 77_005_000, count),
        rng.integers(627_000_000, 627_005_000, count),
        rng.integers(0, 900, count),
    )
    las.classification[:] = rng.integers(0, 9, count)
    las.intensity[:] = rng.integers(0, 65536, count)
    if "gps_time" in las.point_format.dimension_names:
        las.gps_time[:] = rng.random(count) * 1e9
    if "red" in las.point_format.dimension_names:
        las.red[:], las.green[:], las.blue[:] = rng.integers(0, 65536, (3, count))
    for params, values in extra:
        las[params.name] = values
    if version == "1.4":
        las.evlrs = laspy.vlrs.vlrlist.VLRList([laspy.VLR("someone", 7, "kept", b"payload")])
    las.write(path)
    return path


def test_attributes_and_exact_coordinates(tmp_path):
    path = make(tmp_path / "a.laz")
    las, points = laspy.read(path), read(path)
    assert points.meta[0]["origin"] == (*np.floor(las.xyz.min(0)[:2]), 0.0)
    true = points.coord.double().numpy() + points.meta[0]["origin"]
    assert np.abs(true - las.xyz).max() < 1e-3
    assert np.array_equal(np.round((true - las.header.offsets) / las.header.scales).astype(np.int64)[:, 1], las.Y)
    assert points.get("intensity").dtype == torch.int32
    assert np.array_equal(points.get("intensity"), las.intensity)
    assert np.array_equal(points.get("gps_time"), las.gps_time)
    assert np.array_equal(points.get("return_number"), las.return_number)
    np.testing.assert_allclose(points.get("color")[:, 1], np.asarray(las.green) / 257, rtol=1e-6)


@pytest.mark.parametrize("suffix", ["las", "laz"])
@pytest.mark.parametrize(
    ("version", "point_format"), [("1.2", 0), ("1.2", 3), ("1.3", 4), ("1.4", 6), ("1.4", 7), ("1.4", 8), ("1.4", 10)]
)
def test_round_trip_keeps_points_and_header(tmp_path, suffix, version, point_format):
    path = make(tmp_path / f"a.{suffix}", version=version, point_format=point_format)
    points = read(path)
    out = write(tmp_path / f"b.{suffix}", points)
    assert_same_cloud(points, read(out))
    before, after = laspy.read(path), laspy.read(out)
    for name in before.point_format.dimension_names:
        assert np.array_equal(before[name], after[name]), name
    assert after.header.version == before.header.version
    assert after.header.point_format == before.header.point_format
    assert after.header.generating_software.startswith("a scanner")
    assert after.header.vlrs.get("WktCoordinateSystemVlr")[0].string == WKT


def test_template_changes_only_what_changed(tmp_path):
    extra = [
        (laspy.ExtraBytesParams("treeID", "f8"), np.where(np.arange(50) % 2, np.finfo(np.float64).max, np.arange(50))),
        (laspy.ExtraBytesParams("pair", "2u2"), np.arange(100).reshape(50, 2)),
        (laspy.ExtraBytesParams("raw", "7u1"), np.arange(350).reshape(50, 7) % 251),
        (laspy.ExtraBytesParams("tick", "u8"), np.full(50, 2**64 - 3, np.uint64)),
        (laspy.ExtraBytesParams("height", "i4", scales=[0.01], offsets=[5.0]), np.arange(50) * 0.25),
    ]
    path = make(tmp_path / "a.laz", extra=extra)
    points = read(path)
    assert points.get("treeID")[1] == np.finfo(np.float64).max
    assert points.get("pair").shape == (50, 2)
    assert points.get("tick")[0] == -3
    assert points.get("height")[3] == 0.75

    order = torch.arange(50)
    labelled = points.without_attrs("intensity", "pair").with_attrs(
        classification=order % 7,
        pc3d_class=order % 5,
        pc3d_conf=order / 50,
        probability=torch.rand(50, 4),
        flag=order > 3,
    )
    out = write(tmp_path / "b.laz", labelled, template=path)
    before, after = laspy.read(path), laspy.read(out)
    for name in before.point_format.dimension_names:
        if name != "classification":
            assert np.array_equal(before[name], after[name]), name
    assert np.array_equal(after.classification, order % 7)
    assert np.array_equal(after.pc3d_class, order % 5)
    assert after.pc3d_conf.dtype == np.float32
    assert np.array_equal(after["probability_3"], labelled.get("probability")[:, 3])
    assert np.array_equal(after["flag"], order > 3)
    assert np.array_equal(after.header.scales, before.header.scales)
    assert np.array_equal(after.header.mins, before.header.mins)
    assert after.header.creation_date == before.header.creation_date
    assert after.header.parse_crs.__self__.vlrs.get("WktCoordinateSystemVlr")[0].string == WKT
    assert [record.record_data_bytes() for record in after.evlrs] == [b"payload"]


def test_colours_of_a_model_are_written_with_16_bits(tmp_path):
    path = make(tmp_path / "a.las")
    plain = Points(
        read(path).coord, attrs={"color": torch.full((50, 3), 255.0)}, meta=[{"origin": read(path).meta[0]["origin"]}]
    )
    for template in (path, None):
        las = laspy.read(write(tmp_path / "b.las", plain, template=template))
        assert set(las.red) == {65535}


def test_8_bit_colours_in_16_bit_fields_stay(tmp_path):
    path = make(tmp_path / "a.las")
    las = laspy.read(path)
    las.red[:], las.green[:], las.blue[:] = 200, 100, 0
    las.write(path)
    points = read(path)
    assert points.get("color")[0].tolist() == [200, 100, 0]
    assert set(laspy.read(write(tmp_path / "b.las", points)).red) == {200}


def test_cloud_from_elsewhere(tmp_path):
    coord = torch.rand(100, 3) * 2 - 1
    attrs = {
        "color": torch.full((100, 3), 51.0),
        "intensity": torch.rand(100),
        "segment": torch.arange(100) - 1,
        "normal": torch.rand(100, 3),
    }
    cloud = Points(coord, attrs={**attrs, "half": torch.rand(100).half()}, meta=[{"origin": (500000.0, 0.0, 0.0)}])
    points = read(write(tmp_path / "a.laz", cloud))
    true = points.coord.double() + torch.tensor(points.meta[0]["origin"], dtype=torch.float64)
    assert (true - coord.double() - torch.tensor([500000.0, 0, 0], dtype=torch.float64)).abs().max() < 1e-7
    assert points.get("color").unique().tolist() == [51]
    assert torch.equal(points.get("segment"), attrs["segment"])
    assert torch.equal(points.get("intensity_float32"), attrs["intensity"])  # a LAS intensity is an integer
    assert torch.equal(points.get("normal"), attrs["normal"])
    assert set(points.get("return_number").tolist()) == {1}


def test_values_that_do_not_fit(tmp_path):
    path = make(tmp_path / "a.las", version="1.2", point_format=1)
    points = read(path)
    with pytest.raises(InputError, match=r"b\.las: field 'classification' has values from 40 to 40: more than"):
        write(tmp_path / "b.las", points.with_attrs(classification=torch.full((50,), 40)), template=path)
    with pytest.raises(InputError, match="a name of more than 31 bytes"):
        write(tmp_path / "b.las", points.with_attrs(**{"n" * 32: torch.ones(50)}))
    moved = points.with_attrs(coord=points.coord * 1e9)
    with pytest.raises(InputError, match="coordinates do not fit the scales"):
        write(tmp_path / "b.las", moved, template=path)
    assert not (tmp_path / "b.las").exists()
    far = read(write(tmp_path / "c.las", moved))
    extent = float(moved.coord.max())
    assert np.allclose(
        far.coord.double().numpy() + far.meta[0]["origin"],
        moved.coord.double().numpy() + points.meta[0]["origin"],
        atol=extent * 1e-6,
    )


def test_refusals(tmp_path):
    path = make(tmp_path / "a.laz")
    points = read(path)
    with pytest.raises(InputError, match="COPC files cannot be written"):
        write(tmp_path / "b.copc.laz", points)
    with pytest.raises(InputError, match=r"49 points, but template .*a\.laz has 50"):
        write(tmp_path / "b.laz", points.select(torch.arange(49)), template=path)
    with pytest.raises(InputError, match="no such file"):
        write(tmp_path / "b.laz", points, template=tmp_path / "missing.laz")


@pytest.mark.parametrize("suffix", ["las", "laz"])
def test_damaged_files(tmp_path, suffix):
    data = make(tmp_path / f"a.{suffix}", count=200).read_bytes()
    path = tmp_path / f"cut.{suffix}"
    for content in [data[:size] for size in range(0, len(data) - 70, 97)] + [
        b"LASF garbage" * 40,
        b"\0" * 5000,
        data[:96] + b"\xff" * 300,
    ]:
        path.write_bytes(content)
        with pytest.raises(InputError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


def test_empty(tmp_path):
    path = make(tmp_path / "a.las", count=0)
    with pytest.raises(InputError, match="holds no points"):
        read(path)
    empty = read(path, allow_empty=True)
    assert empty.num_points == 0
    assert read(write(tmp_path / "b.las", empty), allow_empty=True).num_points == 0


def test_missing_package_names_the_extra(tmp_path, monkeypatch):
    path = make(tmp_path / "a.las")
    monkeypatch.setitem(__import__("sys").modules, "lazrs", None)
    with pytest.raises(InputError, match=r"pip install pc3d\[las\]"):
        read(path)


@pytest.mark.parametrize("suffix", ["las", "laz"])
@pytest.mark.parametrize(("at", "size"), [(96, 4), (100, 4), (235, 8), (243, 4), (247, 8)])
def test_absurd_counts_cost_neither_time_nor_memory(tmp_path, suffix, at, size):
    data = bytearray(make(tmp_path / f"a.{suffix}").read_bytes())
    data[at : at + size] = b"\xff" * (size - 1) + b"\x0f"
    (tmp_path / f"b.{suffix}").write_bytes(data)
    with pytest.raises(InputError, match="truncated or damaged"):
        read(tmp_path / f"b.{suffix}")
