"""Pickle files of other people's tools, read without running anything in them."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from pc3d.errors import InputError

_PLAIN = {
    ("builtins", name) for name in ("list", "dict", "tuple", "set", "str", "int", "float", "bool", "bytes", "complex")
} | {
    (f"numpy{core}.multiarray", name) for core in (".core", "._core") for name in ("_reconstruct", "scalar")
} | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}  # fmt: skip


class _ForeignNameError(Exception):
    """A pickle asks for something that is no plain value."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return super().find_class(module, name)
        raise _ForeignNameError(f"{module}.{name}")


def read_pickle(path: Path) -> Any:
    """What a pickle holds, if these are plain values and numpy arrays.

    Raises:
        InputError: if it is missing or damaged, or holds anything else.
    """
    try:
        return _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except _ForeignNameError as error:
        raise InputError(f"{path}: holds more than plain values and arrays ({error}): it is not read") from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise InputError(f"{path}: not a readable pickle ({type(error).__name__}): is the file complete?") from error
