"""LoRA in the files of the Hugging Face library: what is in them, and that the library itself reads and writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pc3d.errors import InputError
from pc3d.models import PointViT, SparseUNet
from pc3d.peft import BitFit, LoRA, attach, attached, export_lora, import_lora
from pc3d.points import Points

COORD = torch.rand(70, 3, generator=torch.Generator().manual_seed(0))
POINTS = Points(COORD, torch.tensor([0, 40, 70]), {"feat": COORD})
LORAS = {
    "plain": LoRA(2),
    "alpha": LoRA(2, alpha=6.0, ranks={r"blocks\.0\.attn": 3}, targets=["blocks", "pos_embed"]),
    "stabilized": LoRA(2, ranks={"fc1": 4}, rank_stabilized=True),
}


def network(seed: int = 1) -> PointViT:
    torch.manual_seed(seed)
    return PointViT(channels=12, depth=2, num_heads=2, patches=8, patch_points=4, stages=(1,)).eval()


def features(backbone: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return backbone.eval()(POINTS)


def tuned(method: LoRA) -> PointViT:
    base = network()
    attach(base, method)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return base


@pytest.mark.parametrize("how", LORAS)
def test_there_and_back(how: str, tmp_path: Path) -> None:
    base = tuned(LORAS[how])
    weights, _ = export_lora(tmp_path, base)
    shapes = {key: tuple(value.shape) for key, value in load_file(weights).items()}
    rank = {"plain": 2, "alpha": 3, "stabilized": 2}[how]
    assert shapes["base_model.model.blocks.0.attn.qkv.lora_A.weight"] == (rank, 12)
    assert shapes["base_model.model.blocks.0.attn.qkv.lora_B.weight"] == (36, rank)
    assert len(shapes) == 2 * (8 if how != "alpha" else 10)
    fresh = network()
    import_lora(tmp_path, fresh, "other")
    assert torch.equal(features(fresh), features(base))
    of_task = {key.replace("model.blocks", "model.backbone.blocks"): v for key, v in load_file(weights).items()}
    save_file({key.replace("model.pos", "model.backbone.pos"): v for key, v in of_task.items()}, weights)
    again = network()
    import_lora(tmp_path, again)
    assert torch.equal(features(again), features(base))


@pytest.mark.parametrize("how", LORAS)
def test_the_library_reads_and_writes_them(how: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", minversion="0.10")  # not the folder of these tests
    base = tuned(LORAS[how])
    export_lora(tmp_path / "ours", base)
    theirs = peft.PeftModel.from_pretrained(network(), tmp_path / "ours")
    torch.testing.assert_close(features(theirs), features(base))
    theirs.save_pretrained(tmp_path / "theirs")
    fresh = network()
    import_lora(tmp_path / "theirs", fresh)
    torch.testing.assert_close(features(fresh), features(base))


def test_convolutions_have_kernels_in_the_first_matrix(tmp_path: Path) -> None:
    base = network()
    base.pos_embed[0] = torch.nn.Conv1d(3, 5, 4)  # no layer of this network: only the file is looked at
    attach(base, LoRA(2, targets=[r"pos_embed\.0"]))
    found = load_file(export_lora(tmp_path, base)[0])
    assert found["base_model.model.pos_embed.0.lora_A.weight"].shape == (2, 3, 4)
    assert found["base_model.model.pos_embed.0.lora_B.weight"].shape == (5, 2, 1)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'default' is no LoRA adapter of this PointViT \(it has: none"):
        export_lora(tmp_path, network())
    base = network()
    attach(base, BitFit())
    with pytest.raises(InputError, match=r"it has: default \(BitFit\)"):
        export_lora(tmp_path, base)
    sparse = SparseUNet(3, base_channels=4, channels=(4, 6, 5, 7), layers=(1, 1, 1, 1))
    attach(sparse, LoRA(2))
    with pytest.raises(InputError, match=r"cannot be on '.*', a SubMConv3d"):
        export_lora(tmp_path, sparse)
    with pytest.raises(InputError, match="not a readable LoRA adapter"):
        import_lora(tmp_path, network())
    weights, about = export_lora(tmp_path, tuned(LORAS["plain"]))
    config, tensors, fresh = json.loads(about.read_text()), load_file(weights), network()
    for change, message in (
        ({"use_dora": True}, "'use_dora' is True"),
        ({"peft_type": "IA3"}, "'peft_type' is 'IA3'"),
        ({"alpha_pattern": {"qkv": 5}}, "'alpha_pattern' gives layers factors of their own"),
    ):
        about.write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=message):
            import_lora(tmp_path, fresh)
    about.write_text(json.dumps(config))
    key = "base_model.model.blocks.1.mlp.fc2.lora_B.weight"
    for some, message in (
        ({**tensors, key: torch.ones(3, 2)}, r"lora_B of 'blocks.1.mlp.fc2' is \(3, 2\), \(12, 2\) fits"),
        ({name: v for name, v in tensors.items() if name != key}, r"is \(0,\), \(12, 2\) fits"),
        ({**tensors, "extra": torch.ones(1)}, "'extra' is no matrix"),
        ({name.replace("mlp", "ffn"): v for name, v in tensors.items()}, "finds no layer in PointViT"),
    ):
        save_file(some, weights)
        with pytest.raises(InputError, match=message):
            import_lora(tmp_path, fresh)
        assert not attached(fresh)
