"""Weights of a TorchScript file without running it, and what is refused."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from pc3d.errors import InputError
from pc3d.models import HeightMapNet
from pc3d.models.convert import import_height_map, load_height_map
from pc3d.models.convert.torchscript import torchscript_state


class Regressor(nn.Module):
    """A network under the names of the published file."""

    def __init__(self, network: HeightMapNet) -> None:
        super().__init__()
        self.hm_encoders = network.encoders
        self.hm_merger = network.merge
        self.hm_rgb_merger = network.mix
        self.decoders = nn.ModuleList([network.decoder])
        self.residual = network.refine


class Published(nn.Module):
    def __init__(self, network: HeightMapNet) -> None:
        super().__init__()
        self.regressor = Regressor(network)
        self.kinds = [1, 2]
        self.other = torch.device("cpu")

    def forward(self, patch: torch.Tensor) -> torch.Tensor:
        return patch * 2


@pytest.fixture
def network() -> HeightMapNet:
    torch.manual_seed(0)
    return HeightMapNet()


@pytest.fixture
def published(tmp_path: Path, network: HeightMapNet) -> Path:
    path = tmp_path / "published.pt"
    torch.jit.script(Published(network)).save(str(path))
    return path


def test_torchscript_weights(published: Path, network: HeightMapNet) -> None:
    loaded = load_height_map(published)
    assert not loaded.training
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_state_dict_file(tmp_path: Path, network: HeightMapNet) -> None:
    path = tmp_path / "plain.pth"
    torch.save(Published(network).state_dict(), path)
    loaded = load_height_map(path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), network.parameters(), strict=True))


def test_code_in_an_archive_is_not_run(tmp_path: Path, published: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (eval, (f"open({str(tmp_path / 'harm')!r}, 'w')",))

    bad = tmp_path / "bad.pt"
    with zipfile.ZipFile(published) as source, zipfile.ZipFile(bad, "w") as target:
        for name in source.namelist():
            target.writestr(name, pickle.dumps(Harm()) if name.endswith("data.pkl") else source.read(name))
    with pytest.raises(InputError, match=r"bad.pt: holds Python code \(builtins.eval\) which is not run"):
        load_height_map(bad)
    assert not (tmp_path / "harm").exists()


def test_damaged_and_foreign_files(tmp_path: Path, published: Path, network: HeightMapNet) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_height_map(tmp_path / "none.pt")
    damaged = tmp_path / "damaged.pt"
    with zipfile.ZipFile(published) as source, zipfile.ZipFile(damaged, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, content[: len(content) // 2] if "/data/" in name else content)
    with pytest.raises(InputError, match=r"damaged.pt: not a readable TorchScript file"):
        torchscript_state(damaged)
    state = network.state_dict()
    state["more"] = torch.zeros(1)
    del state["mix.0.bias"]
    state["merge.0.bias"] = torch.zeros(3)
    before = [value.clone() for value in network.parameters()]
    with pytest.raises(InputError, match=r"1 missing \(mix.0.bias\); 1 unexpected \(more\); 1 of another shape"):
        import_height_map(state, network)
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_rasters_of_another_shape(network: HeightMapNet) -> None:
    with pytest.raises(InputError, match=r"takes rasters \(B, 1, 96, 96\), got \(2, 1, 64, 64\)"):
        network(torch.zeros(2, 1, 64, 64), torch.zeros(2, 1, 64, 64))
