"""The benchmark command: it runs, its engines agree, and its figures are written."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pc3d.bench import configs, scenes, windows
from pc3d.bench.clouds import lidar_sweep
from pc3d.bench.command import main
from pc3d.bench.figures import draw_growth
from pc3d.bench.timing import check_equal, time_interleaved
from pc3d.errors import InputError
from pc3d.models import SparseUNet
from pc3d.points import Points


@pytest.mark.parametrize(("op", "cases"), [("voxelize", 1), ("map", 3)])
def test_figures_of_every_engine_are_written(op: str, cases: int, tmp_path: Path, capsys) -> None:
    target = tmp_path / "figures.json"
    threads = torch.get_num_threads()
    try:
        arguments = [op, "--points", "3000", "--size", "0.5", "--threads", "1", "--rounds", "7", "--json", str(target)]
        assert main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    figures = json.loads(target.read_text())
    assert figures["machine"]["threads"] == 1
    assert len({t["case"] for t in figures["timings"]}) == cases
    assert {t["engine"] for t in figures["timings"]} == {"kernels", "reference", "numpy"}
    assert all(t["median_ms"] > 0 for t in figures["timings"])
    assert "median ms" in capsys.readouterr().out


def test_point_operations_beside_their_peers(tmp_path: Path, capsys) -> None:
    target = tmp_path / "points.json"
    assert main(["points", "--points", "600", "--size", "0.5", "--rounds", "7", "--json", str(target)]) == 0
    timings = json.loads(target.read_text())["timings"]
    assert len({t["case"] for t in timings}) == 8
    for case in ("knn 16", "ball 0.2 m", "farthest 150", "distinct", "mean", "max"):
        engines = [t["engine"] for t in timings if t["case"].startswith(case)]
        assert engines[0] == "kernels"
        assert len(engines) >= 2


def test_attention_in_windows(tmp_path: Path, capsys) -> None:
    target = tmp_path / "windows.json"
    assert main(["windows", "--cloud", "3000:0.5", "--threads", "1", "--rounds", "1", "--json", str(target)]) == 0
    rows = json.loads(target.read_text())["rows"]
    assert [row["engine"] for row in rows] == list(windows.engines())
    assert all(row["forward_ms"] > 0 and row["voxels"] > row["largest"] > 1 for row in rows)
    borders = torch.tensor([0, 0, 1, 9, 17, 50])
    qkv = torch.randn(50, 3, 2, 8)
    linear, plain, kernels, padded = (attend(qkv, borders) for attend in windows.engines().values())
    torch.testing.assert_close(linear, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kernels, padded, rtol=1e-4, atol=1e-5)


def test_orders_are_compared_layer_by_layer(tmp_path: Path, capsys) -> None:
    target = tmp_path / "orders.json"
    assert main(["orders", "--points", "1500", "--size", "0.5", "--rounds", "7", "--json", str(target)]) == 0
    timings = json.loads(target.read_text())["timings"]
    layers = {t["case"] for t in timings if not t["case"].startswith("order ")}
    assert len(layers) == 6
    for layer in layers:
        assert {"raster", "hilbert", "soar", "random"} <= {t["engine"] for t in timings if t["case"] == layer}


def test_clouds_of_the_command_line_are_read(tmp_path: Path, capsys) -> None:
    np.save(tmp_path / "cloud.npy", np.random.default_rng(0).random((500, 3), dtype=np.float32))
    assert main(["voxelize", str(tmp_path / "cloud.npy"), "--size", "0.2"]) == 0
    assert "cloud.npy, 0.2 m, 122 voxels" in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path: Path, capsys) -> None:
    assert main(["map", str(tmp_path / "none.ply")]) == 2
    assert capsys.readouterr().err.strip() == f"bench map: {tmp_path / 'none.ply'}: no such file"
    for arguments in (["voxelize", "--rounds", "3"], ["map", "--kernel", "2"], ["nothing"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2


def test_rounds_are_interleaved_and_medians() -> None:
    calls: list[str] = []

    def work(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    timings = time_interleaved("case", 10, {"a": lambda: work("a", 0.001), "b": lambda: work("b", 0.02)}, rounds=7)
    assert calls == ["a", "b"] * 8
    assert [t.engine for t in timings] == ["a", "b"]
    assert timings[1].median_ms > timings[0].median_ms
    assert timings[1].cpu_ms < timings[1].median_ms


def test_engines_that_disagree_are_not_timed() -> None:
    with pytest.raises(InputError, match="case: b and a do not give the same result"):
        check_equal("case", {"a": (np.arange(3),), "b": (np.arange(4),)})


def test_the_generated_sweep_looks_like_lidar() -> None:
    sweep = lidar_sweep(50_000)
    assert sweep.num_points == 50_000
    assert torch.equal(sweep.coord, lidar_sweep(50_000).coord)
    assert bool(torch.isfinite(sweep.coord).all())
    on_ground = (sweep.coord[:, 2] + 1.8).abs() < 0.1
    assert 0.2 < on_ground.float().mean() < 0.95
    distances = sweep.coord[:, :2].norm(dim=1)
    assert float(distances.quantile(0.9)) / float(distances.quantile(0.1)) > 1.5, "density falls with distance"


def test_scan_engines_agree_and_are_timed(tmp_path: Path, capsys) -> None:
    target = tmp_path / "scan.json"
    assert main(["scan", "--shape", "2x64x8x4", "--rounds", "3", "--json", str(target)]) == 0
    timings = json.loads(target.read_text())["timings"]
    assert [t["case"].split()[-1] for t in timings] == ["fwd"] * 3 + ["fwdbwd"] * 3
    assert {t["engine"] for t in timings} == {"kernels", "torch chunked", "reference"}
    with pytest.raises(SystemExit):
        main(["scan", "--shape", "2x64"])
    assert "is not BATCHxLENGTHxCHANNELSxSTATE" in capsys.readouterr().err


def test_backbones_are_timed(tmp_path: Path, capsys) -> None:
    target = tmp_path / "backbones.json"
    arguments = ["backbones", "--points", "1500", "--size", "0.3", "--model", "LitePT-S", "--threads", "1"]
    assert main([*arguments, "--json", str(target)]) == 0
    (row,) = json.loads(target.read_text())["rows"]
    assert row["parameters"] > 12e6
    assert 0 < row["forward_ms"] < row["step_ms"]
    assert main(["backbones", "--model", "nothing"]) == 2
    assert "LitePT-S" in capsys.readouterr().err


def test_the_network_on_spconv_is_ours() -> None:
    pytest.importorskip("spconv")
    from pc3d.bench.spconv_unet import SpconvUNet

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more its results are wrong in some rows
    try:
        ours = SparseUNet(6).eval()
        cells = torch.randperm(20**3, generator=torch.Generator().manual_seed(0))[:1000]
        grid = torch.stack([cells // 400, cells // 20 % 20, cells % 20], 1).int()
        points = Points(grid * 0.02, attrs={"grid_coord": grid, "feat": torch.randn(1000, 6)})
        torch.testing.assert_close(SpconvUNet(ours).eval()(points), ours(points), rtol=1e-4, atol=1e-5)
    finally:
        torch.set_num_threads(threads)


def test_configs_are_timed(tmp_path: Path, capsys) -> None:
    config, threads = Path(__file__).parents[2] / "configs/synthetic_shapes/cls-vit-tiny.yaml", torch.get_num_threads()
    timing = configs._measure(config, None, 1, threads)
    assert (timing.config, timing.clouds, timing.points) == ("synthetic_shapes/cls-vit-tiny", 16, 16 * 512)
    assert timing.step_ms > timing.forward_ms > 0
    assert "1.04 M parameters" in configs.line(timing)
    assert main(["configs", str(tmp_path / "none.yaml")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_scenes_have_the_size_asked_for_and_are_timed(tmp_path: Path) -> None:
    points = scenes.scene(30_000)
    assert points.num_points == 30_000
    assert len(points.get("grid_coord").unique(dim=0)) == 30_000
    timings = [scenes._measure(name, 10_000, 1, torch.get_num_threads()) for name in scenes.models()]
    rows = scenes.rows(timings)
    assert [row["op"] for row in rows] == ["PTv3.small, attention", "PTv3.small, Mamba"]
    assert all(row["ms"]["pc3d"] > 0 for row in rows)
    draw_growth(rows, tmp_path / "scenes.png")
    assert (tmp_path / "scenes.png").stat().st_size > 0
