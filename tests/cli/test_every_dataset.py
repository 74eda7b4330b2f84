"""Every data set: a miniature in its published layout, prepared, and each of its configs trained for a step."""

from __future__ import annotations

from pathlib import Path

import pytest

from pc3d.cli import main

pytest.importorskip("h5py")
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*/*.yaml"))
FIXTURES = {  # folder of the configs -> name of the miniature
    "scannet": "scannet",
    "scannet200": "scannet",
    "s3dis": "s3dis",
    "semantickitti": "semantickitti",
    "nuscenes": "nuscenes",
    "waymo": "waymo",
    "kitti": "kitti",
    "modelnet40": "modelnet40",
    "scanobjectnn": "scanobjectnn",
    "shapenetpart": "shapenetpart",
    "shapenet55": "shapenet55",
    "medpoints": "medpoints",
    "shapenet_occupancy": "shapenet-occupancy",
    "occupancy_rooms": "occupancy-rooms",
}
VARIANTS = {"seg": "medpoints-segmentation", "completion": "medpoints-completion"}
SMALLER = {"fewshot": ["--data.dataset.init_args.shot", "5", "--data.dataset.init_args.queries", "2"]}
BANK = ["--model.init_args.peft.init_args.bank_size", "9"]  # as many clouds as the miniatures have, or fewer


def named(path: Path) -> str:
    return f"{path.parent.name}-{path.stem}"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder where miniatures and what is prepared from them are kept."""
    return tmp_path_factory.mktemp("every")


def prepare(fixture: str, name: str, base: Path) -> Path:
    """The folder to train on: the prepared one, or the raw one where it is read as it is."""
    raw, out = base / f"raw-{fixture}", base / f"out-{name}"
    if not raw.exists():
        assert main(["prepare", "fixture", fixture, "--out", str(raw)]) == 0
    if not out.exists():
        assert main(["prepare", name, "--raw", str(raw), "--out", str(out)]) == 0
    assert (out / "summary.json").is_file()
    if (out / "objects").is_dir():  # of KITTI only what is pasted is prepared
        return raw
    return out if next(out.rglob("coord.npy"), None) else raw


@pytest.mark.slow
@pytest.mark.parametrize("config", [c for c in CONFIGS if c.parent.name in FIXTURES], ids=named)
@pytest.mark.filterwarnings("ignore:.*damaged")
def test_one_command_trains_on_what_another_prepared(
    config: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kitti-prepared").symlink_to(prepared / "out-kitti")  # where the configs look for what is pasted
    fixture = FIXTURES[config.parent.name]
    root = prepare(fixture, VARIANTS.get(config.stem.partition("-")[0], fixture), prepared)
    options = ["--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu", "--data.num_workers", "0"]
    options += [
        "--data.batch_size",
        "2",
        "--data.cache",
        str(tmp_path / "cache"),
        *SMALLER.get(config.stem.partition("-")[0], ()),
        *(BANK if config.stem.endswith("point-peft") else ()),
    ]
    command = ["train", "--config", str(config), "--data.root", str(root), "--run_dir", str(tmp_path / "run")]
    assert main([*command, *options]) == 0


def test_every_data_set_has_a_miniature() -> None:
    from pc3d.datasets.synthetic import objects, scenes

    assert set(FIXTURES.values()) == set(scenes.FIXTURES) | set(objects.FIXTURES)
    procedural = {"synthetic_rooms", "synthetic_shapes", "synthetic_solids", "synthetic_streets"}
    without = procedural | {"lidarhd", "mosd"}  # own files, no licence
    assert {path.parent.name for path in CONFIGS} == set(FIXTURES) | without
