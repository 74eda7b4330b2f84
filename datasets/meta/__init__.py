"""Facts of published data sets: classes, label codes, splits."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def facts(name: str) -> dict[str, Any]:
    """The facts of ``name.json``."""
    return json.loads((files(__package__) / f"{name}.json").read_text())
