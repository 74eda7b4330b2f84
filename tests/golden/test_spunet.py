"""SparseUNet against SpUNet-v1m1 of Pointcept: every stage, and one training step with all gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from harness import Golden, golden_files, needs_gpu, sorted_rows
from torch import Tensor, nn
from torch.testing import assert_close

from pc3d import Points, Voxels
from pc3d.losses import CrossEntropy, Lovasz
from pc3d.models import SparseUNet
from pc3d.models.convert import export_sparse_unet, import_sparse_unet

FILES = golden_files("spunet")


def build(golden: Golden) -> tuple[SparseUNet, nn.Linear | None]:
    """Backbone and head with the recorded weights, through the importer."""
    config: dict[str, Any] = dict(golden.meta["config"])
    num_classes = config.pop("num_classes")
    backbone = SparseUNet(**config)
    head = nn.Linear(backbone.out_channels, num_classes) if num_classes else None
    import_sparse_unet(golden.group("state"), backbone, head)
    return backbone, head


def cloud(golden: Golden) -> Points:
    offset = golden.tensor("in/offset")
    attrs = {"grid_coord": golden.tensor("in/grid_coord"), "feat": golden.tensor("in/feat")}
    return Points(golden.tensor("in/coord"), torch.cat([offset.new_zeros(1), offset]), attrs)


def record_stages(backbone: SparseUNet) -> dict[str, Voxels]:
    """Fills with the output of every stage, under its published name, when the backbone runs."""
    stages: dict[str, Voxels] = {}
    modules = {"conv_input": backbone.conv_input}
    for kind in ("down", "enc", "up", "dec"):
        modules |= {f"{kind}{s}": module for s, module in enumerate(getattr(backbone, kind))}
    for name, module in modules.items():
        module.register_forward_hook(lambda _, __, out, name=name: stages.update({name: out}))
    return stages


def close(actual: Tensor, expected: Tensor, name: str) -> None:
    tolerance = 1e-6 + 1e-5 * float(expected.abs().max())
    assert_close(actual.cpu(), expected, rtol=0, atol=tolerance, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("golden", FILES)
def test_outputs(golden: Golden) -> None:
    check_outputs(golden, "cpu")


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("golden", FILES)
def test_outputs_on_gpu(golden: Golden) -> None:
    check_outputs(golden, "cuda")


def check_outputs(golden: Golden, device: str) -> None:
    """Evaluation mode for files with recorded stages, training mode for a recorded step."""
    backbone, head = build(golden)
    nn.ModuleList([backbone, head or nn.Identity()]).to(device)
    stages = record_stages(backbone)
    out = golden.group("out")
    step = "in/labels" in golden.arrays
    backbone.train(step)
    with torch.no_grad():
        features = backbone(cloud(golden).to(device))
    close(features if head is None else head(features), out["logits" if step else "output"], "output")
    recorded = {name.split("/")[0] for name in out if name.endswith("/indices")}
    assert step or recorded == set(stages)
    for name in recorded:
        rows = sorted_rows(stages[name].coord).to(device)
        assert_close(stages[name].coord[rows].cpu(), out[f"{name}/indices"], rtol=0, atol=0)
        close(stages[name].feat[rows], out[f"{name}/feat"], name)


@pytest.mark.parametrize("golden", FILES)
def test_training_step(golden: Golden) -> None:
    if "in/labels" not in golden.arrays:
        pytest.skip("no training step recorded")
    backbone, head = build(golden)
    assert head is not None
    backbone.train()
    labels, logits = golden.tensor("in/labels"), head(backbone(cloud(golden)))
    losses = {"ce": CrossEntropy()(logits, labels), "lovasz": Lovasz()(logits, labels)}
    for name, loss in losses.items():
        close(loss.detach(), golden.tensor(f"out/{name}"), name)
    sum(losses.values()).backward()

    after = export_sparse_unet(backbone, head)
    for name, expected in golden.group("out/after").items():
        close(after[name], expected, name)
    gradients, recorded = gradients_as_stored(backbone, head), golden.group("out/grad")
    assert len(recorded) == len([*backbone.parameters(), *head.parameters()])
    for name, expected in recorded.items():
        close(gradients[name], expected, name)


@pytest.mark.parametrize("golden", FILES)
def test_export_round_trip(golden: Golden) -> None:
    exported, state = export_sparse_unet(*build(golden)), golden.group("state")
    assert exported.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(exported[name], value), name


def gradients_as_stored(backbone: SparseUNet, head: nn.Linear) -> dict[str, Tensor]:
    """Gradients in the published names and layout: exported as if they were the weights."""
    shadow = copy.deepcopy((backbone, head))
    with torch.no_grad():
        for module, twin in zip((backbone, head), shadow, strict=True):
            for parameter, copied in zip(module.parameters(), twin.parameters(), strict=True):
                copied.copy_(parameter.grad)
    return export_sparse_unet(*shadow)
