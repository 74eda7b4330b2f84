"""Serialization of Point Transformer V3: recorded codes, argsorts and inverses, at adaptive and forced depths."""

from __future__ import annotations

import pytest
import torch
from harness import Golden, golden_files, needs_gpu
from torch.testing import assert_close

from pc3d.ops.backend import use_backend
from pc3d.serialization import CURVES, serialize

RECORDED = {"depth", "batch", "code", "order", "inverse"}


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("golden", golden_files("ptv3-serialization"))
def test_ptv3_serialization(golden: Golden, backend: str) -> None:
    with use_backend(backend):
        check(golden, "cpu")


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("golden", golden_files("ptv3-serialization"))
def test_ptv3_serialization_on_gpu(golden: Golden) -> None:
    check(golden, "cuda")


def check(golden: Golden, device: str) -> None:
    assert golden.meta["orders"] == list(CURVES)
    depths = golden.meta["fixed_depths"]
    recorded = golden.group("out")
    assert set(recorded) <= RECORDED | {f"code_depth{depth}" for depth in depths}
    grid = golden.tensor("in/grid_coord").to(device)
    counts = golden.tensor("in/offset").long()
    offsets = torch.cat([counts.new_zeros(1), counts]).to(device)

    found = serialize(grid, offsets)
    assert found.depth == int(recorded["depth"])
    assert torch.equal(found[0].code.cpu() >> 3 * found.depth, recorded["batch"].long())
    for name in ("code", "order", "inverse"):
        actual = torch.stack([getattr(order, name) for order in found])
        assert_close(actual.cpu(), recorded[name], rtol=0, atol=0)
    for depth in depths:
        actual = torch.stack([order.code for order in serialize(grid, offsets, depth=depth)])
        assert_close(actual.cpu(), recorded[f"code_depth{depth}"], rtol=0, atol=0)
