import subprocess
import sys

import pytest
import torch
from io_clouds import same_values

from pc3d import InputError, Points
from pc3d.io import READABLE, WRITABLE, can_read, read, write


def test_suffixes():
    assert can_read("a/b/SCAN.PLY")
    assert can_read("x.copc.laz")
    assert not can_read("x.label")
    assert not can_read("ply")
    assert set(READABLE) - set(WRITABLE) == {".e57"}


def true_coord(points):
    return points.coord.double() + torch.tensor(points.meta[0]["origin"], dtype=torch.float64)


@pytest.mark.parametrize("suffix", WRITABLE)
def test_format_to_format(tmp_path, suffix):
    """Coordinates, colours and integers survive the way through any other format."""
    if suffix in (".las", ".laz"):
        pytest.importorskip("lazrs")
    count = 20
    generator = torch.Generator().manual_seed(0)
    attrs = {
        "color": torch.randint(0, 256, (count, 3), generator=generator).float(),
        "normal": torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1),
        "segment": torch.randint(-1, 13, (count,), generator=generator),
        "strength": torch.rand(count, 1, generator=generator),
        "label": torch.randint(0, 60000, (count,), generator=generator),
    }
    cloud = Points(torch.rand(count, 3, generator=generator) * 50, attrs=attrs)
    path = write(tmp_path / f"a{suffix}", cloud)
    assert path == tmp_path / f"a{suffix}"
    points = read(path, columns=4 if suffix == ".bin" else None)
    for other in [] if suffix == ".bin" else WRITABLE:
        if other == ".bin" or (other in (".las", ".laz") and "lazrs" not in sys.modules):
            continue
        again = read(write(tmp_path / f"b{other}", points))
        torch.testing.assert_close(true_coord(again), cloud.coord.double(), atol=1e-5, rtol=0)
        assert torch.equal(again.get("color"), attrs["color"])
        assert same_values(again.get("segment"), attrs["segment"])
        assert again.get("label").tolist() == attrs["label"].tolist()
        torch.testing.assert_close(again.get("normal"), attrs["normal"])
        torch.testing.assert_close(again.get("strength"), attrs["strength"])
    torch.testing.assert_close(true_coord(points), cloud.coord.double(), atol=1e-5, rtol=0)


def test_bad_paths(tmp_path):
    cloud = Points(torch.zeros(1, 3))
    with pytest.raises(InputError, match=r"gone\.ply: no such file"):
        read(tmp_path / "gone.ply")
    with pytest.raises(InputError, match="is a folder"):
        read(tmp_path)
    (tmp_path / "a.doc").write_text("")
    with pytest.raises(InputError, match=r"unknown suffix '\.doc' \(readable: \.ply "):
        read(tmp_path / "a.doc")
    with pytest.raises(InputError, match=r"cannot write a '\.doc' file"):
        write(tmp_path / "b.doc", cloud)
    with pytest.raises(InputError, match="must be a file of the same kind"):
        write(tmp_path / "b.ply", cloud, template=tmp_path / "a.laz")
    with pytest.raises(InputError, match="must be a file of the same kind"):
        write(tmp_path / "b.npz", cloud, template=tmp_path / "a.npz")
    with pytest.raises(InputError, match=r"encoding='ascii' is for \.ply and \.pcd"):
        write(tmp_path / "b.npz", cloud, encoding="ascii")
    for suffix in ("ply", "pcd"):
        with pytest.raises(InputError, match="encoding='morse' is none of ascii"):
            write(tmp_path / f"b.{suffix}", cloud, encoding="morse")


def test_options_that_do_not_apply_are_refused(tmp_path):
    path = write(tmp_path / "a.ply", Points(torch.zeros(1, 3)))
    with pytest.raises(InputError, match=r"columns= is for \.bin"):
        read(path, columns=4)
    with pytest.raises(InputError, match="invalid='ignore' is neither"):
        read(path, invalid="ignore")


def test_one_cloud_per_file(tmp_path):
    cloud = Points(torch.zeros(1, 3))
    with pytest.raises(InputError, match="a file holds one cloud, got a batch of 2"):
        write(tmp_path / "a.ply", Points.cat([cloud, cloud]))


@pytest.mark.parametrize("suffix", [s for s in WRITABLE if s != ".bin"])
def test_empty_cloud(tmp_path, suffix):
    if suffix in (".las", ".laz"):
        pytest.importorskip("lazrs")
    path = write(
        tmp_path / f"a{suffix}",
        Points(torch.zeros(0, 3), attrs={"color": torch.zeros(0, 3), "feat": torch.zeros(0, 2)}),
    )
    with pytest.raises(InputError, match="holds no points"):
        read(path)
    assert read(path, allow_empty=True).num_points == 0


def test_all_points_invalid(tmp_path):
    path = write(tmp_path / "a.ply", Points(torch.full((3, 3), float("nan"))))
    with pytest.raises(InputError, match="holds no valid points"):
        read(path, invalid="drop")


def test_coordinates_beyond_float32(tmp_path):
    (tmp_path / "a.xyz").write_text("1e200 0 0\n0 0 0\n")
    with pytest.raises(InputError, match=r"field 'x' has value 1e\+200"):
        read(tmp_path / "a.xyz")


def test_a_column_cannot_pose_as_coordinates(tmp_path):
    (tmp_path / "a.csv").write_text("x,y,z,coord,color,red,green,blue\n1,2,3,4,5,6,7,8\n")
    points = read(tmp_path / "a.csv")
    assert points.coord.tolist() == [[1, 2, 3]]
    assert points.get("color").tolist() == [[6, 7, 8]]
    assert points.get("coord_").tolist() == [4]
    assert points.get("color_").tolist() == [5]


def test_half_precision_and_gradients(tmp_path):
    attrs = {
        "a": torch.ones(2, dtype=torch.bfloat16),
        "b": torch.ones(2, requires_grad=True),
        "c": torch.ones(2, dtype=torch.bool),
    }
    points = read(write(tmp_path / "a.ply", Points(torch.zeros(2, 3), attrs=attrs)))
    assert all(points.get(name).tolist() == [1, 1] for name in attrs)


def test_optional_packages_are_not_imported():
    code = (
        "import sys, pc3d.io; print([m for m in ('laspy', 'lazrs', 'pye57', 'scipy', 'lightning') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
