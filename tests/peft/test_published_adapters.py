"""IDPT, DAPT, PointGST, Point-PEFT: published numbers of parameters, what trains, files, clouds by themselves."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pc3d.errors import InputError
from pc3d.models import PointViT, SparseUNet
from pc3d.models.convert import import_point_vit
from pc3d.models.heads import MLPHead
from pc3d.peft import (
    DAPT,
    IDPT,
    Adaptation,
    LoRA,
    PointGST,
    PointPEFT,
    attach,
    count_parameters,
    detach,
    disabled,
    load_adapter,
    prepare,
    save_adapter,
)
from pc3d.peft.idpt import GraphPrompt, nearest_features
from pc3d.peft.pointgst import SpectralAdapter, eigenbasis, laplacian
from pc3d.points import Points
from pc3d.tasks import Classification

METHODS = {
    "idpt": lambda: IDPT(1),
    "idpt-light": lambda: IDPT(0, "dgcnn_light", "promptonly"),
    "idpt-block": lambda: IDPT(1, "transformer", "promptcls", train_prompt_position=False),
    "dapt": lambda: DAPT(3),
    "dapt-plain": lambda: DAPT(3, class_token=False, prompts="max", patches="mean", identity=True),
    "pointgst": lambda: PointGST(3, 4),
    "pointgst-fourier": lambda: PointGST(3, 4, "UT", signs=True),
    "point-peft": lambda: PointPEFT(6, 3, prompts=5, prompt_blocks=1),
}
# Learned and never used: prompts of the last six blocks, and a factor in every block.
UNUSED = 6 * (10 * 384 + 2 * 8 * 384 + 8 + 384) + 12


def clouds(*counts: int, seed: int = 0) -> Points:
    coord = torch.rand(sum(counts), 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return Points(coord, torch.tensor([0, *counts]).cumsum(0), {"feat": coord})


def network(seed: int = 1) -> PointViT:
    torch.manual_seed(seed)
    return PointViT(channels=12, depth=2, num_heads=2, patches=8, patch_points=4, stages=(1,)).eval()


def features(backbone: PointViT, points: Points) -> Tensor:
    with torch.no_grad():
        return backbone.eval()(points)


@pytest.mark.parametrize(
    ("method", "classes", "expected"),
    [
        (IDPT(11, train_prompt_position=False), 15, 1_696_783),
        (IDPT(11, train_prompt_position=False), 40, 1_703_208),
        (IDPT(11, feature="promptonly", train_prompt_position=False), 15, 1_500_175),
        (IDPT(11), 15, 1_696_783 + 384),
        (DAPT(), 15, 1_087_771),
        (DAPT(patches=None), 15, 989_467),
        (DAPT(72, prompts=None), 40, 1_069_716),
        (PointGST(), 15, 622_831),
        (PointGST(), 40, 629_256),
        (PointPEFT(), 15, 773_017 - UNUSED),
        (PointPEFT(), 40, 779_442 - UNUSED),
    ],
)
def test_published_numbers_of_parameters(method: Adaptation, classes: int, expected: int) -> None:
    """Of Point-MAE with the head; those of the papers are 1.7 M, 1.1 M, 0.6 M and 0.7 to 0.8 M."""
    with torch.device("meta"):
        base = PointViT(patches=128)
        attach(base, method)
        head = MLPHead(base.out_channels, classes, (256, 256), bias=True)
    assert count_parameters(base).tunable + count_parameters(head).tunable == expected


@pytest.mark.parametrize("how", METHODS)
def test_life_of_an_adapter(how: str, tmp_path: Path) -> None:
    base, points = network(), clouds(40, 30)
    state, before = copy.deepcopy(base.state_dict()), features(base, points)
    torch.manual_seed(4)
    attach(base, METHODS[how]())
    prepare(base, lambda count: [clouds(*[20 + i for i in range(count)], seed=7)])
    assert (how[:8] == "pointgst") == torch.equal(features(base, points), before)
    head = MLPHead(base.out_channels, 3, (8,))
    base.train()
    optimizer = torch.optim.AdamW([p for p in base.parameters() if p.requires_grad], 1e-2)
    seen: dict[str, bool] = {}
    for _ in range(3):
        optimizer.zero_grad()
        head(base(points), points).square().sum().backward()
        for name, parameter in base.named_parameters():
            seen[name] = seen.get(name, False) or bool(parameter.grad is not None and parameter.grad.any())
        optimizer.step()
    assert {name for name, p in base.named_parameters() if p.requires_grad} >= {n for n, hit in seen.items() if hit}
    idle = {name for name, p in base.named_parameters() if p.requires_grad and not seen[name]}
    assert not {name for name in idle if "score" not in name}, "every part learns"
    assert all(torch.equal(base.state_dict()[name], value) for name, value in state.items())

    after = features(base, points)
    alone = torch.cat([features(base, points[i]) for i in range(2)])
    torch.testing.assert_close(alone, after, rtol=1e-4, atol=1e-5)
    assert after.shape != before.shape or not torch.allclose(after, before)
    file, _ = save_adapter(tmp_path / "adapter", base, head=head)
    fresh, its_head = network(), MLPHead(base.out_channels, 3, (8,))
    load_adapter(file, fresh, head=its_head)
    assert torch.equal(features(fresh, points), after)
    assert torch.equal(its_head.eval()(after, points), head.eval()(after, points))
    with disabled(base):
        assert torch.equal(features(base, points), before)
    detach(base)
    assert base.out_channels == 24
    assert torch.equal(features(base, points), before)


@pytest.mark.parametrize("how", METHODS)
def test_frozen_blocks_keep_their_drop_path_in_a_task(how: str) -> None:
    """It regularises the adapter, as published; the norms of the patch encoder stay as they were."""
    base = network()
    task = Classification(base, ["a", "b"], peft=METHODS[how](), freeze=["^head"]).train()
    assert all(block.drop_path.training for block in base.blocks)
    assert not any(m.training for m in base.encoder.modules() if isinstance(m, torch.nn.BatchNorm1d))
    assert not task.head.training


def test_published_names_of_the_transformer_prompt() -> None:
    base, points = network(), clouds(40, 30)
    attach(base, IDPT(1, "transformer"))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    published = {}
    for name, value in base.state_dict().items():
        trained = base.state_dict().get(f"adapters.default.{name}", 0)  # of the class token
        name = re.sub(r"^adapters\.default\.(prompt\.block|prompt_pos)", r"\1", name)
        name = re.sub(r"^blocks\.(?=\d)", "blocks.blocks.", name.replace("prompt.block.", "blocks.cls."))
        if not name.startswith("adapters."):
            published[name] = value + trained
    fresh = network(seed=2)
    attach(fresh, IDPT(1, "transformer"))
    assert import_point_vit({"base_model": published}, fresh) == []
    torch.testing.assert_close(features(fresh, points), features(base, points))


def test_prompt_of_idpt_is_that_of_the_instance() -> None:
    base, points = network(), clouds(40, 40)
    attach(base, IDPT(0))
    tokens = base.tokens(points)
    prompt = base.adapters["default"].prompt.eval()
    assert isinstance(prompt, GraphPrompt)
    first = prompt(tokens)
    assert not torch.allclose(first[0], first[1])
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    turned = type(tokens)(tokens.feat[:, torch.cat([torch.zeros(1).long(), order + 1])], tokens.position,
                          tokens.centres, 1)  # fmt: skip
    torch.testing.assert_close(prompt(turned), first)


def test_nearest_features_are_those_of_float32_in_mixed_precision() -> None:
    tokens = 3 + torch.randn(2, 40, 12, generator=torch.Generator().manual_seed(0))
    expected = torch.cdist(tokens.double(), tokens.double()).topk(5, largest=False).indices
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest_features(tokens, 5)
    assert torch.equal(found.sort(-1).values, expected.sort(-1).values)


def test_blocks_before_the_prompt_need_no_gradient_but_for_the_class_token() -> None:
    base, points = network(), clouds(40)
    attach(base, IDPT(1))
    part = base.adapters["default"]
    part.cls_token.requires_grad_(False)
    part.cls_pos.requires_grad_(False)
    graph = []
    base.blocks[0].register_forward_hook(lambda module, args, out: graph.append(out.feat.requires_grad))
    base(points)
    assert graph == [False]


def test_spectral_adapter_without_weights_is_twice_the_tokens() -> None:
    """What U and its transpose do cancels: ``SiLU(p) + 2 p`` for patches, ``SiLU`` for the class token."""
    for transform in ("U", "UT"):
        base = network()
        attach(base, PointGST(3, 4, transform))
        part = base.adapters["default"]
        centres = clouds(8, 8).coord.view(2, 8, 3)
        adapter: SpectralAdapter = part.blocks[0]
        torch.nn.init.eye_(adapter.up.weight)
        x = torch.randn(2, 9, 12)
        low = adapter.down(x)
        expected = torch.nn.functional.silu(low)
        expected[:, 1:] += 2 * low[:, 1:]
        got = adapter(x, part.bases(centres))
        torch.testing.assert_close(got[..., :3], expected, rtol=1e-4, atol=1e-5)


def test_graphs_of_awkward_centres() -> None:
    centres = clouds(30).coord.view(1, 30, 3)
    matrix = laplacian(centres)
    for moved in (centres * 3, centres + 5):
        torch.testing.assert_close(laplacian(moved), matrix, rtol=1e-3, atol=1e-4)
    other = clouds(30, seed=1).coord.view(1, 30, 3) / 50
    torch.testing.assert_close(laplacian(torch.cat([centres, other]))[:1], matrix)
    values, vectors = eigenbasis(matrix, signs=True)
    torch.testing.assert_close(matrix @ vectors, vectors * values[:, None], rtol=0, atol=1e-5)
    for same in (torch.zeros(1, 30, 3), torch.cat([centres[:, :15], centres[:, :15]], 1), centres[:, :1]):
        assert eigenbasis(laplacian(same))[1].isfinite().all()
    with pytest.raises(InputError, match="coincide"):
        laplacian(torch.zeros(1, 8, 3), published_distances=True)


def test_wrong_settings_name_the_option() -> None:
    for make, message in (
        (lambda: IDPT(prompt_network="cnn"), "IDPT.prompt_network: 'cnn'"),
        (lambda: IDPT(feature="none"), "IDPT.feature"),
        (lambda: DAPT(rank=0), "DAPT.rank"),
        (lambda: DAPT(class_token=False, prompts=None, patches=None), "the feature is empty"),
        (lambda: PointGST(transform="V"), "PointGST.transform"),
        (lambda: attach(network(), IDPT(2)), r"IDPT.layer: 2; the network has blocks 0\.\.1"),
        (lambda: attach(network(), PointGST(local=5)), "5 does not divide the 8 patches"),
        (lambda: attach(SparseUNet.small(3), DAPT()), "SparseUNet is no transformer over patches"),
        (lambda: attach(PointViT(decoder=(8, 8, 8, 8)), DAPT()), "a PointViT without decoder"),
    ):
        with pytest.raises(InputError, match=message):
            make()
    base = network()
    attach(base, LoRA(2), "a")
    attach(base, DAPT(2), "b")
    with pytest.raises(InputError, match="as 'b' does"):
        attach(base, IDPT(0), "c")
