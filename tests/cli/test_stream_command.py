"""``pc3d predict --stream``: the labels of the plain command, files of any number, interruptions, wrong use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pc3d.cli.predict_stream import memory_budget
from pc3d.data.pipeline import Pipeline
from pc3d.data.transforms import ScaleAttribute
from pc3d.datasets.synthetic.aerial import write_aerial
from pc3d.errors import InputError
from pc3d.models import SparseUNet
from pc3d.tasks import SemanticSegmentation, save_export
from pc3d.tasks.checkpoint import CARD, make_card
from pc3d.tasks.streaming import StreamingPredictor

laspy = pytest.importorskip("laspy")
pytest.importorskip("lazrs")


def saved(folder: Path, feature: str) -> Path:
    """A checkpoint for synthetic aerial scans, with random weights."""
    torch.manual_seed(0)
    pipeline = Pipeline(1.0, [feature], prepare=[ScaleAttribute(feature, 0.002)])
    backbone = SparseUNet(pipeline.in_channels, base_channels=4, channels=[4, 8, 8, 4], layers=[1, 1, 1, 1])
    task = SemanticSegmentation(backbone, ["ground", "tree", "house"])
    task.pipeline, task.label_map, task.seed = pipeline, {2: 0, 5: 1, 6: 2}, 0
    path, _ = save_export(folder / "model.safetensors", {"state_dict": task.state_dict(), CARD: make_card(task)})
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(tmp_path, "intensity")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for column in range(2):
        write_aerial(tmp_path / f"tiles/{column}.laz", (60 * column, 0), 60, 1, 6, chunk_size=500)
    return tmp_path / "tiles"


def test_a_folder_is_one_scan(pc3d, model: Path, folder: Path) -> None:
    outcome = pc3d("predict", folder, "--ckpt", model, "-o", "out", "--stream", "--tile", 45, "--halo", 4)
    assert outcome.status == 0, outcome.err
    assert f"{folder / '0.laz'} -> out/0.laz: 3,600 points" in outcome.out
    assert "6 tiles of up to 45 m with 4 m around them" in outcome.out
    assert sorted(path.name for path in Path("out").iterdir()) == ["0.laz", "1.laz"]
    for name in ("0.laz", "1.laz"):
        before, after = laspy.read(folder / name), laspy.read(f"out/{name}")
        assert np.array_equal(before.xyz, after.xyz)
        assert set(np.unique(after.classification)) <= {2, 5, 6}
        assert 1 / 3 < np.asarray(after["confidence"]).min() <= np.asarray(after["confidence"]).max() <= 1


def test_one_tile_gives_the_plain_labels(pc3d, model: Path, folder: Path) -> None:
    words = ("predict", folder / "0.laz", "--ckpt", model, "--probabilities", "-o")
    assert pc3d(*words, "plain.laz").status == 0
    outcome = pc3d(*words, "streamed.laz", "--stream", "--tile", 200, "--halo", 5)
    assert outcome.status == 0, outcome.err
    plain, streamed = laspy.read("plain.laz"), laspy.read("streamed.laz")
    names = list(plain.point_format.dimension_names)
    assert names == list(streamed.point_format.dimension_names)
    for name in names:
        np.testing.assert_allclose(streamed[name], plain[name], rtol=1e-5, err_msg=name)


def test_arrays(pc3d, model: Path, folder: Path) -> None:
    words = ("predict", folder, "--ckpt", model, "--stream", "--format", "npy", "--probabilities", "-o", "arrays")
    outcome = pc3d(*words, "--blend", "--mode", "fast", "--memory", "3GB")
    assert outcome.status == 0, outcome.err
    rows = np.load("arrays/1.npy")
    assert rows.dtype.names == ("label", "confidence", "prob_ground", "prob_tree", "prob_house")
    assert len(rows) == 3600
    np.testing.assert_allclose(rows["prob_ground"] + rows["prob_tree"] + rows["prob_house"], 1, rtol=1e-5)


def test_too_large_for_the_memory(pc3d, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pc3d.cli.predict_stream._BYTES_IN_MEMORY", 2e6)
    words = ("predict", folder / "0.laz", "--ckpt", model, "-o", "out.laz", "--tile", 45, "--memory")
    outcome = pc3d(*words, "5GB")
    assert outcome.status == 0, outcome.err
    assert "3,600 points are labelled tile by tile (--memory 5.0GB)" in outcome.out
    assert "tiles of up to 45 m" in outcome.out
    outcome = pc3d("predict", folder, "--ckpt", model, "-o", "labelled.v1", "--tile", 45, "--memory", "5GB")
    assert "tiles of up to 45 m" in outcome.out
    outcome = pc3d(*words, "9GB")
    assert "tiles of up to" not in outcome.out


def test_interrupted_and_repeated(pc3d, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("predict", ".", "--ckpt", model, "--stream", "--tile", 25, "--halo", 3, "-o")
    monkeypatch.chdir(folder)  # the run that was interrupted is no input of the one that goes on
    assert pc3d(*words, "../whole").status == 0
    store = StreamingPredictor._store

    def stopped(self, tile, parts):
        if len(self._done) == 5:
            raise KeyboardInterrupt
        return store(self, tile, parts)

    with monkeypatch.context() as patch:
        patch.setattr(StreamingPredictor, "_store", stopped)
        outcome = pc3d(*words, "out")
    assert outcome.status == 130
    assert "interrupted: repeat the command to go on" in outcome.err
    assert not Path("out/0.laz").exists()
    other = pc3d(*words, "out", "--blend")
    assert other.status == 2
    assert "out/.stream: belongs to a run with another input, model or option" in other.err
    outcome = pc3d(*words, "out")
    assert outcome.status == 0, outcome.err
    assert "going on with the run in out/.stream" in outcome.out
    assert not Path("out/.stream").exists()
    for name in ("0.laz", "1.laz"):
        assert Path("out", name).read_bytes() == Path("../whole", name).read_bytes()


@pytest.mark.slow
def test_killed_and_repeated(pc3d, model: Path, folder: Path, tmp_path: Path) -> None:
    words = ["predict", folder, "--ckpt", model, "--stream", "--tile", "25", "--halo", "3", "-o"]
    assert pc3d(*words, "whole").status == 0
    killer = (
        "import os, signal, sys\n"
        "from pc3d.tasks.streaming import StreamingPredictor as Run\n"
        "store = Run._store\n"
        "def dying(self, tile, parts):\n"
        "    if len(self._done) == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return store(self, tile, parts)\n"
        "Run._store = dying\n"
        "from pc3d.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    line = [sys.executable, "-c", killer, *map(str, words), "killed"]
    killed = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True)
    assert killed.returncode == -9, killed.stderr
    outcome = pc3d(*words, "killed")
    assert outcome.status == 0, outcome.err
    for name in ("0.laz", "1.laz"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_wrong_use(pc3d, model: Path, folder: Path, cloud: Path, tmp_path: Path) -> None:
    write_aerial(tmp_path / "empty.las", (0, 0), 10, 0)
    scan = folder / "0.laz"
    for words, message in [
        ((cloud, "--ckpt", model, "-o", "a.laz", "--stream"), "cloud.ply is no LAS or LAZ file"),
        ((scan, "--ckpt", model, "-o", "a.laz", "--stream", "--format", "ply"), "a.ply: --stream writes"),
        ((scan, "--ckpt", model, "-o", "a.ply", "--stream"), "--stream writes .las, .laz or .npy"),
        ((scan, "--ckpt", model, "-o", "a.laz", "--halo", 0), "--halo: is for --stream"),
        ((scan, "--ckpt", model, "-o", "a.laz", "--blend"), "--blend: is for --stream"),
        ((scan, "--ckpt", model, "-o", "a.laz", "--stream", "--columns", "x,y,z"), "--columns: LAS and LAZ"),
        ((scan, "--ckpt", model, "-o", "a.npy", "--stream", "--label_field", "a"), "--label_field: is for LAS"),
        ((scan, "--ckpt", model, "-o", "a.laz", "--stream", "--label_field", ""), "label_field ''"),
        ((scan, "--ckpt", model, "-o", "a.laz", "--stream", "--label_field", "X"), "label_field 'X'"),
        ((scan, "--ckpt", model, "-o", "a.laz", "--stream", "--label_field", "confidence"), "(x, y, z, confidence)"),
        ((cloud, "--ckpt", model, "-o", "a.ply", "--memory", "4GB"), "--memory: is for LAS and LAZ"),
        ((scan, "--ckpt", model, "-o", "a.laz", "--stream", "--memory", "much"), "--memory much: give a size"),
        ((scan, "--ckpt", model, "-o", "a.laz", "--stream", "--memory", "20MB"), "--memory 20MB: the program"),
        ((scan, "--ckpt", model, "-o", "a.laz", "--stream", "--tile", 0), "tiles of 0.0 m"),
        ((tmp_path / "empty.las", "--ckpt", model, "-o", "a.laz", "--stream"), "empty.las: holds no points"),
        ((scan, "--ckpt", saved(tmp_path / "c", "color"), "-o", "a.laz", "--stream"), "field 'color' is missing"),
    ]:
        outcome = pc3d("predict", *words)
        assert outcome.status == 2, words
        assert message in outcome.err
        assert outcome.err.count("\n") == 1
        assert not Path("a.laz").exists()


@pytest.mark.parametrize(
    ("text", "size"), [("4GB", 4e9), ("500 MB", 5e8), ("2e9", 2e9), ("1.5GiB", 1.5e9), ("0.25t", 2.5e11)]
)
def test_sizes(text: str, size: float) -> None:
    assert memory_budget(text) == size
    for wrong in ("", "GB", "-1GB", "0", "4 apples", "1.2.3GB"):
        with pytest.raises(InputError, match="give a size such as 4GB"):
            memory_budget(wrong)
    assert memory_budget(None) > 1e8


def test_memory_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory_budget(None)
    files = [tmp_path / name for name in ("limit", "none", "missing")]
    monkeypatch.setattr("pc3d.cli.predict_stream._CONTAINER_LIMITS", tuple(map(str, files)))
    files[1].write_text("max\n")
    assert memory_budget(None) >= whole
    files[0].write_text("400000000\n")
    assert memory_budget(None) == 2e8


# The pause lets the thread that measures have its turn on a machine with much else to do.
_PROBE = """
import sys, time, torch
from pc3d.cli.predict_stream import point_memory
from pc3d.io import LasIndex

def predict(cloud, generator):
    held = torch.ones(cloud.num_points, 50_000)
    time.sleep(0.5)
    return held[:, :2].clone()

print(point_memory(LasIndex.open(sys.argv[1]), predict))
"""


def test_memory_of_a_point(folder: Path) -> None:
    """In a process of its own, as the command does: what other tests leave behind would be measured too."""
    words = [sys.executable, "-c", _PROBE, str(folder)]
    found = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert 100_000 < float(found.stdout) < 400_000
