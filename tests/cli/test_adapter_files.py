"""From a pre-trained checkpoint to an adapter in a file of its own and back, by config and commands alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from pc3d.errors import InputError
from pc3d.points import Points
from pc3d.tasks import Classification, load_task
from pc3d.tasks.classification import classify

VIT = Path(__file__).parents[2] / "configs" / "synthetic_shapes" / "cls-vit-tiny.yaml"
POINTS = {"class_path": "pc3d.data.transforms.FixedPoints", "init_args": {"count": 64}}


def write_config(path: Path, head: int, **model: Any) -> Path:
    """The tiny transformer, made smaller still, two epochs on a few shapes."""
    config = yaml.safe_load(VIT.read_text())
    trainer = {"max_epochs": 2, "limit_train_batches": 2, "limit_val_batches": 1, "accelerator": "cpu"}
    config["trainer"] |= {**trainer, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    arguments = config["model"]["init_args"]
    arguments["backbone"]["init_args"] |= {"channels": 12, "depth": 2, "patches": 16, "patch_points": 8, "stages": [1]}
    arguments["head"]["init_args"] |= {"in_channels": head, "widths": [8]}
    arguments |= model
    config["data"]["pipeline"] |= {"crop": [POINTS], "select": [POINTS]}
    config["data"] |= {"batch_size": 4, "cache": False}
    config["data"]["dataset"]["init_args"] = {"train": 12, "val": 4, "test": 1, "points": 100}
    config["trainer"]["callbacks"] = [{"class_path": "pc3d.tasks.callbacks.SavePictures", "init_args": {"clouds": 0}}]
    path.write_text(yaml.safe_dump(config))
    return path


def logits(checkpoint: Path) -> Tensor:
    task, pipeline, _ = load_task(checkpoint)
    coord = torch.rand(100, 3, generator=torch.Generator().manual_seed(0))
    points = Points(coord, attrs={"segment": torch.zeros(100, dtype=torch.int64)})
    assert isinstance(task, Classification)
    return classify(task, pipeline, points, generator=torch.Generator().manual_seed(0))


PEFT: dict[str, dict[str, Any]] = {
    "LoRA": {"rank": 2},
    "PointPEFT": {"bank_size": 12, "prompts": 4, "prompt_blocks": 1, "dropout": 0.3},
}


@pytest.mark.parametrize("method", ["PointPEFT", pytest.param("LoRA", marks=pytest.mark.slow)])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    method: str, tmp_path: Path, pc3d, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapter, head, their average, moments of the optimizer, bank: bit for bit."""
    peft = {"class_path": f"pc3d.peft.{method}", "init_args": PEFT[method]}
    config = write_config(tmp_path / "tuned.yaml", 24, peft=peft, ema_decay=0.9)
    words = [
        "train",
        "--config",
        config,
        "--test",
        "false",
        "--every_n_train_steps",
        1,
        "--trainer.num_sanity_val_steps",
        1,
    ]
    assert pc3d(*words, "--run_dir", "whole").status == 0
    step = Classification.training_step

    def interrupted(self: Classification, batch: Points, batch_idx: int) -> Tensor:
        if self.global_step == 1:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Classification, "training_step", interrupted)
        assert pc3d(*words, "--run_dir", "half").status == 130
    outcome = pc3d(*words, "--run_dir", "half", "--ckpt_path", "half/checkpoints/last.ckpt")
    assert outcome.status == 0, outcome.err
    whole, half = (torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True) for run in ("whole", "half"))
    for state in ("state_dict", "current_model_state"):
        assert whole[state].keys() == half[state].keys()
        assert all(torch.equal(half[state][name], value) for name, value in whole[state].items()), state
    moments = [file["optimizer_states"][0]["state"] for file in (whole, half)]
    assert all(torch.equal(moments[1][i]["exp_avg_sq"], state["exp_avg_sq"]) for i, state in moments[0].items())
    assert torch.equal(logits(Path("whole/checkpoints/last.ckpt")), logits(Path("half/checkpoints/last.ckpt")))


@pytest.mark.slow
def test_adapter_from_config(tmp_path: Path, pc3d) -> None:
    base = write_config(tmp_path / "base.yaml", 24)
    assert pc3d("train", "--config", base, "--run_dir", "base", "--test", "false").status == 0
    assert pc3d("export", "base/checkpoints/last.ckpt", "base.safetensors").status == 0
    peft = {"class_path": "pc3d.peft.IDPT", "init_args": {"layer": 1}}
    tuned = write_config(tmp_path / "tuned.yaml", 36, peft=peft)
    words = ("--config", tuned, "--run_dir", "tuned", "--test", "false", "--init_from", "base.safetensors")
    outcome = pc3d("train", *words)
    assert outcome.status == 0, outcome.err
    assert "parameters train (" in outcome.out
    last = Path("tuned/checkpoints/last.ckpt")

    before = torch.load("base/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    after = torch.load(last, weights_only=True)
    frozen = [name for name in before if name.startswith("backbone.")]
    assert all(torch.equal(after["state_dict"][name], before[name]) for name in frozen)
    moments = [state["exp_avg"].numel() for state in after["optimizer_states"][0]["state"].values()]
    task, _, _ = load_task(last)
    assert sum(moments) == sum(p.numel() for p in task.parameters() if p.requires_grad), "no moments of frozen weights"

    assert pc3d("export", last, "adapter.safetensors", "--adapter").status == 0
    assert Path("adapter.safetensors").stat().st_size < Path("base.safetensors").stat().st_size
    outcome = pc3d("export", "adapter.safetensors", "whole.safetensors", "--base", "base.safetensors")
    assert outcome.status == 0, outcome.err
    assert torch.equal(logits(Path("whole.safetensors")), logits(last))

    with pytest.raises(InputError, match="holds an adapter only"):
        load_task("adapter.safetensors")
    outcome = pc3d("export", "base.safetensors", "x.safetensors", "--adapter")
    assert outcome.status == 2
    assert "has no adapter" in outcome.err
