"""``pc3d profile`` on a small network: every layer and pass, as text and as files."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import TINY, Pc3d


def test_every_layer_is_profiled(pc3d: Pc3d, cloud: Path, tmp_path: Path) -> None:
    run = pc3d("profile", "--config", TINY, "--input", cloud, "--out", tmp_path / "out", "--threads", 1)
    assert run.status == 0, run.err
    assert "share of time: reorder" in run.out
    found = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert {row["op"] for row in found["rows"]} == {"fwd", "dgrad", "wgrad"}
    assert len(found["rows"]) == 3 * len({row["layer"] for row in found["rows"]})
    assert all(row["measured_ms"] > 0 and row["modelled_ms"] > 0 and row["floor_ms"] > 0 for row in found["rows"])
    sizes = found["map_bytes"]
    assert sizes["tile_local"] < sizes["corf"] < sizes["pairs"]
    assert f"pairs {sizes['pairs']:.1f}, corf {sizes['corf']:.1f}" in run.out
    assert abs(sum(found["shares"].values()) - 1) < 1e-6
    assert pc3d("profile", "--config", TINY, "--input", tmp_path / "absent.ply").status == 2
