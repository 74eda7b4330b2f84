"""``pc3d``: finds the command, runs it, and turns every failure a user can cause into one line and exit code 2."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence

from pc3d import __version__
from pc3d.cli.errors import explain
from pc3d.cli.parser import suggest
from pc3d.errors import InputError

COMMANDS: dict[str, str] = {
    "train": "train a model from a config file, then test it",
    "test": "score a checkpoint on the test clouds",
    "fewshot": "train and test the folds of a few-shot protocol",
    "probe": "a linear classifier on the features of a pre-training",
    "robustness": "score a classifier on corrupted clouds",
    "evaluate": "score saved predictions, of one run or several together",
    "predict": "label your own clouds with a checkpoint",
    "reconstruct": "make surfaces of your own clouds with a checkpoint",
    "export": "convert clouds, or a checkpoint to safetensors",
    "convert": "published checkpoints to ours, and back",
    "overview": "a map of scans larger than memory",
    "info": "what a checkpoint needs, or what is installed here",
    "view": "look at a cloud, or render it to a picture",
    "prepare": "check a raw data set and write it prepared",
    "data": "check a folder of clouds before training on it",
    "segments": "measure how pure graph segments are",
    "dataflow": "measure this machine for the sparse layers",
    "profile": "time every sparse layer of a network on a cloud",
}
_EXAMPLE = """\
examples:
  pc3d train --config configs/synthetic_rooms/semseg-spunet-small.yaml
  pc3d predict scan.laz --ckpt runs/demo/checkpoints/best.ckpt -o labelled.laz
  pc3d view labelled.laz --color label --screenshot labelled.png

`pc3d <command> --help` explains a command. With --debug (or PC3D_DEBUG=1) errors come with their traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        Exit status: 0, or 2 after a failure that was explained on one line, or 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("PC3D_DEBUG", "") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--debug"]
    _quiet()
    try:
        return _run(arguments)
    except SystemExit as stop:  # --help and --print_config of a parser
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt as stop:
        print(f"\ninterrupted{f': {stop}' if str(stop) else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `pc3d ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        message = explain(error)
        if debug or message is None:
            raise
        if table := getattr(error, "table", None):  # a mismatch shows both sides
            print(table, end="")
        print(f"error: {message}", file=sys.stderr)
        return 2


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(f"pc3d {__version__}")
        return 0
    command = arguments[0]
    if command not in COMMANDS:
        hint = suggest(command, [*COMMANDS, "--version", "--help"])
        raise InputError(f"unknown command '{command}'{hint} (commands: {', '.join(COMMANDS)})")
    return importlib.import_module(f"pc3d.cli.{command}").main(arguments[1:])


def _overview() -> str:
    lines = [f"  {name:<12}{summary}" for name, summary in COMMANDS.items()]
    return "\n".join(["usage: pc3d <command> ...", "", "Deep learning on 3D point clouds.", "", *lines, "", _EXAMPLE])


def _quiet() -> None:
    """One line per warning, without the source line; those that do not concern the user of a command are left out."""
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {' '.join(str(message).split())}\n"
    for text in (
        ".*does not have many workers.*",
        ".*number of training batches.*smaller than the logging interval.*",
        ".*args parameter is intended to run from within Python.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*LeafSpec.*",
        ".*module\\(s\\) in eval mode at the start.*",  # frozen ones: tasks set the modes
        ".*across ranks is zero.*",  # training without validation clouds
    ):
        warnings.filterwarnings("ignore", message=text)
