import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from io_clouds import assert_one_line, assert_same_cloud, clouds

from pc3d import InputError, Points
from pc3d.io import read, write

ENCODINGS = ["ascii", "binary", "binary_compressed"]
HYPOTHESIS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def header(fields="x y z", size="4 4 4", kind="F F F", count="1 1 1", width=2, height=1, data="ascii", points=None):
    points = width * height if points is None else points
    return (
        f"# .PCD v0.7\nVERSION 0.7\nFIELDS {fields}\nSIZE {size}\nTYPE {kind}\nCOUNT {count}\n"
        f"WIDTH {width}\nHEIGHT {height}\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS {points}\nDATA {data}\n"
    ).encode()


def save(path, head, body=b""):
    path.write_bytes(head + body)
    return path


@HYPOTHESIS
@given(cloud=clouds(), encoding=st.sampled_from(ENCODINGS))
def test_round_trip(tmp_path, cloud, encoding):
    first = read(write(tmp_path / "a.pcd", cloud, encoding=encoding))
    second = read(write(tmp_path / "b.pcd", first, encoding=encoding))
    assert_same_cloud(first, second)
    for name, values in cloud.attrs.items():
        kept = first.get(name).reshape(values.shape)
        assert kept.dtype == values.dtype
        assert torch.equal(kept.nan_to_num(), values.nan_to_num()), name


@pytest.mark.parametrize("kind", ["F", "U"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_packed_rgb(tmp_path, kind, encoding):
    word = np.array([200 << 16 | 100 << 8 | 50, 255], np.uint32)
    head = header("x y z rgb", "4 4 4 4", f"F F F {kind}", "1 1 1 1", data="binary")
    rows = np.zeros(2, [("xyz", "<f4", (3,)), ("rgb", "<u4")])
    rows["rgb"] = word
    points = read(save(tmp_path / "a.pcd", head, rows.tobytes()))
    assert points.get("color").tolist() == [[200, 100, 50], [0, 0, 255]]
    again = read(write(tmp_path / "b.pcd", points, encoding=encoding))
    assert_same_cloud(points, again)


def test_rgba_keeps_alpha(tmp_path):
    cloud = Points(
        torch.zeros(1, 3), attrs={"color": torch.tensor([[1.0, 2, 3]]), "alpha": torch.tensor([200], dtype=torch.uint8)}
    )
    out = write(tmp_path / "a.pcd", cloud)
    assert b"FIELDS x y z rgba\n" in out.read_bytes()
    assert read(out).get("alpha").tolist() == [200]
    assert read(out).get("color").tolist() == [[1, 2, 3]]


def test_float_colours_in_separate_fields(tmp_path):
    head = header("x y z r g b", "4 " * 6, "F " * 6, "1 " * 6, width=1)
    points = read(save(tmp_path / "a.pcd", head, b"0 0 0 1.0 0.5 0\n"))
    assert points.get("color").tolist() == [[255, 127.5, 0]]
    assert_same_cloud(points, read(write(tmp_path / "b.pcd", points)))


def test_padding_and_vector_fields(tmp_path):
    head = header("x _ y z fpfh _", "4 1 4 4 2 1", "F U F F I U", "1 3 1 1 4 1", width=1, data="binary")
    row = np.zeros(1, [("x", "<f4"), ("p", "u1", (3,)), ("yz", "<f4", (2,)), ("f", "<i2", (4,)), ("q", "u1")])
    row["x"], row["yz"], row["f"] = 1, [2, 3], [1, -2, 3, -4]
    points = read(save(tmp_path / "a.pcd", head, row.tobytes()))
    assert points.coord.tolist() == [[1, 2, 3]]
    assert points.get("fpfh").tolist() == [[1, -2, 3, -4]]
    assert set(points.attrs) == {"fpfh"}


def test_organised_cloud_drops_and_gets_back_its_invalid_pixels(tmp_path):
    head = header("label x y z", "4 4 4 4", "U F F F", "1 1 1 1", width=3, height=2)
    body = b"7 nan nan nan\n1 1 1 1\n2 2 2 nan\n3 3 3 3\n4 4 4 4\n0 nan nan nan\n"
    path = save(tmp_path / "a.pcd", head, body)
    points = read(path)
    assert points.meta[0]["valid_rows"].tolist() == [1, 3, 4]
    assert points.coord[:, 0].tolist() == [1, 3, 4]
    assert points.get("label").tolist() == [1, 3, 4]
    with pytest.raises(InputError, match="field 'x' holds 2 non-finite values"):
        read(path, invalid="error")

    changed = points.with_attrs(label=points.get("label") * 10, prediction=torch.tensor([5, 6, 7]), score=torch.rand(3))
    out = write(tmp_path / "b.pcd", changed, template=path)
    assert b"WIDTH 3\nHEIGHT 2\n" in out.read_bytes()
    again = read(out)
    assert again.meta[0]["valid_rows"].tolist() == [1, 3, 4]
    assert again.get("prediction").tolist() == [5, 6, 7]
    rows = [line.split() for line in out.read_text().splitlines()[11:]]
    assert [row[3] for row in rows] == ["7", "10", "2", "30", "40", "0"]
    assert [row[4] for row in rows] == ["-1", "5", "-1", "6", "7", "-1"]
    assert rows[0][5] == "nan"


def test_viewpoint_survives(tmp_path):
    head = header(width=1).replace(b"VIEWPOINT 0 0 0 1 0 0 0", b"VIEWPOINT 1 2 3 0 1 0 0")
    points = read(save(tmp_path / "a.pcd", head, b"1 2 3\n"))
    assert points.meta[0]["viewpoint"] == [1, 2, 3, 0, 1, 0, 0]
    assert read(write(tmp_path / "b.pcd", points)).meta[0]["viewpoint"] == [1, 2, 3, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("head", "body", "message"),
    [
        (b"not a pcd", b"", "no PCD header"),
        (header(data="zip"), b"", "PCD data 'zip'"),
        (header(size="4 4"), b"", "header not understood"),
        (header(kind="F F Q"), b"", "no usable Q"),
        (header(width=-2), b"", "impossible sizes"),
        (header(points=5), b"", "POINTS 5, but WIDTH 2 x HEIGHT 1"),
        (header().replace(b"FIELDS x y z\n", b""), b"", "no usable"),
        (header("x y y"), b"1 2 3\n4 5 6\n", "repeated fields"),
        (header(), b"1 2 3\n", "promises 2 points of 3 numbers, the file has 1 of 3"),
        (header(), b"1 2 3\n1 2 x\n", "line 13, column 3: 'x' is not a number"),
        (header(data="binary"), bytes(23), "truncated: 2 points need 24 bytes, the file has 23"),
        (header(data="binary_compressed"), bytes(3), "truncated"),
        (header(data="binary_compressed"), np.array([9, 24], "<u4").tobytes(), "truncated"),
        (
            header(data="binary_compressed"),
            np.array([1, 99], "<u4").tobytes() + b"\0",
            "holds 99 bytes, its header describes 24",
        ),
        (header(data="binary_compressed"), np.array([2, 24], "<u4").tobytes() + b"\xff\xff", "damaged"),
        (header(data="binary", width=10**12), bytes(23), "truncated"),
        (header(data="binary"), np.array([1, 2, 3, 4, np.inf, 6], "<f4").tobytes(), r"field 'y' holds 1 non-finite"),
        (header(width=0), b"", "holds no points"),
    ],
)
def test_bad_files(tmp_path, head, body, message):
    path = save(tmp_path / "bad.pcd", head, body)
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@HYPOTHESIS
@given(at=st.integers(0, 10**6), value=st.integers(0, 255), encoding=st.sampled_from(ENCODINGS))
def test_damage_never_escapes_as_another_error(tmp_path, at, value, encoding):
    cloud = Points(torch.zeros(40, 3), attrs={"color": torch.full((40, 3), 7.0), "label": torch.arange(40) % 2})
    data = bytearray(write(tmp_path / "a.pcd", cloud, encoding=encoding).read_bytes())
    data[at % len(data)] = value
    (tmp_path / "b.pcd").write_bytes(data)
    assert_one_line(lambda: read(tmp_path / "b.pcd"))
