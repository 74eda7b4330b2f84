"""The report on a folder of clouds."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from pc3d.data.check import check_folder, nearest_spacing, suggest_grid
from pc3d.errors import InputError
from pc3d.io import write
from pc3d.points import Points


def save(path: Path, count: int = 60, codes: list[int] | None = None, **attrs: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(count)
    if codes is not None:
        attrs["label"] = torch.tensor([codes[i % len(codes)] for i in range(count)], dtype=torch.int32)
    write(path, Points(torch.rand(count, 3, generator=generator), attrs=attrs))


def shown(report: object) -> str:
    out = io.StringIO()
    report.print(Console(file=out, width=200))
    return out.getvalue()


def test_counts_classes_and_unknown_codes(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    save(tmp_path / "a.ply", 60, [2, 5, 5])
    save(tmp_path / "sub" / "b.pcd", 40, [2, 64])
    report = check_folder(tmp_path, {2: "ground", 5: "tree", 6: "roof", 7: "ignore"})
    assert report.label_field == "label"
    assert report.codes == {2: 40, 5: 40, 64: 20}
    assert report.classes == {"ground": 40, "tree": 40, "roof": 0}
    assert report.unknown == {64: 20}
    assert report.points == 100
    assert not report.ok
    text = shown(report)
    assert "unknown code 64 in 'label': 20 points" in text
    assert "classes without a point: roof" in text
    assert "40.00%" in text


def test_a_clean_folder_is_ok(tmp_path: Path) -> None:
    save(tmp_path / "a.ply", 60, [0, 1])
    report = check_folder(tmp_path, ["floor", "wall"])
    assert report.ok
    assert report.warnings == []
    assert "1 of 1 files readable, 60 points" in shown(report)


def test_without_a_map_codes_are_counted(tmp_path: Path) -> None:
    save(tmp_path / "a.ply", 60, [0, 9])
    report = check_folder(tmp_path)
    assert report.codes == {0: 30, 9: 30}
    assert report.classes is None
    assert report.ok


def test_a_named_label_field(tmp_path: Path) -> None:
    save(tmp_path / "a.ply", 10, [1], kind=torch.arange(10, dtype=torch.int32) % 2)
    assert check_folder(tmp_path, label_field="kind").codes == {0: 5, 1: 5}
    report = check_folder(tmp_path, label_field="colour")
    assert "field 'colour' is missing" in (report.files[0].error or "")


def test_bad_files_are_one_line_each_and_the_rest_goes_on(tmp_path: Path) -> None:
    save(tmp_path / "a.ply", 60, [0])
    save(tmp_path / "one.ply", 1, [0])
    save(tmp_path / "half.ply", 10, label=torch.arange(10) + 0.5)
    data = (tmp_path / "a.ply").read_bytes()
    (tmp_path / "cut.ply").write_bytes(data[:-9])
    (tmp_path / "empty.xyz").write_text("")
    report = check_folder(tmp_path)
    errors = {Path(item.path).name: item.error for item in report.files if item.error}
    assert sorted(errors) == ["cut.ply", "empty.xyz", "half.ply", "one.ply"]
    assert "holds 1 point; a cloud needs at least 2" in errors["one.ply"]
    assert "10 labels that are not whole numbers (first at point 0: 0.5)" in errors["half.ply"]
    assert all("\n" not in error and name in error for name, error in errors.items())
    assert report.points == 60
    assert report.fields["x"].files == 1
    assert not report.ok
    assert "1 of 5 files readable" in shown(report)


def test_values_that_mean_no_value(tmp_path: Path) -> None:
    values = torch.tensor([1.0, 4.0, float("nan"), 1.7e308], dtype=torch.float64).repeat(5)
    save(tmp_path / "a.ply", 20, tree=values, color=torch.zeros(20, 3))
    report = check_folder(tmp_path)
    assert (report.fields["tree"].low, report.fields["tree"].high, report.fields["tree"].bad) == (1, 4, 10)
    assert any("'tree': 10 values" in warning for warning in report.warnings)
    assert any("'color': is 0 everywhere" in warning for warning in report.warnings)
    assert any("no label field" in warning for warning in report.warnings)


def test_coordinates_that_are_not_finite(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).random((30, 3))
    rows[4, 2] = np.nan
    np.savetxt(tmp_path / "a.xyz", rows)
    report = check_folder(tmp_path)
    assert report.points == 29
    assert "at least 1 points without finite coordinates" in report.warnings[0]


def test_ranges_are_true_coordinates(tmp_path: Path) -> None:
    meta = [{"origin": (770000.0, 6277000.0, 0.0)}]
    write(tmp_path / "a.ply", Points(torch.tensor([[0.0, 1, 2], [3, 4, 5], [6, 7, 8]]), meta=meta))
    report = check_folder(tmp_path)
    assert (report.fields["x"].low, report.fields["y"].high) == (770000.0, 6277007.0)


def test_spacing_of_a_grid() -> None:
    axis = torch.arange(12) * 0.05
    grid = torch.cartesian_prod(axis, axis, axis)
    assert nearest_spacing(Points(grid)) == pytest.approx(0.05, rel=1e-4)
    twice = Points(torch.cat([grid, grid]))
    assert nearest_spacing(twice) == pytest.approx(0.05, rel=1e-4)


def test_spacing_of_coinciding_points_is_unknown(tmp_path: Path) -> None:
    write(tmp_path / "a.ply", Points(torch.ones(5, 3)))
    report = check_folder(tmp_path)
    assert report.spacing is None
    assert json.loads(report.to_json())["files"][0]["spacing"] is None
    shown(report)


def test_spacing_of_a_large_cloud_uses_a_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    points = Points(torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0)))
    whole = nearest_spacing(points)
    monkeypatch.setattr("pc3d.data.check._LARGEST_TREE", 5000)
    assert nearest_spacing(points) == pytest.approx(whole, rel=0.1)


@pytest.mark.parametrize(("spacing", "grid"), [(0.01, 0.02), (0.134, 0.25), (0.0125, 0.025), (0.45, 1.0), (1.5, 3.0)])
def test_suggested_grid(spacing: float, grid: float) -> None:
    assert suggest_grid(spacing) == grid


def test_json_holds_everything(tmp_path: Path) -> None:
    save(tmp_path / "a.ply", 60, [0, 1])
    report = json.loads(check_folder(tmp_path / "a.ply", ["floor", "wall"]).to_json())
    assert report["points"] == 60
    assert report["ok"] is True
    assert report["classes"] == {"floor": 30, "wall": 30}
    assert report["grid_size"] > 0


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no readable point cloud"):
        check_folder(tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        check_folder(tmp_path / "missing")


def test_real_tiles(data_dir: Path) -> None:
    pytest.importorskip("laspy")
    names = {1: "unassigned", 2: "ground", 3: "low", 4: "medium", 5: "high", 6: "building"}
    report = check_folder(data_dir / "ign_lidarhd" / "tiles", names)
    assert report.label_field == "classification"
    assert report.classes == dict(zip(names.values(), (8625, 108355, 5713, 7703, 72412, 87348), strict=True))
    assert report.unknown == {64: 140}
    assert report.grid_size == 0.25
