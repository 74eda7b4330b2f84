"""``tools/bench.py data``: every stage is timed on what it really does, and the loader is a training's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pc3d.bench.command import main
from pc3d.bench.data import Rate, in_memory, lines
from pc3d.data.cache import CloudCache
from pc3d.datasets import SyntheticRooms
from pc3d.points import Points

TINY = str(Path(__file__).parents[1] / "cli" / "tiny.yaml")


def test_figures_of_every_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["--data.cache", str(tmp_path / "cache"), "--data.dataset.init_args.points", "1000"]
    arguments = ["data", "--config", TINY, "--clouds", "2", "--rounds", "1", "--steps", "2", "--workers", "1"]
    assert main([*arguments, "--json", str(tmp_path / "a.json"), "--", *overrides]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "a.json").read_text())["rows"]}
    stages = ["load", "read", "augment", "grid sample", "features", "collate"]
    assert list(rows) == [*stages, "loader, 1 workers", "training, 0 workers", "training, 1 workers"]
    assert all(row["ms"] > 0 and row["clouds"] == pytest.approx(1e3 / row["ms"]) for row in rows.values())
    # The rooms go whole into each stage up to the grid sampling; fewer points come out of it.
    rooms = SyntheticRooms(4, 1, 1, points=1000)
    whole = sum(rooms.load("train", i).num_points for i in range(2)) / 2
    points = {name: row["points"] / row["clouds"] for name, row in rows.items()}
    assert [points[name] for name in stages[:4]] == pytest.approx([whole] * 4)
    assert points["features"] == pytest.approx(points["collate"])
    assert 100 < points["features"] < whole
    assert 0 <= rows["training, 0 workers"]["waiting"] < 1
    assert "waiting" in capsys.readouterr().out


def test_without_a_cache_there_is_nothing_to_map(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--config", TINY]) == 2
    assert "data.cache is false" in capsys.readouterr().err
    assert main(["data", "--config", "none.yaml"]) == 2
    assert "none.yaml: no such config file" in capsys.readouterr().err


def test_reading_touches_the_whole_cloud(tmp_path: Path) -> None:
    cache = CloudCache(tmp_path)
    cloud = Points(torch.rand(50, 3), attrs={"color": torch.rand(50, 3)})
    cache.cloud(("a",), lambda: cloud)
    mapped = cache.cloud(("a",), lambda: cloud)
    copied = in_memory(mapped)
    assert torch.equal(copied.coord, cloud.coord)
    assert copied.coord.data_ptr() != mapped.coord.data_ptr()
    assert copied.get("color").data_ptr() != mapped.get("color").data_ptr()


def test_rates() -> None:
    rate = Rate.of("loader", 2.0, 4, 10_000_000, waiting=0.25)
    assert (rate.ms, rate.clouds, rate.points) == (500, 2, 5_000_000)
    assert lines([rate]).splitlines()[1].split() == ["loader", "500.00", "2.0", "5.00", "25.0%"]
