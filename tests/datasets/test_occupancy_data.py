"""Solids with exact insides, and the layouts of Occupancy Networks and of the synthetic rooms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pc3d import InputError, Points
from pc3d.datasets import OccupancyRooms, ShapeNetOccupancy, SyntheticSolids
from pc3d.datasets.synthetic.objects import occupancy_rooms, shapenet_occupancy
from pc3d.datasets.synthetic.solids import SOLIDS, fitted, surface_and_space


@pytest.mark.parametrize("name", list(SOLIDS))
@pytest.mark.parametrize("seed", range(3))
def test_surfaces_are_where_the_inside_ends(name: str, seed: int) -> None:
    """A step along the normal leads out, a step back leads in; union surfaces have no parts inside."""
    rng = np.random.default_rng(seed)
    solid = fitted(SOLIDS[name](rng), rng)
    points, normals, around, inside = surface_and_space(solid, 3000, 3000, rng)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1)
    assert not solid.inside(points + 1e-6 * normals).any()
    assert solid.inside(points - 1e-6 * normals).mean() > 0.999  # edges where solids meet
    assert np.ptp(points, axis=0).max() == pytest.approx(1, abs=0.05)
    assert 0.02 < inside.mean() < 0.5
    assert not inside[(np.abs(around) > 0.51).any(1)].any()


def test_torus_samples_are_even_over_its_area() -> None:
    """The outer half of a torus has the larger share: (pi + 2 r) / (2 pi)."""
    rng = np.random.default_rng(0)
    torus = SOLIDS["torus"](rng)
    thick = float(torus.surface.area / (4 * np.pi**2))
    points, _ = torus.surface.sample(40_000, rng)
    outer = (np.linalg.norm(points[:, :2], axis=1) > 1).mean()
    assert outer == pytest.approx(0.5 + thick / np.pi, abs=0.01)


def test_synthetic_solids_repeat_and_differ() -> None:
    data = SyntheticSolids(8, 2, 2, surface=50, space=80)
    cloud = data.load("train", 3)
    assert torch.equal(cloud.coord, data.load("train", 3).coord)
    assert not torch.equal(cloud.coord, data.load("val", 3).coord)
    assert (cloud.get("occupancy") == -1).sum() == 50
    assert cloud.num_points == 130
    assert cloud.get("segment").unique().tolist() == [3]
    assert data.fingerprint("train", 1) != SyntheticSolids(8, 2, 2, surface=51, space=80).fingerprint("train", 1)
    with pytest.raises(InputError, match="surface 0"):
        SyntheticSolids(surface=0)


def check_cloud(cloud: Points) -> None:
    occupancy = cloud.get("occupancy")
    assert [int((occupancy == code).sum()) > 0 for code in (-1, 0, 1)] == [True] * 3
    assert int((occupancy == -1).sum()) == 2000
    assert cloud.num_points == 6000
    assert cloud.coord.abs().max() < 0.56


def test_shapenet_layout(tmp_path: Path) -> None:
    shapenet_occupancy(tmp_path)
    data = ShapeNetOccupancy(str(tmp_path))
    assert (data.num_classes, data.size("train"), data.size("val"), data.size("test")) == (13, 12, 6, 6)
    for split in ("train", "test"):
        cloud = data.load(split, 1)
        check_cloud(cloud)
        assert data.class_names[int(cloud.get("segment")[0])] == "airplane"
        assert data.cloud_class(split, 1) == 0


def test_occupancies_may_be_stored_one_by_one(tmp_path: Path) -> None:
    shapenet_occupancy(tmp_path)
    data = ShapeNetOccupancy(str(tmp_path))
    raw = data.scenes("test")[0].raw
    assert raw is not None
    before, stored = data.load("test", 0), dict(np.load(raw / "points.npz"))
    stored["occupancies"] = np.unpackbits(stored["occupancies"]).astype(bool)
    np.savez(raw / "points.npz", **stored)
    assert torch.equal(data.load("test", 0).get("occupancy"), before.get("occupancy"))


def test_rooms_layout(tmp_path: Path) -> None:
    occupancy_rooms(tmp_path)
    data = OccupancyRooms(str(tmp_path))
    assert (data.size("train"), data.size("val"), data.size("test")) == (8, 2, 2)
    names = [data.name("train", i) for i in range(8)]
    assert names[:3] == ["rooms_04_00000000_00", "rooms_04_00000000_01", "rooms_04_00000001_00"]
    assert data.group("train", 0) == data.group("train", 1) != data.group("train", 2)
    for i in (0, 7):
        check_cloud(data.load("train", i))
    assert not torch.equal(data.load("train", 0).coord, data.load("train", 1).coord)
    assert int(data.load("test", 1).get("segment")[0]) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"occupancies": np.zeros(7, "u1")}, "occupancies are"),
        ({"occupancies": np.full(4000, 3)}, "must be 0 or 1"),
        ({"points": np.full((4000, 3), np.nan)}, "not all finite"),
        ({"points": np.zeros((4000, 2))}, "points in space are"),
        ({"points": None}, "has no 'points'"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, changes: dict, message: str) -> None:
    shapenet_occupancy(tmp_path)
    data = ShapeNetOccupancy(str(tmp_path))
    folder = data.scenes("val")[0].raw
    assert folder is not None
    arrays = {**np.load(folder / "points.npz"), **changes}
    np.savez(folder / "points.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(InputError, match=message) as error:
        data.load("val", 0)
    assert "points.npz" in str(error.value)


def test_missing_lists_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a raw nor"):
        ShapeNetOccupancy(str(tmp_path)).size("train")
    shapenet_occupancy(tmp_path)
    (tmp_path / "02691156" / "val.lst").unlink()
    with pytest.raises(InputError, match=r"val\.lst"):
        ShapeNetOccupancy(str(tmp_path)).size("val")
    data = ShapeNetOccupancy(str(tmp_path))
    raw = data.scenes("train")[0].raw
    assert raw is not None
    (raw / "pointcloud.npz").unlink()
    with pytest.raises(InputError, match=r"pointcloud\.npz"):
        data.load("train", 0)
