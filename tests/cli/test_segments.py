"""``pc3d segments`` on rooms made by procedure."""

from __future__ import annotations

from pathlib import Path

import pytest

from pc3d.cli import main

CONFIG = Path(__file__).parents[2] / "configs/synthetic_rooms/semseg-spunet-small.yaml"


def test_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["segments", "--config", str(CONFIG), "--clouds", "1", "--k", "0.05", "0.2", "--min_size", "10"]
    small = ["--data.dataset.init_args.points", "4000", "--data.cache", "false"]
    assert main([*arguments, "--picture", str(tmp_path / "a.png"), "--", *small]) == 0
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("│")]
    assert len(rows) == 4  # two weights of colour, two k
    assert all(float(row.split("│")[5].strip(" %")) > 50 for row in rows)
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert main(["segments", "--config", "nowhere.yaml"]) == 2
