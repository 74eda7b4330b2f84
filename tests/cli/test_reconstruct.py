"""``pc3d reconstruct``, ``convert`` of published weights, and what the other commands say to such checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from pc3d import InputError, Points
from pc3d.cli import main
from pc3d.datasets import SyntheticSolids
from pc3d.io import read, write
from pc3d.models import GridFormer, GridFormerDecoder
from pc3d.models.convert.gridformer import import_gridformer

pytest.importorskip("skimage")
CONFIG = Path(__file__).parents[2] / "configs/synthetic_solids/reconstruct-gridformer-small.yaml"
PUBLISHED = {  # names of the volume's parts: ours -> published
    "embed": "fc_pos",
    "key": "fc_k.0",
    "value": "fc_v",
    "attention.query": "conv_q",
    "attention.position": "fc_pos",
    "attention.weight": "fc_w",
    "merge": "weight_conv",
    "skip": "conv1x1",
    "final": "conv_final",
}


def published_state(network: GridFormer, decoder: GridFormerDecoder) -> dict[str, torch.Tensor]:
    """The state of a volume network as its authors stored it."""
    state = {}
    for name, value in network.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "embed":
            state[f"module.encoder.fc_pos.{rest}"] = value
            continue
        level, _, rest = rest.partition(".")
        start = f"module.encoder.unet3d.{part}s.{level}"
        if rest.startswith("convs."):
            number, kind = int(rest.split(".")[1]), rest.rpartition(".")[2]
            inner = ["groupnorm", "conv"][number % 3]
            state[f"{start}.basic_module.SingleConv{1 + number // 3}.{inner}.{kind}"] = value
            continue
        rest = rest.removeprefix("mixing.")
        ours = next(own for own in PUBLISHED if rest.startswith(own))
        value = value[..., None, None, None] if rest == "attention.query.weight" else value
        state[f"{start}.{PUBLISHED[ours]}{rest.removeprefix(ours)}"] = value
    parts = {"condition": "fc_c", "levels": "fc_multi", "point": "fc_p", "blocks": "blocks", "out": "fc_out"}
    for name, value in decoder.state_dict().items():
        part, _, rest = name.partition(".")
        rest = rest.removeprefix("1.") if part == "out" else rest
        if part == "blocks":
            number, layer, kind = rest.split(".")
            rest = f"{number}.fc_{int(layer) // 2}.{kind}"
        state[f"module.decoder.{parts[part]}.{rest}"] = value
    return state


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published file of a network that takes the left half of space for the inside, converted."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    network, decoder = GridFormer(3, 8, 16).eval(), GridFormerDecoder(8)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
        decoder.point.weight[0, 0] = -10
        decoder.out[1].weight[0, 0] = 1
        decoder.out[1].bias.fill_(-1)
    torch.save({"model": published_state(network, decoder), "epoch_it": 3}, folder / "model_best.pt")
    config = yaml.safe_load(CONFIG.read_text())
    arguments = config["model"]["init_args"]
    arguments["backbone"]["init_args"] = {"channels": 8, "resolution": 16}
    arguments["decoder"]["init_args"] = {"channels": 8}
    arguments |= {"resolution": 8, "steps": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = ["convert", folder / "model_best.pt", folder / "a.safetensors", "--config", folder / "config.yaml"]
    assert main([str(word) for word in command]) == 0
    return folder / "a.safetensors"


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_a_published_file_reconstructs_clouds(checkpoint: Path, tmp_path: Path, capsys) -> None:
    cloud = SyntheticSolids(1, 0, 0, surface=300, space=1).load("train", 0).select(torch.arange(300))
    write(tmp_path / "in" / "near.ply", Points(cloud.coord))
    write(tmp_path / "in" / "far.npy", Points(cloud.coord * 40 + 100))
    assert run("reconstruct", tmp_path / "in", "--ckpt", checkpoint, "-o", tmp_path / "out") == 0
    assert "300 points" in capsys.readouterr().out
    near, far = (read(tmp_path / "out" / f"{name}.ply") for name in ("near", "far"))
    x = near.coord[:, 0].double() + near.meta[0]["origin"][0]
    assert float(x.min()) == pytest.approx(-0.55, abs=0.01)
    assert float(x.max()) == pytest.approx(-0.1, abs=0.05)  # logit 0 at -0.1
    scaled = far.coord[:, 0].double() + far.meta[0]["origin"][0]
    assert float(scaled.max() - 100) / 40 == pytest.approx(float(x.max()), abs=0.05)
    single = tmp_path / "single.obj"
    options = ("--resolution", 16, "--steps", 0, "--threshold", 0.2)
    assert run("reconstruct", tmp_path / "in" / "near.ply", "--ckpt", checkpoint, "-o", single, *options) == 0
    assert single.read_text().startswith("v ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--threshold", "0.9999"], "no surface was found"),
        (["--threshold", "1"], "not a probability"),
        (["--steps", "30"], "cells per axis"),
        (["-o", "a.stl"], "cannot write '.stl' (writable: .ply .obj)"),
        (["--format", "obj"], "of no use"),
        (["-o", "cloud.ply"], "is an input"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(checkpoint: Path, tmp_path: Path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write(Path("cloud.ply"), Points(torch.rand(30, 3) - 0.5))
    before = Path("cloud.ply").read_bytes()
    output = [] if "-o" in words else ["-o", "a.ply"]
    assert run("reconstruct", "cloud.ply", "--ckpt", checkpoint, *output, *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert Path("cloud.ply").read_bytes() == before
    assert not Path("a.ply").exists()


def test_predict_sends_to_reconstruct(checkpoint: Path, tmp_path: Path, capsys) -> None:
    write(tmp_path / "cloud.ply", Points(torch.rand(30, 3)))
    assert run("predict", tmp_path / "cloud.ply", "--ckpt", checkpoint, "-o", tmp_path / "out.ply") == 2
    assert "pc3d reconstruct" in capsys.readouterr().err


def test_names_and_shapes_of_published_files_must_fit() -> None:
    network, decoder = GridFormer(3, 8, 8), GridFormerDecoder(8)
    state = published_state(network, decoder)
    import_gridformer(state, network)
    import_gridformer(state, network, decoder)
    less = {name: value for name, value in state.items() if "fc_out.bias" not in name}
    with pytest.raises(InputError, match=r"1 missing \(decoder\.out\.1\.bias\)"):
        import_gridformer(less, network, decoder)
    with pytest.raises(InputError, match="of another shape"):
        import_gridformer(state, GridFormer(3, 16, 8), GridFormerDecoder(8))
    with pytest.raises(InputError, match="unexpected"):
        import_gridformer({**state, "module.encoder.more": torch.zeros(1)}, network, decoder)
