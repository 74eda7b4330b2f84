"""Spiking neurons: forward, gradients, spike trains, leak; and what the meter counts."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from pc3d import Voxels
from pc3d.errors import InputError
from pc3d.nn.spiking import SpikeMeter, SpikingNeuron, spike_train
from pc3d.sparse import SparseConv3d, SparseInverseConv3d, SparseSequential, SubMConv3d

EDGES = [-torch.inf, -3.0, -0.0, 0.0, 0.49, 0.5, 1.0, 1.5, 2.5, 3.49, 3.5, 4.0, 4.5, 99.0, torch.inf]
FIRED = [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 2.0, 3.0, 3.0, 4.0, 4.0, 4.0, 4.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_ties_and_edges(dtype: torch.dtype) -> None:
    spikes = SpikingNeuron()(torch.tensor(EDGES, dtype=torch.float64).to(dtype))
    assert spikes.dtype == dtype
    expected = torch.tensor(FIRED, dtype=torch.float64)
    rounded = torch.tensor(EDGES, dtype=torch.float64).to(dtype).double()
    assert torch.equal(spikes.double(), (rounded.clamp(0, 4) + 0.5).floor())
    if dtype in (torch.float64, torch.float32):
        assert torch.equal(spikes.double(), expected)


def gradient(neuron: SpikingNeuron, values: list[float]) -> list[float]:
    x = torch.tensor(values, requires_grad=True)
    neuron(x).sum().backward()
    assert x.grad is not None
    return x.grad.tolist()


def test_published_gradient_is_strict_at_both_ends() -> None:
    assert gradient(SpikingNeuron(2), [-0.1, 0.0, 0.1, 1.0, 1.9, 2.0, 2.1]) == [0, 0, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("surrogate", ["rectangular", "triangular", "sigmoid"])
@pytest.mark.parametrize("decay", [None, 1.0])
def test_gradients_add_up_to_the_rise(surrogate: str, decay: float | None) -> None:
    """Over all inputs, the gradient of D steps integrates to D spikes; the leaky neuron passes it on D times a D-th."""
    grid = torch.linspace(-6, 10, 3201)
    neuron = SpikingNeuron(4, surrogate, decay=decay)
    total = sum(gradient(neuron, grid.tolist())) * float(grid[1] - grid[0])
    assert total == pytest.approx(4, rel=0.02) if decay is None else total > 1


def test_a_neuron_used_twice() -> None:
    neuron = SpikingNeuron()
    x = torch.tensor([0.7, 3.0], requires_grad=True)
    (neuron(x) + 2 * neuron(neuron(x))).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [3.0, 3.0]


def test_learned_threshold() -> None:
    neuron = SpikingNeuron(learn_threshold=True)
    assert neuron.threshold is not None
    neuron.threshold.data.fill_(2.0)
    assert neuron(torch.tensor([0.9, 1.0, 5.0])).tolist() == [0, 1, 3]
    neuron(torch.tensor([5.0])).sum().backward()
    assert neuron.threshold.grad is not None
    assert float(neuron.threshold.grad) == pytest.approx(-5 / 4)


def test_without_leak_the_leaky_neuron_is_the_integer_one() -> None:
    x = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 8 - 2
    for levels in (1, 4, 7):
        assert torch.equal(SpikingNeuron(levels, decay=1.0)(x), SpikingNeuron(levels)(x))
    leaky = SpikingNeuron(decay=0.5)(x)
    assert bool((leaky <= SpikingNeuron()(x)).all())
    assert 0 < leaky.sum() < SpikingNeuron()(x).sum()


@pytest.mark.parametrize(
    "options", [{"levels": 0}, {"decay": 0.0}, {"decay": 1.5}, {"surrogate": "arctan"}], ids=lambda o: str(o)
)
def test_settings_out_of_range(options: dict) -> None:
    with pytest.raises(InputError, match="spiking neuron"):
        SpikingNeuron(**options)


def grid(channels: int = 4) -> Voxels:
    generator = torch.Generator().manual_seed(0)
    coord = torch.cartesian_prod(*[torch.arange(4)] * 3)[torch.randperm(64, generator=generator)[:40]]
    feat = torch.randn(40, channels, generator=generator) * 2
    return Voxels(torch.cat([torch.zeros(40, 1, dtype=torch.int64), coord], 1).int(), feat, 1)


def test_a_train_of_spikes_convolves_to_the_same() -> None:
    voxels, conv = grid(), SubMConv3d(4, 5, 3, bias=False)
    spikes = SpikingNeuron()(voxels.feat)
    train = spike_train(spikes, 4)
    assert set(train.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(train.sum(0), spikes)
    steps = sum(conv(voxels.with_feat(step)).feat for step in train)
    assert_close(steps, conv(voxels.with_feat(spikes)).feat)


def test_meter_counts_pairs_and_spikes() -> None:
    layers: list[torch.nn.Module] = [SubMConv3d(4, 6, 3), SpikingNeuron(), SparseConv3d(6, 8, 2, stride=2)]
    layers += [SpikingNeuron(2), SparseInverseConv3d(8, 3, 2), SpikingNeuron(), torch.nn.Linear(3, 7)]
    network, voxels = SparseSequential(*layers), grid()
    with SpikeMeter(network) as meter, torch.no_grad():
        out = network(voxels)
    first, down, up, last = meter.layers
    near = (voxels.coord[:, None, 1:] - voxels.coord[None, :, 1:]).abs().amax(2) <= 1
    assert first.macs == int(near.sum()) * 4 * 6
    assert (down.macs, up.macs, last.macs) == (40 * 6 * 8, 40 * 8 * 3, 40 * 3 * 7)
    assert first.rate is None
    assert [layer.rate for layer in (down, up, last)] == [rate for _, rate in meter.rates]
    assert [layer.levels for layer in (down, up, last)] == [4, 2, 4]
    expected = 4.6 * first.macs + sum(0.9 * s.levels * s.rate * s.macs for s in (down, up, last))
    assert meter.millijoules == pytest.approx(expected * 1e-9)
    network(out.with_feat(voxels.feat))
    assert len(meter.layers) == 4  # nothing is counted outside the block


def test_meter_counts_pixels() -> None:
    conv, up = torch.nn.Conv2d(3, 5, 3, stride=2, padding=1), torch.nn.ConvTranspose2d(5, 2, 2, stride=2)
    with SpikeMeter(torch.nn.Sequential(SpikingNeuron(), conv, SpikingNeuron(2), up)) as meter, torch.no_grad():
        meter.network(torch.randn(2, 3, 8, 6) * 3)
    assert [layer.macs for layer in meter.layers] == [2 * 4 * 3 * 3 * 5 * 9, 2 * 4 * 3 * 5 * 2 * 4]
    assert [layer.rate for layer in meter.layers] == [rate for _, rate in meter.rates]
    assert [layer.levels for layer in meter.layers] == [4, 2]


def test_compiled_agrees() -> None:
    x = torch.linspace(-1, 5, 61)
    neuron = SpikingNeuron()
    assert torch.equal(torch.compile(neuron, backend="eager")(x), neuron(x))
