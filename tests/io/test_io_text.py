import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from io_clouds import assert_same_cloud, clouds

from pc3d import InputError
from pc3d.io import read, write


def save(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cloud=clouds(), suffix=st.sampled_from(["txt", "csv", "xyz", "pts", "asc"]))
def test_round_trip(tmp_path, cloud, suffix):
    first = read(write(tmp_path / f"a.{suffix}", cloud))
    second = read(write(tmp_path / f"b.{suffix}", first))
    assert_same_cloud(first, second)
    if "color" in cloud:
        assert torch.equal(first.get("color"), cloud.get("color"))
    if "segment" in cloud:
        assert torch.equal(first.get("segment"), cloud.get("segment"))


@pytest.mark.parametrize(
    "text",
    [
        "x y z label\n1 2 3 4\n5 6 7 8\n",
        "X,Y,Z,label\n1,2,3,4\n5,6,7,8\n",
        '"x"; "y"; "z"; "label"\n1; 2; 3; 4\n5; 6; 7; 8\n',
        "# x y z label\n1\t2\t3\t4\n5\t6\t7\t8\n",
        "//X Y Z label\n2\n1 2 3 4\n\n5 6 7 8\n",
        "\ufeffx y z label\r\n1.0 2 3e0 4\r\n# a remark\r\n5 6 7 8",
    ],
)
def test_headers_and_delimiters(tmp_path, text):
    points = read(save(tmp_path / "a.txt", text))
    assert points.coord.tolist() == [[1, 2, 3], [5, 6, 7]]
    assert points.get("label").tolist() == [4, 8]
    assert points.get("label").dtype == torch.int32


def test_columns_without_names(tmp_path):
    rooms = read(save(tmp_path / "a.txt", "1.5 2 3 255 128 0\n1 2 3 10 20 30\n"))
    assert rooms.get("color").tolist() == [[255, 128, 0], [10, 20, 30]]
    shapes = read(save(tmp_path / "b.txt", "1 2 3 0 0.6 0.8 7.0\n1 2 3 1 0 0 6.0\n"))
    assert shapes.get("normal")[0].tolist() == pytest.approx([0, 0.6, 0.8])
    assert shapes.get("column_6").tolist() == [7, 6]
    scan = read(save(tmp_path / "c.pts", "2\n1 2 3 -700 9 8 7\n1 2 3 -701 1 2 3\n"))
    assert scan.get("intensity").tolist() == [-700, -701]
    assert scan.get("color").tolist() == [[9, 8, 7], [1, 2, 3]]
    named = read(tmp_path / "c.pts", columns=["x", "y", "z", "_", "a", "b", "label"])
    assert set(named.attrs) == {"a", "b", "label"}


def test_large_coordinates_keep_millimetres(tmp_path):
    points = read(save(tmp_path / "a.xyz", "770500.123 6277500.456 12.3456789\n770599.999 6277599.001 0.1\n"))
    true = points.coord.double() + torch.tensor(points.meta[0]["origin"], dtype=torch.float64)
    assert points.meta[0]["origin"] == (770500.0, 6277500.0, 0.0)
    expected = torch.tensor(
        [[770500.123, 6277500.456, 12.3456789], [770599.999, 6277599.001, 0.1]], dtype=torch.float64
    )
    assert (true - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,5 2,5 3,5\n", r"line 1: '1,5' has a decimal comma"),
        ("x;y;z\n1,5;2;3\n", "decimal comma"),
        ("1 2 3\n4 5 six\n", "line 2, column 3: 'six' is not a number"),
        ("1 2 3\n# remark\n\n4 5\n", "line 4 has 2 columns, the lines before it 3"),
        ("1 2 3\n4 5 103.0\x100\n", "line 2, column 3"),
        ("3\n1 2 3\n4 5 6\n", "promises 3 points, the file has 2"),
        ("1 2\n3 4\n", "has 2 columns, coordinates need at least 3"),
        ("a b c\n1 2 3\n", "fields x, y, z are missing"),
        ("x y z\n1 2 3 4\n", "columns x y z are 3 names, the file has 4 columns"),
        ("x y z z\n1 2 3 4\n", "names 'z' twice"),
        ("1 2 nan\n", "field 'z' holds 1 non-finite value"),
        ("x y z\n", "holds no points"),
        ("", "holds no points"),
        ("\0\1\2", "is not text"),
        ("\x89PNG\r\n garbage", "is not a number|missing"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = save(tmp_path / "bad.txt", text)
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_columns_must_be_names(tmp_path):
    with pytest.raises(InputError, match="give their names"):
        read(save(tmp_path / "a.txt", "1 2 3\n"), columns=3)
