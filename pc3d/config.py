"""Objects that know the config they were built from: the basis of checkpoint cards and of saved pipelines."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from pathlib import Path
from typing import Any

from pc3d.errors import InputError

_PLAIN = (str, int, float, bool, type(None))


class Configurable:
    """Mixin: records the arguments of ``__init__`` so that an object can be written as ``class_path``/``init_args``.

    Arguments may be plain values, paths, (nested) sequences and mappings of them, and other ``Configurable`` objects.
    They are recorded by name, defaults included (a default that changes in a later version must not change what was
    built before); nothing has to be written in a subclass. A dataclass is recorded by its fields.
    """

    _init_args: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" not in cls.__dict__:
            return
        original = cls.__init__
        signature = inspect.signature(original)

        @functools.wraps(original)
        def recording(self: Any, *args: Any, **kw: Any) -> None:
            if type(self) is cls or "_init_args" not in self.__dict__:
                bound = signature.bind(self, *args, **kw)
                bound.apply_defaults()
                arguments = dict(bound.arguments)
                arguments.pop(next(iter(signature.parameters)))
                for name, parameter in signature.parameters.items():
                    if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                        arguments.update(arguments.pop(name, {}))
                    elif parameter.kind is inspect.Parameter.VAR_POSITIONAL and not arguments.get(name):
                        arguments.pop(name, None)
                object.__setattr__(self, "_init_args", arguments)
            original(self, *args, **kw)

        cls.__init__ = recording  # type: ignore[method-assign]

    def to_config(self) -> dict[str, Any]:
        """``{"class_path": ..., "init_args": {...}}`` of plain values, as :func:`instantiate` reads it."""
        if dataclasses.is_dataclass(self):
            given = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.init}
        else:
            given = self.__dict__.get("_init_args", {})
        arguments = {name: _plain(value) for name, value in given.items()}
        return {"class_path": class_path(type(self)), "init_args": arguments}


def class_path(cls: type) -> str:
    """Importable dotted name of a class; the shortest one (``pc3d.models.SparseUNet``) where a package exports it."""
    parts = cls.__module__.split(".")
    for end in range(1, len(parts) + 1):
        try:
            module = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        if getattr(module, cls.__qualname__, None) is cls:
            return f"{module.__name__}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def instantiate(config: dict[str, Any], allow: tuple[str, ...] = ("pc3d.",)) -> Any:
    """Build the object that a ``class_path``/``init_args`` mapping describes, nested ones first.

    Args:
        config: as written by :meth:`Configurable.to_config`.
        allow: prefixes of class paths that may be imported. A config inside a checkpoint is a stranger's text: only the
            package's own :class:`Configurable` classes are built from it unless the caller allows more.

    Raises:
        InputError: if a class path is not allowed, does not exist or does not take the arguments.
    """
    path = config["class_path"]
    if not path.startswith(allow):
        raise InputError(
            f"class_path '{path}' is not one of this package ({', '.join(allow)}*): pass --allow_classes to trust it"
        )
    module_name, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"class_path '{path}' cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Configurable)):
        raise InputError(f"class_path '{path}' is not a configurable class")
    arguments = {key: _build(value, allow) for key, value in config.get("init_args", {}).items()}
    try:
        return cls(**arguments)
    except TypeError as error:
        raise InputError(f"{path}: {error}") from error


def _build(value: Any, allow: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        if "class_path" in value:
            return instantiate(value, allow)
        return {key: _build(item, allow) for key, item in value.items()}
    if isinstance(value, list):
        return [_build(item, allow) for item in value]
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Configurable):
        return value.to_config()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise TypeError(f"a value of type {type(value).__name__} cannot be written to a config: {value!r}")
