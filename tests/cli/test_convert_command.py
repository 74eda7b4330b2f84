"""``pc3d convert`` on files in the published format, written by the test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from pc3d.cli import main
from pc3d.datasets.synthetic_rooms import CLASSES
from pc3d.models import PointViT, PTv3, SparseUNet
from pc3d.models.convert import export_pointcept, export_sparse_unet
from pc3d.tasks import load_task

CONFIGS = Path(__file__).parents[2] / "configs" / "synthetic_rooms"


@pytest.fixture(params=["spunet", "ptv3"])
def published(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, nn.Module]:
    """A published file, the config of its model, and the network it was written from."""
    torch.manual_seed(0)
    config = CONFIGS / f"semseg-{request.param}-small.yaml"
    settings = yaml.safe_load(config.read_text())["model"]["backbone"]["init_args"]
    backbone = (SparseUNet if request.param == "spunet" else PTv3)(6, **settings)
    head = nn.Linear(backbone.out_channels, len(CLASSES))
    export = export_sparse_unet if isinstance(backbone, SparseUNet) else export_pointcept
    state = {f"module.{name}": value for name, value in export(backbone, head).items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "model_best.pth")
    return tmp_path / "model_best.pth", config, backbone


def test_there_and_back_again(published: tuple[Path, Path, nn.Module], tmp_path: Path, capsys) -> None:
    source, config, backbone = published
    target = tmp_path / "ours.safetensors"
    assert main(["convert", str(source), str(target), "--config", str(config), "--layout", "krsc"]) == 0
    task, _, card = load_task(target)
    for name, value in backbone.state_dict().items():
        assert torch.equal(task.backbone.state_dict()[name], value), name
    assert len(card["class_names"]) == len(CLASSES)
    assert main(["convert", str(target), str(tmp_path / "back.pth")]) == 0
    first, second = (torch.load(path, weights_only=True)["state_dict"] for path in (source, tmp_path / "back.pth"))
    assert {name.removeprefix("module.") for name in first} == set(second)
    assert all(torch.equal(value, second[name.removeprefix("module.")]) for name, value in first.items())
    assert "kernels KRSC" in capsys.readouterr().out


def test_what_does_not_fit_is_listed(published: tuple[Path, Path, nn.Module], tmp_path: Path, capsys) -> None:
    source, config, _ = published
    checkpoint = torch.load(source, weights_only=True)
    name = next(name for name in checkpoint["state_dict"] if "enc" in name)
    checkpoint["state_dict"]["module.backbone.mystery.weight"] = checkpoint["state_dict"].pop(name)
    torch.save(checkpoint, source)
    target = tmp_path / "ours.safetensors"
    assert main(["convert", str(source), str(target), "--config", str(config), "--layout", "krsc"]) == 2
    message = capsys.readouterr().err
    assert str(source) in message
    assert "missing" in message
    assert "mystery.weight" in message
    assert not target.exists()


def test_jointly_trained_files_keep_one_head(tmp_path: Path) -> None:
    config = CONFIGS / "semseg-ptv3-small.yaml"
    settings = yaml.safe_load(config.read_text())["model"]["backbone"]["init_args"]
    names = ["Structured3D", "ScanNet", "S3DIS"]
    backbone = PTv3(6, **settings, pdnorm_conditions=names)
    state = {**export_pointcept(backbone), "embedding_table.weight": torch.zeros(3, 256)}
    for i in range(3):
        head = nn.Linear(backbone.out_channels, len(CLASSES))
        state |= {f"seg_heads.{i}.{name}": value.detach() for name, value in head.named_parameters()}
    torch.save({"state_dict": state}, tmp_path / "ppt.pth")
    options = [
        f"--model.backbone.init_args.pdnorm_conditions={names}",
        "--model.backbone.init_args.pdnorm_default=S3DIS",
    ]
    target = tmp_path / "ours.safetensors"
    assert main(["convert", str(tmp_path / "ppt.pth"), str(target), "--config", str(config), *options]) == 0
    task, _, _ = load_task(target)
    assert torch.equal(task.head.linear.weight, state["seg_heads.2.weight"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.pth", "a.safetensors", "--config", str(CONFIGS / "semseg-ptv3-small.yaml")], "no such checkpoint file"),
        (["none.pth", "a.safetensors"], "--config is needed"),
        (["none.pth", "a.txt"], "the output is .safetensors"),
    ],
)
def test_bad_calls(arguments: list[str], message: str, capsys) -> None:
    assert main(["convert", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_pretrained_point_mae_becomes_a_classifier_without_its_head(tmp_path: Path, capsys) -> None:
    torch.manual_seed(0)
    config = CONFIGS.parent / "synthetic_shapes" / "cls-vit-tiny.yaml"
    settings = yaml.safe_load(config.read_text())["model"]["init_args"]["backbone"]["init_args"]
    encoder = PointViT(**settings)
    state = {"module.mask_token": torch.zeros(1, 1, 96), "module.MAE_decoder.norm.weight": torch.zeros(96)}
    for name, value in encoder.state_dict().items():
        if not name.startswith("cls_"):
            value = value[..., None] if "_conv.0.weight" in name or "_conv.3.weight" in name else value
            state[f"module.MAE_encoder.{name.replace('blocks.', 'blocks.blocks.')}"] = value
    torch.save({"base_model": state, "epoch": 300}, tmp_path / "pretrain.pth")
    target = tmp_path / "vit.safetensors"
    assert main(["convert", str(tmp_path / "pretrain.pth"), str(target), "--config", str(config)]) == 0
    assert "the file has no head" in capsys.readouterr().out
    task, _, _ = load_task(target)
    own = task.backbone.state_dict()
    assert all(torch.equal(own[name], value) for name, value in encoder.state_dict().items() if "cls_" not in name)
