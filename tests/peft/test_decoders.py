"""Adapters of networks with a decoder that no pre-training brings: it trains with them, and is in their file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pc3d.errors import InputError
from pc3d.models import PointViT, Sonata
from pc3d.models.convert import import_point_vit
from pc3d.peft import (
    IDPT,
    Adaptation,
    IDPTSegmentation,
    LinearProbe,
    LoRA,
    attach,
    base_state,
    detach,
    disabled,
    fingerprint,
    load_adapter,
    save_adapter,
)
from pc3d.peft.weights import is_adapted
from pc3d.points import Points
from pc3d.tasks.heads import LinearHead

METHODS = {
    "lora": lambda: LoRA(2),
    "idpt": IDPTSegmentation,
    "idpt-graph": lambda: IDPTSegmentation("dgcnn_light2", 4),
    "idpt-block": lambda: IDPTSegmentation("transformer"),
}


def clouds(*counts: int) -> Points:
    coord = torch.rand(sum(counts), 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    category = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return Points(coord, torch.tensor([0, *counts]).cumsum(0), {"feat": coord, "category": category})


POINTS = clouds(40, 30)


def network(seed: int = 1, decoder_seed: int = 1) -> PointViT:
    """With an encoder of one seed and a decoder of another."""
    options = {"channels": 12, "depth": 3, "num_heads": 2, "patches": 8, "patch_points": 4, "stages": (0, 2)}
    torch.manual_seed(seed)
    made = PointViT(**options, decoder=(16, 8, 12, 8), categories=2)
    torch.manual_seed(decoder_seed)
    assert made.decoder is not None
    for parameter in made.decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def features(backbone: PointViT) -> Tensor:
    with torch.no_grad():
        return backbone.eval()(POINTS)


def train(backbone: PointViT) -> None:
    backbone.train()
    optimizer = torch.optim.AdamW([p for p in backbone.parameters() if p.requires_grad], 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        backbone(POINTS).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("how", METHODS)
def test_the_decoder_belongs_to_the_adapter(how: str, tmp_path: Path) -> None:
    base, method = network(), METHODS[how]()
    encoder = {name: value.clone() for name, value in base.state_dict().items() if not name.startswith("decoder.")}
    before, decoder = features(base), {n: v.clone() for n, v in base.state_dict().items() if n.startswith("decoder.")}
    entry = attach(base, method)
    assert torch.equal(features(base), before) == (how == "lora")
    trains = {name for name, p in base.named_parameters() if p.requires_grad}
    assert trains <= entry.added
    assert {name for name, _ in base.named_parameters() if name.startswith("decoder.")} <= trains
    assert not any("adapted" in name for name in entry.added if name.startswith("decoder."))
    train(base)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in base.parameters() if p.requires_grad)
    now = base.state_dict()
    assert all(torch.equal(now[name], value) for name, value in encoder.items())
    assert not any(torch.equal(now[name], value) for name, value in decoder.items()), "statistics of its norms too"
    assert fingerprint(base_state(base)) == fingerprint(encoder)

    after = features(base)
    alone = torch.cat([base(POINTS[i]) for i in range(2)])
    torch.testing.assert_close(alone, after, rtol=1e-4, atol=1e-5)
    file, _ = save_adapter(tmp_path / "adapter", base)
    fresh = network(decoder_seed=5)
    load_adapter(file, fresh)
    assert torch.equal(features(fresh), after)
    with pytest.raises(InputError, match="trained on another"):
        load_adapter(file, network(seed=2))
    with pytest.raises(InputError, match="'decoder' of this PointViT trains with its adapter 'default'"):
        attach(base, LoRA(2), "second")
    with disabled(base):
        plain = features(base)
    detach(base)
    assert torch.equal(features(base), plain)
    assert base.state_dict().keys() == encoder.keys() | decoder.keys()


def test_a_decoder_behind_a_frozen_encoder() -> None:
    """Decoder probing: of a serialized backbone nothing but its decoder trains."""
    sizes = {"enc_depths": [1, 1], "enc_channels": [12, 24], "enc_num_head": [1, 2], "enc_patch_size": [32, 32]}
    decoder = {"dec_depths": [1], "dec_channels": [12], "dec_num_head": [1], "dec_patch_size": [32]}
    base = Sonata(3, stride=[2], **sizes, **decoder, enc_mode=False)
    attach(base, LinearProbe())
    trains = {name for name, p in base.named_parameters() if p.requires_grad}
    assert trains == {name for name, _ in base.named_parameters() if name.startswith("dec.")}
    detach(base)
    attach(base, LoRA(2))
    assert not [name for name, module in base.named_modules() if name.startswith("dec.") and is_adapted(module)]
    assert [name for name, module in base.named_modules() if name.startswith("enc.") and is_adapted(module)]


def published(backbone: PointViT, head: LinearHead) -> dict[str, Tensor]:
    """State of an adapted network under its published names."""
    names = [
        (r"^adapters\.default\.prompts\.(\d)\.edges\.(\d)\.(linear|norm)\.", lambda m: f"dgcnn_cls{2 * int(m[1])}.conv"
         f"{int(m[2]) + 1}.{int(m[3] == 'norm')}."),
        (r"^adapters\.default\.prompts\.(\d)\.(fuse|norm)\.", lambda m: f"dgcnn_cls{2 * int(m[1])}.conv5."
         f"{int(m[2] == 'norm')}."),
        (r"^adapters\.default\.prompt_pos$", "prompt_cls_pos"),
        (r"^blocks\.", "blocks.blocks."),
        (r"^decoder\.category\.", "label_conv_cls."),
        (r"^decoder\.spread\.(\d)\.0\.", r"propagation_0_cls.mlp_convs.\1."),
        (r"^decoder\.spread\.(\d)\.1\.", r"propagation_0_cls.mlp_bns.\1."),
        (r"^decoder\.join\.0\.", "convs1_cls."), (r"^decoder\.join\.1\.", "bns1_cls."),
        (r"^decoder\.last\.1\.0\.", "convs2_cls."), (r"^decoder\.last\.1\.1\.", "bns2_cls."),
        (r"^linear\.", "convs3_cls."),
    ]  # fmt: skip
    found = {}
    for name, value in (backbone.state_dict() | head.state_dict()).items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        found[name] = value.clone()
        if twice := re.match(r"(dgcnn_cls\d\.)conv(\d)\.1\.(.+)", name):
            found[f"{twice[1]}bn{twice[2]}.{twice[3]}"] = value.clone()
    return found


def test_published_names_of_a_segmentation() -> None:
    base, head = network(), LinearHead(8, 3)
    attach(base, METHODS["idpt-graph"]())
    train(base)
    state = published(base, head)
    fresh, its_head = network(seed=3), LinearHead(8, 3)
    attach(fresh, METHODS["idpt-graph"]())
    assert import_point_vit({"model_state_dict": state}, fresh, its_head) == []
    assert torch.equal(features(fresh), features(base))
    assert torch.equal(its_head.linear.weight, head.linear.weight)
    state["dgcnn_cls2.bn1.weight"] += 1
    with pytest.raises(InputError, match=r"'dgcnn_cls2.bn1.weight' and its copy in 'dgcnn_cls2.conv1.1.weight' differ"):
        import_point_vit({"model_state_dict": state}, fresh, its_head)


def test_wrong_networks_are_refused() -> None:
    levels = PointViT(channels=12, num_heads=2, levels=(8, 4))
    attempts: list[tuple[PointViT, Adaptation, str]] = [
        (PointViT(channels=12, num_heads=2), IDPTSegmentation(), "wants PointViT with Point-MAE's decoder"),
        (levels, IDPTSegmentation(), "wants PointViT with Point-MAE's decoder"),
        (levels, IDPT(), "a PointViT without decoder"),
        (network(), LoRA(targets=["^decoder"]), "that '.decoder' matches"),
    ]
    for backbone, method, message in attempts:
        with pytest.raises(InputError, match=message):
            attach(backbone, method)
    with pytest.raises(InputError, match=r"IDPTSegmentation\.neighbours: 0"):
        IDPTSegmentation(neighbours=0)
    with pytest.raises(InputError, match=r"IDPTSegmentation\.prompt_network: 'cnn'"):
        IDPTSegmentation("cnn")
