"""The models of configs on a training batch of their own data: forward pass, training step, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from pc3d.bench.backbones import forget_peak, median_ms, peak_mb


@dataclass
class ConfigTiming:
    """One config: medians in milliseconds, memory in MB above that of the process before the first pass."""

    config: str
    clouds: int
    points: int
    threads: int
    parameters: int
    forward_ms: float
    step_ms: float
    forward_mb: float
    step_mb: float


def run(configs: Sequence[Path], root: str | None, rounds: int, threads: int) -> list[ConfigTiming]:
    """Time every config in a process of its own, one after the other."""
    timings = []
    for config in configs:
        with get_context("spawn").Pool(1) as pool:
            timings.append(pool.apply(_measure, (config, root, rounds, threads)))
        print(line(timings[-1]), flush=True)
    return timings


def _measure(config: Path, root: str | None, rounds: int, threads: int) -> ConfigTiming:
    from pc3d.cli.experiment import Experiment
    from pc3d.cli.runs import Run

    torch.set_num_threads(threads)
    words = ["--config", str(config)] + ([] if root is None else ["--data.root", root])
    with TemporaryDirectory() as folder:
        experiment = Experiment(words, lambda parsed: Run(Path(folder)), program="tools/bench.py")
        batch = next(iter(experiment.datamodule.train_dataloader()))
        model = experiment.model

        def forward() -> None:
            with torch.no_grad():
                model(batch.with_attrs())

        def step() -> None:
            model.zero_grad(set_to_none=True)
            model(batch.with_attrs()).square().mean().backward()

        forget_peak()
        before = peak_mb()
        model.eval()
        forward_ms, forward_mb = median_ms(forward, rounds), peak_mb() - before
        model.train()
        step_ms = median_ms(step, rounds)
        name = f"{config.parent.name}/{config.stem}"
        parameters = sum(p.numel() for p in model.parameters())
        sizes = len(batch), batch.num_points, threads, parameters
        return ConfigTiming(name, *sizes, forward_ms, step_ms, forward_mb, peak_mb() - before)


def line(timing: ConfigTiming) -> str:
    return (
        f"{timing.config:44} {timing.clouds:>3} clouds, {timing.points:>8,} points, {timing.threads} threads: forward "
        f"{timing.forward_ms:>7,.0f} ms {timing.forward_mb:>6,.0f} MB, step {timing.step_ms:>7,.0f} ms "
        f"{timing.step_mb:>6,.0f} MB, {timing.parameters / 1e6:.2f} M parameters"
    )
