import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pc3d.io import lzf
from pc3d.ops.backend import cpu_kernels, use_backend

BACKENDS = [
    "reference",
    pytest.param("auto", marks=pytest.mark.skipif(cpu_kernels() is None, reason="C++ kernels not built")),
]
DATA = st.one_of(
    st.binary(max_size=400),
    st.builds(lambda unit, times: unit * times, st.binary(min_size=1, max_size=9), st.integers(0, 300)),
)


@pytest.mark.parametrize("writer", BACKENDS)
@pytest.mark.parametrize("reader", BACKENDS)
@settings(max_examples=80, deadline=None)
@given(data=DATA)
def test_round_trip(writer, reader, data):
    with use_backend(writer):
        packed = lzf.compress(data)
    assert len(packed) <= len(data) + -(-len(data) // 32)
    with use_backend(reader):
        assert lzf.decompress(packed, len(data)) == data


@pytest.mark.parametrize("backend", BACKENDS)
def test_streams_by_hand(backend):
    with use_backend(backend):
        assert lzf.decompress(b"\x02abc", 3) == b"abc"
        assert lzf.decompress(b"\x01ab\x20\x01", 5) == b"ababa"  # length code 1: three bytes from two back
        assert lzf.decompress(b"\x00a\xe0\x03\x00", 13) == b"a" * 13  # length 7 + 3 + 2, one back
        assert lzf.decompress(b"", 0) == b""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("stream", "size"),
    [
        (b"\x05ab", 6),  # literals beyond the end
        (b"\x20\x00", 3),  # copy before the start
        (b"\x00a\x20", 4),  # copy without its distance
        (b"\x00a\xe0", 10),  # copy without its length
        (b"\x02abc", 4),  # too short
        (b"\x02abc", 2),  # too long
        (b"\x00a\xe0\xff\x00", 5),  # copy beyond the size
        (b"\x00a", 10**9),
    ],
)
def test_damaged_streams(backend, stream, size):
    with use_backend(backend), pytest.raises(ValueError, match="damaged"):
        lzf.decompress(stream, size)


@settings(max_examples=200, deadline=None)
@given(stream=st.binary(max_size=60), size=st.integers(0, 200))
def test_kernels_agree_on_any_stream(stream, size):
    if cpu_kernels() is None:
        pytest.skip("C++ kernels not built")
    results = []
    for backend in ("reference", "auto"):
        with use_backend(backend):
            try:
                results.append(lzf.decompress(stream, size))
            except ValueError:
                results.append(None)
    assert results[0] == results[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_real_columns_shrink(backend):
    data = np.repeat(np.arange(3000, dtype=np.int32), 4).tobytes()
    with use_backend(backend):
        packed = lzf.compress(data)
        assert lzf.decompress(packed, len(data)) == data
    assert backend == "reference" or len(packed) < len(data) / 2
