"""A config becomes data, model, trainer and a run folder: what ``train`` and ``test`` share."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from lightning_fabric.plugins import CheckpointIO, TorchCheckpointIO
from pytorch_lightning.callbacks import Callback, LambdaCallback, ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from pc3d.cli.config_errors import readable_config_errors
from pc3d.cli.errors import one_line
from pc3d.cli.parser import suggest
from pc3d.cli.runs import CHECKPOINTS, Run, run_of
from pc3d.data.module import PointDataModule
from pc3d.errors import InputError
from pc3d.io.atomic import atomic_write
from pc3d.tasks import check_card, init_weights, read_checkpoint
from pc3d.tasks.base import PointTask
from pc3d.tasks.callbacks import RunRecord, SavePictures, ScoreProgressBar, ScoreTable
from pc3d.tasks.checkpoint import CARD, data_entries
from pc3d.tasks.segmentation import SemanticSegmentation

# Options of one call, not of the experiment: a saved config does not hold them, so nothing is resumed by accident.
CALL_OPTIONS = ("config", "ckpt_path", "init_from", "run_dir", "trust")
# Of the trainer: the others have a model whose inputs are not float32.
PRECISIONS = ("32-true", "32", "16-mixed", "16", "bf16-mixed", "bf16")


class Experiment(LightningCLI):
    """The objects that a config describes; nothing is written and nothing runs until they are used.

    Args:
        arguments: ``--config FILE`` and overrides, as on the command line.
        plan: chooses the run's folder and checkpoint from the parsed config; called before anything is built.
        program: name shown in messages.

    Raises:
        InputError: for anything wrong in the config, in one line.
    """

    model: PointTask
    datamodule: PointDataModule
    trainer: pl.Trainer

    def __init__(self, arguments: Sequence[str], plan: Callable[[Any], Run], program: str = "pc3d train") -> None:
        self.plan = plan
        for name in ("pytorch_lightning", "lightning_fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)  # set when imported; what matters is printed by us
        _check_configs(arguments)
        self.task_class = _task_class(arguments)
        with _program_name(program):
            super().__init__(
                SemanticSegmentation if self.task_class is None else PointTask,
                PointDataModule,
                subclass_mode_model=self.task_class is not None,
                run=False,
                args=list(arguments),
                seed_everything_default=0,
                auto_configure_optimizers=False,
                save_config_callback=None,
                parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
            )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        add_call_options(parser)
        model = "model" if self.task_class is None else "model.init_args"
        parser.link_arguments("data.class_names", f"{model}.class_names", apply_on="instantiate")
        parser.link_arguments("data.in_channels", f"{model}.backbone.init_args.in_channels", apply_on="instantiate")
        if self.task_class is not None and "categories" in inspect.signature(self.task_class).parameters:
            parser.link_arguments("data.categories", f"{model}.categories", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        with readable_config_errors(parser):
            super().parse_arguments(parser, args)

    def before_instantiate_classes(self) -> None:
        self.run = self.plan(self.config)

    def instantiate_classes(self) -> None:
        with readable_config_errors(self.parser):
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        given = self.config_init["trainer"]
        if given["precision"] is not None and str(given["precision"]) not in PRECISIONS:
            raise InputError(
                f"config: trainer.precision: {given['precision']} is not for point clouds: coordinates stay float32 "
                f"(possible: {', '.join(PRECISIONS)})"
            )
        if given["logger"] in (None, True):
            kwargs["logger"] = self._loggers()
        callbacks: list[Callback] = given["callbacks"] or []
        for callback in callbacks:
            if isinstance(callback, SavePictures) and callback.folder is None:
                callback.folder = str(self.run.folder / "pictures")
        kwargs["callbacks"] = [*callbacks, *self._callbacks(given)]
        kwargs["default_root_dir"] = str(given["default_root_dir"] or self.run.folder)
        plugins = given["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        if given["enable_model_summary"] is None:
            kwargs["enable_model_summary"] = False
        return super().instantiate_trainer(**kwargs)

    def _loggers(self) -> list[Logger]:
        """CSV always, TensorBoard if installed; a resumed run logs beside its earlier part, not over it."""
        logs = self.run.logs.name
        loggers: list[Logger] = [CSVLogger(self.run.folder, name="", version=logs)]
        if importlib.util.find_spec("tensorboard") is not None:
            loggers.append(TensorBoardLogger(self.run.folder, name="", version=logs))
        return loggers

    def _callbacks(self, trainer: Any) -> list[Callback]:
        """Reports and checkpoints, except those that the config brings or switches off."""
        validations = (trainer["max_epochs"] or 1) // (trainer["check_val_every_n_epoch"] or 1)
        own: list[Callback] = [
            ScoreTable(),
            SavePictures(str(self.run.folder / "pictures"), every_n_validations=max(validations // 4, 1)),
            SameLength(),
            RunRecord(self.saved_config(), str(self.run.folder)),
            LambdaCallback(on_train_start=lambda trainer, module: self.save_config()),
        ]
        if trainer["enable_progress_bar"] is not False:
            own.append(ScoreProgressBar())
        given = {type(callback) for callback in trainer["callbacks"] or []} - {LambdaCallback}
        own = [callback for callback in own if type(callback) not in given]
        if trainer["enable_checkpointing"] is not False and not trainer["fast_dev_run"]:
            own += self._checkpoints()
        return own

    def _checkpoints(self) -> list[Callback]:
        """``best.ckpt`` by the task's figure; ``last.ckpt`` after every epoch and, on request, every so many steps."""
        common: dict[str, Any] = {"dirpath": self.run.folder / CHECKPOINTS, "enable_version_counter": False}
        monitor, mode = self.model.monitor
        checkpoints = [
            ModelCheckpoint(filename="best", monitor=monitor, mode=mode, **common),
            ModelCheckpoint(filename="last", save_on_train_epoch_end=True, **common),
        ]
        if self.config["every_n_train_steps"]:
            checkpoints.append(
                ModelCheckpoint(filename="last", every_n_train_steps=self.config["every_n_train_steps"], **common)
            )
        return list(checkpoints)

    def saved_config(self) -> dict[str, Any]:
        """The whole config as plain values, defaults included, without the options of this call."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False, format="yaml"))
        return {key: value for key, value in config.items() if key not in CALL_OPTIONS}

    @rank_zero_only
    def save_config(self) -> None:
        """Write ``config.yaml`` to the run folder: ``pc3d train --config`` with it repeats the run."""
        with atomic_write(self.run.folder / "config.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(self.saved_config(), sort_keys=False))


def trained_experiment(
    checkpoint: Path, config: str | None, overrides: Sequence[str], plan: Callable[[Any], Run], program: str
) -> Experiment:
    """The experiment of a checkpoint, with its weights.

    Args:
        config: experiment file, default the ``config.yaml`` of the checkpoint's run.
        overrides: of the config, as on the command line.
        plan, program: see :class:`Experiment`.

    Raises:
        InputError: if checkpoint or config is missing, or they do not fit each other.
    """
    content = read_checkpoint(checkpoint)
    words = ["--config", str(config or _config_beside(checkpoint)), *overrides]
    experiment = Experiment(words, plan, program)
    model = experiment.model
    if CARD in content:
        card = content[CARD]
        entries = data_entries(experiment.datamodule.pipeline)
        check_card(card, str(checkpoint), class_names=model.class_names, **entries)
        model.seed = card["seed"]
    init_weights(model, checkpoint, strict=True)
    return experiment


def _config_beside(checkpoint: Path) -> Path:
    if not checkpoint.is_file():
        raise InputError(f"{checkpoint}: no such checkpoint file")
    config = (run_of(checkpoint) or checkpoint.parent) / "config.yaml"
    if not config.is_file():
        raise InputError(f"{checkpoint}: no config.yaml in its run folder: add --config FILE.yaml")
    return config


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints are complete or not there: the trainer's own are copied into place, and a full disk cuts them off."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with atomic_write(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())


class SameLength(Callback):
    """Refuses to resume a one-cycle schedule with another number of steps: it would end before or after its cycle."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for config in trainer.lr_scheduler_configs:
            planned, now = getattr(config.scheduler, "total_steps", None), trainer.estimated_stepping_batches
            if planned is not None and planned != max(now, 2):  # torch's cycle has two steps at least
                raise InputError(
                    f"{trainer.ckpt_path}: its schedule has {planned} steps, this run {now}: resume with the same "
                    "trainer.max_epochs, batch_size and data, or start a new run with --init_from"
                )


def add_call_options(parser: Any) -> None:
    """The options of ``train`` which are not part of trainer, model or data."""
    parser.add_argument("--ckpt_path", type=str | None, default=None, help="resume: 'last' or a checkpoint file")
    parser.add_argument("--init_from", type=str | None, default=None, help="start from the weights of a checkpoint")
    parser.add_argument("--test", type=bool, default=True, help="test the best checkpoint after training")
    parser.add_argument("--run_dir", type=str | None, default=None, help="folder of the run, default runs/<config>")
    parser.add_argument("--every_n_train_steps", type=int | None, default=None, help="save last.ckpt this often")
    parser.add_argument("--trust", type=bool, default=False, help="run code inside --init_from (your own file only)")


@contextlib.contextmanager
def _program_name(name: str) -> Iterator[None]:
    """jsonargparse and Lightning look at the process's own arguments, which are not those of an embedded call."""
    before, sys.argv = sys.argv, [name]
    try:
        yield
    finally:
        sys.argv = before


def _check_configs(arguments: Sequence[str]) -> None:
    """Check that a command line has a ``--config`` (or asks for help), and that the file is there and holds keys.

    Raises:
        InputError: if not; names the config that may have been meant.
    """
    paths = [value for flag, value in _pairs(arguments) if flag in ("--config", "-c")]
    if not all(paths) or not (paths or "--help" in arguments):
        given = next((f", as in --config {word}" for word in arguments if word.endswith((".yaml", ".yml"))), "")
        raise InputError(f"no config: add --config FILE.yaml{given or ', such as those in configs/'}")
    for path in paths:
        if not Path(path).is_file():
            known = (str(config) for config in Path("configs").glob("*/*.yaml"))
            raise InputError(f"{path}: no such config file{suggest(path, known)}")
        try:
            content = yaml.safe_load(Path(path).read_text())
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not a readable config: {one_line(str(error))}") from error
        if not isinstance(content, dict):
            raise InputError(
                f"{path}: not a config: holds {one_line(repr(content))[:60]}, not sections such as 'model:'"
            )


def _task_class(arguments: Sequence[str]) -> type | None:
    """The class that ``model.class_path`` names, :class:`PointTask` if there is no such class.

    None without a ``class_path``: ``model`` then holds the arguments of semantic segmentation.
    """
    named = [value for flag, value in _pairs(arguments) if flag in ("--model", "--model.class_path")]
    for path in (value for flag, value in _pairs(arguments) if flag in ("--config", "-c")):
        with contextlib.suppress(KeyError, TypeError):  # told by the parser
            named += [str(yaml.safe_load(Path(path).read_text())["model"]["class_path"])]
    if not named:
        return None
    module, _, name = named[0].rpartition(".")
    with contextlib.suppress(ImportError, AttributeError, ValueError):  # told by the parser
        return getattr(importlib.import_module(module), name)
    return PointTask


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag.startswith("-"):
            yield flag, value if equals else (arguments[i + 1] if i + 1 < len(arguments) else "")
