import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from io_clouds import assert_same_cloud, clouds

from pc3d import InputError
from pc3d.io import read, write


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cloud=clouds(), suffix=st.sampled_from(["npy", "npz"]))
def test_round_trip(tmp_path, cloud, suffix):
    cloud.attrs["file"] = torch.ones(cloud.num_points, dtype=torch.bool)
    first = read(write(tmp_path / f"a.{suffix}", cloud))
    assert_same_cloud(first, read(write(tmp_path / f"b.{suffix}", first)))
    for name, values in cloud.attrs.items():
        assert first.get(name).dtype == values.dtype
        assert torch.equal(first.get(name).nan_to_num(), values.nan_to_num()), name


def test_plain_array(tmp_path):
    rows = np.arange(21, dtype=np.float64).reshape(3, 7)
    np.save(tmp_path / "a.npy", rows)
    points = read(tmp_path / "a.npy")
    assert points.coord.tolist() == rows[:, :3].tolist()
    assert points.get("color").tolist() == rows[:, 3:6].tolist()
    assert points.get("column_6").tolist() == [6, 13, 20]
    named = read(tmp_path / "a.npy", columns=["_", "x", "y", "z", "label", "_", "_"])
    assert named.coord.tolist() == rows[:, 1:4].tolist()
    assert set(named.attrs) == {"label"}


def test_big_endian_and_fortran_order(tmp_path):
    np.save(tmp_path / "a.npy", np.asfortranarray(np.arange(12).reshape(4, 3)).astype(">f8"))
    assert read(tmp_path / "a.npy").coord.tolist() == np.arange(12).reshape(4, 3).tolist()


def test_keys(tmp_path):
    arrays = {
        "xyz": np.zeros((4, 3)),
        "colors": np.full((4, 3), 0.5),
        "label": np.arange(4, dtype=np.uint32),
        "edges": np.zeros((2, 9)),
    }
    np.savez(tmp_path / "a.npz", **arrays, name=np.array("a room"))
    points = read(tmp_path / "a.npz")
    assert points.get("color").tolist() == [[127.5] * 3] * 4
    assert points.get("label").dtype == torch.int64
    assert sorted(points.meta[0]["skipped"]) == ["edges", "name"]
    np.savez(tmp_path / "b.npz", x=np.ones(2), Y=np.ones(2), z=np.ones(2))
    assert read(tmp_path / "b.npz").num_points == 2
    np.savez(tmp_path / "c.npz", a=np.zeros((4, 3)), b=np.zeros((4, 3)))
    with pytest.raises(InputError, match=r"no coordinates: none of the keys coord, .* \(it has: a, b\)"):
        read(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", coord=np.zeros(4))
    with pytest.raises(InputError, match=r"key 'coord' must be \(N, 3 \+ C\) numbers, got \(4,\) float64"):
        read(tmp_path / "d.npz")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a stranger's code ran",))


def test_pickles_are_never_loaded(tmp_path):
    np.save(tmp_path / "a.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "b.npz", coord=np.array([Bomb()], dtype=object))
    (tmp_path / "c.npy").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "d.npz").write_bytes(pickle.dumps(Bomb()))
    for name in ("a.npy", "b.npz", "c.npy", "d.npz"):
        with pytest.raises(InputError, match=f"{name}: no readable"):
            read(tmp_path / name)


def test_damaged(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((100, 3)))
    np.savez_compressed(tmp_path / "a.npz", coord=np.random.default_rng(0).random((100, 3)))
    for suffix in ("npy", "npz"):
        data = (tmp_path / f"a.{suffix}").read_bytes()
        path = tmp_path / f"cut.{suffix}"
        damaged = bytearray(data)
        damaged[len(data) // 2] ^= 255
        for content in [
            *(data[:size] for size in range(0, len(data), 41)),
            b"garbage",
            *([damaged] if suffix == "npz" else []),
        ]:
            path.write_bytes(content)
            with pytest.raises(InputError) as caught:
                read(path)
            assert "\n" not in str(caught.value)
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npy").read_bytes())
    (tmp_path / "b.npy").write_bytes((tmp_path / "a.npz").read_bytes())
    for name in ("b.npz", "b.npy"):
        with pytest.raises(InputError, match="rename it"):
            read(tmp_path / name)


def test_header_that_promises_more_than_the_file_holds(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((10, 3)))
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data.replace(b"(10, 3), }" + b" " * 9, b"(10000000000, 3), }"))
    assert b"(10000000000" in (tmp_path / "a.npy").read_bytes()
    with pytest.raises(InputError, match="no readable"):
        read(tmp_path / "a.npy")


def test_empty_and_wrong_kinds(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((0, 3)))
    with pytest.raises(InputError, match="holds no points"):
        read(tmp_path / "a.npy")
    assert read(tmp_path / "a.npy", allow_empty=True).num_points == 0
    np.save(tmp_path / "b.npy", np.array([["a", "b", "c"]]))
    with pytest.raises(InputError, match="must be"):
        read(tmp_path / "b.npy")
    np.save(tmp_path / "c.npy", np.zeros((5, 2)))
    with pytest.raises(InputError, match="has 2 columns, coordinates need at least 3"):
        read(tmp_path / "c.npy")
    np.save(tmp_path / "d.npy", np.zeros(2, [("x", "f4"), ("y", "f4"), ("z", "f4"), ("name", "U3")]))
    assert read(tmp_path / "d.npy").meta[0]["skipped"] == ["name"]
    with pytest.raises(InputError, match="columns= is for plain arrays"):
        read(tmp_path / "d.npy", columns=list("xyzn"))
