"""The height-map network of LidarScout against its published graph."""

from __future__ import annotations

import pytest
import torch
from harness import Golden, golden_files, needs_gpu

from pc3d.models import HeightMapNet
from pc3d.models.convert import import_height_map


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
@pytest.mark.parametrize("golden", golden_files("lidarscout-hm"))
@torch.no_grad()
def test_height_map(golden: Golden, device: str) -> None:
    network = HeightMapNet()
    import_height_map(golden.group("state"), network)
    rasters = [golden.tensor(f"in/patch_hm_{kind}").to(device) for kind in ("nearest", "linear")]
    actual = network.to(device).eval()(*rasters).cpu()
    expected = golden.tensor("out/heightmap")
    tolerance = 1e-5 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_size() -> None:
    assert sum(parameter.numel() for parameter in HeightMapNet().parameters()) == 642_888
