"""The serialization benchmark: engines agree, are timed, and bad depths are one line."""

from __future__ import annotations

import json
from pathlib import Path

from pc3d.bench import serialize
from pc3d.bench.command import main


def test_every_engine_is_checked_and_timed(tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "figures.json"
    arguments = ["serialize", "--points", "2000", "--size", "0.5"]
    assert main([*arguments, "--depth", "11", "--json", str(target)]) == 0
    timings = json.loads(target.read_text())["timings"]
    engines: dict[str, set[str]] = {}
    for timing in timings:
        assert "depth 11" in timing["case"]
        engines.setdefault(timing["case"].split(" lidar")[0], set()).add(timing["engine"])
    every = {"kernels", "reference", "numpy"}
    assert engines == {
        "z codes": every,
        "z order": every,
        "hilbert codes": every,
        "hilbert order": every,
        "5 levels": {"kernels", "reference"},
        "reorder": {"torch"},
    }
    monkeypatch.setattr(serialize, "_codes_by_numpy", lambda cells, depth, curve: cells[:, 0])
    assert main(arguments) == 2


def test_a_depth_that_does_not_hold_the_cells_is_one_line(capsys) -> None:
    assert main(["serialize", "--points", "500", "--size", "0.5", "--depth", "2"]) == 2
    assert "does not fit depth 2 (0 to 3)" in capsys.readouterr().err.strip().splitlines()[-1]
