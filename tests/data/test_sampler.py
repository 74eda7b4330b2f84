"""The order of samples: balanced, a function of (seed, epoch), divided over ranks, resumable."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pc3d.data.sampler import CloudSampler, Draw, class_balance, generator_of, scene_balance


def draws(clouds: int, shuffle: bool = True, epoch: int = 0, skip: int = 0, **options: Any) -> list[Draw]:
    sampler = CloudSampler(range(clouds), shuffle, **options)
    sampler.set_epoch(epoch)
    sampler.skip = skip
    return list(sampler)


def numbers(*args: object, **kwargs: object) -> list[int]:
    return [draw.cloud for draw in draws(*args, **kwargs)]


def test_every_pass_is_a_new_permutation() -> None:
    order = numbers(50, repeat=3)
    passes = [order[i : i + 50] for i in (0, 50, 100)]
    assert all(sorted(each) == list(range(50)) for each in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    assert numbers(50, epoch=1) == numbers(50, epoch=1)
    assert numbers(50, epoch=1) != numbers(50, epoch=2)
    assert numbers(50, epoch=1) != numbers(50, epoch=1, seed=1)


def test_evaluation_keeps_the_order() -> None:
    assert numbers(5, shuffle=False, epoch=3) == [0, 1, 2, 3, 4]


def test_positions_tell_the_passes_apart() -> None:
    order = draws(4, repeat=2, epoch=5)
    assert [draw.position for draw in order] == list(range(8))
    assert {draw.epoch for draw in order} == {5}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_ranks_share_an_epoch(clouds: int, repeat: int, world: int, shuffle: bool) -> None:
    repeat = repeat if shuffle else 1
    ranks = [draws(clouds, shuffle, repeat=repeat, rank=r, world_size=world) for r in range(world)]
    lengths = {len(rank) for rank in ranks}
    assert lengths == {len(CloudSampler(range(clouds), shuffle, repeat=repeat, world_size=world))}
    together = [draw for step in zip(*ranks, strict=True) for draw in step]
    alone = draws(clouds, shuffle, repeat=repeat)
    real = [draw for draw in together if not draw.padding]
    assert real == alone[: len(real)]
    if shuffle:
        assert len(alone) - len(real) < world
    else:
        assert Counter(draw.cloud for draw in real) == Counter(range(clouds))
        assert len(together) - len(real) < world


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.integers(1, 3), st.integers(0, 40))
def test_skipping_leaves_out_the_beginning(clouds: int, world: int, skip: int) -> None:
    for rank in range(world):
        whole = draws(clouds, rank=rank, world_size=world)
        assert draws(clouds, rank=rank, world_size=world, skip=skip) == whole[skip:]


def test_generators_differ_by_every_part_of_the_key() -> None:
    def first(*key: int | str) -> int:
        return int(torch.randint(2**62, (1,), generator=generator_of(*key)))

    values = [first(0, "a", 0, 0), first(1, "a", 0, 0), first(0, "b", 0, 0), first(0, "a", 1, 0), first(0, "a", 0, 1)]
    assert len(set(values)) == 5
    assert first(0, "a", 0, 0) == values[0]


def test_the_seed_of_a_generator_never_changes() -> None:
    """Runs of older versions must stay repeatable: these numbers were written down once."""
    assert generator_of(0, "order", 0, 0).initial_seed() == 6106747882082121107
    assert torch.randperm(8, generator=generator_of(0, "order", 0, 0)).tolist() == [6, 0, 2, 7, 4, 3, 1, 5]


@pytest.mark.parametrize("world", [2, 3])
def test_a_set_smaller_than_the_number_of_ranks(world: int) -> None:
    order = [numbers(1, rank=rank, world_size=world) for rank in range(world)]
    assert order == [[0]] * world


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0, 1e-9, 1e9]), min_size=1, max_size=20), st.integers(0, 10**6))
def test_every_cloud_comes_its_share_of_a_pass(weights: list[float], seed: int) -> None:
    count, total = len(weights), sum(weights)
    if total == 0:
        return
    order = numbers(count, seed=seed, weights=torch.tensor(weights))
    assert len(order) == count
    found = Counter(order)
    for cloud, weight in enumerate(weights):
        share = count * weight / total
        assert int(share - 1e-6) <= found[cloud] <= int(share + 1e-6) + 1
        assert weight or not found[cloud]


def test_weighted_order_depends_on_seed_and_epoch_alone_and_is_shared_by_ranks() -> None:
    weights = torch.rand(40, generator=torch.Generator().manual_seed(0))
    whole = numbers(40, epoch=2, repeat=2, weights=weights)
    assert whole == numbers(40, epoch=2, repeat=2, weights=weights) != numbers(40, epoch=3, repeat=2, weights=weights)
    ranks = [numbers(40, epoch=2, repeat=2, weights=weights, rank=r, world_size=2) for r in range(2)]
    assert [cloud for pair in zip(*ranks, strict=True) for cloud in pair] == whole
    assert numbers(40, epoch=2, repeat=2, weights=weights, skip=13) == whole[13:]
    assert numbers(40, shuffle=False, weights=weights) == list(range(40))


def test_weights_of_classes_and_scenes() -> None:
    counts = torch.tensor([[90, 0, 0], [10, 5, 0], [0, 0, 0], [0, 15, 0]])
    torch.testing.assert_close(class_balance(counts), torch.tensor([0.9, 0.35, 0, 0.75], dtype=torch.float64))
    assert scene_balance(["a", "b", "b", "b"]).tolist() == [1, 1 / 3, 1 / 3, 1 / 3]
