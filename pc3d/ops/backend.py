"""Which implementation of an op runs: C++ on the CPU, Triton on a GPU where an op has it, plain PyTorch otherwise.

This is the one documented dispatch setting of the package: :func:`use_backend` (or ``PC3D_BACKEND=reference``) forces
the plain-PyTorch path, which every kernel is tested against. ``triton`` sends CPU tensors to the Triton kernels, in
Triton's interpreter (set ``TRITON_INTERPRET=1`` before anything imports Triton): for tests, it is very slow. ``spconv``
leaves sparse convolution to the package of that name.
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

Backend = Literal["auto", "reference", "triton", "spconv"]
_IS_BUILT = find_spec("pc3d._C") is not None


def _named(name: str) -> Backend:
    if name not in get_args(Backend):
        raise ValueError(f"backend {name!r}: choose from {', '.join(get_args(Backend))}")
    return cast(Backend, name)


_choice = _named(os.environ.get("PC3D_BACKEND", "auto"))


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
    if _choice == "reference" or any(t.device.type != "cpu" for t in tensors):
        return None
    kernels = _load()
    if kernels is not None:
        kernels.set_num_threads(torch.get_num_threads())
    return kernels


def on_triton(*tensors: torch.Tensor) -> bool:
    """Whether the Triton kernels of an op are to serve ``tensors``."""
    if _choice == "reference" or not _is_installed("triton"):
        return False
    wanted = "cpu" if _choice == "triton" else "cuda"
    return all(t.device.type in ("cuda", wanted) for t in tensors)


def on_package(name: str, *tensors: torch.Tensor) -> bool:
    """Whether an optional CUDA package is installed and to serve ``tensors``."""
    return _choice == "auto" and all(t.device.type == "cuda" for t in tensors) and _is_installed(name)


def on_spconv(*tensors: torch.Tensor) -> bool:
    """Whether the package spconv is to convolve ``tensors``: when chosen, and on a GPU without Triton."""
    if _choice == "spconv":
        return True
    return not _is_installed("triton") and on_package("spconv", *tensors)


@cache
def _is_installed(name: str) -> bool:
    return find_spec(name) is not None


def on_cpu_kernels(*tensors: torch.Tensor) -> bool:
    """Whether the C++ extension is to serve ``tensors``; unlike :func:`cpu_kernels`, torch.compile can trace it."""
    return _IS_BUILT and _choice == "auto" and all(t.device.type == "cpu" for t in tensors)


@contextlib.contextmanager
def use_backend(choice: Backend) -> Iterator[None]:
    """Inside a block, use the plain-PyTorch reference of every op (``"reference"``) or the fastest one (``"auto"``)."""
    global _choice
    before, _choice = _choice, _named(choice)
    try:
        yield
    finally:
        _choice = before
