"""Point Cloud Mamba against vectors recorded from the published implementation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pc3d.models.backbones.pcm import SCAN_ORDERS, PointCloudMamba, scan_cells, scan_order
from pc3d.models.convert.pcm import import_point_cloud_mamba
from pc3d.models.heads import GlobalContextHead, MLPHead
from pc3d.ops.serialize import curve_codes
from pc3d.points import Points
from pc3d.serialization.traverse import TRAVERSES, released_codes, snake_codes, snake_order
from pc3d.tasks.tiles import in_tiles


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.exists():
        pytest.skip(f"{path.name} is not there")
    with np.load(path) as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
        return arrays, json.loads(str(file["meta"]))


def _cases(arrays: dict[str, Tensor], meta: dict[str, Any]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    for key, cloud in arrays.items():
        if key.startswith("in/"):
            for size in meta["grid_sizes"]:
                offsets = torch.arange(len(cloud) + 1) * cloud.shape[1]
                yield f"out/{key[3:]}.{size}", cloud.flatten(0, 1), offsets, size


def test_serialization(golden_dir: Path) -> None:
    arrays, meta = _load(golden_dir / "pcm-cts1.npz")
    for name, coord, offsets, size in _cases(arrays, meta):
        cells = scan_cells(coord, offsets, size)
        assert torch.equal(cells, arrays[f"{name}.grid"].flatten(0, 1))
        depth = int(arrays[f"{name}.depth"])
        for order in SCAN_ORDERS:
            if order in TRAVERSES:
                codes = released_codes(cells, offsets, order)
                snake = snake_codes(cells, offsets, order)
                assert torch.equal(snake, arrays[f"{name}.snake_code.{order}"].flatten()), (name, order)
                local = snake_order(cells, offsets, order) - torch.repeat_interleave(offsets[:-1], offsets.diff())
                assert torch.equal(local, arrays[f"{name}.snake_order.{order}"].flatten()), (name, order)
            else:
                codes = curve_codes(cells.int(), offsets, depth, [order])[0]
            assert torch.equal(codes, arrays[f"{name}.code.{order}"].flatten()), (name, order)
            rows = scan_order(cells, offsets, order, released=True)
            assert torch.equal(rows, arrays[f"{name}.order.{order}"].flatten()), (name, order)
        chain = torch.arange(len(cells))
        for key in (key for key in arrays if key.startswith(f"{name}.chain.")):
            order = key.removeprefix(f"{name}.chain.")
            cells = scan_cells(coord[chain], offsets, size)
            chain = chain[scan_order(cells, offsets, order, released=True)]
            assert torch.equal(chain, arrays[key].flatten()), key


def _model(state: dict[str, Tensor], meta: dict[str, Any]) -> tuple[PointCloudMamba, GlobalContextHead | MLPHead]:
    config, encoder = meta["config"], meta["config"]["encoder_args"]
    decoder = config.get("decoder_args")
    expansion = np.cumprod(encoder["dim_expansion"]) * encoder["embed_dim"]
    network = PointCloudMamba(
        encoder["in_channels"] - 3 * encoder.get("combine_pos", False),
        encoder["embed_dim"],
        expansion.tolist(),
        encoder["mamba_blocks"],
        encoder["mamba_layers_orders"],
        encoder["reducers"],
        encoder["k_neighbors"][0],
        encoder["prompt_num_per_order"] if encoder["use_order_prompt"] else 0,
        encoder.get("grid_size", 0.02),
        encoder.get("windows_size"),
        encoder.get("combine_pos", False),
        decoder["decoder_channel_list"] if decoder else None,
        decoder["gmp_dim"] if decoder else 64,
        16 if decoder and "cls_dim" in decoder else 0,
        released=True,
    )
    classes = config["cls_args"]["num_classes"]
    head: GlobalContextHead | MLPHead
    if decoder:
        head = GlobalContextHead(network.out_channels, classes)
    else:
        head = MLPHead(network.out_channels, classes, config["cls_args"]["mlps"])
    rows = {
        order: start
        for order, (start, _) in zip(meta["prompt"]["orders"], meta["prompt"]["per_layer_prompt_rows"], strict=True)
    }
    import_point_cloud_mamba(state, network, head, rows)
    return network.eval(), head.eval()


def _points(arrays: dict[str, Tensor], combine_pos: bool) -> Points:
    pos, x = arrays["in/pos"], arrays["in/x"].transpose(1, 2).flatten(0, 1)
    offsets = torch.arange(len(pos) + 1) * pos.shape[1]
    attrs = {"feat": x}
    if "in/cls" in arrays:
        attrs["category"] = arrays["in/cls"][:, 0].repeat_interleave(pos.shape[1])
    return Points(pos.flatten(0, 1), offsets, attrs)


def _close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        actual, expected.reshape(actual.shape), rtol=0, atol=1e-4 * max(1.0, float(expected.abs().max()))
    )


@pytest.mark.parametrize("name", ["cls1", "partseg1", "sceneseg1"])
def test_networks(golden_dir: Path, name: str) -> None:
    arrays, meta = _load(golden_dir / f"pcm-{name}.npz")
    state = {key.removeprefix("state/"): value for key, value in arrays.items() if key.startswith("state/")}
    network, head = _model(state, meta)
    points = _points(arrays, meta["config"]["encoder_args"].get("combine_pos", False))
    with torch.no_grad():
        for i, level in enumerate(network._levels(points)):
            _close(level.coord, arrays[f"out/level{i}.xyz"].flatten(0, 1))
            _close(level.feat, arrays[f"out/level{i}.feat"].transpose(1, 2).flatten(0, 1))
        features = network(points)
        logits = head(features, points)
    if "out/global_feat" in arrays:
        _close(features, arrays["out/global_feat"])
    expected = arrays["out/logits"]
    _close(logits, expected.transpose(1, 2).flatten(0, 1) if expected.ndim == 3 else expected)
    if "out/logits_cropped" in arrays:
        with torch.no_grad():
            tiled = in_tiles(lambda tile: head(network(tile), tile), points, points.num_points // 2)
        _close(tiled, arrays["out/logits_cropped"].transpose(1, 2).flatten(0, 1))
        assert not torch.allclose(tiled, logits, atol=1e-3)
