"""Detection on the command line: frames in KITTI's layout, objects to paste, result files, boxes of single scans."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import Pc3d

from pc3d.cli import main
from pc3d.cli.experiment import Experiment
from pc3d.cli.runs import Run
from pc3d.datasets.synthetic.scenes import kitti_object
from pc3d.io import read
from pc3d.io.kitti_object import read_objects
from pc3d.tasks import Detection, load_task
from pc3d.viz.boxes import read_boxes

CONFIGS = Path(__file__).parents[2] / "configs"
RANGE = [0, -12.8, -3, 38.4, 12.8, 1]


def tiny(raw: Path, objects: Path) -> dict:
    """Three steps of a network that sees nothing: 0.8 m pillars."""
    backbone = {
        "grid": {"point_range": RANGE, "voxel_size": [0.8, 0.8, 4]},
        "channels": 8,
        "neck_layers": [0, 0, 0],
        "neck_channels": [8, 8, 8],
        "up_channels": [8, 8, 8],
    }
    transforms = "pc3d.data.transforms."
    paste = {"database": str(objects), "counts": {"Car": 10, "Pedestrian": 5, "Cyclist": 5}}
    return {
        "trainer": {
            "max_epochs": 1,
            "logger": False,
            "enable_progress_bar": False,
            "num_sanity_val_steps": 0,
            "callbacks": [{"class_path": "pc3d.tasks.callbacks.SavePictures", "init_args": {"clouds": 1}}],
        },
        "model": {
            "class_path": "pc3d.tasks.Detection",
            "init_args": {
                "backbone": {"class_path": "pc3d.models.PointPillars", "init_args": backbone},
                "head": {"class_path": "pc3d.models.heads.AnchorHead", "init_args": {"score_threshold": 0.005}},
            },
        },
        "data": {
            "dataset": {"class_path": "pc3d.datasets.KITTIObject", "init_args": {"root": str(raw)}},
            "pipeline": {
                "grid_size": None,
                "features": ["coord", "strength"],
                "augment": [{"class_path": f"{transforms}PasteObjects", "init_args": paste}],
                "crop": [
                    {"class_path": f"{transforms}CropBox", "init_args": {"point_range": RANGE}},
                    {"class_path": f"{transforms}ShufflePoints"},
                ],
            },
            "batch_size": 2,
            "redraw_empty": True,
            "test_split": "val",
            "cache": False,
        },
    }


@pytest.fixture(scope="module")
def kitti(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``raw`` and ``prepared`` frames, and a ``run``; one training frame shows nothing."""
    folder = tmp_path_factory.mktemp("detection")
    kitti_object(folder / "raw", 2, {"train": 6, "val": 2, "test": 1})
    (folder / "raw/training/label_2/000003.txt").write_text("")
    assert main(["prepare", "kitti", "--raw", str(folder / "raw"), "--out", str(folder / "prepared")]) == 0
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny(folder / "raw", folder / "prepared/objects")))
    assert main(["train", "--config", str(folder / "tiny.yaml"), "--run_dir", str(folder / "run")]) == 0
    return folder


def test_a_run_is_scored_and_drawn(kitti: Path) -> None:
    summary = json.loads((kitti / "run/summary.json").read_text())
    assert {"val/AP", "test/AP", "test/AP_bev", "test/AP/Car", "train/loss_box"} <= set(summary)
    pictures = {path.name for path in (kitti / "run/pictures").iterdir()}
    assert {"val-000006.png", "test-000006.png"} <= pictures


def test_result_files_are_those_of_the_benchmark(kitti: Path, pc3d: Pc3d, tmp_path: Path) -> None:
    best = kitti / "run/checkpoints/best.ckpt"
    out = pc3d("test", "--ckpt", best, "--save", tmp_path / "saved", "--run_dir", tmp_path / "test")
    assert out.status == 0, out.err
    saved = read_objects(tmp_path / "saved/000006.txt")
    assert saved.scores is not None
    assert (np.diff(saved.scores) <= 0).all()
    figures = json.loads((tmp_path / "test/summary.json").read_text())
    command = [
        "evaluate",
        "--config",
        kitti / "tiny.yaml",
        "--predictions",
        tmp_path / "saved",
        "--json",
        "scores.json",
    ]
    assert pc3d(*command).status == 0
    scores = json.loads(Path("scores.json").read_text())
    mean = np.mean([scores[f"{name}_3d_R40_moderate"] for name in ("Car", "Pedestrian", "Cyclist")])
    assert mean == pytest.approx(figures["test/AP"])
    # Frames without labels are written too, and not scored.
    words = ["--save", tmp_path / "hidden", "--run_dir", tmp_path / "other", "--data.test_split", "test"]
    assert pc3d("test", "--ckpt", best, *words).status == 0
    assert (tmp_path / "hidden/000000.txt").is_file()


def test_boxes_of_single_scans(kitti: Path, pc3d: Pc3d, tmp_path: Path) -> None:
    best, scan = kitti / "run/checkpoints/best.ckpt", kitti / "raw/training/velodyne/000006.bin"
    out = pc3d("predict", scan, "--ckpt", best, "-o", "boxes.json")
    assert out.status == 0, out.err
    boxes = read_boxes("boxes.json")
    assert boxes.shape[1] == 7
    assert len(boxes) > 0
    assert pc3d("predict", scan, "--ckpt", best, "-o", "result.txt").status == 0
    result = read_objects("result.txt")
    assert len(result) == len(boxes)
    np.testing.assert_allclose(result.dimensions[:, [0, 2, 1]], boxes[:, 3:6], atol=2e-4)
    for name in ("seen.png", "points.ply"):
        assert pc3d("predict", scan, "--ckpt", best, "-o", name).status == 0
    points = read("points.ply")
    assert {"label", "instance", "color"} <= set(points.attrs)
    folder = kitti / "raw/testing/velodyne"
    assert pc3d("predict", folder, "--ckpt", best, "-o", "all", "--format", "json").status == 0
    assert Path("all/000000.json").is_file()
    # Anywhere else a calibration has to be given, and without one all points count.
    moved = tmp_path / "scan.bin"
    moved.write_bytes(scan.read_bytes())
    out = pc3d("predict", moved, "--ckpt", best, "-o", "no.txt", "--columns", "x,y,z,strength")
    assert out.status == 2
    assert "add --calib" in out.err
    calib = kitti / "raw/training/calib/000006.txt"
    assert pc3d("predict", moved, "--ckpt", best, "-o", "yes.txt", "--calib", calib).status == 0
    assert Path("yes.txt").read_text() == Path("result.txt").read_text()
    assert pc3d("predict", scan, "--ckpt", best, "-o", "x.json", "--tta", "scannet").status == 2
    assert pc3d("view", scan, "--boxes", "boxes.json", "--screenshot", "view.png").status == 0
    out = pc3d("view", scan, "--boxes", "result.txt", "--screenshot", "view.png")
    assert (out.status, "is no file of boxes" in out.err) == (2, True)


def test_frames_without_boxes_of_a_class_are_redrawn(kitti: Path, tmp_path: Path) -> None:
    config = tiny(kitti / "raw", kitti / "prepared/objects")
    config["data"]["pipeline"]["augment"] = []
    path = tmp_path / "plain.yaml"
    path.write_text(yaml.safe_dump(config))
    data = Experiment(["--config", str(path)], lambda parsed: Run(tmp_path)).datamodule
    samples = data.samples("train")
    assert samples.dataset.load("train", 3).meta[0]["boxes"] == []
    drawn = [samples[3][1].meta[0] for _ in range(2)]
    assert drawn[0]["box_names"]
    assert drawn[0]["name"] == drawn[1]["name"] != "000003"
    data.redraw_empty = False
    assert data.samples("train")[3][1].meta[0]["boxes"] == []


@pytest.mark.parametrize("name", ["det-second", "det-pointpillars"])
def test_published_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """OpenPCDet's own form: ``model_state`` with its names, kernels of spconv 2 on z y x."""
    from pc3d.models.convert.kernels import KernelLayout, write_kernel
    from pc3d.sparse import SparseConvolution

    config = CONFIGS / "kitti" / f"{name}.yaml"
    task = Experiment(["--config", str(config), "--data.root", str(tmp_path)], lambda parsed: Run(tmp_path)).model
    modules, state = dict(task.named_modules()), {}
    published = {"backbone.encoder.": "backbone_3d.", "backbone.neck.": "backbone_2d.", "head.": "dense_head."}
    for key, value in task.state_dict().items():
        value.copy_(torch.rand(value.shape)) if value.is_floating_point() else None
        owner = modules[key.rpartition(".")[0]]
        stored = write_kernel(value, owner, KernelLayout.KRSC, "zyx") if isinstance(owner, SparseConvolution) else value
        for own, other in {**published, "backbone.vfe.": "vfe.pfn_layers.0."}.items():
            key = other + key.removeprefix(own) if key.startswith(own) else key
        state[key] = stored
    torch.save({"model_state": state, "epoch": 80, "version": "pcdet"}, tmp_path / "published.pth")
    command = ["convert", str(tmp_path / "published.pth"), str(tmp_path / "ours.safetensors"), "--config", str(config)]
    assert main([*command, "--data.root", str(tmp_path)]) == 0
    loaded, _, _ = load_task(tmp_path / "ours.safetensors")
    assert isinstance(loaded, Detection)
    for key, value in task.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


@pytest.mark.slow
def test_a_small_detector_learns(pc3d: Pc3d) -> None:
    """About three minutes on a core."""
    config = CONFIGS / "synthetic_streets/det-pointpillars-small.yaml"
    assert pc3d("train", "--config", config, "--run_dir", "run", "--trainer.enable_progress_bar", "false").status == 0
    figures = json.loads(Path("run/summary.json").read_text())
    assert figures["test/AP"] > 40
    assert figures["test/AP/Car"] > 60
