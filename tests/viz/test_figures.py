"""Confusion matrices and comparison panels."""

from __future__ import annotations

import builtins
from pathlib import Path

import pytest
import torch

from pc3d.errors import InputError
from pc3d.points import Points
from pc3d.viz.figures import save_confusion_matrix, save_triptych

pytest.importorskip("matplotlib")


def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that is drawn from here on."""
    from matplotlib.text import Text

    seen: list[str] = []
    draw = Text.draw

    def recording(self, *args, **kwargs):
        seen.append(self.get_text())
        return draw(self, *args, **kwargs)

    monkeypatch.setattr(Text, "draw", recording)
    return seen


def test_confusion_matrix_shows_shares_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = texts(monkeypatch)
    path = save_confusion_matrix(tmp_path / "c.png", torch.tensor([[30, 10], [0, 0]]), ["wall", "lamp"])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert {"75.0 %\n30", "25.0 %\n10", "wall  (40)", "lamp  (0)"} <= set(seen)
    with pytest.raises(InputError, match="for 1 class names"):
        save_confusion_matrix(path, torch.zeros(2, 2), ["wall"])


@pytest.mark.parametrize("labelled", [True, False])
def test_panels(labelled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = texts(monkeypatch)
    points = Points(torch.rand(200, 3), meta=[{"name": "room"}])
    truth = torch.arange(200) % 3 - 1  # a third unlabelled
    prediction = truth.clamp(min=0)
    prediction[truth == 1] = torch.arange(int((truth == 1).sum())) % 2
    save_triptych(tmp_path / "t.png", points, truth if labelled else None, prediction, None, ["wall", "lamp", "bed"])
    assert {"input", "prediction", "wall", "lamp"} <= set(seen)
    assert "bed" not in seen
    wrong = 100 * int(((truth >= 0) & (truth != prediction)).sum()) / int((truth >= 0).sum())
    assert (f"wrong points ({wrong:.1f} %)" in seen) == labelled
    assert ("truth" in seen) == labelled
    assert ("unlabelled" in seen) == labelled


def test_without_matplotlib_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importing = builtins.__import__

    def without(name: str, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"need matplotlib: pip install pc3d\[plots\]"):
        save_confusion_matrix(tmp_path / "c.png", torch.zeros(1, 1), ["wall"])
