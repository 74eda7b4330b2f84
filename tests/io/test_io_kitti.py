import numpy as np
import pytest
import torch
from io_clouds import assert_same_cloud

from pc3d import InputError, Points
from pc3d.io import read, write


def scan(columns, count, seed=0):
    rng = np.random.default_rng(seed)
    rows = rng.uniform(-40, 40, (count, columns)).astype("<f4")
    if columns == 4:
        rows[:, 3] = rng.random(count)
    if columns == 5:
        rows[:, 3], rows[:, 4] = rng.integers(0, 256, count), rng.integers(0, 32, count)
    if columns == 6:
        rows[:, 3:] = rng.integers(0, 256, (count, 3))
    return rows


def save(path, rows):
    rows.tofile(path)
    return path


@pytest.mark.parametrize("count", [60, 61, 100])  # 60 and 100 rows also fit other numbers of columns
@pytest.mark.parametrize(("columns", "names"), [(4, {"strength"}), (5, {"strength", "ring"}), (6, {"color"})])
def test_columns_are_found_from_size_and_values(tmp_path, columns, names, count):
    rows = scan(columns, count)
    path = save(tmp_path / "a.bin", rows)
    points = read(path)
    assert set(points.attrs) == names
    assert np.array_equal(points.coord, rows[:, :3])
    assert np.array_equal(points.get("color" if columns == 6 else "strength"), rows[:, 3 : 6 if columns == 6 else 4])
    out = write(tmp_path / "b.bin", points)
    assert out.read_bytes() == path.read_bytes()
    assert_same_cloud(points, read(out))


def test_given_columns(tmp_path):
    rows = scan(4, 60)
    path = save(tmp_path / "a.bin", rows)
    points = read(path, columns=["x", "_", "y", "z"])
    assert np.array_equal(points.coord, rows[:, [0, 2, 3]])
    assert points.attrs == {}
    assert read(path, columns=3).num_points == 80
    with pytest.raises(InputError, match="columns=7: give 3, 4, 5 or 6"):
        read(path, columns=7)
    with pytest.raises(InputError, match="not whole rows of 7 columns"):
        read(path, columns=list("xyzabcd"))
    with pytest.raises(InputError, match="fields x, y, z are missing"):
        read(path, columns=list("abcd"))


def test_unclear_and_truncated(tmp_path):
    with pytest.raises(InputError, match="cannot tell whether rows have 4 or 5 or 6 columns: pass columns="):
        read(save(tmp_path / "a.bin", np.zeros(60, "<f4")))
    with pytest.raises(InputError, match="cannot tell whether rows have 4 or 5 columns"):
        read(save(tmp_path / "a.bin", np.full(40, 1000, "<f4")))
    with pytest.raises(InputError, match="are no whole rows of 4, 5 or 6 columns: truncated"):
        read(save(tmp_path / "a.bin", np.zeros(61, "<f4")))
    (tmp_path / "b.bin").write_bytes(bytes(63))
    with pytest.raises(InputError, match="63 bytes are not a whole number of float32"):
        read(tmp_path / "b.bin")
    (tmp_path / "b.bin").write_bytes(b"")
    with pytest.raises(InputError):
        read(tmp_path / "b.bin")


def test_non_finite(tmp_path):
    rows = scan(4, 61)
    rows[[3, 9], 1] = np.nan
    path = save(tmp_path / "a.bin", rows)
    with pytest.raises(InputError, match=r"a\.bin: field 'y' holds 2 non-finite values \(first: nan at point 3\)"):
        read(path)
    points = read(path, invalid="drop")
    assert points.num_points == 59
    assert points.meta[0]["valid_rows"].tolist() == [i for i in range(61) if i not in (3, 9)]


def test_writing_other_clouds(tmp_path):
    cloud = Points(torch.ones(4, 3), attrs={"segment": torch.zeros(4, dtype=torch.int64)})
    data = np.fromfile(write(tmp_path / "a.bin", cloud), "<f4").reshape(4, 4)
    assert data.tolist() == [[1, 1, 1, 0]] * 4
    far = cloud.replace(meta=[{"origin": (770000.3, 0.0, 0.0)}])
    with pytest.raises(InputError, match=r"would move points by 0\.0\d+ m"):
        write(tmp_path / "b.bin", far)
    coloured = read(save(tmp_path / "c.bin", scan(6, 61))).without_attrs("color")
    with pytest.raises(InputError, match="field 'red' is missing"):
        write(tmp_path / "b.bin", coloured)
    assert not (tmp_path / "b.bin").exists()
