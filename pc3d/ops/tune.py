"""Which block sizes run fastest on this GPU: timed once per problem, remembered on disk."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

WARM_UPS, RUNS = 2, 5
Blocks = tuple[int, ...]
_chosen: dict[str, Blocks] = {}


def fastest(
    key: tuple[object, ...], candidates: Sequence[Blocks], launch: Callable[[Blocks], None], device: torch.device
) -> Blocks:
    """The candidate whose launches take least time, by the median of five after two warm-ups.

    Asked again for the same key (and kind of device), it answers from memory, or from ``tuning.json`` in the cache
    folder of the package. ``PC3D_TUNE=0`` takes the first candidate untimed.
    """
    if os.environ.get("PC3D_TUNE") == "0" or torch.cuda.is_current_stream_capturing():
        return candidates[0]
    name = json.dumps([torch.cuda.get_device_name(device), torch.__version__, *key])
    if name not in _chosen:
        known = _stored().get(name)
        best = tuple(known) if known is not None and tuple(known) in candidates else None
        if best is None:
            best = min(candidates, key=lambda blocks: milliseconds(launch, blocks))
            _store(name, best)
        _chosen[name] = best
    return _chosen[name]


def milliseconds(launch: Callable[[Blocks], None], blocks: Blocks) -> float:
    """Median time of a launch; infinite where the device cannot run it (too little shared memory, for example)."""
    times = []
    try:
        for i in range(WARM_UPS + RUNS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            launch(blocks)
            end.record()
            end.synchronize()
            if i >= WARM_UPS:
                times.append(start.elapsed_time(end))
    except Exception:  # whatever the compiler says: another candidate will do
        return float("inf")
    return sorted(times)[len(times) // 2]


def _path() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PC3D_CACHE_DIR") or Path(base) / "pc3d") / "tuning.json"


@cache
def _stored() -> dict[str, list[int]]:
    try:
        return json.loads(_path().read_text())
    except (OSError, ValueError):
        return {}


def _store(name: str, best: Blocks) -> None:
    """Add an entry; another process's entries may be lost, they are timed again."""
    stored = _stored()
    stored[name] = list(best)
    with contextlib.suppress(OSError):
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".json")
        with os.fdopen(handle, "w") as file:
            json.dump(stored, file, indent=1)
        os.replace(temporary, path)
