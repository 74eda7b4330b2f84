"""The one error type for bad input: what is wrong, where, and what to do, in one line."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input from the user (a file, a field, a config value): shown as one line by the command line, exit code 2.

    The message names the file, the field and the value, e.g. ``scan.ply: field 'x' holds 3 non-finite values (first at
    point 17)``.
    """
