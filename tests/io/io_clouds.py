"""Clouds and comparisons shared by the tests of the readers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from hypothesis import strategies as st

from pc3d import InputError, Points

Result = TypeVar("Result")

DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.float32, torch.float64)


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def assert_same_cloud(a: Points, b: Points) -> None:
    """Equal coordinates, origin, attributes (values and dtypes) and stored dtypes; NaN equals NaN."""
    assert a.meta[0]["origin"] == b.meta[0]["origin"]
    assert same_values(a.coord, b.coord)
    assert set(a.attrs) == set(b.attrs)
    for name, values in a.attrs.items():
        assert same_values(values, b.attrs[name]), name
    assert a.meta[0]["dtypes"] == b.meta[0]["dtypes"]


def assert_one_line(reader: Callable[[], Result]) -> Result | None:
    """What ``reader`` gives, or None when it refuses its file; it must do that with an InputError of one line."""
    refusal = None
    try:
        return reader()
    except InputError as error:
        refusal = str(error)
    assert "\n" not in refusal
    assert ": " in refusal
    return None


@st.composite
def clouds(draw: st.DrawFn, vectors: bool = True, floats_finite: bool = False) -> Points:
    """A cloud with an origin, the usual attributes and some of every dtype, extreme values included."""
    count = draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    coord = torch.rand(count, 3, generator=generator) * draw(st.sampled_from([1e-3, 1.0, 300.0]))
    attrs: dict[str, torch.Tensor] = {}
    if draw(st.booleans()):
        attrs["color"] = torch.randint(0, 256, (count, 3), generator=generator).float()
    if draw(st.booleans()):
        attrs["normal"] = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1)
    if draw(st.booleans()):
        attrs["strength"] = torch.rand(count, 1, generator=generator)
    if draw(st.booleans()):
        attrs["segment"] = torch.randint(-1, 20, (count,), generator=generator)
    for dtype in draw(st.sets(st.sampled_from(DTYPES))):
        name = f"field_{str(dtype).removeprefix('torch.')}"
        if dtype.is_floating_point:
            special = [0.0] if floats_finite else [float("nan"), float("inf"), -float("inf"), -0.0]
            values = torch.tensor(
                draw(st.lists(st.sampled_from([0.1, -2.5e-30, 7e30, *special]), min_size=count, max_size=count))
            )
            attrs[name] = values.to(dtype)
        else:
            info = torch.iinfo(dtype)
            attrs[name] = torch.tensor(
                draw(st.lists(st.integers(info.min, info.max), min_size=count, max_size=count)), dtype=dtype
            )
    if vectors and draw(st.booleans()):
        attrs["feat"] = torch.rand(count, draw(st.integers(1, 5)), generator=generator)
    origin = draw(st.sampled_from([(0.0, 0.0, 0.0), (770500.0, 6277500.0, 0.0), (-12345.5, 0.25, 9000.0)]))
    return Points(coord, attrs=attrs, meta=[{"origin": origin}])
