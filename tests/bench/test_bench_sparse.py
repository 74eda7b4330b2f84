"""``tools/bench.py sparse``: every engine does the same work, a wrong one is refused, rows and pictures are written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pc3d.bench import sparse
from pc3d.bench.command import main
from pc3d.bench.engines import Pc3d, TorchGather, installed_engines
from pc3d.errors import InputError


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cloud(tmp_path: Path) -> str:
    sides = np.random.default_rng(0).random((600, 3), dtype=np.float32)
    np.save(tmp_path / "cloud.npy", sides)
    return f"{tmp_path / 'cloud.npy'}:0.1"


def test_rows_of_layers_and_maps_are_written(cloud: str, tmp_path: Path, capsys) -> None:
    target, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    only = ["subm3_4x32", "down2_32", "up2_64", "map_subm3"]
    arguments = ["sparse", cloud, "--rounds", "1", "--json", str(target), "--picture", str(picture), "--only", *only]
    assert main(arguments) == 0
    rows = json.loads(target.read_text())["rows"]
    assert [row["op"] for row in rows] == [
        "subm3_4x32_fwd",
        "subm3_4x32_fwdbwd",
        "down2_32x64_fwd",
        "up2_64x32_fwd",
        "map_subm3",
    ]
    names = {engine.name for engine in installed_engines()}
    for row in rows[:-1]:
        assert row["ms"].keys() == names
        assert row["ratio"]["torch_gather"] == pytest.approx(row["ms"]["torch_gather"] / row["ms"]["pc3d"], abs=0.01)
        assert 0 <= row["max_err"] < 1e-5
        assert (row["data"], row["threads"]) == ("cloud.npy@0.1", 1)
    assert rows[-1]["max_err"] is None
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "GFLOP/s" in capsys.readouterr().out


def test_whole_networks_agree() -> None:
    coord = torch.nonzero(torch.rand(8, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.3).int()
    coord = torch.cat([torch.zeros(len(coord), 1, dtype=torch.int32), coord], 1)
    infer = sparse.measure("cube", coord, [Pc3d(), TorchGather()], ["unet34c_infer"], rounds=1)
    (row,) = infer
    assert row.max_err is not None
    assert row.max_err < 1e-4


def test_bfloat16_is_timed_beside_float32(cloud: str, tmp_path: Path) -> None:
    target = tmp_path / "rows.json"
    only = ["--only", "subm3_32x32", "map_subm3", "unet34c_infer"]
    assert main(["sparse", cloud, "--rounds", "1", "--bf16", "--skip", "spconv_cpu", "--json", str(target), *only]) == 0
    rows = {row["op"]: row for row in json.loads(target.read_text())["rows"]}
    for op in ("subm3_32x32_fwd", "subm3_32x32_fwdbwd", "unet34c_infer"):
        assert rows[op]["ratio"]["pc3d_bf16"] > 0
        assert rows[op]["max_err"] < 1e-4  # of float32
    assert "pc3d_bf16" not in rows["map_subm3"]["ms"]


def test_an_engine_that_is_wrong_is_not_timed(cloud: str, monkeypatch) -> None:
    monkeypatch.setattr(Pc3d, "tolerance", -1.0)
    name, coord = sparse.read_voxels(cloud)
    with pytest.raises(InputError, match="subm3_4x32_fwd: pc3d and torch_gather differ"):
        list(sparse.measure(name, coord, [Pc3d(), TorchGather()], ["subm3_4x32_fwd"], rounds=1))


@pytest.mark.parametrize("spec", ["cloud.npy", "cloud.npy:x", "cloud.npy:0.1:x", "cloud.npy:-1"])
def test_a_cloud_in_another_form_is_refused(spec: str, capsys) -> None:
    assert main(["sparse", spec]) == 2
    assert capsys.readouterr().err.startswith(f"bench sparse: {spec}")


def test_growth_in_bfloat16_is_refused(capsys) -> None:
    assert main(["sparse", "--growth", "--bf16"]) == 2
    assert "--growth times float32 only" in capsys.readouterr().err


def test_an_unknown_case_is_refused(capsys) -> None:
    assert main(["sparse", "--only", "subm5"]) == 2
    assert "there are subm3_4x32_fwd" in capsys.readouterr().err


def test_real_clouds_are_the_default(data_dir: Path, monkeypatch) -> None:
    monkeypatch.setenv("PC3D_DATA_DIR", str(data_dir))
    assert [spec.split("/")[-1] for spec in sparse.default_clouds()] == list(sparse.DEFAULT_CLOUDS)
    monkeypatch.setenv("PC3D_DATA_DIR", str(data_dir / "absent"))
    assert sparse.default_clouds() == []


def test_growth_is_measured_and_drawn(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sparse, "GROWTH", (500, 1000))
    target, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    assert main(["sparse", "--growth", "--rounds", "1", "--json", str(target), "--picture", str(picture)]) == 0
    content = json.loads(target.read_text())
    assert [(row["op"], row["voxels"]) for row in content["rows"]] == [
        (op, size) for size in (500, 1000) for op in ("map_subm3", "subm3_32x32_fwd")
    ]
    assert picture.exists()
