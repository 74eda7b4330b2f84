"""``pc3d convert`` on files of ConDaFormer, E-3DSNN, Point-PEFT and ScatterFormer, written in their published form."""

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
from pc3d.tasks.base import PointTask

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


def published_detector(task: PointTask) -> dict[str, Tensor]:
    """A whole ScatterFormer: kernels of spconv and depth-wise ones with z first, parts under OpenPCDet's names."""
    modules, state = dict(task.named_modules()), {"global_step": torch.ones(1)}
    parts = {
        "backbone.encoder": "backbone_3d",
        "backbone.neck": "backbone_2d",
        "backbone.vfe": "vfe",
        "head": "dense_head",
    }
    for name, value in task.state_dict().items():
        owner = modules[name.rpartition(".")[0]]
        if isinstance(owner, SparseConvolution) and name.endswith("weight"):
            value = write_kernel(value, owner, KernelLayout.KRSC, "zyx")
        elif isinstance(owner, DepthwiseSubMConv3d):
            value = value.reshape(*owner.kernel_size, -1).permute(2, 1, 0, 3)
        for ours, theirs in parts.items():
            if name.startswith(f"{ours}."):
                state[name.replace(ours, theirs, 1)] = value
    return state


def test_published_scatterformer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = CONFIGS.parent / "synthetic_streets" / "det-scatterformer-small.yaml"
    task = Experiment(["--config", str(config)], lambda parsed: Run(tmp_path)).model
    for value in task.state_dict().values():
        value.copy_(torch.rand(value.shape)) if value.is_floating_point() else None
    state, source, target = published_detector(task), tmp_path / "scatterformer.pth", tmp_path / "ours.safetensors"
    assert {"backbone_3d.stage1.0.cffn_layers.0.conv_h.weight", "backbone_3d.app.pos_embedding.weight"} <= set(state)
    torch.save({"model_state": state}, source)
    assert main(["convert", str(source), str(target), "--config", str(config)]) == 0
    loaded, _, _ = load_task(target)
    for name, value in task.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    torch.save({"model_state": {n: v for n, v in state.items() if not n.startswith("dense_head.")}}, source)
    assert main(["convert", str(source), str(target), "--config", str(config)]) == 0
    assert "the file has no head" in capsys.readouterr().out


def published_vit(task: PointTask, prefix: str = "") -> dict[str, Tensor]:
    """State of a transformer over patches, without its adapter."""
    state = {n: v for n, v in task.backbone.state_dict().items() if "adapt" not in n}
    return {prefix + re.sub(r"^blocks\.", "blocks.blocks.", name): value.clone() for name, value in state.items()}


def published_point_peft(task: PointTask) -> dict[str, Tensor]:
    """Names of the published adapter; what trains in place of a weight of the base is that weight."""
    state = task.backbone.state_dict()
    found = published_vit(task)
    for name, value in state.items():
        if weight := re.match(r"(.+)\.adapted\.(\w+)\.default\.delta$", name):
            found[re.sub(r"^blocks\.", "blocks.blocks.", f"{weight[1]}.{weight[2]}")] += value
        name = name.removeprefix("adapters.default.")
        if name in ("cls_token", "cls_pos"):
            found[name] = state[name] + state[f"adapters.default.{name}"]
        for pattern, replacement in (
            (r"^prompt_coord$", "prompt_cor"),
            (r"^attention\.norm\.", "blocks.norm3."),
            (r"^attention\.(qkv|proj)\.", r"blocks.attn1.\1."),
            (r"^prompts\.(\d)\.prompt$", r"blocks.blocks.\1.prompt_embeddings"),
            (r"^prompts\.(\d)\.refine\.", r"blocks.blocks.\1.cp_adapter."),
            (r"^blocks\.(\d)\.mlp\.(?=down|up)", r"blocks.blocks.\1.adapter."),
            (r"^blocks\.(\d)\.last\.", r"blocks.blocks.\1.adapter1."),
            (r"^blocks\.(\d)\.norm\.", r"blocks.blocks.\1.out_transform.0."),
        ):
            theirs, hits = re.subn(pattern, replacement, name)
            if hits:
                found[theirs.replace(".down.", ".ln1.").replace(".up.", ".ln2.")] = value
    unused = {
        "ad_gate": torch.zeros(1),
        "prompt_embeddings": torch.zeros(5, 48),
        "cp_adapter.ln1.weight": torch.ones(8),
    }
    return found | {f"blocks.blocks.2.{name}": value for name, value in unused.items()}


def test_published_point_peft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The pre-training keeps its weights, which the bank is asked with; the tuned file becomes a difference."""
    config = str(CONFIGS.parent / "synthetic_shapes" / "cls-point-peft-tiny.yaml")
    words = ["--config", config, "--model.init_args.peft.init_args.bank_size", "12"]
    task = Experiment(words, lambda parsed: Run(tmp_path)).model
    assert isinstance(task.head, nn.Module)
    for value in task.state_dict().values():
        value.copy_(torch.rand(value.shape) - 0.3 * (value.ndim > 1)) if value.is_floating_point() else None
    base, tuned, bank = (tmp_path / name for name in ("pretrained.pth", "tuned.pth", "bank.pt"))
    head = {
        re.sub(r"^hidden\.0\.|^linear", lambda m: "" if m[0] != "linear" else "4", name): value
        for name, value in task.head.state_dict().items()
    }
    torch.save({"base_model": published_vit(task, "module.MAE_encoder.")}, base)
    published = published_point_peft(task) | {f"cls_head_finetune.{name}": value for name, value in head.items()}
    torch.save({"base_model": {f"module.{name}": value for name, value in published.items()}}, tuned)
    torch.save(torch.rand(48, 12), bank)
    command = ["convert", str(tuned), str(tmp_path / "ours.safetensors"), *words, "--base", str(base)]
    assert main([*command, "--bank", str(bank)]) == 0
    loaded, _, _ = load_task(tmp_path / "ours.safetensors")
    torch.testing.assert_close(loaded.backbone.adapters["default"].bank.features, torch.load(bank).T.half())
    expected = {name: value for name, value in task.state_dict().items() if ".bank." not in name}
    for name, value in loaded.state_dict().items():
        if name in expected:
            torch.testing.assert_close(value, expected[name], msg=name)

    torch.save(torch.rand(48, 9), bank)
    assert main([*command, "--bank", str(bank)]) == 2
    assert f"{bank}: bank: (9, 48) features do not fill one of (12, 48)" in capsys.readouterr().err
    bank.write_bytes(b"nothing")
    assert main([*command, "--bank", str(bank)]) == 2
    assert f"{bank}: not a readable bank" in capsys.readouterr().err
