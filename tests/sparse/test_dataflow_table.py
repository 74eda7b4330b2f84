"""The dataflow table: bins, look-up, files, forced flows, calibration, and layers that follow it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pc3d.cli import main
from pc3d.errors import InputError
from pc3d.ops.conv import Flows, sparse_conv
from pc3d.ops.kernel_map import KernelMap, strided_map, submanifold_map
from pc3d.sparse import SoarOrder, SparseConv3d, SparseInverseConv3d, SparseSequential, SubMConv3d, apply_in_order
from pc3d.sparse.calibrate import QUICK, calibrate, model, shell
from pc3d.sparse.dataflow import Device, Flow, Layer, Pass, RateGrid, Tiling, attributes, mask_efficiency, traffic
from pc3d.sparse.flows import REAL_FLOWS, flows_of
from pc3d.sparse.table import (
    Choice,
    DataflowTable,
    Key,
    choose,
    current_table,
    decide,
    field_bin,
    key_of,
    parse_flows,
    size_bin,
    use_dataflow,
)
from pc3d.voxels import Voxels


@pytest.fixture(scope="module")
def table() -> DataflowTable:
    return calibrate(REAL_FLOWS["cpu"], effort=QUICK)


def test_bins() -> None:
    assert [field_bin(a) for a in (0, 1, 1.99, 2, 5.9, 6, 16, 19.9, 20, 27, 125)] == [0, 0, 0, 1, 3, 4, 8, 8, 9, 9, 9]
    assert [size_bin(n) for n in (0, 1, 255, 256, 511, 512, 1 << 22, 1 << 30)] == [8, 8, 8, 8, 8, 9, 22, 22]


def test_a_rate_between_measured_points() -> None:
    grid = RateGrid({"pairs": (4.0, 16.0), "in_channels": (8.0,)}, (1.0, 100.0))
    assert grid.at(pairs=8, in_channels=64, out_channels=1) == pytest.approx(10)
    assert (grid.at(pairs=1, in_channels=8), grid.at(pairs=99, in_channels=8)) == pytest.approx((1, 100))
    with pytest.raises(ValueError, match="one positive rate"):
        RateGrid({"pairs": (1.0, 2.0)}, (1.0,))


@pytest.mark.parametrize("wanted", [2, 4, 8, 11, 20])
def test_shells_have_the_field_they_are_asked_for(wanted: float) -> None:
    coord = shell(wanted, 3000)
    kmap = submanifold_map(coord, (3, 3, 3))
    assert attributes(kmap).receptive_field == pytest.approx(wanted, rel=0.3)
    assert 1500 < len(coord) < 6000


def test_nearest_bin_of_a_look_up(table: DataflowTable) -> None:
    keys = [Key("fwd", 27, cin, 64, "float32", bin_, 13) for cin in (3, 40, 999) for bin_ in range(10)]
    for key in keys:
        found = table.look_up(key)
        assert found is not None
        assert not found[1]  # 13 is no bin of the table
    assert table.look_up(Key("fwd", 27, 32, 32, "float64", 3, 12)) is None


def test_a_file_holds_the_table(table: DataflowTable, tmp_path: Path) -> None:
    path = tmp_path / "dataflow-cpu-x.json"
    path.write_text(table.to_text())
    content = json.loads(path.read_text())
    fields = {"version", "device", "library", "dtype", "caches", "rates", "table", "fitted_error"}
    assert set(content) == fields
    entry = next(iter(content["table"].values()))
    assert set(entry) == {"flow", "T", "W", "split", "t_us", "second_best", "margin"}
    assert DataflowTable.load(path).table == table.table
    content["version"] = 99
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="version 99"):
        DataflowTable.load(path)
    path.write_text("{}")
    with pytest.raises(InputError, match="not a dataflow table"):
        DataflowTable.load(path)


def test_which_table_is_used(table: DataflowTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PC3D_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("PC3D_DATAFLOW_TABLE", raising=False)
    shipped = current_table("cpu")
    assert shipped is not None
    assert shipped.path is not None
    assert shipped.path.parent.name == "tables"
    given = tmp_path / "given.json"
    given.write_text(table.to_text())
    monkeypatch.setenv("PC3D_DATAFLOW_TABLE", str(given))
    used = current_table("cpu")
    assert used is not None
    assert used.path == given
    assert current_table("cuda") is None


def test_forced_flows() -> None:
    assert parse_flows("ws") == {op: Choice("ws") for op in Pass}
    forced = parse_flows("fwd=os@128, wgrad=ws")
    assert forced == {Pass.FORWARD: Choice("os", 128), Pass.WEIGHT_GRAD: Choice("ws")}
    assert parse_flows("os").keys() == {Pass.FORWARD, Pass.INPUT_GRAD}
    assert parse_flows("auto") == {}
    for wrong in ("xx", "wgrad=os", "sideways=ws", "os@100", "ws@128"):
        with pytest.raises(InputError, match="expected FLOW or PASS=FLOW"):
            parse_flows(wrong)
    kmap = submanifold_map(shell(6, 500), (3, 3, 3))
    with use_dataflow("ws"):
        assert choose(kmap, 8, 8, torch.float32, "cpu") == {op: Choice("ws") for op in Pass}
        assert flows_of(choose(kmap, 8, 8, torch.float32, "cpu")) == Flows("ws", "ws", "ws")
    pointwise = decide(submanifold_map(shell(6, 500), (1, 1, 1)), 8, 8, torch.float32, "cpu")
    assert [choice and choice.flow for _, choice, _ in pointwise] == ["os", "os", "fod"]


def test_the_input_gradient_is_a_layer_the_other_way() -> None:
    kmap = strided_map(shell(20, 3000), (2, 2, 2), (2, 2, 2))[1]
    forward, back = (key_of(op, kmap, 8, 16, torch.float32) for op in (Pass.FORWARD, Pass.INPUT_GRAD))
    assert (back.in_channels, back.out_channels, back.field_bin) == (16, 8, 0)
    assert forward.field_bin > 0
    assert back.size_bin >= forward.size_bin


def test_the_model_names_a_time_for_every_flow(table: DataflowTable) -> None:
    kmap = submanifold_map(shell(8, 2000), (3, 3, 3))
    for op, choices in REAL_FLOWS["cpu"].items():
        for width in (16, 32):
            seconds = [model(table, op, choice, kmap, Layer(width, width)).seconds for choice in choices]
            assert all(0 < s < 60 for s in seconds)
    assert set(table.fitted_error) == {"median", "p95"}
    with pytest.raises(ValueError, match="keeps outputs"):
        traffic(kmap, Layer(8, 8, op=Pass.WEIGHT_GRAD), Flow.OUTPUT_GATHER, _device(), Tiling(64))


def test_flows_of_a_gpu_fill_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the times of a made-up GPU: 1e12 multiply-adds per second in every lane of a tile, 10 us per launch."""

    def seconds(op: Pass, choice: Choice, kmap: KernelMap, layer: Layer, *_: object) -> float:
        tiling = Tiling(choice.tile or 1, choice.window, choice.splits)
        lanes = kmap.num_pairs / (mask_efficiency(kmap, tiling) if choice.flow == "os" else 1)
        launches = 1 if choice.flow == "os" or op is Pass.WEIGHT_GRAD else kmap.kernel_volume
        return launches * 1e-5 + lanes * layer.in_channels * layer.out_channels / 1e12

    monkeypatch.setattr("pc3d.sparse.calibrate.time_pass", seconds)
    ways = REAL_FLOWS["cuda"]
    table = calibrate(ways, effort=QUICK, dtype=torch.float32)
    found = {choice.name for key, choice in table.table.items() if key.op == "fwd"}
    assert found <= {way.name for way in ways[Pass.FORWARD]}
    again = json.loads(table.to_text())["table"]
    assert {Choice.from_json(entry).name for entry in again.values()} == {c.name for c in table.table.values()}
    for op, choices in ways.items():
        grids = [table.rates["flows"][f"{op.value}|{flow}"] for flow in {choice.flow for choice in choices}]
        assert all(min(grid["values"]) > 0 for grid in grids)


def test_a_near_tie_keeps_the_usual_flow(table: DataflowTable) -> None:
    kept = [(key, choice) for key, choice in table.table.items() if choice.margin < 0]
    assert all(choice.name == REAL_FLOWS["cpu"][Pass(key.op)][0].name and choice.margin > -0.5 for key, choice in kept)
    others = [choice for key, choice in table.table.items() if choice.name != REAL_FLOWS["cpu"][Pass(key.op)][0].name]
    assert all(choice.margin >= 0 for choice in others)


def _device() -> Device:
    return Device(1 << 20, 1e9, 1e9, {flow: 1e9 for flow in Flow})


@pytest.mark.parametrize("flow", ["os@128", "os@2048", "ws"])
def test_every_flow_gives_the_same_numbers(flow: str) -> None:
    kmap = strided_map(shell(11, 2500), (3, 3, 3), (2, 2, 2), (1, 1, 1))[1]
    torch.manual_seed(0)
    feat, weight = torch.randn(kmap.num_in, 5, requires_grad=True), torch.randn(27, 5, 7, requires_grad=True)
    flows = Flows(flow, flow, "ws" if flow == "ws" else "fod")
    expected, found = (sparse_conv(feat, weight, kmap, flows=f) for f in (None, flows))
    upstream = torch.randn_like(found)
    gradients = [torch.autograd.grad(out, [feat, weight], upstream) for out in (expected, found)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    for wrong in ("gemm", "os@100", "ws@128", "os@64s2", "os@64walls4", "os@-1"):
        with pytest.raises(ValueError, match=f"no flow '{wrong}'"):
            Flows(forward=wrong)
    with pytest.raises(ValueError, match="weight_grad: no flow 'os'"):
        Flows(weight_grad="os")


def test_a_network_in_order_by_the_table_is_the_plain_network() -> None:
    torch.manual_seed(0)
    coord = torch.cat([shell(9, 1200), shell(12, 900) + torch.tensor([1, 0, 0, 0])]).int()
    network = SparseSequential(
        SubMConv3d(4, 16, 3), torch.nn.ReLU(), SparseConv3d(16, 32, 2, 2), SubMConv3d(32, 32, 3), torch.nn.ReLU(),
        SparseInverseConv3d(32, 16, 2), SubMConv3d(16, 8, 1),
    )  # fmt: skip
    feat = torch.randn(len(coord), 4)
    results = []
    for planned in (False, True):
        voxels = Voxels(coord, feat, 2)
        with use_dataflow("auto" if planned else "fwd=os,dgrad=os,wgrad=fod"):
            run = apply_in_order(network, voxels, SoarOrder(64, 1024)) if planned else network(voxels)
            network.zero_grad()
            run.feat.square().sum().backward()
        results.append((run.feat.detach(), [p.grad.clone() for p in network.parameters()]))
    (plain, plain_grads), (found, grads) = results
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
    for left, right in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4 * float(right.abs().max()))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.json"
    assert main(["dataflow", "calibrate", "--quick", "-o", str(path)]) == 0
    assert "choices; model error" in capsys.readouterr().out
    assert DataflowTable.load(path).table
    assert main(["dataflow", "calibrate", "--threads", "0"]) == 2
