"""Which implementation of an op runs: C++ on the CPU, Triton on a GPU where an op has it, plain PyTorch otherwise.

This is the one documented dispatch setting of the package: :func:`use_backend` (or ``PC3D_BACKEND=reference``) forces
the plain-PyTorch path, which every kernel is tested against. ``triton`` sends CPU tensors to the Triton kernels, in
Triton's interpreter (set ``TRITON_INTERPRET=1`` before anything imports Triton): for tests, it is very slow. ``spconv``
leaves sparse convolution to the package of that name; every other op runs as in ``auto``.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Literal, cast, get_args

import torch

from pc3d.errors import InputError

Backend = Literal["auto", "reference", "triton", "spconv"]
_FASTEST = ("auto", "spconv")  # every op but convolution by its fastest path
_IS_BUILT = find_spec("pc3d._C") is not None


# Checked when an op asks for it, so that a wrong name in the environment is one clear error and not a failing import.
_choice: str = os.environ.get("PC3D_BACKEND", "auto")


def _chosen() -> Backend:
    return _checked(_choice)


@cache
def _checked(name: str) -> Backend:
    which = f"backend {name!r} (PC3D_BACKEND, use_backend)"
    if name not in get_args(Backend):
        raise InputError(f"{which} does not exist: choose from {', '.join(get_args(Backend))}")
    if name in ("triton", "spconv") and not _is_installed(name):
        raise InputError(f"{which} needs the package {name}, which is not installed")
    return cast(Backend, name)


@cache
def _load() -> ModuleType | None:
    try:
        return import_module("pc3d._C")
    except ImportError as error:
        message = f"pc3d runs without its C++ kernels (slow): {error}. Reinstall with `pip install .`"
        warnings.warn(message, stacklevel=3)
        return None


def cpu_kernels(*tensors: torch.Tensor) -> ModuleType | None:
    """The C++ extension, ready to run on ``tensors``; None when the reference path must serve them.

    The thread count of the kernels follows ``torch.get_num_threads()`` at every call.
    """
    if _chosen() == "reference" or any(t.device.type != "cpu" for t in tensors):
        return None
    kernels = _load()
    if kernels is not None:
        kernels.set_num_threads(torch.get_num_threads())
    return kernels


def on_triton(*tensors: torch.Tensor) -> bool:
    """Whether the Triton kernels of an op are to serve ``tensors``."""
    if _chosen() == "reference" or not _is_installed("triton"):
        return False
    wanted = "cpu" if _choice == "triton" else "cuda"
    return all(t.device.type in ("cuda", wanted) for t in tensors)


def on_package(name: str, *tensors: torch.Tensor) -> bool:
    """Whether an optional CUDA package is installed and to serve ``tensors``."""
    return _chosen() in _FASTEST and all(t.device.type == "cuda" for t in tensors) and _is_installed(name)


def on_spconv(*tensors: torch.Tensor) -> bool:
    """Whether the package spconv is to convolve ``tensors``: when chosen, and on a GPU without Triton."""
    if _chosen() == "spconv":
        return True
    return not _is_installed("triton") and on_package("spconv", *tensors)


@cache
def _is_installed(name: str) -> bool:
    return find_spec(name) is not None


def on_cpu_kernels(*tensors: torch.Tensor) -> bool:
    """Whether the C++ extension is to serve ``tensors``; unlike :func:`cpu_kernels`, torch.compile can trace it."""
    return _IS_BUILT and _choice in _FASTEST and all(t.device.type == "cpu" for t in tensors)


@contextlib.contextmanager
def use_backend(choice: Backend) -> Iterator[None]:
    """Inside a block, run ops by ``choice``: see the module's text.

    Raises:
        InputError: if there is no such backend, or its package is not installed.
    """
    global _choice
    before, _choice = _choice, _checked(choice)
    try:
        yield
    finally:
        _choice = before
