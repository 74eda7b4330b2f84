"""What a person sees of a run: progress bar, score tables, pictures, and its record beside the checkpoints."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import RichProgressBar
from rich.console import Console

from pc3d.errors import InputError
from pc3d.points import Points
from pc3d.tasks.base import PointTask
from pc3d.tasks.record import environment, write_json


class ScoreProgressBar(RichProgressBar):
    """Lightning's rich progress bar with the task's running score of this epoch beside the loss."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        score = (
            pl_module.running_score("val" if trainer.validating else "train")
            if isinstance(pl_module, PointTask)
            else None
        )
        return items if score is None else {**items, score[0]: score[1]}

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        super().on_validation_batch_end(trainer, pl_module, *args)
        self._update_metrics(trainer, pl_module)


class ScoreTable(pl.Callback):
    """Prints the task's scores, class by class, after each validation and test."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._print(trainer, pl_module, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._print(trainer, pl_module, "test")

    def _print(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        task = _task(pl_module)
        if trainer.is_global_zero:
            title = f"{stage}, epoch {trainer.current_epoch}" if stage == "val" else stage
            Console().print(task.score_table(stage, title))


class SavePictures(pl.Callback):
    """Writes the confusion matrix and the first clouds with their predictions, in training and test.

    Files: ``{val,test}-confusion.png`` and ``{val,test}-<cloud>.png``; each validation replaces those of the last. The
    matrix is written after every validation, the clouds (seconds each) after the last one of a training. Without
    matplotlib one line says so and the run goes on.

    Args:
        folder: where the pictures go, default ``pictures`` in the run's folder.
        clouds: number of clouds drawn.
        every_n_validations: draw the clouds after every n-th validation too.
    """

    def __init__(self, folder: str | None = None, clouds: int = 3, every_n_validations: int | None = None) -> None:
        if clouds < 0 or (every_n_validations is not None and every_n_validations < 1):
            raise InputError(
                f"SavePictures: clouds {clouds} must be >= 0, every_n_validations {every_n_validations} >= 1"
            )
        self.folder = folder
        self.clouds = clouds
        self.every_n_validations = every_n_validations
        self.written: list[Path] = []
        self._kept: list[tuple[Points, Any]] = []
        self._validations = 0
        self._failed = False

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._kept = []

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._kept = []

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any
    ) -> None:
        self._keep(trainer, pl_module, outputs)

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        self._keep(trainer, pl_module, outputs)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._validations += 1
        self._draw_confusion(trainer, pl_module, "val")
        wanted = self.every_n_validations is not None and self._validations % self.every_n_validations == 0
        if wanted or trainer.state.fn != "fit":
            self._draw_clouds(trainer, pl_module, "val")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw_clouds(trainer, pl_module, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw_confusion(trainer, pl_module, "test")
        self._draw_clouds(trainer, pl_module, "test")

    def _keep(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: dict[str, Any]) -> None:
        """Copy the first clouds with their predictions to the CPU."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        wanted = self.clouds - len(self._kept)
        for cloud, prediction in itertools.islice(_task(pl_module).predictions(outputs), max(wanted, 0)):
            self._kept.append((cloud.cpu(), prediction.cpu()))

    def _draw_confusion(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        from pc3d.viz.figures import save_confusion_matrix

        task = _task(pl_module)
        confusion = task.confusion(stage)
        if confusion is not None:
            path = self._folder(trainer) / f"{stage}-confusion.png"
            self._draw(trainer, partial(save_confusion_matrix, path, confusion, task.class_names))

    def _draw_clouds(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        task = _task(pl_module)
        for i, (cloud, prediction) in enumerate(self._kept):
            path = self._folder(trainer) / f"{stage}-{Path(str(cloud.meta[0].get('name', i))).name}.png"
            self._draw(trainer, partial(task.save_picture, path, cloud, prediction))
        self._kept = []

    def _draw(self, trainer: pl.Trainer, save: Callable[[], Path]) -> None:
        """A picture that cannot be written (no matplotlib, full disk) costs one line, not the run."""
        if self._failed or not trainer.is_global_zero:
            return
        try:
            path = save()
        except InputError as error:
            self._failed = True
            Console(stderr=True).print(f"no pictures: {error}", soft_wrap=True, markup=False)
            return
        self.written = [*(old for old in self.written if old != path), path]

    def _folder(self, trainer: pl.Trainer) -> Path:
        return Path(self.folder) if self.folder else run_folder(trainer) / "pictures"


class SavePredictions(pl.Callback):
    """Keeps what a test predicts for every cloud, in the form of the data set's benchmark; see ``pc3d evaluate``.

    Args:
        folder: of the predictions.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: list[Points],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        (cloud,) = batch
        if not cloud.meta[0].get("padding"):
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            prediction = _task(pl_module).saved_prediction(outputs, cloud.cpu())
            data.dataset.save_prediction(self.folder, cloud.cpu(), prediction)


class RunRecord(pl.Callback):
    """Writes what a run is and what it found beside its checkpoints.

    ``run.json``: configuration, code revision, environment, seed and start; ``summary.json``: latest figures, seconds
    and paths, rewritten after every validation and test so that a killed run leaves one too.

    Args:
        config: the resolved configuration as plain values.
        folder: where the files go, default the run's folder.
    """

    def __init__(self, config: dict[str, Any] | None = None, folder: str | None = None) -> None:
        self.config = config
        self.folder = folder
        self.figures: dict[str, float] = {}
        self._start = time.time()
        self._seed = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._start, self._seed = time.time(), torch.initial_seed()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:  # not before: a checkpoint that does not fit must not change the run it is in
            started = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self._start))
            record = {"started": started, "seed": self._seed, **environment(), "config": self.config}
            write_json(self._folder(trainer) / "run.json", record)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._summarise(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._summarise(trainer)

    def _folder(self, trainer: pl.Trainer) -> Path:
        return Path(self.folder) if self.folder else run_folder(trainer)

    def _summarise(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero:
            return
        self.figures |= {name: float(value) for name, value in trainer.callback_metrics.items()}
        checkpoints = trainer.checkpoint_callback
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        savers = [callback for callback in callbacks if isinstance(callback, SavePictures)]
        summary = {
            **self.figures,
            "seconds": round(time.time() - self._start, 1),
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "best_checkpoint": getattr(checkpoints, "best_model_path", "") or None,
            "last_checkpoint": getattr(checkpoints, "last_model_path", "") or _last_checkpoint(checkpoints),
            "pictures": [str(path) for saver in savers for path in saver.written],
        }
        write_json(self._folder(trainer) / "summary.json", summary)


def _last_checkpoint(callback: Any) -> str | None:
    """``last.ckpt`` in a callback's folder; another callback may write it, and testing an older file resets it."""
    path = Path(getattr(callback, "dirpath", None) or "", "last.ckpt")
    return str(path) if path.is_file() else None


def _task(module: pl.LightningModule) -> PointTask:
    if not isinstance(module, PointTask):
        raise InputError(f"this callback reports on the tasks of pc3d, not on {type(module).__name__}")
    return module


def run_folder(trainer: pl.Trainer) -> Path:
    """The folder a run writes to: its logger's, or the trainer's root."""
    return Path(trainer.log_dir or trainer.default_root_dir)
