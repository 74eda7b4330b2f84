"""Samples, maps and height patches of scans that are never read whole."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pc3d.data.height_patches import (
    HeightPatches,
    denormalise,
    normalise,
    patch_weights,
    view_from_above,
    window_rasters,
)
from pc3d.data.overview import Overview, interpolate
from pc3d.datasets.synthetic.aerial import ground_height, write_aerial
from pc3d.errors import InputError
from pc3d.io import LasIndex
from pc3d.io.las_index import LasFile

pytest.importorskip("lazrs")


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiles of 200 m with a gap between them: many small chunks, one with colours."""
    folder = tmp_path_factory.mktemp("tiles")
    write_aerial(folder / "a.laz", (1000, 2000), 200, 2, 6, chunk_size=500)
    write_aerial(folder / "b.laz", (1300, 2000), 200, 4, 7, chunk_size=500)
    return folder


def test_samples(tiles: Path) -> None:
    index = LasIndex.open(tiles)
    overview = Overview.of(index)
    assert len(overview.coord) == 160 + 320
    assert np.array_equal(overview.coord, index.first_points())
    assert overview.weight.sum() == index.num_points == 240_000
    assert overview.color is not None
    assert (overview.color[:160] == 255).all()
    assert set(map(tuple, overview.color[160:].tolist())) <= {(150, 140, 110), (60, 110, 50), (170, 80, 70)}
    assert index.bytes_read < 0.05 * index.num_bytes


def test_more_samples_by_decoding(tiles: Path) -> None:
    overview = Overview.of(LasIndex.open(tiles), decode=7)
    assert len(overview.coord) == 480 - 7 + 7 * 500
    assert overview.weight.sum() == 240_000
    assert len(Overview.of(LasIndex.open(tiles), decode=10_000).coord) == 240_000


def test_maps(tiles: Path) -> None:
    overview = Overview.of(LasIndex.open(tiles))
    maps = overview.rasters(5.0)
    assert maps.low == pytest.approx((1000, 2000), abs=0.2)
    assert maps.height.shape == maps.density.shape == maps.estimate.shape == (40, 100)
    assert maps.estimate.sum() == pytest.approx(240_000)
    assert np.isnan(maps.height[:, 42:58]).all()
    assert np.isfinite(maps.height[:, :40]).all()
    assert np.isfinite(maps.height[:, 61:]).all()
    assert np.nanmean(maps.density[:, :40]) == pytest.approx(2, rel=0.15)
    assert np.nanmean(maps.density[:, 61:]) == pytest.approx(4, rel=0.15)
    y, x = np.mgrid[:40, :40]
    ground = ground_height(np.stack([x.ravel(), y.ravel()], 1) * 5.0 + 2.5 + maps.low)
    assert np.median(np.abs(maps.height[:, :40].ravel() - ground)) < 3
    for cell in (0.0, -1.0, np.nan, 1e-4):
        with pytest.raises(InputError, match="cells of"):
            overview.rasters(cell)
    assert overview.rasters().cell == pytest.approx((80_000 / 480) ** 0.5 / 2, rel=0.05)


def test_no_points(tmp_path: Path) -> None:
    overview = Overview.of(LasIndex.open(write_aerial(tmp_path / "a.las", (0, 0), 1, 0)))
    assert len(overview.coord) == len(overview.boxes) == 0
    with pytest.raises(InputError, match="no points to make a map of"):
        overview.rasters()


def test_octree_levels(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = data_dir / "reader_zoo/simple.copc.laz"
    file = LasFile(path)
    assert file.octree is not None
    monkeypatch.setattr("pc3d.data.overview._NODE_POINTS", 200)
    overview = Overview.of(LasIndex.open(path))
    levels, counts = file.octree.key[:, 0], file.octree.count
    totals = np.cumsum(np.bincount(levels, counts))
    deepest = int((totals <= 200).sum()) - 1
    upper = levels <= max(deepest, 0)
    assert len(overview.coord) == counts[upper].sum() + (~upper).sum()
    assert overview.weight.sum() == file.header.num_points
    monkeypatch.setitem(sys.modules, "lazrs", None)
    assert len(Overview.of(LasIndex.open(path)).coord) == len(file)


def test_interpolation_far_from_the_origin() -> None:
    rng = np.random.default_rng(0)
    xy = rng.random((200, 2)) * 100 + [5e6, -7e6]
    values = xy @ [0.5, -0.25]
    inside, outside = xy[:50] * 0.5 + xy[50:100] * 0.5, np.array([[5e6 - 50.0, -7e6]])
    nearest, linear = interpolate(xy, values, np.concatenate([inside, outside]))
    np.testing.assert_allclose(linear[:50], inside @ [0.5, -0.25], atol=1e-6)
    closest = np.linalg.norm(xy - outside, axis=1).argmin()
    assert nearest[50] == linear[50] == values[closest]
    on_a_line = np.stack([np.arange(5.0), np.arange(5.0)], 1)
    assert interpolate(on_a_line, np.arange(5.0), on_a_line + 0.1)[1].tolist() == [0, 1, 2, 3, 4]
    assert interpolate(xy[:1], values[:1], inside)[1].tolist() == [values[0]] * 50


# Patches -------------------------------------------------------------------------------------------------------------


def test_normalisation() -> None:
    centre, radius = np.array([1e6, 2e6]), 2**0.5 / 2 * 10 * 96 * 1.5
    samples = np.array([[1e6, 2e6, 10.0], [1e6 + radius, 2e6 - radius, 30.0]])
    normalised, mean = normalise(samples, centre)
    assert mean == 20
    scale = 103 / 96 * (1 - 1 / 96)
    np.testing.assert_allclose(normalised, [[0, 0, -100 / radius], [scale, -scale, 100 / radius]])
    np.testing.assert_allclose(denormalise(normalised[:, 2], mean), [10, 30])


def test_window_rasters() -> None:
    rng = np.random.default_rng(0)
    samples = np.concatenate([rng.random((400, 2)) - 0.5, np.zeros((400, 1))], 1)
    samples[:, 2] = 3 * samples[:, 0] - samples[:, 1]
    nearest, linear = window_rasters(samples)
    assert nearest.dtype == linear.dtype == np.float32
    ticks = np.arange(96) / 96 - 0.5
    np.testing.assert_allclose(linear[10:-10, 10:-10], (3 * ticks - ticks[:, None])[10:-10, 10:-10], atol=1e-6)
    place = np.linalg.norm(samples[:, :2] - [ticks[70], ticks[20]], axis=1).argmin()
    assert nearest[20, 70] == np.float32(samples[place, 2])


def plane(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 50 + 0.1 * x - 0.05 * y


def sampled_plane(extent: tuple[float, float], count: int) -> Overview:
    rng = np.random.default_rng(0)
    xy = rng.random((count, 2)) * extent
    coord = np.stack([xy[:, 0] + 3e5, xy[:, 1] + 5e6, plane(*xy.T)], 1)
    return Overview(coord, None, np.ones(count), np.array([[3e5, 5e6, 0, 3e5 + extent[0], 5e6 + extent[1], 300]]))


def test_patches_without_a_network_show_the_samples() -> None:
    patches = HeightPatches(sampled_plane((1500, 700), 4000))
    assert patches.shape == (2, 3)
    mosaic = patches.mosaic()
    assert mosaic.shape == (128, 192)
    y, x = np.mgrid[:60, :140] * 10.0  # the grid of a patch starts at its corner; its scale is that of the weights
    np.testing.assert_allclose(mosaic[5:60, 5:140], plane(x, y)[5:, 5:], atol=0.4)


def test_patches_with_few_samples_are_left_out() -> None:
    rng = np.random.default_rng(0)
    overview = sampled_plane((1900, 600), 600)
    near = overview.coord[overview.coord[:, 0] < 3e5 + 500]
    alone = near[rng.permutation(len(near))[:24]]
    boxes = overview.boxes
    assert np.isnan(HeightPatches(Overview(alone, None, np.ones(24), boxes)).mosaic()).all()
    one = HeightPatches(Overview(near, None, np.ones(len(near)), boxes))
    assert [(patch.column, patch.row) for patch in one.maps()] == [(0, 0)]
    assert np.isnan(one.mosaic()[:, 64:]).all()


def test_a_network_gets_both_rasters_of_each_window() -> None:
    overview = sampled_plane((1200, 600), 3000)
    seen = []

    def network(nearest: torch.Tensor, linear: torch.Tensor) -> torch.Tensor:
        assert nearest.shape == linear.shape == (1, 1, 96, 96)
        seen.append((nearest, linear))
        return linear[..., 16:80, 16:80] + 1

    learned, plain = HeightPatches(overview, network).mosaic(), HeightPatches(overview).mosaic()
    assert len(seen) == 2
    radius = 2**0.5 / 2 * 10 * 96 * 1.5
    np.testing.assert_allclose(learned - plain, radius / 10, rtol=1e-4)


def test_order_of_patches() -> None:
    centres = np.array([[0, 0, 10.0], [300, 0, 10], [900, 0, 10], [0, 0, -10]])
    perspective = np.zeros((4, 4))  # from z = 0 along +z, 90 degrees wide
    perspective[0, 0] = perspective[1, 1] = perspective[3, 2] = 1
    weights = patch_weights(centres * [0.01, 1, 1], perspective)
    np.testing.assert_allclose(weights, [0.1, 0.07, 0.01, 0])
    above = patch_weights(centres, view_from_above(np.array([-1000.0, -10]), np.array([1000.0, 10])))
    assert above.argsort().tolist()[-1] in (0, 3)
    assert above[0] == above[3] == 1 > above[1] > above[2] > 0
    order = [(patch.column, patch.row) for patch in HeightPatches(sampled_plane((1900, 1900), 3000)).maps()]
    assert order[0] == (1, 1)
    assert len(order) == 9
    assert set(order[-4:]) == {(0, 0), (0, 2), (2, 0), (2, 2)}
