"""Failures that have a cause the user can change, each as one line."""

from __future__ import annotations

import errno
import os

from pc3d.errors import InputError


def explain(error: BaseException) -> str | None:
    """One line that says what is wrong; None for an error of the program itself (which deserves its traceback)."""
    for cause in _chain(error):
        if isinstance(cause, InputError):
            return one_line(str(cause))
        if _disk_full(cause):
            where = getattr(cause, "filename", None)
            return f"{where or 'output'}: the disk is full: free some space, or choose another --run_dir or -o"
        if isinstance(cause, OSError) and cause.filename is not None and cause.strerror:
            return f"{cause.filename}: {cause.strerror}"
        if type(cause).__name__ == "MisconfigurationException":  # the trainer's: named, not imported, to start fast
            return f"trainer: {one_line(str(cause))}"
        if _out_of_memory(cause):
            return "out of memory: use smaller clouds (crop, --tile), a smaller batch_size, or a larger grid_size"
    return None


def one_line(text: str) -> str:
    return " ".join(text.split())


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from."""
    chain, current = [], error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__  # type: ignore[assignment]
    return chain


def _disk_full(error: BaseException) -> bool:
    """Libraries in other languages report it in words only."""
    number = error.errno if isinstance(error, OSError) else None
    return number in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)


def _out_of_memory(error: BaseException) -> bool:
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )
