"""``pc3d convert`` on files of ConDaFormer and E-3DSNN, written by the test in their published form."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pc3d.cli import main
from pc3d.cli.experiment import Experiment
from pc3d.cli.runs import Run
from pc3d.models.convert import KernelLayout
from pc3d.models.convert.kernels import write_kernel
from pc3d.sparse import DepthwiseSubMConv3d, SparseConvolution
from pc3d.tasks import load_task

CONFIGS = Path(__file__).parents[2] / "configs" / "synthetic_rooms"


def published_backbone(backbone: nn.Module) -> dict[str, Tensor]:
    """Kernels as spconv stores them, stages counted from one beside their name."""
    modules, state = dict(backbone.named_modules()), {}
    for name, value in backbone.state_dict().items():
        owner = modules[name.rpartition(".")[0]]
        if isinstance(owner, SparseConvolution):
            value = write_kernel(value, owner, KernelLayout.KRSC)
        elif isinstance(owner, DepthwiseSubMConv3d):
            value = value.T.reshape(-1, 3, 3, 3, 1)
        state[re.sub(r"^(pool|block|unpool)\.(\d+)", lambda m: f"{m[1]}{int(m[2]) + 1}", name)] = value
    return state


def published_head(head: nn.Module) -> dict[str, Tensor]:
    state = head.state_dict()
    if "hidden.0.0.weight" in state:
        return {name.replace("hidden.0.", "final.").replace("linear.", "final.3."): v for name, v in state.items()}
    weight = state["linear.weight"]  # a pointwise kernel, whose memory is read as (Cin, Cout)
    return {"final.weight": weight.T.reshape(len(weight), 1, 1, 1, -1), "final.bias": state["linear.bias"]}


@pytest.mark.parametrize("model", ["condaformer", "e3dsnn"])
def test_published_files(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    config = CONFIGS / f"semseg-{model}-small.yaml"
    task = Experiment(["--config", str(config)], lambda parsed: Run(tmp_path)).model
    assert isinstance(task.head, nn.Module)
    for value in task.state_dict().values():  # norms too shall differ from their start
        value.copy_(torch.rand(value.shape)) if value.is_floating_point() else None
    backbone = published_backbone(task.backbone)
    source, target = tmp_path / "model_best.pth", tmp_path / "ours.safetensors"
    head = published_head(task.head)
    torch.save({"state_dict": {f"module.{name}": value for name, value in (backbone | head).items()}}, source)
    assert main(["convert", str(source), str(target), "--config", str(config)]) == 0
    loaded, _, _ = load_task(target)
    for part in ("backbone", "head"):
        for name, value in getattr(task, part).state_dict().items():
            assert torch.equal(getattr(loaded, part).state_dict()[name], value), name

    torch.save({"state_dict": backbone}, source)
    assert main(["convert", str(source), str(tmp_path / "headless.safetensors"), "--config", str(config)]) == 0
    assert "the file has no head" in capsys.readouterr().out
    backbone.popitem()
    torch.save({"state_dict": backbone}, source)
    assert main(["convert", str(source), str(tmp_path / "not.safetensors"), "--config", str(config)]) == 2
    assert f"{source}: does not fit this" in capsys.readouterr().err
