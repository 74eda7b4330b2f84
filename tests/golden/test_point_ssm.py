"""Hierarchical point SSM against vectors recorded from the published implementation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pc3d.models.backbones.point_ssm import SCANS, PointSSM, hilbert_key, scan_rows
from pc3d.models.convert.point_ssm import import_point_ssm, rename_block
from pc3d.models.heads import FoldingDecoder
from pc3d.nn.patches import sample_centres
from pc3d.nn.point_ssm import GroupScan, PointSSMBlock, vanilla_mixer
from pc3d.ops.point_sets import chamfer_distance, density_aware_chamfer_distance
from pc3d.points import Points
from pc3d.tasks.heads import LinearHead

SCAN_NAMES = {
    "x_order": "x",
    "y_order": "y",
    "z_order": "z",
    "center_dist": "center_distance",
    "hilbert": "hilbert",
    "nonsort": "given",
}


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.exists():
        pytest.skip(f"{path.name} is not there")
    with np.load(path) as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
        return arrays, json.loads(str(file["meta"]))


def _offsets(batch: Tensor) -> Tensor:
    return torch.arange(len(batch) + 1) * batch.shape[1]


def _local(rows: Tensor, batch: Tensor) -> Tensor:
    """Rows counted from the start of their cloud, ``(B, M)``."""
    return rows.view(len(batch), -1) - _offsets(batch)[:-1, None]


def _close(actual: Tensor, expected: Tensor) -> None:
    largest = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected.reshape(actual.shape), rtol=0, atol=1e-4 * largest)


def _state(arrays: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    start = f"state/{prefix}"
    return {key.removeprefix(start): value for key, value in arrays.items() if key.startswith(start)}


def test_orders(golden_dir: Path) -> None:
    arrays, _ = _load(golden_dir / "medpoints-ssm-blocks1.npz")
    xyz = arrays["in/xyz"]
    for i, rows in enumerate(scan_rows(xyz.flatten(0, 1), _offsets(xyz), SCANS, flip=True)):
        assert torch.equal(_local(rows, xyz), arrays[f"out/scan{i}"])


@pytest.mark.parametrize("name", ["nonffn", "ffn", "nonffn2", "scan_nonffn", "scan_ffn", "scan2_nonffn", "scan2_ffn"])
def test_blocks(golden_dir: Path, name: str) -> None:
    arrays, meta = _load(golden_dir / "medpoints-ssm-blocks1.npz")
    width, state, groups = meta["C"], meta["kw"]["state_channel"], meta["kw"]["num_norm_groups"]
    head = 8 if name.rstrip("_fno").endswith("2") else None
    ffn = None if "nonffn" in name else ((2.0,) if name.startswith("scan") else (4.0,))
    out = width if name in ("scan_nonffn", "scan2_nonffn") else meta["Co"]
    mixer = GroupScan(width, meta["K"], state, head) if name.startswith("scan") else vanilla_mixer(width, state, head)
    block = PointSSMBlock(width, out, mixer, groups, ffn)
    block.load_state_dict({rename_block(f".{key}")[1:]: value for key, value in _state(arrays, f"{name}.").items()})
    x = arrays["in/x"]
    offsets = _offsets(x)
    orders = [scan_rows(arrays["in/xyz"].flatten(0, 1), offsets, SCANS, flip=True)] if name.startswith("scan") else []
    _close(block(x.flatten(0, 1), offsets, *orders), arrays[f"out/{name}"])


def _network(meta: dict[str, Any]) -> PointSSM:
    encoder = meta["config"]["encoder"]
    condition = meta["config"].get("condition_embedding")
    return PointSSM(
        encoder["in_channel"],
        encoder["fps_feature_channels"],
        encoder["num_fps_points"],
        encoder["projection_channel"],
        encoder["num_neighbors_k"],
        encoder["neighbor_radius"],
        query=encoder.get("knn_query", "ball"),
        scans=[SCAN_NAMES[name] for name in encoder["scan_strategies"]],
        flip=encoder["flip_scan"],
        state=encoder["state_channel"],
        groups=encoder["num_norm_groups"],
        attention=encoder.get("channel_attention") == "eca",
        concat=encoder.get("final_concat", False),
        dense=encoder["dense_channels"],
        decoder=encoder["fp_channels"] if meta["config"]["name"] == "SeM" else None,
        categories=condition["encoder"]["num_classes"] if condition else 0,
        condition_hidden=2 * condition["encoder"]["out_channel"] if condition else 0,
        condition_channels=condition["encoder"]["out_channel"] if condition else 0,
        ignore_origin=True,
    ).eval()


def _points(arrays: dict[str, Tensor]) -> Points:
    x = arrays["in/x"]
    attrs = {"feat": x.flatten(0, 1)}
    if "in/c" in arrays:
        attrs["category"] = arrays["in/c"].argmax(1).repeat_interleave(x.shape[1])
    return Points(x.flatten(0, 1), _offsets(x), attrs)


def _check_levels(network: PointSSM, points: Points, arrays: dict[str, Tensor]) -> None:
    before = arrays["in/x"]
    for i, level in enumerate(network._levels(points)[1:]):
        xyz = arrays[f"out/level{i}.xyz"]
        assert torch.equal(_local(level.rows, before), arrays[f"out/level{i}.fps"])
        _close(level.coord, xyz)
        _close(level.feat, arrays[f"out/level{i}.ca"])
        before = xyz


@torch.no_grad()
def test_classifier(golden_dir: Path) -> None:
    arrays, meta = _load(golden_dir / "medpoints-ssm-cls1.npz")
    network, points = _network(meta), _points(arrays)
    head = LinearHead(network.out_channels, meta["config"]["encoder"]["out_channel"])
    import_point_ssm(_state(arrays), network, head)
    _check_levels(network, points, arrays)
    _close(network(points), arrays["out/latent"])
    logits = head(network(points), points)
    _close(logits, arrays["out/cls_logits"])
    _close(F.cross_entropy(logits, arrays["in/y"]), arrays["out/loss0"])


@torch.no_grad()
def test_segmentation(golden_dir: Path) -> None:
    arrays, meta = _load(golden_dir / "medpoints-ssm-seg1.npz")
    network, points = _network(meta), _points(arrays)
    head = LinearHead(network.out_channels, meta["config"]["encoder"]["out_channel"])
    import_point_ssm(_state(arrays), network, head)
    _check_levels(network, points, arrays)
    _close(network.latent(points)[0], arrays["out/latent"])
    features = network(points)
    _close(features, arrays["out/fp3"])
    _close(head(features, points), arrays["out/seg_logits"])


@torch.no_grad()
def test_completion(golden_dir: Path) -> None:
    arrays, meta = _load(golden_dir / "medpoints-ssm-cpl1.npz")
    network, points, config = _network(meta), _points(arrays), meta["config"]
    decoder = FoldingDecoder(
        network.out_channels,
        config["encoder"]["point_num"],
        config["decoder"]["folding_hidden_channels"],
        config["decoder"]["folding_times"],
        config["encoder"]["num_norm_groups"],
        config["condition_embedding"]["encoder"]["out_channel"],
    )
    import_point_ssm(_state(arrays), network, decoder)
    _check_levels(network, points, arrays)
    latent, condition = network.latent(points)
    _close(latent, arrays["out/latent"])
    _close(decoder.plane, arrays["out/base_shape"])
    out = decoder(latent, condition)
    _close(out, arrays["out/recon"])
    pair = out.flatten(0, 1), _offsets(out), arrays["in/y"].flatten(0, 1), _offsets(arrays["in/y"])
    dcd, cd = config["reconstruction_losses"]
    loss = density_aware_chamfer_distance(*pair, dcd["alpha"], dcd["n_lambda"]).mean()
    _close(loss, arrays["out/loss0"])
    _close(chamfer_distance(*pair).mean() * cd["weight"], arrays["out/loss1"])


def test_sampling_skips_the_origin(golden_dir: Path) -> None:
    arrays, _ = _load(golden_dir / "medpoints-ssm-blocks1.npz")
    xyz = arrays["in/xyz_fps"]
    rows, _ = sample_centres(xyz.flatten(0, 1), _offsets(xyz), 16, ignore_origin=True)
    assert torch.equal(_local(rows, xyz), arrays["out/fps16"])


def test_hilbert_order(golden_dir: Path) -> None:
    arrays, _ = _load(golden_dir / "medpoints-ssm-blocks1.npz")
    for cloud, rows in zip(arrays["in/xyz"], arrays["out/hilbert8"], strict=True):
        assert torch.equal(hilbert_key(cloud, bins=8).argsort(stable=True), rows)
