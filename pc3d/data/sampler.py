"""Which cloud comes when: an order that depends on (seed, epoch) alone, so that a run can continue anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, DistributedSampler


class Draw(NamedTuple):
    """One sample of an epoch.

    Attributes:
        cloud: its number in the split.
        epoch: training epoch.
        position: place in the epoch's order over all ranks; (epoch, position) is unique in a run.
        padding: True if the sample only fills up the last batch of an evaluation over several devices.
    """

    cloud: int
    epoch: int = 0
    position: int = 0
    padding: bool = False


class CloudSampler(DistributedSampler[Draw]):
    """Draws of one rank, epoch by epoch.

    In training every epoch is ``repeat`` passes over the clouds, each pass a new permutation, so that every cloud comes
    equally often. A ``DistributedSampler``, because Lightning leaves those alone; rank ``r`` of ``W`` gets positions
    ``r, r + W, ...``. All ranks get the same number: a training epoch loses its last few draws, an evaluation gets
    padding draws.

    Args:
        dataset: anything with a length: the clouds of the split.
        shuffle: training order (permutations); otherwise clouds in their own order.
        seed: seed of the permutations.
        repeat: passes per epoch.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self, dataset: Dataset[Any], shuffle: bool, seed: int = 0, repeat: int = 1, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)
        self.clouds = len(dataset)  # type: ignore[arg-type]
        self.repeat = repeat
        self.skip = 0  # draws of this rank that a run had behind it before it was resumed

    def __len__(self) -> int:
        total = self.clouds * self.repeat
        return max(total // self.num_replicas, 1) if self.shuffle else -(-total // self.num_replicas)

    def __iter__(self) -> Iterator[Draw]:
        total = len(self) * self.num_replicas
        order = self.order()
        for position in range(self.rank + self.skip * self.num_replicas, total, self.num_replicas):
            yield Draw(order[position % len(order)], self.epoch, position, padding=position >= len(order))

    def order(self) -> list[int]:
        """Cloud numbers of the current epoch over all ranks."""
        if not self.shuffle:
            return list(range(self.clouds)) * self.repeat
        passes = [generator_of(self.seed, "order", self.epoch, i) for i in range(self.repeat)]
        return [cloud for generator in passes for cloud in torch.randperm(self.clouds, generator=generator).tolist()]


def generator_of(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by a hash of ``key``: the same numbers in any process and on any machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))
