"""LitePT: published sizes, where it is serialized, settings that do not fit; the rest with the other transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pc3d import InputError, Points
from pc3d.models import LitePT
from pc3d.nn import serialized
from pc3d.nn.serialized import GridPooling

TINY: dict[str, Any] = {
    "in_channels": 3,
    "stride": (2, 2),
    "enc_depths": (1, 1, 2),
    "enc_channels": (12, 24, 36),
    "enc_num_head": (2, 4, 3),
    "enc_patch_size": (8, 8, 8),
    "enc_conv": (True, True, False),
    "enc_attn": (False, True, True),
    "enc_rope_freq": (100, 100, 100),
    "dec_depths": (1, 1),
    "dec_channels": (12, 24),
    "dec_num_head": (2, 4),
    "dec_patch_size": (8, 8),
    "dec_conv": (True, False),
    "dec_attn": (False, True),
    "dec_rope_freq": (100, 100),
    "depth": 5,
}


def build(**options: Any) -> LitePT:
    torch.manual_seed(0)
    return LitePT(**{**TINY, **options})


def clouds(*counts: int, size: int = 12) -> Points:
    """Clouds of ``counts`` points, each in a cell of its own."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.cat([torch.randperm(size**3, generator=generator)[:count] for count in counts])
    grid = torch.stack([cells // size**2, cells // size % size, cells % size], 1).int()
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return Points(grid * 0.02, offsets, {"grid_coord": grid, "feat": torch.randn(len(grid), 3, generator=generator)})


@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        (LitePT, 12_712_932),
        (LitePT.base, 45_112_788),
        (LitePT.large, 85_880_448),
        (LitePT.small_with_decoder, 15_988_716),
    ],
)
def test_published_parameter_counts(make: Any, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in make().parameters()) == parameters


def test_only_levels_with_attention_are_serialized(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain = serialized.serialize
    monkeypatch.setattr(serialized, "serialize", lambda *args: calls.append(1) or plain(*args))
    net = build().eval()
    net(clouds(90))
    assert len(calls) == 2  # the two pooled levels, not the input
    assert [m.curves != () for m in net.modules() if isinstance(m, GridPooling)] == [True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enc_num_head": (2, 3, 3)}, "must be a multiple of 6"),
        ({"enc_attn": (False, False, True)}, r"dec_attn\[1\] needs enc_attn\[1\]"),
        ({"enc_conv": (False, True, False)}, "blocks of enc0 neither convolve nor attend"),
        ({"enc_conv": (True, True)}, "enc_conv, enc_attn and enc_rope_freq must have one entry per stage"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(**options)
