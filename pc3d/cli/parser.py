"""What the commands' argument parsers share."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from typing import NoReturn

from pc3d.errors import InputError

PRESETS = ("scannet", "s3dis", "scaling")
"""Names of :data:`pc3d.tasks.augmentations.TestAugmentation`, without its imports."""


def suggest(word: str, choices: Iterable[str]) -> str:
    """``": did you mean 'x'?"`` for the choice closest to a mistyped word; empty if none is close."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f": did you mean '{close[0]}'?" if close else ""


def split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """A command's own arguments, and what follows ``--``: overrides of its config."""
    place = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:place], arguments[place + 1 :]


class Parser(argparse.ArgumentParser):
    """An argument parser with the examples kept as written, and errors as one line with a suggestion."""

    def __init__(self, command: str, description: str, examples: str) -> None:
        super().__init__(
            prog=f"pc3d {command}",
            description=description,
            epilog=f"examples:\n{examples.rstrip()}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(self, args=None, namespace=None):
        """Like ``argparse``, but an unknown option is answered with the closest known one."""
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].split("=")[0]
            options = [option for action in self._actions for option in action.option_strings]
            self.error(f"unknown argument '{unknown[0]}'{suggest(word, options)}")
        return known

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message} (see {self.prog} --help)")
