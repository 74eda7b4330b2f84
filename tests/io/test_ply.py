import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from io_clouds import assert_one_line, assert_same_cloud, clouds

from pc3d import InputError, Points
from pc3d.io import ply, read, write

ENCODINGS = ["ascii", "binary_little_endian", "binary_big_endian"]
HYPOTHESIS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def save(path, header, body=b""):
    lines = ["ply", *header, "end_header"]
    path.write_bytes("".join(f"{line}\n" for line in lines).encode() + body)
    return path


XYZ = ["property float x", "property float y", "property float z"]


@HYPOTHESIS
@given(cloud=clouds(), encoding=st.sampled_from(ENCODINGS))
def test_round_trip(tmp_path, cloud, encoding):
    first = read(write(tmp_path / "a.ply", cloud, encoding=encoding))
    second = read(write(tmp_path / "b.ply", first, encoding=encoding))
    assert_same_cloud(first, second)
    true = cloud.coord.double() + torch.tensor(cloud.meta[0]["origin"], dtype=torch.float64)
    again = first.coord.double() + torch.tensor(first.meta[0]["origin"], dtype=torch.float64)
    assert (true - again).abs().max() < 1e-4
    for name, values in cloud.attrs.items():
        kept = first.get(name)
        assert kept.dtype == values.dtype
        assert torch.equal(kept.nan_to_num(), values.nan_to_num()), name


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_bytes_of_a_known_file(tmp_path, encoding):
    order = {"binary_big_endian": ">", "binary_little_endian": "<"}.get(encoding)
    rows = [(1.5, 200, -2.0, 0.25, 65535), (-1.0, 0, 4.0, 1e10, 7)]
    header = [
        f"format {encoding} 1.0",
        "comment made by hand",
        "element vertex 2",
        "property double x",
        "property uint8 Red",
    ]
    header += ["property float y", "property float32 z", "property ushort label"]
    if order:
        dtype = [("x", order + "f8"), ("r", "u1"), ("y", order + "f4"), ("z", order + "f4"), ("l", order + "u2")]
        body = np.array(rows, dtype).tobytes()
    else:
        body = b"".join(" ".join(map(repr, row)).encode() + b"\n" for row in rows)
    points = read(save(tmp_path / "a.ply", header, body))
    assert points.coord.tolist() == [[1.5, -2.0, 0.25], [-1.0, 4.0, 1e10]]
    assert points.get("label").tolist() == [65535, 7]
    assert points.get("label").dtype == torch.int32
    assert points.get("Red").tolist() == [200, 0]
    assert points.meta[0]["dtypes"] == {"coord": "float64", "Red": "uint8", "label": "uint16"}


@pytest.mark.parametrize(("dtype", "scale"), [("uchar", 1), ("ushort", 257), ("float", 1 / 255)])
def test_colours_of_any_depth_become_0_to_255_and_go_back(tmp_path, dtype, scale):
    names = [f"property {dtype} {name}" for name in ("red", "green", "blue")]
    header = ["format ascii 1.0", "element vertex 2", *XYZ, *names]
    top = {"uchar": 255, "ushort": 65535, "float": 1.0}[dtype]
    middle = {"uchar": 51, "ushort": 51 * 257 + 3, "float": 0.2}[dtype]
    path = save(tmp_path / "a.ply", header, f"0 0 0 {top} 0 {middle}\n1 1 1 0 0 0\n".encode())
    points = read(path)
    assert points.get("color").dtype == torch.float32
    torch.testing.assert_close(points.get("color")[0], torch.tensor([255.0, 0.0, middle / scale]))
    columns = ply.read(write(tmp_path / "b.ply", points, encoding="ascii")).columns
    assert [columns[name][0] for name in ("red", "green", "blue")] == [top, 0, pytest.approx(middle)]
    assert columns["red"].dtype == ply.read(path).columns["red"].dtype


def mesh(path, encoding, polygon=3):
    faces = [list(range(polygon)), list(range(1, polygon + 1))]
    header = [f"format {encoding} 1.0", "comment a mesh", f"element vertex {polygon + 1}", *XYZ, "property uchar alpha"]
    header += ["element face 2", "property list uchar int vertex_indices", "property uchar flags"]
    vertices = [(i, 2 * i, 3 * i, i) for i in range(polygon + 1)]
    if encoding == "ascii":
        body = "".join(" ".join(map(str, row)) + "\n" for row in vertices)
        body += "".join(" ".join(map(str, [polygon, *face, 9])) + "\n" for face in faces)
        return save(path, header, body.encode())
    order = {"binary_big_endian": ">", "binary_little_endian": "<"}[encoding]
    body = np.array(vertices, [("x", order + "f4"), ("y", order + "f4"), ("z", order + "f4"), ("a", "u1")]).tobytes()
    body += np.array(
        [(polygon, face, 9) for face in faces], [("n", "u1"), ("v", order + "i4", (polygon,)), ("f", "u1")]
    ).tobytes()
    return save(path, header, body)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_faces_are_skipped_read_apart_and_kept_by_a_template(tmp_path, encoding):
    path = mesh(tmp_path / "mesh.ply", encoding)
    points = read(path)
    assert points.num_points == 4
    assert points.meta[0]["skipped"] == ["face"]
    assert ply.read_faces(path).tolist() == [[0, 1, 2], [1, 2, 3]]

    labelled = points.with_attrs(prediction=torch.tensor([3, 1, -1, 2])).without_attrs("alpha")
    out = write(tmp_path / "out.ply", labelled, template=path)
    assert ply.read_faces(out).tolist() == [[0, 1, 2], [1, 2, 3]]
    assert b"comment a mesh" in out.read_bytes()
    assert f"format {encoding}".encode() in out.read_bytes()
    again = read(out)
    assert again.get("prediction").tolist() == [3, 1, -1, 2]
    assert again.get("alpha").tolist() == [0, 1, 2, 3]
    assert torch.equal(again.coord, points.coord)


def test_template_needs_its_own_points_and_encoding(tmp_path):
    path = mesh(tmp_path / "mesh.ply", "ascii")
    points = read(path)
    with pytest.raises(InputError, match=r"out\.ply: 2 points, but template .*mesh\.ply has 4"):
        write(tmp_path / "out.ply", points.select(torch.tensor([0, 1])), template=path)
    with pytest.raises(InputError, match="would lose element 'face'"):
        write(tmp_path / "out.ply", points, template=path, encoding="binary_big_endian")
    with pytest.raises(InputError, match="not hold triangles"):
        ply.read_faces(mesh(tmp_path / "quads.ply", "ascii", polygon=4))
    assert not (tmp_path / "out.ply").exists()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_other_elements_before_the_vertices(tmp_path, encoding):
    header = [f"format {encoding} 1.0", "element camera 2", "property list uchar int k", "element vertex 1", *XYZ]
    if encoding == "ascii":
        body = b"1 5\n1 6\n1 2 3\n"
    else:
        order = {"binary_big_endian": ">", "binary_little_endian": "<"}[encoding]
        body = np.array([(1, 5), (1, 6)], [("n", "u1"), ("v", order + "i4")]).tobytes()
        body += np.array([1, 2, 3], order + "f4").tobytes()
    assert read(save(tmp_path / "a.ply", header, body)).coord.tolist() == [[1, 2, 3]]


def test_vertex_list_property_is_a_vector(tmp_path):
    header = ["format ascii 1.0", "element vertex 2", *XYZ, "property list uchar float feat"]
    points = read(save(tmp_path / "a.ply", header, b"0 0 0 2 1 2\n1 1 1 2 3 4\n"))
    assert points.get("feat").tolist() == [[1, 2], [3, 4]]
    with pytest.raises(InputError, match="'feat' of element 'vertex' differ in length"):
        read(save(tmp_path / "b.ply", header, b"0 0 0 2 1 2\n1 1 1 1 3 4\n"))


@pytest.mark.parametrize("newline", ["\r\n", "\n"])
def test_line_ends(tmp_path, newline):
    lines = ["ply", "format ascii 1.0", "element vertex 1", *XYZ, "end_header", "1 2 3", ""]
    (tmp_path / "a.ply").write_bytes(newline.join(lines).encode())
    assert read(tmp_path / "a.ply").coord.tolist() == [[1, 2, 3]]


BAD = {
    "garbage": (b"\x89PNG garbage", "no PLY header"),
    "no end": (b"ply\nformat ascii 1.0\n", "no PLY header"),
    "format": (b"ply\nformat morse 1.0\nelement vertex 1\nend_header\n", "PLY format 'morse'"),
    "type": (
        b"ply\nformat ascii 1.0\nelement vertex 1\nproperty quad x\nend_header\n",
        "not understood: 'property quad x'",
    ),
    "no vertex": (b"ply\nformat ascii 1.0\nelement face 0\nend_header\n", "no element 'vertex'"),
    "no x": (b"ply\nformat ascii 1.0\nelement vertex 1\nproperty int a\nend_header\n1\n", "fields x, y, z are missing"),
    "no properties": (b"ply\nformat binary_little_endian 1.0\nelement vertex 1\nend_header\n1\n", "no properties"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_headers(tmp_path, name):
    data, message = BAD[name]
    path = tmp_path / "bad.ply"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"0 0 0\n", "promises 2 rows, the file has 1"),
        (b"0 0 0\n1 zwei 3\n", r"line 8, column 2: 'zwei' is not a number"),
        (b"0 0 0\n1 2\n", r"line 8 has 2 columns, the lines before it 3"),
        (b"0 0 0 0\n1 2 3 4\n", "rows of 4 numbers, its header describes 3"),
        (b"0 0 0\nnan 2 3\n", r"field 'x' holds 1 non-finite value \(first: nan at point 1\)"),
        (b"0 0 inf\n1 2 -inf\n", r"field 'z' holds 2 non-finite values \(first: inf at point 0\)"),
    ],
)
def test_bad_ascii_body(tmp_path, body, message):
    with pytest.raises(InputError, match=message):
        read(save(tmp_path / "bad.ply", ["format ascii 1.0", "element vertex 2", *XYZ], body))


def test_value_beyond_its_type(tmp_path):
    header = ["format ascii 1.0", "element vertex 1", *XYZ, "property uchar label"]
    with pytest.raises(InputError, match="field 'label' has value 300 at point 0, but its type is uint8"):
        read(save(tmp_path / "bad.ply", header, b"0 0 0 300\n"))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_truncation_is_refused(tmp_path, encoding):
    cloud = Points(torch.arange(30.0).reshape(10, 3) + 1000, attrs={"label": torch.arange(10) + 1000})
    data = write(tmp_path / "whole.ply", cloud, encoding=encoding).read_bytes()
    path = tmp_path / "cut.ply"
    for size in range(0, len(data) - 5, 7):
        path.write_bytes(data[:size])
        with pytest.raises(InputError):
            read(path)


@HYPOTHESIS
@given(at=st.integers(0, 300), value=st.integers(0, 255), encoding=st.sampled_from(ENCODINGS))
def test_damage_never_escapes_as_another_error(tmp_path, at, value, encoding):
    data = bytearray(mesh(tmp_path / "mesh.ply", encoding).read_bytes())
    data[at % len(data)] = value
    (tmp_path / "damaged.ply").write_bytes(data)
    for reader in (read, ply.read_faces):
        assert_one_line(lambda reader=reader: reader(tmp_path / "damaged.ply"))


def test_names_with_blanks_and_large_integers(tmp_path):
    cloud = Points(torch.zeros(1, 3), attrs={"my label": torch.tensor([1]), "id": torch.tensor([2**40])})
    points = read(write(tmp_path / "a.ply", cloud))
    assert points.get("my_label").tolist() == [1]
    assert points.get("id").tolist() == [2.0**40]
    with pytest.raises(InputError, match="field 'id' has value 9007199254740993, too large"):
        write(tmp_path / "a.ply", Points(torch.zeros(1, 3), attrs={"id": torch.tensor([2**53 + 1])}))
