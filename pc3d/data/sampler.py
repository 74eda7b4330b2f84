"""Which cloud comes when: an order that depends on (seed, epoch) alone, so that a run can continue anywhere."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from pc3d.errors import InputError

Balance = Literal["classes", "points", "scenes"]


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
    equally often. With ``weights`` a pass has as many draws, and each cloud comes its share of them, rounded up or down
    (systematic sampling). A ``DistributedSampler``, because Lightning leaves those alone; rank ``r`` of ``W`` gets
    positions ``r, r + W, ...``. All ranks get the same number: a training epoch loses its last few draws, an evaluation
    gets padding draws.

    Args:
        dataset: anything with a length: the clouds of the split.
        shuffle: training order (permutations); otherwise clouds in their own order.
        seed: seed of the permutations.
        repeat: passes per epoch.
        rank: of this process.
        world_size: number of processes.
        weights: ``(clouds,)`` shares of the draws of training, of any sum; None = all alike.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        shuffle: bool,
        seed: int = 0,
        repeat: int = 1,
        rank: int = 0,
        world_size: int = 1,
        weights: Tensor | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)
        self.clouds = len(dataset)  # type: ignore[arg-type]
        self.repeat = repeat
        self.weights = weights
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
        return [cloud for generator in passes for cloud in self._pass(generator).tolist()]

    def _pass(self, generator: torch.Generator) -> Tensor:
        order = torch.randperm(self.clouds, generator=generator)
        if self.weights is None:
            return order
        ends = self.weights[order].double().cumsum(0)
        start = torch.rand(1, generator=generator, dtype=torch.float64)
        places = (torch.arange(self.clouds) + start) * (ends[-1] / self.clouds)
        drawn = order[torch.searchsorted(ends, places, right=True).clamp(max=self.clouds - 1)]
        return drawn[torch.randperm(self.clouds, generator=generator)]


def class_balance(counts: Tensor) -> Tensor:
    """``(C,)`` float64 weights of clouds with ``(C, K)`` labelled points per class: every class is drawn equally often.

    A cloud without labels is never drawn.

    Raises:
        InputError: if no cloud has a label.
    """
    total = counts.sum(0)
    if not bool(total.any()):
        raise InputError("data.balance: classes: no training cloud has labels")
    return (counts.double() / total.clamp(min=1)).sum(1)


def scene_balance(scenes: Sequence[str]) -> Tensor:
    """``(C,)`` float64 weights of clouds by the scene that each belongs to: every scene is drawn equally often."""
    scans = Counter(scenes)
    return torch.tensor([1 / scans[scene] for scene in scenes], dtype=torch.float64)


def generator_of(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by a hash of ``key``: the same numbers in any process and on any machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))
