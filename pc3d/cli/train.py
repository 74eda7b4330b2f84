"""``pc3d train``: fit a config, then test its best checkpoint."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pc3d.cli.runs import CHECKPOINTS, Run, plan_run
from pc3d.errors import InputError

if TYPE_CHECKING:
    from pc3d.cli.experiment import Experiment
    from pc3d.tasks import PointTask

HELP = """\
usage: pc3d train --config FILE [--ckpt_path last|FILE] [--init_from FILE] [--run_dir DIR] [any override]

Train a model as a config file describes, then test its best checkpoint.

  --config FILE            the experiment; several are merged, the later wins
  --KEY VALUE              override any key of the config: --model.optimizer.lr 1e-3 --trainer.max_epochs 20
  --data.root DIR          folder of the data set's files
  --run_dir DIR            where results go; default runs/<config>, numbered when that holds another run
  --ckpt_path last         go on with the last run of this config, from its last checkpoint
  --ckpt_path FILE         go on from this checkpoint: weights, optimizer, epoch and data order
  --init_from FILE         start a new run from the weights of a checkpoint, nothing else
  --test false             do not test afterwards
  --every_n_train_steps N  save last.ckpt every N steps too, not only after each epoch
  --print_config           print the whole config, with every default, and stop
  --help_all               list every key with its type and default
  --debug                  show the traceback of an error

A run folder holds checkpoints/best.ckpt and last.ckpt, logs/ (CSV, TensorBoard), pictures/, config.yaml, run.json and
summary.json. Results of an earlier run are never overwritten.

examples:
  pc3d train --config configs/synthetic_rooms/semseg-spunet-small.yaml
  pc3d train --config configs/lidarhd/semseg-spunet.yaml --data.root my_tiles --trainer.max_epochs 30
  pc3d train --config configs/lidarhd/semseg-spunet.yaml --ckpt_path last
  pc3d train --config my.yaml --init_from runs/demo/checkpoints/best.ckpt --model.optimizer.lr 5e-4
"""


def main(arguments: list[str]) -> int:
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(HELP, end="")
        return 0
    from pc3d.cli.experiment import Experiment

    def plan(config: Any) -> Run:
        if config["ckpt_path"] and config["init_from"]:
            raise InputError("--ckpt_path resumes a run, --init_from starts a new one from weights: give one of them")
        return plan_run(Path(str(config["config"][-1])), config["run_dir"], config["ckpt_path"])

    arguments = ["--help" if argument == "--help_all" else argument for argument in arguments]
    return fit_and_test(Experiment(arguments, plan), arguments)


def fit_and_test(experiment: Experiment, arguments: list[str]) -> int:
    """Run a training experiment; see :data:`HELP`."""
    from pc3d.peft import attached, count_parameters
    from pc3d.tasks import init_weights, read_checkpoint

    model, trainer, folder = experiment.model, experiment.trainer, experiment.run.folder
    resume, weights = experiment.run.checkpoint, experiment.config["init_from"]
    if resume is not None:
        read_checkpoint(resume)  # a damaged file, or one with code in it, ends here
    if weights is not None:
        print(init_weights(model, weights, trust=experiment.config["trust"]))
    if attached(model.backbone):
        print(f"adapter: {count_parameters(model)}")
    print(f"run folder: {folder}" + (f", resuming from {resume}" if resume else ""))
    try:
        trainer.fit(model, datamodule=experiment.datamodule, ckpt_path=resume and str(resume))
    except SystemExit as stop:  # after Ctrl-C the trainer ends the process itself
        raise KeyboardInterrupt(_how_to_resume(arguments, folder)) from stop
    except Exception:
        experiment.run.discard()
        raise
    if experiment.config["test"] and not experiment.config["trainer"]["fast_dev_run"]:
        _test_best(experiment)
    _report(folder, experiment.model)
    return 0


def _test_best(experiment: Experiment) -> None:
    if not experiment.datamodule.size("test"):
        print("no test clouds: not tested")
        return
    best = experiment.run.folder / CHECKPOINTS / "best.ckpt"
    weights = str(best) if best.is_file() else None
    experiment.trainer.test(experiment.model, datamodule=experiment.datamodule, ckpt_path=weights, verbose=False)


def _how_to_resume(arguments: list[str], folder: Path) -> str:
    last = folder / CHECKPOINTS / "last.ckpt"
    if not last.is_file():
        return "no checkpoint was saved yet"
    words = iter(arguments)
    keep = [word for word in words if not (word.startswith("--ckpt_path") and ("=" in word or next(words, "")))]
    return f"go on with: pc3d train {shlex.join(keep)} --ckpt_path {shlex.quote(str(last))}"


def _report(folder: Path, model: PointTask) -> None:
    from pc3d.tasks import Classification, Completion, Detection, Pretraining, Reconstruction

    best = next((path for name in ("best", "last") if (path := folder / CHECKPOINTS / f"{name}.ckpt").is_file()), None)
    print(f"figures: {folder}/summary.json, pictures: {folder}/pictures, logs: {folder}/logs")
    if best is not None and isinstance(model, Pretraining):
        print(f"fine-tune it: pc3d train --config CONFIG --init_from {best}")
    elif best is not None and isinstance(model, Reconstruction):
        print(f"reconstruct a cloud of your own: pc3d reconstruct CLOUD --ckpt {best} -o surface.ply")
    elif best is not None:
        uses = {
            Classification: ("classify", "classes.csv"),
            Completion: ("complete", "whole.ply"),
            Detection: ("find boxes in", "boxes.json"),
        }
        verb, output = uses.get(type(model), ("label", "labelled.ply"))
        print(f"{verb} a cloud of your own: pc3d predict CLOUD --ckpt {best} -o {output}")
