"""``pc3d robustness``: what a network is shown, what is counted, and published files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from pc3d.cli import main
from pc3d.data.transforms.corruptions import MODELNET_C
from pc3d.datasets.synthetic.objects import FIXTURES
from pc3d.metrics import RobustnessScores
from pc3d.points import Points
from pc3d.tasks import Classification

h5py = pytest.importorskip("h5py")
CONFIG = Path(__file__).parents[2] / "configs" / "synthetic_shapes" / "cls-pct-tiny.yaml"
LABELS = [0, 8, 35]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny network for the classes of ModelNet40."""
    root = tmp_path_factory.mktemp("robustness")
    FIXTURES["modelnet40"](root, 0)
    content = yaml.safe_load(CONFIG.read_text())
    content["data"]["dataset"] = {"class_path": "pc3d.datasets.ModelNet40"}
    content["data"] |= {"root": str(root / "modelnet40_ply_hdf5_2048"), "cache": False, "val_batch_size": 5}
    for place in ("crop", "select"):
        content["data"]["pipeline"][place][0]["init_args"]["count"] = 100
    backbone = {"channels": 4, "key_points": [16, 8], "neighbours": 4, "out_channels": 16}
    content["model"]["init_args"]["backbone"]["init_args"] |= backbone
    content["model"]["init_args"]["head"]["init_args"] |= {"in_channels": 16, "num_classes": 40}
    content["trainer"] |= {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False}
    content["trainer"]["callbacks"] = [{"class_path": "pc3d.tasks.callbacks.SavePictures", "init_args": {"clouds": 0}}]
    config = root / "config.yaml"
    config.write_text(yaml.safe_dump(content))
    assert main(["train", "--config", str(config), "--run_dir", str(root / "run"), "--test", "false"]) == 0
    return root / "run" / "checkpoints" / "last.ckpt"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Points]:
    """The clouds that a network is shown; it answers with their class, but for every second cloud."""
    seen: list[Points] = []

    def forward(task: Classification, points: Points) -> Tensor:
        assert not task.training
        answers = points.get("segment")[points.offsets[:-1]].clone()
        for i, cloud in enumerate(points):
            answers[i] += len(seen) % 2
            seen.append(cloud)
        return torch.nn.functional.one_hot(answers, 41).float()

    monkeypatch.setattr(Classification, "forward", forward)
    return seen


def test_clouds_are_prepared_then_corrupted(
    checkpoint: Path, shown: list[Points], pc3d: Callable, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "figures.json"
    words = ["--corruptions", "dropout_global", "add_local", "--severities", 4, 0, "--out", out]
    done = pc3d("robustness", "--ckpt", checkpoint, "--benchmark", "modelnet-c", *words, "--", "--data.num_workers", 0)
    assert done.status == 0, done.err
    figures = json.loads(out.read_text())
    assert figures["clouds"] == 12 == len(shown) / 5
    assert {name: list(values) for name, values in figures["accuracy"].items()} == {
        "dropout_global": ["0", "4"],
        "add_local": ["0", "4"],
    }
    assert figures["clean"] == figures["accuracy"]["add_local"]["4"] == 0.5
    assert figures["mean_error_rate"] == pytest.approx(0.5)
    assert (figures["points"], figures["up"], figures["seed"]) == (100, "z", 0)
    assert "mCE" not in figures
    counts = [cloud.num_points for cloud in shown]
    assert counts == [100] * 12 + [75] * 12 + [25] * 12 + [110] * 12 + [149] * 12  # nothing is sampled afterwards
    assert out.with_suffix(".png").stat().st_size > 5000
    assert "add_local" in done.out
    assert "mean error rate" in done.out


def test_background_does_not_shrink_a_cloud(checkpoint: Path, shown: list[Points], pc3d: Callable) -> None:
    words = ["--ckpt", checkpoint, "--corruptions", "background", "--severities", 5]
    assert pc3d("robustness", *words).status == 0
    assert json.loads((checkpoint.parents[1] / "modelnet40-c.json").read_text())["error_rate_noise"] == 0.5
    corrupted = shown[12:]
    assert len(corrupted) == 12
    assert max(float(cloud.coord.norm(dim=1).max()) for cloud in corrupted) > 1.1
    before = [cloud.coord for cloud in corrupted]
    shown.clear()
    assert pc3d("robustness", *words).status == 0
    assert all(torch.equal(a, b.coord) for a, b in zip(before, shown[12:], strict=True))


def files_of_modelnet_c(folder: Path) -> dict[str, np.ndarray]:
    folder.mkdir()
    names = ["clean", *(f"{name}_{level}" for name in MODELNET_C for level in range(5))]
    arrays = {name: np.random.default_rng(i).random((3, 40 + i, 3)).astype("f4") for i, name in enumerate(names)}
    for name, array in arrays.items():
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["data"], file["label"] = array, np.array(LABELS)[:, None]
    return arrays


def test_published_files_are_shown_as_they_are(
    checkpoint: Path, shown: list[Points], pc3d: Callable, tmp_path: Path
) -> None:
    arrays = files_of_modelnet_c(tmp_path / "modelnet_c")
    out = tmp_path / "figures.json"
    done = pc3d("robustness", "--ckpt", checkpoint, "--files", tmp_path / "modelnet_c", "-o", out)
    assert done.status == 0, done.err
    expected = [cloud for array in arrays.values() for cloud in array]
    assert all(np.array_equal(cloud.coord.numpy(), array) for cloud, array in zip(shown, expected, strict=True))
    figures = json.loads(out.read_text())
    accuracy = {name: {int(level): v for level, v in levels.items()} for name, levels in figures["accuracy"].items()}
    assert figures["clean"] == 2 / 3
    errors, costs = RobustnessScores(2 / 3, accuracy).relative_errors()
    assert (figures["mCE"], figures["RmCE"]) == pytest.approx((errors, costs))
    assert f"{errors:.3f}" in done.out
    assert "mCE" not in json.loads(out.read_text())["accuracy"]
    (tmp_path / "modelnet_c" / "rotate_3.h5").unlink()
    before = out.read_bytes()
    done = pc3d("robustness", "--ckpt", checkpoint, "--files", tmp_path / "modelnet_c", "-o", out)
    assert done.status == 2
    assert "rotate_3.h5: is missing" in done.err
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--corruptions", "impulsee"], "--corruptions impulsee: modelnet40-c has occlusion"),
        (["--corruptions", "impulsee"], "did you mean 'impulse'?"),
        (["--severities", "0"], "--severities 0: modelnet40-c has 1 to 5"),
        (["--benchmark", "modelnet-c", "--severities", "5"], "--severities 5: modelnet-c has 0 to 4"),
        (["--points", "0"], "points 0 must be at least 1"),
        (["--out", "figures.yaml"], "figures.yaml: figures are written as .json"),
        (["--files", "files", "--points", "5"], "--points: of no use with --files"),
        (["--files", "files", "--up", "y"], "--up: of no use with --files"),
        (["--files", "files"], "files is not a folder; expected data_<corruption>"),
    ],
)
def test_what_cannot_be_done(words: list[str], says: str, checkpoint: Path, pc3d: Callable) -> None:
    done = pc3d("robustness", "--ckpt", checkpoint, *words)
    assert done.status == 2
    assert says in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_other_models_and_classes(trained: Path, checkpoint: Path, pc3d: Callable, tmp_path: Path) -> None:
    done = pc3d("robustness", "--ckpt", trained / "checkpoints" / "best.ckpt")
    assert "holds a SemanticSegmentation, not a Classification" in done.err
    files_of_modelnet_c(tmp_path / "files")
    words = ["--ckpt", checkpoint, "--files", tmp_path / "files", "--benchmark", "modelnet40-c"]
    assert "are of modelnet-c" in pc3d("robustness", *words).err
