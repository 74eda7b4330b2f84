"""Files that are either complete or not there: write under a temporary name, then rename."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from pc3d.errors import InputError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; it replaces ``path`` when the block ends without an error.

    The temporary name keeps the suffix, so that writers which choose a format by suffix choose the same one. Missing
    parent folders are made. When the block fails, the temporary file is removed and an older ``path`` stays as it was.

    Raises:
        InputError: if the file cannot be written (full disk, no permission, ``path`` is a folder).
    """
    target = Path(path)
    if target.is_dir():
        raise InputError(f"{target}: cannot be written: it is a folder")
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(4)}.tmp{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        reason = f"{target.parent} is no folder" if target.parent.is_file() else error.strerror or error
        raise InputError(f"{target}: cannot be written: {reason}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def visible_files(folder: Path) -> Iterator[Path]:
    """The files below a folder, without hidden ones and those in hidden folders: what is still being written."""
    for path in folder.rglob("*"):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts) and path.is_file():
            yield path
