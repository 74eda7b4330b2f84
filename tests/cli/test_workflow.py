"""From a config to a labelled cloud: train, resume, test, predict, export, view, each through the command line."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from pc3d.cli.predict import plan_jobs
from pc3d.io import read, write
from pc3d.points import Points

TINY = Path(__file__).with_name("tiny.yaml")


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


# Training -----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_everything_in_its_folder(trained: Path) -> None:
    names = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
    assert {"checkpoints/best.ckpt", "checkpoints/last.ckpt", "config.yaml", "run.json", "summary.json"} <= names
    assert {"logs/metrics.csv", "pictures/test-confusion.png", "pictures/test-room_test_0000.png"} <= names
    summary = json.loads((trained / "summary.json").read_text())
    assert 0 <= summary["test/mIoU"] <= 1
    assert summary["seconds"] > 0
    assert [Path(summary[f"{name}_checkpoint"]).name for name in ("best", "last")] == ["best.ckpt", "last.ckpt"]
    rows = list(csv.DictReader((trained / "logs" / "metrics.csv").open()))
    assert sum(bool(row["val/mIoU"]) for row in rows) == 2


def test_a_run_without_validation_and_test_clouds_ends_well(pc3d) -> None:
    rooms = ["--data.dataset.init_args.val_rooms", "0", "--data.dataset.init_args.test_rooms", "0"]
    outcome = pc3d("train", "--config", TINY, "--run_dir", "run", "--trainer.max_epochs", "1", *rooms)
    assert outcome.status == 0, outcome.err
    assert "no test clouds" in outcome.out
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["last.ckpt"]


def test_the_saved_config_repeats_the_run(trained: Path, pc3d) -> None:
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert not {"ckpt_path", "init_from", "run_dir", "config"} & set(config)
    outcome = pc3d("train", "--config", trained / "config.yaml", "--run_dir", "again", "--test", "false")
    assert outcome.status == 0, outcome.err
    first, second = weights(trained / "checkpoints/last.ckpt"), weights(Path("again/checkpoints/last.ckpt"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_killed_run_goes_on_to_the_same_weights(trained: Path, tmp_path: Path, pc3d) -> None:
    environment = {**os.environ, "PYTHONPATH": str(TINY.parents[2]), "PC3D_RUN_DIR": ""}
    killer = (
        "import os, signal, sys, pytorch_lightning as pl\n"
        "from pc3d.tasks.segmentation import SemanticSegmentation as Task\n"
        "step = Task.training_step\n"
        "def dying(self, batch, batch_idx):\n"
        "    if self.global_step == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, batch, batch_idx)\n"
        "Task.training_step = dying\n"
        "from pc3d.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = ["train", "--config", str(TINY), "--run_dir", "killed", "--every_n_train_steps", "1", "--test", "false"]
    killed = subprocess.run([sys.executable, "-c", killer, *words], cwd=tmp_path, env=environment, capture_output=True)
    assert killed.returncode == -9
    assert weights(tmp_path / "killed/checkpoints/last.ckpt")
    outcome = pc3d(*words, "--ckpt_path", "last")
    assert outcome.status == 0, outcome.err
    assert "resuming from killed/checkpoints/last.ckpt" in outcome.out
    assert (tmp_path / "killed/logs-2/metrics.csv").is_file()
    whole, resumed = weights(trained / "checkpoints/last.ckpt"), weights(tmp_path / "killed/checkpoints/last.ckpt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_init_from_starts_a_new_run_from_the_weights(checkpoint: Path, pc3d) -> None:
    words = ["--trainer.max_epochs", "1", "--model.optimizer.lr", "0", "--model.optimizer.weight_decay", "0"]
    outcome = pc3d("train", "--config", TINY, "--init_from", checkpoint, "--test", "false", *words)
    assert outcome.status == 0, outcome.err
    assert "initialised from it" in outcome.out
    before, after = weights(checkpoint), weights(Path("runs/tiny/checkpoints/last.ckpt"))
    assert torch.equal(before["head.linear.weight"], after["head.linear.weight"])
    both = pc3d("train", "--config", TINY, "--init_from", checkpoint, "--ckpt_path", checkpoint)
    assert both.status == 2
    assert "give one of them" in both.err


def test_an_interrupted_run_says_how_to_go_on(pc3d, monkeypatch: pytest.MonkeyPatch) -> None:
    from pc3d.tasks.segmentation import SemanticSegmentation

    step = SemanticSegmentation.training_step

    def interrupted(self, batch, batch_idx):
        if self.global_step == 3:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SemanticSegmentation, "training_step", interrupted)
    outcome = pc3d("train", "--config", TINY, "--run_dir", "stopped")
    assert outcome.status == 130
    assert f"pc3d train --config {TINY} --run_dir stopped --ckpt_path stopped/checkpoints/last.ckpt" in outcome.err


def test_print_config_holds_defaults_and_overrides(pc3d) -> None:
    outcome = pc3d("train", "--config", TINY, "--model.optimizer.lr", "0.5", "--print_config")
    config = yaml.safe_load(outcome.out)
    assert outcome.status == 0
    assert config["model"]["optimizer"]["lr"] == 0.5
    assert config["data"]["mix3d"] == 0.0


# Testing, predicting ------------------------------------------------------------------------------------------------


def test_test_repeats_the_figures_of_the_run(trained: Path, checkpoint: Path, pc3d) -> None:
    outcome = pc3d("test", "--ckpt", checkpoint, "--run_dir", "scores")
    assert outcome.status == 0, outcome.err
    again = json.loads(Path("scores/summary.json").read_text())
    before = json.loads((trained / "summary.json").read_text())
    assert again["test/mIoU"] == pytest.approx(before["test/mIoU"], abs=1e-6)


def test_prediction_keeps_the_cloud_and_adds_labels(checkpoint: Path, cloud: Path, pc3d) -> None:
    outcome = pc3d("predict", cloud, "--ckpt", checkpoint, "-o", "labelled.ply", "--probabilities")
    assert outcome.status == 0, outcome.err
    before, after = read(cloud), read("labelled.ply")
    assert torch.equal(before.coord, after.coord)
    assert before.meta[0]["origin"] == after.meta[0]["origin"]
    assert torch.equal(before.get("quality"), after.get("quality"))
    probabilities = torch.stack([v.flatten() for n, v in after.attrs.items() if n.startswith("prob_")], 1)
    assert probabilities.shape == (500, 12)
    assert torch.allclose(probabilities.sum(1), torch.ones(500), atol=1e-4)
    assert torch.equal(probabilities.argmax(1), after.get("label").flatten().long())
    assert torch.allclose(probabilities.amax(1), after.get("confidence").flatten())
    assert len(after.get("color").unique(dim=0)) == len(after.get("label").unique())


def test_a_folder_is_predicted_into_a_folder(checkpoint: Path, cloud: Path, tmp_path: Path, pc3d) -> None:
    scans = tmp_path / "scans" / "north"
    scans.mkdir(parents=True)
    for name in ("a", "b"):
        write(scans / f"{name}.ply", read(cloud))
    outcome = pc3d(
        "predict", tmp_path / "scans", "--ckpt", checkpoint, "-o", "out", "--format", "npz", "--mode", "fast"
    )
    assert outcome.status == 0, outcome.err
    assert sorted(str(p) for p in Path("out").rglob("*.*")) == ["out/north/a.npz", "out/north/b.npz"]
    assert "label" in read("out/north/a.npz")


def test_a_bad_file_of_a_folder_does_not_stop_the_others(checkpoint: Path, cloud: Path, tmp_path: Path, pc3d) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    (scans / "a.ply").write_bytes(cloud.read_bytes()[:-20])
    write(scans / "b.ply", read(cloud))
    outcome = pc3d("predict", scans, "--ckpt", checkpoint, "-o", "out", "--mode", "fast")
    assert outcome.status == 2
    assert "1 of 2 clouds could not be labelled" in outcome.err
    assert "a.ply" in outcome.out
    assert [path.name for path in Path("out").iterdir()] == ["b.ply"]


def test_copc_becomes_plain_laz(tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    (scans / "a.copc.laz").touch()
    assert plan_jobs([scans], tmp_path / "out", None) == [(scans / "a.copc.laz", tmp_path / "out" / "a.laz")]


def test_las_gets_classification_and_keeps_its_header(data_dir: Path, checkpoint: Path, pc3d) -> None:
    laspy = pytest.importorskip("laspy")
    source = data_dir / "ahn_amsterdam" / "ahn_2386_9702.laz"
    before = laspy.read(source)
    colored = pc3d("export", source, "colored.laz", "--color", "height")
    assert colored.status == 0, colored.err
    outcome = pc3d("predict", "colored.laz", "--ckpt", checkpoint, "-o", "out.laz", "--mode", "fast", "--tile", "20")
    assert outcome.status == 0, outcome.err
    after = laspy.read("out.laz")
    for name in ("X", "Y", "Z", "intensity"):
        assert (before[name] == after[name]).all()
    assert set(after.classification) <= set(range(12))
    assert ((after["confidence"] > 0) & (after["confidence"] <= 1)).all()
    assert (after.header.scales == before.header.scales).all()


@pytest.mark.parametrize("suffix", [".ply", ".pcd", ".npy", ".npz", ".xyz", ".txt", ".csv"])
def test_a_cloud_is_labelled_in_its_own_format(suffix: str, checkpoint: Path, cloud: Path, pc3d) -> None:
    write(f"own{suffix}", read(cloud))
    for output in (f"labelled{suffix}", "folder"):
        outcome = pc3d("predict", f"own{suffix}", "--ckpt", checkpoint, "-o", output, "--mode", "fast")
        assert outcome.status == 0, outcome.err
    for path in (f"labelled{suffix}", f"folder/own{suffix}"):
        labelled = read(path)
        assert labelled.num_points == 500
        assert {"quality", "label", "confidence"} <= labelled.attrs.keys()


def test_inputs_are_never_overwritten(checkpoint: Path, cloud: Path, pc3d) -> None:
    content = cloud.read_bytes()
    for output in (cloud, cloud.parent):
        outcome = pc3d("predict", cloud, "--ckpt", checkpoint, "-o", output)
        assert outcome.status == 2
        assert "inputs are never overwritten" in outcome.err
    assert cloud.read_bytes() == content


# Exporting, viewing -------------------------------------------------------------------------------------------------


def test_an_export_predicts_like_its_checkpoint(checkpoint: Path, cloud: Path, pc3d) -> None:
    assert pc3d("export", checkpoint, "model.safetensors").status == 0
    assert json.loads(Path("model.json").read_text())["class_names"][0] == "ceiling"
    for name, ckpt in (("a", checkpoint), ("b", "model.safetensors")):
        assert pc3d("predict", cloud, "--ckpt", ckpt, "-o", f"{name}.ply", "--mode", "fast").status == 0
    assert Path("a.ply").read_bytes() == Path("b.ply").read_bytes()


@pytest.mark.parametrize("suffix", ["ply", "pcd", "npz", "las"])
def test_exports_are_coloured_by_label(suffix: str, tmp_path: Path, pc3d) -> None:
    labels = torch.arange(40) % 3
    source = write(tmp_path / "in.npz", Points(torch.rand(40, 3), attrs={"label": labels}, meta=[{"name": "in"}]))
    outcome = pc3d("export", source, f"out.{suffix}")
    assert outcome.status == 0, outcome.err
    color = read(f"out.{suffix}").get("color")
    assert torch.equal(color[3:], color[:-3])
    assert len(color.unique(dim=0)) == 3


def test_labels_alone_are_exported_for_semantic_kitti(tmp_path: Path, pc3d) -> None:
    from pc3d.io import read_labels

    codes = torch.tensor([10, 40, 252])
    source = write(tmp_path / "in.ply", Points(torch.rand(3, 3), attrs={"label": codes}, meta=[{"name": "in"}]))
    assert pc3d("export", source, "0.label").status == 0
    assert read_labels("0.label")[0].tolist() == [10, 40, 252]


def test_view_writes_a_picture(cloud: Path, pc3d) -> None:
    outcome = pc3d("view", cloud, "--screenshot", "view.png", "--size", "200x160")
    assert outcome.status == 0, outcome.err
    header = Path("view.png").read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert (int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")) == (200, 160)


def test_data_check_reports_a_folder(tmp_path: Path, pc3d) -> None:
    folder = tmp_path / "scans"
    points = Points(torch.rand(200, 3), attrs={"label": torch.arange(200) % 2}, meta=[{"name": "a"}])
    write(folder / "a.ply", points)
    (tmp_path / "map.yaml").write_text("0: ground\n1: tree\n")
    outcome = pc3d("data", "check", folder, "--labels", tmp_path / "map.yaml", "--json", "report.json")
    assert outcome.status == 0, outcome.err
    assert json.loads(Path("report.json").read_text())["classes"] == {"ground": 100, "tree": 100}
    assert "suggested grid_size" in outcome.out


@pytest.mark.parametrize("command", ["train", "test", "predict", "export", "view", "data"])
def test_every_command_has_help_with_examples(command: str, pc3d) -> None:
    outcome = pc3d(command, "--help")
    assert outcome.status == 0
    assert outcome.err == ""
    assert f"usage: pc3d {command}" in outcome.out
    assert outcome.out.count(f"pc3d {command}") >= 3
    assert command in pc3d("--help").out


def test_predicted_codes_are_those_of_the_training_files() -> None:
    from pc3d.cli.predict import label_codes

    label_map = {9: -1, 6: 2, 2: 0, 5: 1, 3: 1}
    assert label_codes(torch.tensor([0, 1, 2, -1]), label_map).tolist() == [2, 3, 6, -1]
    assert label_codes(torch.tensor([0, 1, -1]), None).tolist() == [0, 1, -1]
