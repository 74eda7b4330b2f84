import numpy as np
import pytest

from pc3d import InputError
from pc3d.io import read, write


def test_missing_package_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pye57", None)
    path = tmp_path / "a.e57"
    path.write_bytes(b"ASTM-E57")
    with pytest.raises(InputError, match=r"a\.e57: E57 is not supported without pye57: pip install pye57$"):
        read(path)


STRAIGHT = np.array([1.0, 0, 0, 0])


def scans(path, poses):
    pye57 = pytest.importorskip("pye57")
    file = pye57.E57(str(path), mode="w")
    for number, (rotation, translation) in enumerate(poses):
        data = {
            "cartesianX": np.array([1.0, 0.0]),
            "cartesianY": np.array([0.0, 1.0]),
            "cartesianZ": np.array([0.0, 2.0]) + number,
            "intensity": np.array([0.25, 0.5]),
            "colorRed": np.array([255, 0], np.uint8),
            "colorGreen": np.array([0, 1], np.uint8),
            "colorBlue": np.array([7, 8], np.uint8),
        }
        file.write_scan_raw(data, name=f"scan {number}", rotation=rotation, translation=translation)
    file.close()
    return path


def test_scans_are_moved_by_their_poses(tmp_path):
    quarter_turn = np.array([np.sqrt(0.5), 0, 0, np.sqrt(0.5)])
    path = scans(tmp_path / "a.e57", [(STRAIGHT, np.zeros(3)), (quarter_turn, np.array([10.0, 0, 0]))])
    points = read(path)
    np.testing.assert_allclose(points.coord, [[1, 0, 0], [0, 1, 2], [10, 1, 1], [9, 0, 3]], atol=1e-6)
    assert points.get("scan").tolist() == [0, 0, 1, 1]
    assert points.get("color").tolist() == [[255, 0, 7], [0, 1, 8]] * 2
    assert points.get("intensity").tolist() == [0.25, 0.5] * 2


def test_damaged(tmp_path):
    path = scans(tmp_path / "a.e57", [(STRAIGHT, np.zeros(3))])
    data = path.read_bytes()
    for content in (b"garbage", b"", data[: len(data) // 2]):
        (tmp_path / "b.e57").write_bytes(content)
        with pytest.raises(InputError, match=r"b\.e57: ") as caught:
            read(tmp_path / "b.e57")
        assert "\n" not in str(caught.value)
        assert (tmp_path / "b.e57").read_bytes() == content
    with pytest.raises(InputError, match=r"cannot write a '\.e57' file"):
        write(tmp_path / "c.e57", read(path))
