"""What the commands' argument parsers share."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from typing import NoReturn

from pc3d.errors import InputError

PRESETS = ("scannet", "s3dis", "scaling")
"""Names of :data:`pc3d.tasks.augmentations.TestAugmentation`, without its imports."""

SECTIONS = ("seed_everything", "trainer", "model", "data")
"""Top-level keys of a config."""


def suggest(word: str, choices: Iterable[str]) -> str:
    """``": did you mean 'x'?"`` for the choice closest to a mistyped word, or one that holds it; empty if none does."""
    known = list(choices)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    close = close or [choice for choice in known if len(word) > 3 and word.lower() in choice.lower()]
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
            self._refuse(unknown[0])
        return known

    def parse_with_overrides(self, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """The command's own options, and overrides of its config: options with a dot in the name, and whole sections.

        Raises:
            InputError: for an option that is neither.
        """
        known, rest = self.parse_known_args(arguments)
        for word in rest:
            name = word.partition("=")[0]
            if name.startswith("--") and "." not in name and name[2:] not in SECTIONS:
                self._refuse(word)
        return known, rest

    def _refuse(self, word: str) -> NoReturn:
        options = [option for action in self._actions for option in action.option_strings]
        self.error(f"unknown argument '{word}'{suggest(word.partition('=')[0], options)}")

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message} (see {self.prog} --help)")
