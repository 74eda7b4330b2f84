"""The config parser's many-line messages as one line: the key, what is wrong with it, and the key that was meant."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import re
import typing
from collections.abc import Iterator
from typing import Any

import yaml

from pc3d.cli.errors import one_line
from pc3d.cli.parser import suggest
from pc3d.errors import InputError

_UNKNOWN = (
    re.compile(r"unrecognized arguments: --?(?P<key>[\w.]+)"),
    re.compile(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'"),
    re.compile(r"Option '(?P<key>[\w.]+)' is not accepted"),
)
_CLASS = re.compile(r"Problem with given class_path '([\w.]+)'")
_MISSING = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
_FOREIGN = re.compile(r"Import path ([\w.]+) does not correspond to a subclass of (\w+)")
_NO_PATH = re.compile(r"Expected a dot import path string: (.+)")
_NOISE = re.compile(r"^.*Expected a path but .* either not accessible or invalid$", re.MULTILINE)
_EXPECTED = re.compile(r"Expected an? (?P<type>.+?)(?:\. Got value: (?P<value>.*))?$", re.MULTILINE | re.DOTALL)
_AROUND = ("Parser key", "Problem with", "Does not validate", "Subtypes:", "Errors:", "Given value")
"""What lines begin with that tell where a value of several possible types stands."""


@contextlib.contextmanager
def readable_config_errors(parser: Any) -> Iterator[None]:
    """Turn what parsing a config or building its objects raises into an ``InputError`` of one line.

    Raises:
        InputError: in place of parser errors, and of the type and value errors of constructors.
    """
    try:
        yield
    except InputError:
        raise
    except (argparse.ArgumentError, yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise InputError(f"config: {config_message(str(error), parser)}") from error


def config_message(text: str, parser: Any) -> str:
    """One line for one message of the config parser."""
    path = re.findall(r"Parser key \"([\w.]+)\"", text)
    classes = _CLASS.findall(text)
    for pattern in _UNKNOWN:
        if match := pattern.search(text):
            group = match.groupdict().get("group")
            key = ".".join(filter(None, [*path, group, match["key"]]))
            return f"unknown key '{key}'{_meant(key, match['key'], classes, parser)}"
    where = f"{'.'.join(path)}: " if path else ""
    if match := _MISSING.search(text):
        return where + _no_such_name(match[1], match[2])
    if match := _FOREIGN.search(text):
        return f"{where}{match[1]} is no {match[2]}"
    if match := _NO_PATH.search(text):
        return f"{where}expected a class with its module, such as pc3d.models.PTv3, got {match[1]!r}"
    value = _after(text, "Given value: ")
    text = _NOISE.sub("", text)
    if "Union subtypes" in text:
        text, value = _problems(text), value.partition("\n")[0]
    if expected := _EXPECTED.findall(text):
        types = [_type_name(name) for name, _ in expected]
        value = next((value for _, value in expected if value), None) or value
        if re.fullmatch(r"pc3d[\w.]*\.\w+", value) and (wrong := _no_such_name(*value.rsplit(".", 1))):
            return where + wrong  # a class in the place of a list of them
        return f"{where}expected {' or '.join(dict.fromkeys(types))}, got {one_line(value)!r}"
    details = re.sub(r"Parser key \"[\w.]+\":|Problem with given class_path", "", text).strip()
    return where + one_line(details)


def _problems(text: str) -> str:
    """What is wrong with a value of several possible types, line by line.

    That is what a constructor says; if none does, the types that the innermost of nested values may have (what is
    around it may be null too, which is of no interest).
    """
    lines = [(len(line) - len(line.lstrip()), line.strip().removeprefix("- ")) for line in text.splitlines()]
    lines = [(depth, line) for depth, line in lines if line and not line.startswith(_AROUND)]
    said = [line for _, line in lines if not _EXPECTED.match(line)]
    deepest = max((depth for depth, _ in lines), default=0)
    return "\n".join(said or [line for depth, line in lines if depth == deepest])


def _meant(key: str, last: str, classes: list[str], parser: Any) -> str:
    """The suggestion for an unknown key: among the arguments of its class, or among all keys of the parser."""
    if classes:
        *groups, name = last.split(".")
        cls = _class(classes[-1])
        for group in groups:
            cls = typing.get_type_hints(cls.__init__).get(group)
            if not isinstance(cls, type):  # one of several: it depends on the value
                return ""
        options = [option for option in inspect.signature(cls.__init__).parameters if option != "self"]
        return suggest(name, options) or f" ({cls.__name__} has: {', '.join(options)})"
    known = {action.dest for action in parser._actions} | {group for group in ("trainer", "model", "data")}
    depth = key.count(".")
    parts = key.split(".")
    same_depth = {".".join(name.split(".")[: depth + 1]) for name in known if name.count(".") >= depth}
    for end in range(1, depth + 2):  # the first part that no key starts with is the mistyped one
        prefix, names = ".".join(parts[:end]), {".".join(name.split(".")[:end]) for name in known}
        if prefix not in names:
            return suggest(prefix, {name for name in names if name.count(".") == end - 1})
    return suggest(key, same_depth)


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _no_such_name(module: str, name: str) -> str:
    """What is wrong with a class path, empty if nothing is."""
    try:
        public = [known for known in dir(importlib.import_module(module)) if not known.startswith("_")]
    except ImportError:
        return f"there is no module {module}"
    return "" if name in public else f"{module} has no '{name}'{suggest(name, public)}"


def _type_name(text: str) -> str:
    found = re.search(r"<class '(?:[\w.]*\.)?(\w+)'>", text)
    name = found[1] if found else one_line(text).removeprefix("typing.")
    return {
        "NoneType": "null",
        "str": "text",
        "float": "a number",
        "int": "a whole number",
        "bool": "true or false",
    }.get(name, name)


def _after(text: str, marker: str) -> str:
    return text.split(marker, 1)[1].strip() if marker in text else ""
