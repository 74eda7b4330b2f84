"""Point Cloud Transformer: its formulas written out, published files, clouds of all sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from pc3d.cli import main
from pc3d.errors import InputError
from pc3d.models import PCT
from pc3d.models.convert import import_pct
from pc3d.models.heads import MLPHead
from pc3d.ops.neighbours import farthest_points
from pc3d.points import Points
from pc3d.tasks import load_task

CONFIGS = Path(__file__).parents[2] / "configs" / "modelnet40"

SIZES = {"channels": 8, "key_points": (24, 12), "neighbours": 6, "out_channels": 20}


def clouds(*counts: int, extra: int = 0) -> Points:
    generator = torch.Generator().manual_seed(0)
    coord = torch.randn(sum(counts), 3, generator=generator)
    feat = torch.cat([coord, torch.randn(sum(counts), extra, generator=generator)], 1)
    return Points(coord, torch.tensor([0, *counts]).cumsum(0), {"feat": feat})


def randomised(module: nn.Module) -> nn.Module:
    """Running statistics and affine weights that matter."""
    torch.manual_seed(1)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm1d):
            norm.running_mean.normal_(std=0.3)
            norm.running_var.uniform_(0.5, 2)
            nn.init.normal_(norm.weight, 1, 0.2)
            nn.init.normal_(norm.bias, 0, 0.2)
    return module.eval()


def published(width: int = 8, out: int = 20, classes: int = 4) -> dict[str, Tensor]:
    """A file as the PointSP repository writes it, of random weights."""
    generator = torch.Generator().manual_seed(2)
    state: dict[str, Tensor] = {}

    def conv(name: str, a: int, b: int, axes: int = 1, bias: bool = False) -> None:
        state[f"{name}.weight"] = torch.randn(b, a, *[1] * axes, generator=generator) * a**-0.5
        if bias:
            state[f"{name}.bias"] = torch.randn(b, generator=generator) * 0.1

    def norm(name: str, channels: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.rand(2, channels, generator=generator)
        state[f"{name}.running_mean"] = torch.randn(channels, generator=generator) * 0.2
        state[f"{name}.running_var"] = torch.rand(channels, generator=generator) + 0.5
        state[f"{name}.num_batches_tracked"] = torch.tensor(3)

    def mlp(prefix: str, a: int, b: int) -> None:
        for layer, (i, o) in enumerate(((a, b), (b, b)), 1):
            conv(f"{prefix}conv{layer}", i, o)
            norm(f"{prefix}bn{layer}", o)

    mlp("", 3, width)
    mlp("gather_local_0.", 2 * width, 2 * width)
    mlp("gather_local_1.", 4 * width, 4 * width)
    mlp("pt_last.", 4 * width, 4 * width)
    for i in range(1, 5):
        name = f"pt_last.sa{i}"
        conv(f"{name}.q_conv", 4 * width, width)
        state[f"{name}.k_conv.weight"] = state[f"{name}.q_conv.weight"].clone()
        conv(f"{name}.v_conv", 4 * width, 4 * width, bias=True)
        conv(f"{name}.trans_conv", 4 * width, 4 * width, bias=True)
        norm(f"{name}.after_norm", 4 * width)
    conv("conv_fuse.0", 20 * width, out)
    norm("conv_fuse.1", out)
    conv("linear1", out, 512, axes=0)
    norm("bn6", 512)
    conv("linear2", 512, 256, axes=0, bias=True)
    norm("bn7", 256)
    conv("linear3", 256, classes, axes=0, bias=True)
    return {f"module.model.{name}": value for name, value in state.items()}


def written_out(state: dict[str, Tensor], coord: Tensor, key_points: tuple[int, int], neighbours: int) -> Tensor:
    """Logits of one cloud, channels first, straight from the published layers."""
    w = {name.removeprefix("module.model."): value for name, value in state.items()}

    def conv(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"{name}.weight"].flatten(1), w.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        scale = w[f"{name}.weight"] / (w[f"{name}.running_var"] + 1e-5).sqrt()
        return (x - w[f"{name}.running_mean"]) * scale + w[f"{name}.bias"]

    def mlp(prefix: str, x: Tensor) -> Tensor:
        for layer in (1, 2):
            x = norm(f"{prefix}bn{layer}", conv(f"{prefix}conv{layer}", x)).relu()
        return x

    x = mlp("", coord)
    for i, count in enumerate(key_points):
        rows = farthest_points(coord, torch.tensor([0, len(coord)]), torch.tensor([0, count]))
        near = torch.cdist(coord[rows], coord).topk(neighbours, largest=False).indices
        own = x[rows][:, None].expand(-1, neighbours, -1)
        x, coord = mlp(f"gather_local_{i}.", torch.cat([x[near] - own, own], -1)).amax(1), coord[rows]
    tokens, x = x, mlp("pt_last.", x)
    seen = []
    for i in range(1, 5):
        query = conv(f"pt_last.sa{i}.q_conv", x)
        share = (query @ conv(f"pt_last.sa{i}.k_conv", x).T).softmax(-1)
        share = share / (1e-9 + share.sum(0, keepdim=True))
        passed = share.T @ conv(f"pt_last.sa{i}.v_conv", x)
        x = x + norm(f"pt_last.sa{i}.after_norm", conv(f"pt_last.sa{i}.trans_conv", x - passed)).relu()
        seen.append(x)
    whole = F.leaky_relu(norm("conv_fuse.1", conv("conv_fuse.0", torch.cat([*seen, tokens], -1))), 0.2).amax(0)
    hidden = F.leaky_relu(norm("bn6", conv("linear1", whole)), 0.2)
    return conv("linear3", F.leaky_relu(norm("bn7", conv("linear2", hidden)), 0.2))


def test_published_file_gives_the_formulas() -> None:
    network, head = PCT(**SIZES), MLPHead(20, 4, bias=True, leak=0.2)
    state, points = published(), clouds(60, 40)
    import_pct({"model_state": state}, network, head)
    with torch.no_grad():
        found = head.eval()(network.eval()(points), points)
    for logits, cloud in zip(found, points, strict=True):
        assert_close(logits, written_out(state, cloud.coord, (24, 12), 6), rtol=1e-4, atol=1e-5)
    import_pct({"model_state": state}, PCT(**SIZES))


def test_published_file_on_the_command_line(tmp_path: Path) -> None:
    state, source, target = published(64, 1024, 40), tmp_path / "best.pth", tmp_path / "ours.safetensors"
    torch.save({"model_state": state}, source)
    assert main(["convert", str(source), str(target), "--config", str(CONFIGS / "cls-pointsp-pct.yaml")]) == 0
    task, _, _ = load_task(target)
    assert isinstance(task.head, MLPHead)
    assert torch.equal(task.head.linear.weight, state["module.model.linear3.weight"])


def test_published_size() -> None:
    parameters = sum(p.numel() for module in (PCT(), MLPHead(1024, 40)) for p in module.parameters())
    assert round(parameters / 1e6, 2) == 2.88  # as reported


def test_foreign_files_are_refused() -> None:
    network = PCT(**SIZES)
    before = network.state_dict()["embed.0.weight"].clone()
    state = published()
    with pytest.raises(InputError, match=r"8 missing .*embed\.0\.weight"):
        import_pct({k: v for k, v in state.items() if not k.startswith("module.model.conv")}, network)
    state["module.model.pt_last.sa2.k_conv.weight"] += 1
    with pytest.raises(InputError, match=r"sa2\.k_conv\.weight differs from the queries"):
        import_pct(state, network)
    with pytest.raises(InputError, match="of another shape"):
        import_pct(published(width=16), network)
    assert torch.equal(network.state_dict()["embed.0.weight"], before)


def test_clouds_do_not_see_each_other_and_may_be_small() -> None:
    network, points = randomised(PCT(5, **SIZES)), clouds(60, 5, 1, 30, extra=2)
    with torch.no_grad():
        together = network(points)
        alone = torch.cat([network(cloud) for cloud in points])
    assert_close(together, alone, rtol=1e-5, atol=1e-6)
    stages = network.forward_features(points)
    widths = {name: stage.get("feat").shape[1] for name, stage in stages.items() if isinstance(stage, Points)}
    assert widths == {info.name: info.channels for info in network.feature_info}
    assert network(clouds(40, 0, 9, extra=2))[1].tolist() == network(clouds(0, extra=2))[0].tolist() == [0.0] * 20
    assert network(clouds(extra=2)).shape == (0, 20)


def test_protocol_of_pointsp() -> None:
    options = {"training_rule": "weighted", "inference_rule": "filtered", "resample": True, "least_points": 64}
    network = PCT(**SIZES, **options, cut=True).train()
    network(clouds(80, 50)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    first, second = (abstraction.sampler for abstraction in network.abstractions)
    assert (first.training_rule, first.inference_rule, first.replace) == ("weighted", "filtered", False)
    assert second.training_rule == "farthest"
    network.eval()
    torch.manual_seed(0)
    assert network.resampler(clouds(20, 90)).counts.tolist() == [64, 64]


def test_misuse() -> None:
    with pytest.raises(InputError, match="key_points"):
        PCT(key_points=(8,))
    network = PCT(**SIZES)
    in_cells = clouds(30).with_attrs(grid_coord=torch.zeros(30, 3, dtype=torch.int32))
    with pytest.raises(InputError, match="come in cells"):
        network(in_cells)
