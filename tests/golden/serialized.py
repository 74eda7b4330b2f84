"""Published serialized transformers: recorded stages, permutations and training steps against a network."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from harness import Golden
from torch import Tensor, nn
from torch.testing import assert_close

from pc3d import Points
from pc3d.losses import CrossEntropy, Lovasz
from pc3d.models.convert import export_pointcept, import_pointcept
from pc3d.nn.serialized import SerializedUNet, Tokens

# Of the published configs: settings that change no number, and those of which there is one value in all checkpoints.
IGNORED = {"enable_flash", "upcast_softmax", "traceable", "freeze_encoder"}
FIXED = {"qk_scale": None, "attn_drop": 0.0, "proj_drop": 0.0, "pre_norm": True, "cls_mode": False}


def config_of(golden: Golden) -> dict[str, Any]:
    """The recorded config in the arguments of the backbone; orders are shuffled as the recorded permutations say."""
    recorded = golden.meta["config"]
    assert all(recorded[name] == value for name, value in FIXED.items() if name in recorded)
    config = {name: value for name, value in recorded.items() if name not in IGNORED | FIXED.keys()}
    return {**config, "equal_windows": not recorded.get("enable_flash", True), "deterministic_orders": False}


def build(golden: Golden, backbone: SerializedUNet) -> nn.Linear | None:
    """Load the recorded weights; the head, if there is one."""
    state = golden.group("state")
    head = None
    if "seg_head.weight" in state:
        head = nn.Linear(*reversed(state["seg_head.weight"].shape))
    import_pointcept(state, backbone, head)
    return head


def cloud(golden: Golden) -> Points:
    offset = golden.tensor("in/offset").long()
    names = [name for name in ("grid_coord", "feat", "mask") if f"in/{name}" in golden.arrays]
    attrs = {name: golden.tensor(f"in/{name}") for name in names}
    return Points(golden.tensor("in/coord"), torch.cat([offset.new_zeros(1), offset]), attrs)


def replay_permutations(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orders are permuted as recorded, not at all where nothing was."""
    drawn = iter(range(1000))

    def permutation(count: int, **_: object) -> Tensor:
        name = f"in/perm{next(drawn)}"
        return golden.tensor(name) if name in golden.arrays else torch.arange(count)

    monkeypatch.setattr(torch, "randperm", permutation)


def record_stages(backbone: SerializedUNet) -> dict[str, Tokens]:
    """Fills with the output of every recorded module when the backbone runs."""
    seen: dict[str, Tokens] = {}
    modules: dict[str, nn.Module] = {"embedding": backbone.embedding}
    for name, stage in [*backbone.enc.items(), *backbone.dec.items()]:
        parts = dict(stage.items())
        modules |= {f"{name}.{part}": module for part, module in parts.items() if part in ("down", "up")}
        modules[name] = list(parts.values())[-1]
    for name, module in modules.items():
        module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    return seen


def check_outputs(golden: Golden, backbone: SerializedUNet, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    head = build(golden, backbone)
    nn.ModuleList([backbone, head or nn.Identity()]).to(device)
    replay_permutations(golden, monkeypatch)
    seen, out = record_stages(backbone), golden.group("out")
    is_step = "in/labels" in golden.arrays
    backbone.train(is_step)
    with torch.no_grad():
        feat = backbone(cloud(golden).to(device))
    close(feat if head is None else head(feat), out["logits" if is_step else "output"], "output")
    recorded = {name.split("/")[0] for name in out if name.endswith("/feat")}
    assert is_step or recorded == set(seen)
    for name in recorded:
        level = seen[name].level
        close(seen[name].feat, out[f"{name}/feat"], name)
        close(level.position, out[f"{name}/coord"], f"{name} coord")
        assert torch.equal(level.grid.cpu().long(), out[f"{name}/grid_coord"].long()), name
        assert torch.equal(level.voxels.coord[:, 0].cpu().long(), out[f"{name}/batch"]), name


def check_training_step(golden: Golden, backbone: SerializedUNet, monkeypatch: pytest.MonkeyPatch) -> None:
    head = build(golden, backbone)
    assert head is not None
    replay_permutations(golden, monkeypatch)
    backbone.train()
    labels, logits = golden.tensor("in/labels"), head(backbone(cloud(golden)))
    losses = {"ce": CrossEntropy()(logits, labels), "lovasz": Lovasz()(logits, labels)}
    for name, loss in losses.items():
        close(loss.detach(), golden.tensor(f"out/{name}"), name)
    sum(losses.values()).backward()
    after = export_pointcept(backbone, head)
    for name, expected in golden.group("out/after").items():
        close(after[name], expected, name)
    gradients, recorded = gradients_as_stored(backbone, head), golden.group("out/grad")
    assert len(recorded) == len([*backbone.parameters(), *head.parameters()])
    for name, expected in recorded.items():
        close(gradients[name], expected, name)


def check_round_trip(golden: Golden, backbone: SerializedUNet) -> None:
    exported, state = export_pointcept(backbone, build(golden, backbone)), golden.group("state")
    assert exported.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(exported[name], value), name


def gradients_as_stored(backbone: SerializedUNet, head: nn.Linear) -> dict[str, Tensor]:
    """Gradients in the published names and layout: exported as if they were the weights."""
    shadow = copy.deepcopy((backbone, head))
    with torch.no_grad():
        for module, twin in zip((backbone, head), shadow, strict=True):
            for parameter, copied in zip(module.parameters(), twin.parameters(), strict=True):
                copied.copy_(parameter.grad)
    return export_pointcept(*shadow)


def close(actual: Tensor, expected: Tensor, name: str) -> None:
    tolerance = 1e-6 + 1e-5 * float(expected.abs().max())
    assert_close(actual.cpu(), expected, rtol=0, atol=tolerance, msg=lambda text: f"{name}: {text}")
