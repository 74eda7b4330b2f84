"""What a run leaves behind for a person: tables, pictures, records."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import TinyData, tiny_task, trainer

from pc3d import InputError
from pc3d.metrics.segmentation import scores_from_confusion
from pc3d.tasks.callbacks import RunRecord, SavePictures, ScoreProgressBar, ScoreTable
from pc3d.tasks.record import git_revision, write_json
from pc3d.tasks.tables import score_table


def test_score_table() -> None:
    confusion = torch.tensor([[8, 2, 0], [1, 9, 0], [0, 0, 0]])
    console = Console(file=io.StringIO(), width=100)
    console.print(score_table(scores_from_confusion(confusion), ["floor", "wall", "chair [red]"], "val, epoch 3"))
    text = console.file.getvalue()
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert "val, epoch 3: mIoU 0.492" in text  # (8/11 + 9/12 + 0) / 3
    for cell in ("0.727", "0.800", " 10 ", " 9 "):
        assert cell in rows["floor"]
    assert "absent" in rows["chair [red]"]
    assert "all points 0.850" in text


def test_a_run_leaves_tables_pictures_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    pictures = SavePictures(clouds=1)
    record = RunRecord(config={"trainer": {"max_epochs": 1}})
    task = tiny_task()
    run = trainer(tmp_path, max_epochs=1, callbacks=[record, ScoreTable(), pictures], enable_checkpointing=True)
    run.fit(task, TinyData())
    run.test(task, TinyData(), verbose=False)
    printed = capsys.readouterr().out
    assert "val, epoch 0: mIoU" in printed
    assert "test: mIoU" in printed
    expected = ["test-cloud20.png", "test-confusion.png", "val-cloud10.png", "val-confusion.png"]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == expected
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "pictures").iterdir())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["test/mIoU"] == pytest.approx(task.scores["test"].miou)
    assert summary["val/mIoU"] == pytest.approx(task.scores["val"].miou)
    assert sorted(Path(path).name for path in summary["pictures"]) == expected
    assert summary["seconds"] > 0
    assert summary["steps"] == 2
    assert Path(summary["best_checkpoint"]).is_file()
    written = json.loads((tmp_path / "run.json").read_text())
    assert written["config"] == {"trainer": {"max_epochs": 1}}
    assert written["torch"] == torch.__version__
    assert written["seed"] == 7
    assert written["command"] == sys.argv


def test_without_matplotlib_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.layout_engine"):
        monkeypatch.setitem(sys.modules, name, None)
    task = tiny_task()
    run = trainer(tmp_path, max_epochs=2, callbacks=[SavePictures()])
    run.fit(task, TinyData())
    message = capsys.readouterr().err
    assert message.count("no pictures") == 1
    assert "pip install pc3d[plots]" in message
    assert not list(tmp_path.rglob("*.png"))


def test_clouds_are_drawn_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def drawing(path: Path, *args: object) -> Path:
        drawn.append(path.name)
        return path

    monkeypatch.setattr("pc3d.viz.figures.save_triptych", drawing)
    monkeypatch.setattr("pc3d.viz.figures.save_confusion_matrix", drawing)
    options = {"max_epochs": 4, "enable_checkpointing": False}
    trainer(tmp_path, callbacks=[SavePictures(clouds=1)], **options).fit(tiny_task(), TinyData())
    assert drawn == ["val-confusion.png"] * 4 + ["val-cloud10.png"]
    drawn.clear()
    trainer(tmp_path, callbacks=[SavePictures(clouds=2, every_n_validations=3)], **options).fit(tiny_task(), TinyData())
    clouds = ["val-cloud10.png", "val-cloud11.png"]
    assert drawn == ["val-confusion.png"] * 3 + clouds + ["val-confusion.png"] + clouds
    with pytest.raises(InputError, match="every_n_validations 0"):
        SavePictures(every_n_validations=0)


def test_progress_bar_shows_the_running_score(tmp_path: Path) -> None:
    seen: list[tuple[bool, float]] = []

    class Watching(ScoreProgressBar):
        def get_metrics(self, trainer, pl_module):
            items = super().get_metrics(trainer, pl_module)
            metrics = pl_module.val_metrics if trainer.validating else pl_module.train_metrics
            if "mIoU" in items:
                assert items["mIoU"] == pytest.approx(scores_from_confusion(metrics.confusion).miou_present)
                seen.append((trainer.validating, items["mIoU"]))
            return items

    trainer(tmp_path, max_epochs=2, callbacks=[Watching()], enable_progress_bar=True).fit(tiny_task(), TinyData())
    assert {validating for validating, _ in seen} == {True, False}


def test_git_revision_is_the_commit_of_the_package() -> None:
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if not head:
        pytest.skip("not a git checkout")
    git_revision.cache_clear()
    assert (git_revision() or "").rstrip("+") == head


def test_json_is_replaced_only_when_complete(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
