"""Scans and Mamba mixers against vectors recorded from the published implementation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pc3d.nn.mamba import BidirectionalMamba, Mamba, Mamba2, MambaBlock
from pc3d.ops.backend import use_backend
from pc3d.ops.scan import selective_scan, ssd

CASES = ["full", "bare", "grouped", "const", "stiff", "bf16", "len1"]
BACKENDS = pytest.mark.parametrize("backend", ["reference", "auto"])


class Golden:
    def __init__(self, path: Path) -> None:
        if not path.exists():
            pytest.skip(f"{path.name} is not there")
        with np.load(path) as file:
            self.arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
            self.meta: dict[str, Any] = json.loads(str(file["meta"]))

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): t for key, t in self.arrays.items() if key.startswith(prefix)}


def _rows(batch: Tensor) -> Tensor:
    """``(B, L, ...) -> (B L, ...)``."""
    return batch.flatten(0, 1)


def _offsets(batch: Tensor) -> Tensor:
    return torch.arange(len(batch) + 1) * batch.shape[1]


def _same(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    largest = max(expected.abs().max().item(), 1e-6)
    torch.testing.assert_close(actual.float().cpu(), expected.reshape(actual.shape), rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("backend", ["reference", "auto", pytest.param("triton", marks=pytest.mark.gpu_kernel)])
@pytest.mark.parametrize("case", CASES)
def test_selective_scan(golden_dir: Path, backend: str, case: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    golden = Golden(golden_dir / "selective-scan-scan1.npz")
    stored, dtypes = golden.group(f"in/{case}."), golden.meta["cases"][case]["dtypes"]
    upstream = stored.pop("grad_y")
    batch, _, length = upstream.shape
    leaves = {
        k: t.to(device, getattr(torch, dtypes[k].removeprefix("torch."))).requires_grad_() for k, t in stored.items()
    }

    def channels_last(name: str) -> Tensor:
        return _rows(leaves[name].transpose(1, 2))

    def coefficients(name: str) -> Tensor:
        t = leaves[name]
        if t.ndim == 2:
            return t
        grouped = t if t.ndim == 4 else t[:, None]
        return _rows(grouped.permute(0, 3, 1, 2))

    with use_backend(backend):
        y, last = selective_scan(
            channels_last("u"),
            channels_last("delta"),
            leaves["A"],
            coefficients("B"),
            coefficients("C"),
            torch.arange(batch + 1, device=device) * length,
            leaves.get("D"),
            channels_last("z") if "z" in leaves else None,
            leaves.get("delta_bias"),
            golden.meta["cases"][case]["delta_softplus"],
        )
        y = y.view(batch, length, -1).transpose(1, 2)
        (y.float() * upstream.to(device)).sum().backward()
    half = 1e-2 if case == "bf16" else 1e-5
    expected = golden.group(f"out/{case}.")
    _same(y, expected["y"], half)
    _same(last, expected["last_state"], half)
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        _same(leaf.grad, expected[f"grad_{name}"], max(half, 1e-4))


def _check_mixer(golden: Golden, mixer: nn.Module, state: dict[str, Tensor], names: Callable[[str], str]) -> None:
    mixer.load_state_dict({names(key): t for key, t in state.items()}, strict=True)
    x = golden.arrays["in/x"].clone().requires_grad_()
    y = mixer(_rows(x), _offsets(x))
    _same(y, golden.arrays["out/y"])
    y.backward(_rows(golden.arrays["in/grad_y"]))
    assert x.grad is not None
    _same(x.grad, golden.arrays["out/grad_x"], 1e-3)
    parameters = dict(mixer.named_parameters())
    for key, expected in golden.group("out/grad.").items():
        gradient = parameters[names(key)].grad
        assert gradient is not None, key
        _same(gradient, expected, 1e-3)


@BACKENDS
def test_mamba_mixer_and_decoding(golden_dir: Path, backend: str) -> None:
    golden = Golden(golden_dir / "selective-scan-mamba1block1.npz")
    sizes = golden.meta["config"]
    mixer = Mamba(sizes["d_model"], sizes["d_state"], sizes["d_conv"], sizes["expand"])
    x = golden.arrays["in/x"]
    with use_backend(backend):
        _check_mixer(golden, mixer, golden.group("state/"), str)
        seen = x.new_zeros(len(x), golden.meta["d_inner"], sizes["d_conv"])
        state = x.new_zeros(len(x), golden.meta["d_inner"], sizes["d_state"])
        steps = []
        for t in range(x.shape[1]):
            y, seen, state = mixer.step(x[:, t], seen, state)
            steps.append(y)
    _same(torch.stack(steps, 1), golden.arrays["out/y_step"])
    _same(seen, golden.arrays["out/final_conv_state"])
    _same(state, golden.arrays["out/final_ssm_state"])


@BACKENDS
def test_bidirectional_mixer(golden_dir: Path, backend: str) -> None:
    golden = Golden(golden_dir / "pcm-bimamba1.npz")
    meta = golden.meta

    def ours(key: str) -> str:
        name, _, rest = key.partition(".")
        if name.endswith("_b") or name == "A_b_log":
            return "backward_ssm." + name.replace("_b", "", 1) + ("." + rest if rest else "")
        return key

    mixer = BidirectionalMamba(meta["d_model"], meta["d_state"], meta["d_conv"], meta["expand"])
    with use_backend(backend):
        _check_mixer(golden, mixer, golden.group("state/"), ours)


@BACKENDS
def test_chain_of_blocks(golden_dir: Path, backend: str) -> None:
    golden = Golden(golden_dir / "selective-scan-blockchain1.npz")
    width, state = golden.meta["d_model"], golden.meta["d_state"]
    blocks = nn.ModuleList(MambaBlock(width, Mamba(width, state)) for _ in range(golden.meta["n"]))
    blocks.load_state_dict(golden.group("state/"), strict=True)
    x = golden.arrays["in/x"]
    hidden: Tensor = _rows(x)
    residual: Any = None
    with use_backend(backend):
        for i, block in enumerate(blocks):
            hidden, residual = block(hidden, residual, _offsets(x))
            _same(hidden, golden.arrays[f"out/h{i}"])
            _same(residual, golden.arrays[f"out/res{i}"])
    _same(hidden + residual, golden.arrays["out/final_sum"])


@BACKENDS
@pytest.mark.parametrize("name", ["mamba2block1", "mamba2simple1"])
def test_mamba2_mixer(golden_dir: Path, backend: str, name: str) -> None:
    golden = Golden(golden_dir / f"selective-scan-{name}.npz")
    sizes = golden.meta["config"]
    mixer = Mamba2(
        sizes["d_model"],
        sizes["d_state"],
        sizes["headdim"],
        groups=sizes.get("ngroups", 1),
        expand=sizes["expand"],
        norm_groups=1 if golden.meta["cls"] == "Mamba2Simple" else None,
        learned_start=sizes.get("learnable_init_states", False),
    )
    with use_backend(backend):
        _check_mixer(golden, mixer, golden.group("state/"), str)


@BACKENDS
@pytest.mark.parametrize("case", ["full", "plain", "dlimit", "seqidx"])
def test_ssd(golden_dir: Path, backend: str, case: str) -> None:
    golden = Golden(golden_dir / "selective-scan-ssd1.npz")
    stored = golden.group("in/")
    upstream, seq_idx = stored.pop("grad_y"), stored.pop("seq_idx")
    leaves = {name: t.clone().requires_grad_() for name, t in stored.items()}
    offsets = _offsets(seq_idx)
    if case == "seqidx":
        new = seq_idx.diff(dim=1, prepend=seq_idx[:, :1] - 1) != 0
        offsets = torch.cat([_rows(new).nonzero()[:, 0], torch.tensor([new.numel()])])
    full = case == "full"
    with use_backend(backend):
        y, last = ssd(
            _rows(leaves["x"]),
            _rows(leaves["dt"]),
            leaves["A"],
            _rows(leaves["B"]),
            _rows(leaves["C"]),
            offsets,
            {"plain": None, "dlimit": leaves["D2"]}.get(case, leaves["D"]),
            _rows(leaves["z"]) if full else None,
            leaves["dt_bias"],
            dt_softplus=True,
            dt_limit=(0.05, 0.6) if case == "dlimit" else (0.0, float("inf")),
            initial_state=leaves["initial_states"] if full else None,
        )
        _same(y, golden.arrays[f"out/{case}.y"])
        if full:
            _same(last, golden.arrays["out/full.final_state"])
            y.backward(_rows(upstream))
            for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states"):
                gradient = leaves[name].grad
                assert gradient is not None, name
                _same(gradient, golden.arrays[f"out/full.grad_{name}"], 1e-3)
