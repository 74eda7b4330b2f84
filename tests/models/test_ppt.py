"""Networks with norms per dataset, and the jointly trained checkpoints they read."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from pc3d import InputError, Points
from pc3d.models import PTv3, SparseUNet
from pc3d.models.convert import KernelLayout, export_pointcept, export_sparse_unet, import_ppt
from pc3d.models.convert.ppt import CLASS_ROWS
from pc3d.models.heads import ClassEmbeddingHead
from pc3d.nn.norm import Condition, ConditionalNorm, PointLayerNorm

NAMES = ("ScanNet", "S3DIS", "Structured3D")  # of norms
TABLE = ("Structured3D", "ScanNet", "S3DIS")  # of contexts and heads
PTV3: dict[str, Any] = {
    "stride": (2,),
    "enc_depths": (1, 1),
    "enc_channels": (8, 16),
    "enc_num_head": (1, 2),
    "enc_patch_size": (8, 8),
    "dec_depths": (1,),
    "dec_channels": (8,),
    "dec_num_head": (1,),
    "dec_patch_size": (8,),
}
UNET: dict[str, Any] = {"base_channels": 4, "channels": (4, 6, 5, 7), "layers": (1, 1, 1, 1)}


def ptv3(**options: Any) -> PTv3:
    torch.manual_seed(0)
    adaptive = {"pdnorm_adaptive": True, "context_channels": 5, "pdnorm_default": "S3DIS"}
    return PTv3(3, **{**PTV3, "pdnorm_conditions": NAMES, **adaptive, **options})


def sparse_unet(**options: Any) -> SparseUNet:
    torch.manual_seed(0)
    adaptive = {"context_channels": 5, "norm_default": "S3DIS"}
    return SparseUNet(3, **{**UNET, "norm_conditions": NAMES, **adaptive, **options})


def cloud(dataset: str | None = None) -> Points:
    generator = torch.Generator().manual_seed(0)
    cells = torch.randperm(1000, generator=generator)[:90]
    grid = torch.stack([cells // 100, cells // 10 % 10, cells % 10], 1).int()
    attrs = {"grid_coord": grid, "feat": torch.randn(90, 3, generator=generator)}
    return Points(grid * 0.02, attrs=attrs, meta=[{} if dataset is None else {"condition": dataset}])


def scrambled(network: nn.Module) -> nn.Module:
    """The network with other numbers everywhere, so that datasets differ."""
    generator = torch.Generator().manual_seed(1)
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.1)
    return network.eval()


def published(backbone: PTv3 | SparseUNet) -> dict[str, Tensor]:
    """Its state as a jointly trained file names it, without a head."""
    if isinstance(backbone, PTv3):
        state = export_pointcept(backbone)
    else:
        state = export_sparse_unet(backbone)
        for pattern, new in (
            (r"\.norm\.", ".bns."),
            (r"(conv_input|(?:down|up)\.\d)\.0\.", r"\1.conv."),
            (r"(conv_input|(?:down|up)\.\d)\.1\.", r"\1.bn."),
            (r"\.proj\.0\.", ".proj_conv."),
            (r"\.proj\.1\.", ".proj_norm."),
        ):
            state = {re.sub(pattern, new, name): value for name, value in state.items()}
    table = state.pop("backbone.embedding_table.weight", torch.randn(3, 5))
    state["embedding_table.weight"] = table[[NAMES.index(name) for name in TABLE]]
    return {f"module.{name}": value for name, value in state.items()}


def test_a_norm_is_chosen_and_modulated_by_the_dataset() -> None:
    norm = scrambled(ConditionalNorm(PointLayerNorm, 4, conditions=2, context_channels=3))
    feat, context = torch.randn(6, 4), torch.randn(1, 3)
    shift, scale = F.linear(F.silu(context), norm.modulation[1].weight, norm.modulation[1].bias).split(4, 1)
    chosen = F.layer_norm(feat, (4,), norm.norm[1].weight, norm.norm[1].bias)
    assert_close(norm(feat, Condition(1, context)), chosen * (1 + scale) + shift)


@pytest.mark.parametrize("make", [ptv3, sparse_unet])
def test_clouds_name_their_dataset(make: Any) -> None:
    network = scrambled(make())
    by_name = {name: network(cloud(name)) for name in NAMES}
    assert not torch.allclose(by_name["ScanNet"], by_name["S3DIS"], rtol=1e-2)
    assert torch.equal(network(cloud()), by_name["S3DIS"]), "the default"
    network.train()
    network(cloud("ScanNet")).sum().backward()
    trained = {name for name, p in network.named_parameters() if p.grad is not None}
    assert {"embedding_table.weight"} <= trained
    assert not any(re.search(r"\.norm\.[12]\.", name) for name in trained), "only norms of the batch's dataset"


@pytest.mark.parametrize("make", [ptv3, sparse_unet])
def test_jointly_trained_files(make: Any) -> None:
    source, target = scrambled(make()), make()
    state = published(source)
    assert state.keys() >= (
        {
            "module.backbone.enc.enc0.block0.norm1.0.norm.2.weight",
            "module.backbone.enc.enc1.down.norm.0.modulation.1.bias",
        }
        if make is ptv3
        else {
            "module.backbone.conv_input.bn.bns.2.running_mean",
            "module.backbone.up.1.bn.modulation.1.weight",
            "module.backbone.dec.0.block0.proj_conv.weight",
            "module.backbone.dec.0.block0.proj_norm.bns.0.bias",
        }
    )
    head, width = nn.Linear(source.out_channels, 6), source.out_channels
    heads = {f"module.seg_heads.{i}.weight": torch.full((6, width), float(i)) for i in range(3)}
    heads |= {f"module.seg_heads.{i}.bias": torch.zeros(6) for i in range(3)}
    import_ppt({"state_dict": {**state, **heads}}, target, head, layout=KernelLayout.KRSC)
    assert_close(target.eval()(cloud("ScanNet")), source(cloud("ScanNet")))
    assert bool((head.weight == TABLE.index("S3DIS")).all()), "the head of the default dataset"


def test_classes_as_vectors() -> None:
    backbone, head = ptv3(pdnorm_adaptive=False, pdnorm_default="ScanNet"), ClassEmbeddingHead(8, 20, 7)
    vectors = F.normalize(torch.randn(36, 7))
    text = {"proj_head.weight": torch.randn(7, 8), "proj_head.bias": torch.randn(7)}
    text |= {"class_embedding": vectors, "logit_scale": torch.tensor(2.0)}
    state = {**published(backbone), **{f"module.{name}": value for name, value in text.items()}}
    import_ppt(state, backbone, head, layout=KernelLayout.KRSC)
    features = torch.randn(5, 8)
    projected = features @ text["proj_head.weight"].T + text["proj_head.bias"]
    cosine = F.cosine_similarity(projected[:, None], vectors[list(CLASS_ROWS["ScanNet"])][None], dim=-1)
    assert_close(head(features, cloud()), torch.tensor(2.0).exp() * cosine)
    assert {name for name, _ in head.named_parameters()} == {"proj.weight", "proj.bias"}
    assert [len(rows) for rows in CLASS_ROWS.values()] == [25, 20, 13]


def test_what_does_not_fit() -> None:
    state = published(ptv3())
    with pytest.raises(InputError, match="the backbone has norms for no datasets; set pdnorm_conditions"):
        import_ppt(state, PTv3(3, **PTV3))
    with pytest.raises(InputError, match="set pdnorm_default or norm_default to one"):
        import_ppt(state, ptv3(pdnorm_default=None), nn.Linear(8, 13))
    with pytest.raises(InputError, match=r"has no 'seg_heads.2.weight' for this Linear; try head: ClassEmbeddingHead"):
        import_ppt(state, ptv3(), nn.Linear(8, 13))
    with pytest.raises(InputError, match="condition 'ADE' of clouds that name none is not one of ScanNet"):
        ptv3(pdnorm_default="ADE")
    with pytest.raises(InputError, match="nothing to modulate without pdnorm_conditions"):
        ptv3(pdnorm_conditions=(), pdnorm_default=None)
    with pytest.raises(InputError, match="context_channels has no effect without norm_conditions"):
        sparse_unet(norm_conditions=(), norm_default=None)
