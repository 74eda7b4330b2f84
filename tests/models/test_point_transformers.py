"""PTv3, Sonata, Utonia and LitePT: published sizes, contracts of a backbone, clouds of every size, flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pc3d import InputError, Points
from pc3d.config import instantiate
from pc3d.models import LitePT, PTv3, Sonata, Utonia
from pc3d.models.convert import export_pointcept, import_pointcept
from pc3d.nn import serialized
from pc3d.nn.serialized import SerializedUNet
from pc3d.sparse import maps

K = 8
TINY: dict[str, Any] = {
    "in_channels": 3,
    "stride": (2, 2),
    "enc_depths": (1, 2, 1),
    "enc_channels": (12, 24, 36),
    "enc_num_head": (2, 4, 3),
    "enc_patch_size": (K, K, K),
    "dec_depths": (1, 1),
    "dec_channels": (12, 24),
    "dec_num_head": (2, 4),
    "dec_patch_size": (K, K),
}
OWN: dict[type[SerializedUNet], dict[str, Any]] = {
    PTv3: {},
    Sonata: {"enc_mode": False},
    Utonia: {"enc_mode": False},
    LitePT: {
        "enc_conv": (True, True, False),
        "enc_attn": (False, True, True),
        "enc_rope_freq": (100, 100, 100),
        "dec_conv": (True, False),
        "dec_attn": (False, True),
        "dec_rope_freq": (100, 100),
    },
}
MODELS = list(OWN)


def clouds(*counts: int, size: int = 12, seed: int = 0) -> Points:
    """Clouds of ``counts`` points, each in a cell of its own."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.cat([torch.randperm(size**3, generator=generator)[:count] for count in counts])
    grid = torch.stack([cells // size**2, cells // size % size, cells % size], 1).int()
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return Points(grid * 0.02, offsets, {"grid_coord": grid, "feat": torch.randn(len(grid), 3, generator=generator)})


def build(model: type[SerializedUNet], **options: Any) -> SerializedUNet:
    torch.manual_seed(0)
    return model(**{**TINY, **OWN[model], **options})


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_published_parameter_counts() -> None:
    with torch.device("meta"):
        ptv3, encoder, full = PTv3(), Sonata(), Sonata(enc_mode=False)
        head = nn.Linear(ptv3.out_channels, 20)
    assert count_parameters(ptv3) + count_parameters(head) == 46_167_572
    assert round(count_parameters(encoder) / 1e6, 2) == 108.46
    assert round(count_parameters(full) / 1e6, 1) == 124.8
    assert (encoder.out_channels, full.out_channels) == (1232, 64)


def test_variants() -> None:
    with torch.device("meta"):
        assert Sonata(upcast_levels=2).out_channels == 1088
        assert PTv3.outdoor().in_channels == 4
        assert PTv3.s3dis_rpe().enc["enc0"]["block0"].attn.rpe.rpe_table.shape == (3 * 31, 2)
        assert count_parameters(PTv3.small()) < 2.4e6


def test_drop_path_rises_with_depth_and_falls_towards_the_output() -> None:
    net = PTv3.small()
    rates = [block.drop_path.p for block in net.modules() if isinstance(block, serialized.SerializedBlock)]
    assert rates == pytest.approx([0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.05, 0])


@pytest.mark.parametrize("model", MODELS)
def test_features_in_input_order_and_stages(model: type[SerializedUNet]) -> None:
    net, points = build(model).eval(), clouds(150, 0, 60)
    features = net(points)
    assert features.shape == (210, net.out_channels) == (210, 12)
    stages = net.forward_features(points)
    assert list(stages) == [info.name for info in net.feature_info]
    assert list(stages) == ["embedding", "enc0", "enc1", "enc2", "dec1", "dec0"]
    for info in net.feature_info:
        stage = stages[info.name]
        assert stage.get("feat").shape == (stage.num_points, info.channels)
        assert len(stage) == 3
        assert int(stage.get("grid_coord").max()) <= 11 // info.stride
    assert torch.equal(stages["dec0"].get("feat"), features)


@pytest.mark.parametrize("model", MODELS)
def test_encoder_alone(model: type[SerializedUNet]) -> None:
    net, points = build(model, enc_mode=True).eval(), clouds(90)
    assert net(points).shape == (90, net.out_channels) == (90, 12 + 24 + 36)
    stages = net.forward_features(points)
    assert torch.equal(net(points)[:, :12], stages["enc0"].get("feat"))
    less = build(model, enc_mode=True, upcast_levels=1).eval()
    assert torch.equal(less(points), net(points)[:, 12:])
    assert less.out_channels == 24 + 36


@pytest.mark.parametrize("model", MODELS)
def test_batch_mates_do_not_matter(model: type[SerializedUNet]) -> None:
    net, batch = build(model, depth=5).eval(), clouds(40, 0, K + 1, 1, 200)
    together = net(batch)
    for b in range(len(batch)):
        assert_close(together[batch.offsets[b] : batch.offsets[b + 1]], net(batch[b]), rtol=1e-4, atol=1e-5)


def test_equal_windows_depend_on_the_batch() -> None:
    net, batch = build(PTv3, equal_windows=True).eval(), clouds(40, 3)
    assert not torch.allclose(net(batch)[:40], net(batch[0]), atol=1e-4)
    assert_close(net(batch[0]), build(PTv3).eval()(batch[0]))


@pytest.mark.parametrize("model", MODELS)
def test_rows_may_come_in_any_order(model: type[SerializedUNet]) -> None:
    net, points = build(model).eval(), clouds(150)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1))
    assert_close(net(points.select(order)), net(points)[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("n", [0, 1, K - 1, K, K + 1, 2 * K + 1])
def test_clouds_of_any_size(model: type[SerializedUNet], n: int) -> None:
    net = build(model).eval()
    features = net(clouds(n))
    assert features.shape == (n, 12)
    assert features.isfinite().all()
    if n > K:  # smaller clouds may leave batch norms with one point
        net.train()
        net(clouds(n, n)).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_one_point_cannot_train_batch_norms() -> None:
    with pytest.raises(InputError, match="1 points in a stage, it needs two"):
        build(PTv3).train()(clouds(1))


def test_points_of_one_cell_share_a_token() -> None:
    net, points = build(PTv3).eval(), clouds(60)
    twice = Points.cat([points, points])
    twice = Points(twice.coord, torch.tensor([0, 120]), twice.attrs)
    assert_close(net(twice), net(points).repeat(2, 1), rtol=1e-4, atol=1e-5)


def test_orders_are_shuffled_on_demand() -> None:
    points = clouds(150)
    always, never = build(PTv3, deterministic_orders=False).eval(), build(PTv3, deterministic_orders=True)
    torch.manual_seed(0)
    assert not torch.allclose(always(points), always(points), atol=1e-5)
    default = build(PTv3, drop_path=0.0)
    assert torch.equal(default.eval()(points), default(points))
    assert torch.equal(default(points), never.eval()(points))
    default.train()
    assert not torch.allclose(default(points), default(points), atol=1e-5)


def test_flags_of_the_convolution_change_what_they_say() -> None:
    points = clouds(150)
    plain, sums, old = (
        build(PTv3, **{f: True}).eval() for f in ("qkv_bias", "refresh_sparse_after_unpool", "legacy_v151")
    )
    stages = [net.forward_features(points) for net in (plain, sums, old)]
    assert torch.equal(stages[0]["enc2"].get("feat"), stages[1]["enc2"].get("feat"))
    assert not torch.allclose(stages[0]["dec1"].get("feat"), stages[1]["dec1"].get("feat"), atol=1e-4)
    assert torch.equal(stages[0]["enc0"].get("feat"), stages[2]["enc0"].get("feat"))
    assert not torch.allclose(stages[0]["enc1"].get("feat"), stages[2]["enc1"].get("feat"), atol=1e-4)


def test_old_depth_rule() -> None:
    """Seven cells per axis need 3 bits, one more with the headroom; Hilbert orders differ."""
    points = clouds(150, size=8)
    new, old = build(PTv3, order=("hilbert",)).eval(), build(PTv3, order=("hilbert",), legacy_v151=True).eval()
    assert not torch.allclose(*(n.forward_features(points)["enc0"].get("feat") for n in (new, old)), atol=1e-4)
    fixed = build(PTv3, order=("hilbert",), legacy_v151=True, depth=4).eval()
    assert_close(*(n.forward_features(points)["enc0"].get("feat") for n in (new, fixed)))


def test_maps_and_orders_are_built_once_per_level(monkeypatch: pytest.MonkeyPatch) -> None:
    built, split, sorted_codes = [], [], []
    from pc3d.serialization import orders

    for module, name, calls in (
        (maps, "submanifold_map", built),
        (serialized, "split_windows", split),
        (orders, "sort_codes", sorted_codes),
    ):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, original=original, calls=calls: calls.append(1) or original(*a))
    build(PTv3).eval()(clouds(200))
    assert len(built) == 4  # stem and three levels
    assert len(split) == 3
    assert len(sorted_codes) == 1 + 2 + 1  # the orders that blocks and poolings use, no others


@pytest.mark.parametrize("model", MODELS)
def test_checkpointing_gives_the_same_gradients(model: type[SerializedUNet]) -> None:
    points, gradients = clouds(80), []
    for checkpoint_blocks in (False, True):
        net = build(model, checkpoint_blocks=checkpoint_blocks).train()
        torch.manual_seed(1)
        net(points).sin().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert_close(recomputed, plain)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_on_a_real_scan(model: type[SerializedUNet], dtype: torch.dtype, data_dir: Path) -> None:
    raw = torch.from_numpy(np.fromfile(data_dir / "bench_clouds/scannet_scene0000_00.bin", np.float32)).view(-1, 6)
    cloud = Points(raw[:6000, :3], attrs={"feat": raw[:6000, 3:] / 255})
    voxels = cloud.voxelize(0.1)
    position = voxels.coord[:, 1:].float() * 0.1
    points = Points(position, attrs={"grid_coord": voxels.coord[:, 1:], "feat": voxels.feat})
    net = build(model).train()
    with torch.autocast("cpu", dtype=dtype):
        features = net(points)
        features.float().square().mean().backward()
    assert features.isfinite().all()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
    net.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        half = net(points)
    exact = net(points)
    assert (half - exact).norm() < 0.05 * exact.norm()


def test_mask_token() -> None:
    net, points = build(Sonata, mask_token=True).eval(), clouds(60)
    nn.init.normal_(net.embedding.mask_token)
    mask = torch.arange(60) % 3 == 0
    embedded = net.forward_features(points.with_attrs(mask=mask))["embedding"].get("feat")
    assert torch.equal(embedded[mask], net.embedding.mask_token.expand(20, -1))
    assert torch.equal(embedded[~mask], net.forward_features(points)["embedding"].get("feat")[~mask])


def test_rotation_sees_differences_of_positions_and_is_jittered_in_training_only() -> None:
    net, points = build(Utonia, drop_path=0.0, shift_coords=1.0, deterministic_orders=True).eval(), clouds(100)
    moved = points.with_attrs(coord=points.coord + 3)
    assert_close(net(moved), net(points), rtol=1e-3, atol=1e-4)
    assert torch.equal(net(points), net(points))
    assert not torch.allclose(net(points.with_attrs(coord=points.coord * 50)), net(points), atol=1e-5)
    net.train()
    wide = points.with_attrs(coord=points.coord * 50)
    assert not torch.allclose(net(wide), net(wide), atol=1e-5)
    still = build(Utonia, dec_rope_enable=False)
    assert still.dec["dec0"]["block0"].attn.rope is None
    assert still.enc["enc0"]["block0"].attn.rope is not None


@pytest.mark.parametrize("model", [Sonata, Utonia])
def test_a_traceable_network_leads_back_to_the_coarser_stages(model: type[SerializedUNet]) -> None:
    net, points = build(model, traceable=True).eval(), clouds(80)
    last, token_of_point = net.forward_tokens(points)
    assert_close(last.feat[token_of_point], net(points))
    widths = []
    while last.child is not None:
        last = last.child
        widths.append(last.feat.shape[1])
    assert widths == [24, 36]
    assert build(model).eval().forward_tokens(points)[0].child is None


def test_norms_per_dataset() -> None:
    names = ("ScanNet", "S3DIS")
    net, points = build(PTv3, pdnorm_conditions=names).eval(), clouds(80)
    state = net.state_dict()
    assert {"embedding.stem.norm.norm.1.weight", "enc.enc0.block0.norm1.0.norm.0.weight"} <= state.keys()
    assert {"enc.enc1.down.norm.0.norm.1.running_var", "dec.dec0.up.proj.1.norm.0.bias"} <= state.keys()
    for name, value in state.items():
        if ".norm.1." in name and name.endswith("bias"):
            value.add_(0.5)
    by_name = [net(points.replace(meta=[{"condition": name}])) for name in names]
    assert not torch.allclose(*by_name, atol=1e-3)
    with pytest.raises(InputError, match="meta 'condition' is None; this network needs one of ScanNet, S3DIS"):
        net(points)
    mixed = clouds(20, 30).replace(meta=[{"condition": name} for name in names])
    with pytest.raises(InputError, match="the same for all clouds"):
        net(mixed)
    only_batch_norms = build(PTv3, pdnorm_conditions=names, pdnorm_ln=False).state_dict()
    assert "enc.enc0.block0.norm1.0.weight" in only_batch_norms


@pytest.mark.parametrize("model", MODELS)
def test_config_round_trip(model: type[SerializedUNet]) -> None:
    net, points = build(model).eval(), clouds(70)
    again = instantiate(net.to_config()).eval()
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(points), net(points))


@pytest.mark.parametrize("prefix", ["module.", "module.student.", ""])
@pytest.mark.parametrize("nested", [False, True])
def test_import_of_published_files(prefix: str, nested: bool) -> None:
    source, target = build(Sonata, enc_mode=True), build(Sonata, enc_mode=True)
    nn.init.ones_(source.embedding.stem.linear.weight)
    state = {f"{prefix}{name}": value for name, value in export_pointcept(source).items()}
    if not prefix:  # release files name the parts of the backbone alone
        state = {name.removeprefix("backbone."): value for name, value in state.items()}
    if "student" in prefix:
        state |= {name.replace("student", "teacher"): value * 0 for name, value in state.items()}
        state["module.student.mask_head.weight"] = torch.zeros(3)
    import_pointcept({"config": {}, "state_dict": state} if nested else state, target)
    for name, value in source.state_dict().items():
        assert torch.equal(value, target.state_dict()[name]), name


def test_import_says_what_does_not_fit() -> None:
    state = export_pointcept(build(PTv3))
    del state["backbone.embedding.stem.norm.bias"]
    with pytest.raises(InputError, match=r"1 missing \(backbone.embedding.stem.norm.bias\)"):
        import_pointcept(state, build(PTv3))
    with pytest.raises(InputError, match=r"2 missing .*seg_head.bias"):
        import_pointcept(export_pointcept(build(PTv3)), build(PTv3), nn.Linear(12, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": (2,)}, "3 encoder stages need 2 strides and decoder stages, got 1 and 2"),
        ({"dec_depths": (1,)}, "dec_depths, dec_channels, dec_num_head and dec_patch_size must have one entry"),
        ({"enc_num_head": (5, 2, 3)}, "12 channels cannot be split into 5 heads"),
        ({"stride": (3, 2)}, "stride must be a power of two, got 3"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(PTv3, **options)


def test_bad_input() -> None:
    points = clouds(20)
    with pytest.raises(InputError, match=r"field 'feat' is \(20, 2\), PTv3 takes \(N, 3\)"):
        build(PTv3)(points.with_attrs(feat=torch.zeros(20, 2)))
    with pytest.raises(InputError, match=r"field 'grid_coord': .*negative"):
        build(PTv3)(points.with_attrs(grid_coord=points.get("grid_coord") - 1))
    with pytest.raises(InputError, match="heads of 4 channels"):
        build(Utonia, enc_num_head=(3, 2, 3))
    with pytest.raises(InputError, match="jitter_coords must be at least 1"):
        build(Utonia, jitter_coords=0.5)


@pytest.mark.parametrize("model", [PTv3, LitePT])
def test_dense_part_of_a_block_compiles_without_a_graph_break(model: type[SerializedUNet]) -> None:
    net, points = build(model).eval(), clouds(70, 3)
    expected = net(points)
    for block in (net.enc["enc1"]["block1"], net.enc["enc2"]["block0"]):
        block.attn.compile(backend="eager", fullgraph=True, dynamic=True)
        block.mlp.compile(backend="eager", fullgraph=True, dynamic=True)
    assert_close(net(points), expected, rtol=1e-5, atol=1e-6)


def test_any_integer_stride() -> None:
    net, points = build(Sonata, stride=(3, 2)).eval(), clouds(120)
    stages = net.forward_features(points)
    assert [info.stride for info in net.feature_info] == [1, 1, 3, 6, 3, 1]
    assert int(stages["enc1"].get("grid_coord").max()) == 3


def test_mamba_in_the_place_of_attention() -> None:
    net, batch = build(PTv3, mixer="mamba", depth=5).eval(), clouds(40, 0, K + 1, 1, 200)
    assert not any(isinstance(module, serialized.SerializedAttention) for module in net.modules())
    together = net(batch)
    assert_close(together, torch.cat([net(batch[i]) for i in range(len(batch))]), rtol=1e-4, atol=1e-5)
    rows = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    cloud = batch[4]
    attrs = {name: cloud.get(name)[rows] for name in ("feat", "grid_coord")}
    assert_close(net(Points(cloud.coord[rows], cloud.offsets, attrs)), net(cloud)[rows], rtol=1e-4, atol=1e-5)
    together.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    with pytest.raises(InputError, match="mixer: 'conv' is not attention or mamba"):
        build(PTv3, mixer="conv")
