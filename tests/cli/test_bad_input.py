"""Every mistake a user can make ends with one line that names it, exit code 2, and nothing half-written."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pc3d.io import read, write
from pc3d.points import Points

TINY = Path(__file__).with_name("tiny.yaml")
CONFIGS = Path(__file__).parents[2] / "configs"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused(pc3d, tmp_path: Path) -> Callable[..., str]:
    """Run a command that must fail cleanly; returns its one line."""

    def run(*words: object) -> str:
        before = files(tmp_path)
        outcome = pc3d(*words)
        assert outcome.status == 2, outcome
        assert outcome.err.endswith("\n")
        assert outcome.err.count("\n") == 1, outcome.err
        assert outcome.err.startswith("error: ")
        assert files(tmp_path) == before
        return outcome.err

    return run


# Clouds -------------------------------------------------------------------------------------------------------------


def cut(path: Path, keep: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


def colored(coord: np.ndarray) -> Points:
    return Points(torch.from_numpy(coord.astype(np.float32)), attrs={"color": torch.zeros(len(coord), 3)})


def truncated_ply(folder: Path) -> Path:
    return cut(write(folder / "cut.ply", colored(np.random.default_rng(0).random((100, 3)))), 0.6)


def truncated_laz(folder: Path) -> Path:
    pytest.importorskip("lazrs")
    return cut(write(folder / "cut.laz", colored(np.random.default_rng(0).random((5000, 3)))), 0.6)


def truncated_bin(folder: Path) -> Path:
    path = folder / "cut.bin"
    path.write_bytes(np.zeros((10, 4), "<f4").tobytes()[:-3])
    return path


def not_finite(folder: Path) -> Path:
    coord = np.zeros((11, 4), "<f4")
    coord[3, 1], coord[7, 2] = np.nan, np.inf
    path = folder / "holes.bin"
    path.write_bytes(coord.tobytes())
    return path


def empty(folder: Path) -> Path:
    path = folder / "empty.ply"
    path.write_text(
        "ply\nformat ascii 1.0\nelement vertex 0\n" + "".join(f"property float {a}\n" for a in "xyz") + "end_header\n"
    )
    return path


def without_color(folder: Path) -> Path:
    return write(folder / "grey.ply", Points(torch.rand(50, 3)))


def no_file(folder: Path) -> Path:
    return folder / "missing.ply"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (truncated_ply, "truncated"),
        (truncated_laz, "cut.laz"),
        (truncated_bin, "truncated"),
        (not_finite, "non-finite"),
        (empty, "no points"),
        (without_color, "field 'color' is missing"),
        (no_file, "no such file"),
    ],
)
def test_a_bad_cloud_is_not_predicted(
    make: Callable[[Path], Path], says: str, checkpoint: Path, tmp_path: Path, refused
) -> None:
    path = make(tmp_path)
    message = refused("predict", path, "--ckpt", checkpoint, "-o", tmp_path / "out.ply")
    assert path.name in message
    assert says in message


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("out.docx", "out.docx: cannot write '.docx' (writable: .ply"),
        ("out.bin", "cannot write '.bin'"),  # it has no place for labels
        ("cloud.ply", "inputs are never overwritten"),
        ("cloud.ply/out.ply", "out.ply: cannot be written: cloud.ply is no folder"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused(
    output: str, says: str, checkpoint: Path, cloud: Path, refused
) -> None:
    assert says in refused("predict", "cloud.ply", "--ckpt", checkpoint, "-o", output)


def test_clouds_of_a_folder_do_not_fit_into_one_file(checkpoint: Path, cloud: Path, refused) -> None:
    message = refused("predict", cloud.parent, "--ckpt", checkpoint, "-o", "labelled.ply")
    assert "labelled.ply: several clouds need a folder" in message


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["export", "cloud.ply", "out.las", "--adapter"], "--adapter: is for checkpoints"),
        (["export", "CKPT", "out.safetensors", "--color", "rgb"], "--color: is for clouds"),
        (["export", "cloud.ply", "out.las", "--ckpt", "CKPT"], "cloud.ply: has no labels to colour by"),
        (["view", "cloud.ply", "--screenshot", "a.png", "--ckpt", "CKPT"], "cloud.ply: has no labels to colour by"),
        (["convert", "CKPT", "out.pth", "--config", str(TINY)], "--config: of no use"),
        (["overview", "cloud.ply", "-o", "map.ply", "--cell", "2"], "map.ply: holds samples and no maps"),
        (["prepare", "scannet", "extra", "--raw", ".", "--out", "o"], "unknown argument 'extra'"),
        (["segments", "--config", str(TINY), "--k", "-1"], "--k -1.0 must be above 0"),
        (["segments", "--config", str(TINY), "--picture", "a.jpg"], "--picture a.jpg: pictures are written as .png"),
        (["probe", "--ckpt", "CKPT", "--config", "no.yaml"], "no.yaml: no such config file"),
        (["test", "--ckpt", "CKPT", "--savee", "x"], "unknown argument '--savee': did you mean '--save'?"),
        (["test", "--ckpt", "CKPT", "--save", "cloud.ply"], "--save cloud.ply: is a file"),
        (["test", "--ckpt", "CKPT", "--config", "no.yaml"], "no.yaml: no such config file"),
        (["predict", "cloud.ply", "--ckpt", str(TINY), "-o", "out.ply"], "tiny.yaml: not a readable checkpoint"),
    ],
)
def test_an_option_without_use_or_sense_is_refused(
    words: list[str], says: str, checkpoint: Path, cloud: Path, refused
) -> None:
    assert says in refused(*(checkpoint if word == "CKPT" else word for word in words))


def test_one_point_is_predicted(checkpoint: Path, tmp_path: Path, pc3d) -> None:
    path = write(tmp_path / "one.ply", colored(np.ones((1, 3))))
    outcome = pc3d("predict", path, "--ckpt", checkpoint, "-o", "out.ply")
    assert outcome.status == 0, outcome.err
    assert read("out.ply").num_points == 1


# Data sets ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder_config(tmp_path: Path) -> Path:
    """A config for the labelled clouds in ``scans/``, of the classes 0 and 1."""
    config = yaml.safe_load(TINY.read_text())
    config["data"]["dataset"] = {
        "class_path": "pc3d.datasets.FolderDataset",
        "init_args": {
            "root": str(tmp_path / "scans"),
            "label_field": "label",
            "label_map": {0: "ground", 1: "tree"},
            "val": ["c.ply"],
        },
    }
    path = tmp_path / "folder.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def scan(folder: Path, name: str, points: int = 300, highest: int = 1, **attrs: torch.Tensor) -> None:
    fields = {"color": torch.rand(points, 3) * 255, "label": torch.arange(points) % (highest + 1), **attrs}
    write(folder / "scans" / f"{name}.ply", Points(torch.rand(points, 3), attrs=fields))


def test_a_label_outside_the_map_stops_training(folder_config: Path, tmp_path: Path, refused) -> None:
    scan(tmp_path, "a")
    scan(tmp_path, "b", highest=7)
    scan(tmp_path, "c")
    message = refused("train", "--config", folder_config)
    assert "b.ply: field 'label' has codes outside the label map: 2" in message
    message = refused("data", "check", tmp_path / "scans", "--labels", _map(tmp_path))
    assert "outside the label map" in message


def _map(folder: Path) -> Path:
    path = folder / "map.yaml"
    path.write_text("0: ground\n1: tree\n")
    return path


def test_a_missing_field_stops_training(folder_config: Path, tmp_path: Path, refused) -> None:
    for name in ("a", "b", "c"):
        scan(tmp_path, name)
    message = refused("train", "--config", folder_config, "--data.pipeline.features", "[color,intensity]")
    assert "field 'intensity' is missing" in message


def test_a_training_cloud_of_one_point_is_named(folder_config: Path, tmp_path: Path, refused) -> None:
    for name in ("a", "b", "c"):
        scan(tmp_path, name, points=1)
    assert "a.ply: holds 1 point" in refused("train", "--config", folder_config)


def test_a_missing_folder_is_named(folder_config: Path, tmp_path: Path, refused) -> None:
    assert str(tmp_path / "nowhere") in refused("train", "--config", folder_config, "--data.root", tmp_path / "nowhere")


# Configs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model.optimizer.lrr", "1"], "unknown key 'model.optimizer.lrr': did you mean 'model.optimizer.lr'?"),
        (["--trainer.max_epoch", "3"], "unknown key 'trainer.max_epoch': did you mean 'trainer.max_epochs'?"),
        (["--trainr.max_epochs", "3"], "did you mean 'trainer'?"),
        (["--data.dataset.init_args.train_roms", "3"], "did you mean 'train_rooms'?"),
        (["--data.pipeline.gridsize", "1"], "unknown key 'data.pipeline.gridsize': did you mean 'grid_size'?"),
        (
            ["--model.backbone", "pc3d.models.SparseUNett"],
            "pc3d.models has no 'SparseUNett': did you mean 'SparseUNet'?",
        ),
        (["--trainer.max_epochs", "many"], "trainer.max_epochs: expected a whole number or null, got 'many'"),
        (["--data.pipeline.grid_size", "big"], "data.pipeline.grid_size: expected a number or null, got 'big'"),
        (
            ["--model.optimizer.name", "lion"],
            "model.optimizer.name: expected Literal['adamw', 'adam', 'sgd'], got 'lion'",
        ),
        (["--model.optimizer.lr", "-1"], "optimizer.lr is -1.0: it must not be negative"),
        (["--data.batch_size", "0"], "data.batch_size: 0 must be at least 1"),
        (["--trainer.accelerator", "gpuu"], "gpuu"),
        (["--trainer.precision", "bf16-true"], "trainer.precision: bf16-true is not for point clouds"),
        (["--trainer.precision", "64"], "trainer.precision: 64 is not for point clouds"),
        (["--config", "missing.yaml"], "missing.yaml: no such config file"),
        (["--config"], "no config: add --config FILE.yaml"),
        (["--run_dir", str(TINY)], "tiny.yaml: is a file"),
        (["--model.criteria", "pc3d.losses.Lovas"], "pc3d.losses has no 'Lovas': did you mean 'Lovasz'?"),
        (["--data.pipeline.augment", "pc3d.data.transforms.Flip"], "did you mean 'RandomFlip'?"),
        (["--model.backbone", "NoSuchNet"], "model.backbone: expected a class with its module"),
        (["--model.backbone", "torch.nn.Linear"], "model.backbone: torch.nn.Linear is no Backbone"),
        (["--data.dataset.init_args.zzz", "3"], "'data.dataset.zzz' (SyntheticRooms has: train_rooms, val_rooms,"),
        (["--model.class_path", "pc3d.tasks.SemanticSegmentation", "--model.optimizer.lrr", "1"], "mean 'lr'?"),
        (["--ckpt_path", "missing.ckpt"], "missing.ckpt: no such checkpoint file"),
        (["--ckpt_path", "last"], "there is no runs/tiny/checkpoints/last.ckpt to resume from"),
        (["--init_from", "missing.ckpt"], "missing.ckpt: no such checkpoint file"),
    ],
)
def test_a_wrong_setting_is_explained(words: list[str], says: str, refused) -> None:
    assert says in refused("train", "--config", TINY, *words)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (
            "decoder.init_args.channels=16",
            "model.decoder takes grids of [64, 32, 16] channels, the backbone gives [32, ",
        ),
        ("criterion.init_args.margin=-1", "config: MarginOccupancy.margin: -1.0 must not be negative\n"),
        ("criterion.init_args.margin=far", "config: model.criterion.margin: expected a number, got 'far'\n"),
        ("criterion.init_args.marge=1", "config: unknown key 'model.criterion.marge': did you mean 'margin'?\n"),
        ("freeze=1", "config: model.freeze: expected list or null, got '1'\n"),
    ],
)
def test_a_wrong_setting_of_a_task_with_a_class_path_is_explained(option: str, says: str, refused) -> None:
    config = CONFIGS / "synthetic_solids" / "reconstruct-gridformer-small-stage2.yaml"
    assert says in refused("train", "--config", config, f"--model.init_args.{option}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("trainer: {max_epochss: 3}", "unknown key 'trainer.max_epochss': did you mean 'trainer.max_epochs'?"),
        ("trainr: {max_epochs: 3}", "unknown key 'trainr.max_epochs': did you mean 'trainer'?"),
        ("model: {optimiser: {lr: 1}}", "unknown key 'model.optimiser.lr': did you mean 'model.optimizer'?"),
        ("model: [", "wrong.yaml: not a readable config: while parsing"),
        ("only text", "wrong.yaml: not a config: holds 'only text'"),
        ("", "wrong.yaml: not a config: holds None"),
        ("\x00", "wrong.yaml: not a readable config"),
    ],
)
def test_a_wrong_config_file_is_explained(text: str, says: str, tmp_path: Path, refused) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    assert says in refused("train", "--config", TINY, "--config", path)


def test_unknown_commands_and_options_get_a_suggestion(refused) -> None:
    assert "did you mean 'predict'?" in refused("predct", "x.ply")
    assert "did you mean '--screenshot'?" in refused("view", "x.ply", "--screnshot", "y.png")
    assert "no config: add --config" in refused("train", "--trainer.max_epochs", "3")


def test_debug_shows_the_traceback(pc3d) -> None:
    with pytest.raises(ValueError, match="no such file"):
        pc3d("view", "missing.ply", "--debug")


# Checkpoints --------------------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize(
    "words",
    [
        ["predict", "cloud.ply", "-o", "out.ply", "--ckpt", "evil.ckpt"],
        ["test", "--ckpt", "evil.ckpt", "--config", str(TINY)],
        ["export", "evil.ckpt", "out.safetensors"],
        ["train", "--config", str(TINY), "--init_from", "evil.ckpt"],
        ["train", "--config", str(TINY), "--ckpt_path", "evil.ckpt"],
    ],
    ids=lambda words: " ".join(words[:1] + words[-2:-1]),
)
def test_code_in_a_checkpoint_is_not_run(words: list[str], cloud: Path, tmp_path: Path, refused) -> None:
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps({"state_dict": Malicious(tmp_path / "owned")}))
    assert "evil.ckpt: holds Python code" in refused(*words)
    assert not (tmp_path / "owned").exists()


def test_a_truncated_checkpoint_is_named(checkpoint: Path, cloud: Path, tmp_path: Path, refused) -> None:
    (tmp_path / "half.ckpt").write_bytes(checkpoint.read_bytes()[:5000])
    message = refused("predict", cloud, "--ckpt", tmp_path / "half.ckpt", "-o", "out.ply")
    assert "half.ckpt: not a readable checkpoint" in message


def test_other_channels_than_the_checkpoints_are_a_table(checkpoint: Path, pc3d) -> None:
    for words in (["test", "--ckpt", checkpoint], ["train", "--config", TINY, "--ckpt_path", checkpoint]):
        outcome = pc3d(*words, "--run_dir", "other", "--data.pipeline.features", "[color,normal]")
        assert outcome.status == 2
        assert outcome.err.count("\n") == 1
        assert "in_channels 3 (here: 6)" in outcome.err
        assert "in_channels" in outcome.out
        assert not Path("other").exists()


def test_a_checkpoint_that_does_not_fit_leaves_its_run_as_it_was(trained: Path, pc3d) -> None:
    before = files(trained)
    resume = ["train", "--config", TINY, "--ckpt_path", trained / "checkpoints" / "last.ckpt"]
    for words in (["--data.pipeline.features", "[color,normal]"], ["--trainer.max_epochs", "3"]):
        assert pc3d(*resume, *words).status == 2
        assert files(trained) == before


def test_a_failed_test_leaves_nothing(checkpoint: Path, trained: Path, pc3d, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(trained)
    monkeypatch.setattr("pc3d.tasks.SemanticSegmentation.on_test_epoch_end", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pc3d("test", "--ckpt", checkpoint)
    assert files(trained) == before


def test_a_resumed_run_keeps_its_length(checkpoint: Path, refused) -> None:
    message = refused(
        "train", "--config", TINY, "--ckpt_path", checkpoint, "--run_dir", "more", "--trainer.max_epochs", "3"
    )
    assert "its schedule has 4 steps, this run 6" in message


# The machine --------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(tmp_path: Path):
    """A file system of 16 kB."""
    folder = tmp_path / "full"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_nothing_half_written(checkpoint: Path, tmp_path: Path, full_disk: Path, pc3d) -> None:
    big = write(tmp_path / "big.ply", colored(np.random.default_rng(0).random((20_000, 3))))
    for words in (
        ["predict", big, "--ckpt", checkpoint, "-o", full_disk / "out.ply", "--mode", "fast"],
        ["export", big, full_disk / "out.las"],
        ["export", checkpoint, full_disk / "out.safetensors"],
        ["train", "--config", TINY, "--run_dir", full_disk / "run"],
    ):
        outcome = pc3d(*words)
        assert outcome.status == 2, outcome
        assert outcome.err.count("\n") == 1, outcome.err
        assert "No space left on device" in outcome.err or "disk is full" in outcome.err
        assert files(full_disk) == {}


def test_the_line_is_alone_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Nothing else reaches stderr: no warnings of imported packages, no messages of the trainer."""
    words = [
        sys.executable,
        str(TINY.parents[2] / "tools" / "train.py"),
        "--config",
        str(TINY),
        "--model.optimizer.lr",
        "-1",
    ]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: optimizer.lr is -1.0: it must not be negative\n"
    assert list(tmp_path.iterdir()) == []
