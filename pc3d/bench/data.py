"""The data of a config: every stage of a training sample, the loader, and training fed by it."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from pc3d.cli.experiment import Experiment
from pc3d.cli.runs import Run
from pc3d.data.module import PointDataModule
from pc3d.data.sampler import Draw, generator_of
from pc3d.data.transforms import AssembleFeatures, Compose, GridSample
from pc3d.errors import InputError
from pc3d.points import Points
from pc3d.tasks.base import PointTask

_FROM_DISK = ("load", "read")
_WARM_UP = 2  # steps that are not timed


@dataclass
class Rate:
    """How fast something is done.

    Attributes:
        name: what.
        ms: per cloud, median over the rounds.
        clouds, points: per second; points that go in, or come out of a loader.
        waiting: share of the training time spent waiting for a batch; None elsewhere.
    """

    name: str
    ms: float
    clouds: float
    points: float
    waiting: float | None = None

    @staticmethod
    def of(name: str, seconds: float, clouds: float, points: float, waiting: float | None = None) -> Rate:
        return Rate(name, 1e3 * seconds / clouds, clouds / seconds, points / seconds, waiting)


def run(config: str, overrides: Sequence[str], clouds: int, rounds: int, workers: int, steps: int) -> list[Rate]:
    """Time the training data of a config.

    Args:
        config: file of the experiment; ``overrides`` as in ``pc3d train``.
        clouds: training clouds that the stages are timed on.
        rounds: of timing, after one untimed.
        workers: processes of the loader.
        steps: of training; 0 leaves it out.

    Raises:
        InputError: for a config that is wrong or does without the cache.
    """
    arguments = ["--config", config, *overrides]
    with tempfile.TemporaryDirectory() as folder:
        experiment = Experiment(arguments, lambda _: Run(Path(folder)), "tools/bench.py data")
        model, data = experiment.model, experiment.datamodule
        if data.cache is None:
            raise InputError("data.cache is false: what is timed is the memory-mapped cache")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a worker
        try:
            rates = stages(data, clouds, rounds)
        finally:
            torch.set_num_threads(threads)
        data.num_workers = workers
        rates.append(loading(data, rounds))
        for count in (0, workers) if steps else ():
            data.num_workers = count
            rates.append(training(model, data, steps))
    return rates


def stages(data: PointDataModule, clouds: int, rounds: int) -> list[Rate]:
    """What a worker does for a batch, stage by stage, with the cache and (``load``) without."""
    work = sample_stages(data)
    count = min(clouds, data.dataset.size("train"))
    collate = data.train_dataloader().collate_fn
    seconds: dict[str, list[float]] = defaultdict(lambda: [0.0] * (rounds + 1))
    points: dict[str, int] = defaultdict(int)
    for number in range(rounds + 1):
        batch: list[tuple[Draw, Points]] = []
        for index in range(count):
            generator, cloud = generator_of(data.seed, "augment", number, index), None
            for name, stage in work.items():
                start = time.perf_counter()
                result = stage(index if name in _FROM_DISK else cloud, generator)
                seconds[name][number] += time.perf_counter() - start
                points[name] += result.num_points if name in _FROM_DISK or cloud is None else cloud.num_points
                cloud = result
            assert cloud is not None
            batch.append((Draw(index, number, index), cloud))
        start = time.perf_counter()
        for first in range(0, count, data.batch_size):
            collate(batch[first : first + data.batch_size])
        seconds["collate"][number] = time.perf_counter() - start
        points["collate"] += sum(cloud.num_points for _, cloud in batch)
    return [
        Rate.of(name, statistics.median(each[1:]), count, points[name] / (rounds + 1)) for name, each in seconds.items()
    ]


def sample_stages(data: PointDataModule) -> dict[str, Callable[[Any, torch.Generator], Points]]:
    """Named stages, each on the result of the one before; the first two take the number of a training cloud."""
    samples, pipeline = data.samples("train"), data.pipeline
    steps: dict[str, Any] = {
        "augment": pipeline.augment,
        "grid sample": [] if pipeline.grid_size is None else [GridSample(pipeline.grid_size, pick="random")],
        "crop": pipeline.crop,
        "features": [*pipeline.finish, AssembleFeatures(pipeline.features)],
    }
    return {
        "load": lambda index, _: Compose(samples.prepare)(data.dataset.load("train", index)),
        "read": lambda index, _: in_memory(samples.cloud(index)),
        **{name: Compose(list(transforms)) for name, transforms in steps.items() if transforms},
    }


def in_memory(cloud: Points) -> Points:
    """A copy that is read from disk: what is memory-mapped costs nothing until it is touched."""
    return cloud.replace(coord=cloud.coord.clone(), attrs={name: value.clone() for name, value in cloud.attrs.items()})


def loading(data: PointDataModule, rounds: int) -> Rate:
    """Epochs of the training loader, nothing else running; workers are started before the clock."""
    loader = data.train_dataloader()
    seconds, clouds, points = [], 0, 0
    for epoch in range(rounds + 1):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        start = time.perf_counter()
        for batch in loader:
            clouds, points = clouds + loader.batch_size, points + batch.num_points  # type: ignore[operator]
        seconds.append(time.perf_counter() - start)
    name = f"loader, {data.num_workers} workers"
    return Rate.of(name, statistics.median(seconds[1:]), clouds / (rounds + 1), points / (rounds + 1))


def training(model: PointTask, data: PointDataModule, steps: int) -> Rate:
    """``steps`` training steps as the trainer does them."""
    clock = _Clock()
    trainer = pl.Trainer(
        max_steps=steps + _WARM_UP,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    )
    trainer.fit(model, datamodule=data)
    whole = clock.ends[-1] - clock.ends[_WARM_UP - 1]
    working = sum(end - start for start, end in zip(clock.starts[_WARM_UP:], clock.ends[_WARM_UP:], strict=True))
    points = sum(clock.points[_WARM_UP:])
    return Rate.of(
        f"training, {data.num_workers} workers", whole, steps * data.batch_size, points, waiting=1 - working / whole
    )


class _Clock(pl.Callback):
    """When each training step starts and ends, and its points."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.ends: list[float] = []
        self.points: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Points, batch_idx: int) -> None:
        self.points.append(batch.num_points)
        self.starts.append(time.perf_counter())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Points, batch_idx: int) -> None:
        self.ends.append(time.perf_counter())


def lines(rates: Sequence[Rate]) -> str:
    """The rates as a table."""
    rows = [f"{'stage':<22} {'ms/cloud':>9} {'clouds/s':>9} {'M points/s':>10} {'waiting':>8}"]
    for rate in rates:
        waiting = "" if rate.waiting is None else f"{rate.waiting:.1%}"
        rows.append(f"{rate.name:<22} {rate.ms:>9.2f} {rate.clouds:>9.1f} {rate.points / 1e6:>10.2f} {waiting:>8}")
    return "\n".join(rows)
