"""A folder of prepared clouds: one ``.npy`` per attribute, memory-mapped, written once by whoever comes first."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch

import pc3d
from pc3d.io.numpy_arrays import load_npy
from pc3d.points import Points

FORMAT = 1
_MANIFEST = "manifest.json"


class CloudCache:
    """Clouds and small values kept on disk between runs.

    An entry is a folder named by a hash of its key; it is written under a temporary name and renamed when complete, so
    readers never see half of one and several processes may write at once. An entry that is damaged is built again. If
    the disk is full or read-only the cloud is handed out uncached, with one warning.

    Args:
        folder: where entries live; may be deleted at any time.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._checked: set[Path] = set()
        self._writable = True

    @staticmethod
    def default_folder() -> Path:
        """``$PC3D_CACHE_DIR``, else ``$XDG_CACHE_HOME/pc3d``, else ``~/.cache/pc3d``."""
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(os.environ.get("PC3D_CACHE_DIR") or Path(base) / "pc3d")

    def entry(self, *key: Any) -> Path:
        """Folder of the entry of ``key`` (plain values), for this version of the package."""
        text = json.dumps([FORMAT, pc3d.__version__, key], sort_keys=True, default=str)
        return self.folder / hashlib.sha256(text.encode()).hexdigest()[:24]

    def cloud(self, key: tuple[Any, ...], build: Callable[[], Points]) -> Points:
        """The cloud of ``key``, memory-mapped; ``build()`` makes it if the cache does not have it.

        The arrays are copy-on-write: changing them in place changes nothing on disk. Of ``meta`` only what JSON can
        hold comes back (plus ``origin`` as a tuple).
        """
        path = self.entry(*key)
        cached = self._read(path)
        if cached is not None:
            return cached
        cloud = build()
        self._write(path, lambda folder: _write_cloud(folder, cloud))
        return cloud

    def value(self, key: tuple[Any, ...], build: Callable[[], Any]) -> Any:
        """A value that JSON can hold, like :meth:`cloud`."""
        path = self.entry(*key) / "value.json"
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            shutil.rmtree(path.parent, ignore_errors=True)
            value = json.loads(json.dumps(build()))
            self._write(path.parent, lambda folder: (folder / path.name).write_text(json.dumps(value)))
            return value

    def has(self, *key: Any) -> bool:
        """Whether a complete entry of ``key`` is there."""
        return (self.entry(*key) / _MANIFEST).exists()

    def _read(self, path: Path) -> Points | None:
        if not path.exists():
            return None
        try:
            manifest = json.loads((path / _MANIFEST).read_text())
            arrays = {name: _read_array(_array_path(path, name), entry) for name, entry in manifest["arrays"].items()}
            if path not in self._checked:
                _check_sums(arrays, manifest["arrays"])
                self._checked.add(path)
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            return Points(tensors.pop("coord"), attrs=tensors, meta=[_restore_meta(manifest["meta"])])
        except (OSError, ValueError, KeyError, TypeError):
            shutil.rmtree(path, ignore_errors=True)  # damaged: make room for a new one
            return None

    def _write(self, path: Path, fill: Callable[[Path], Any]) -> None:
        if not self._writable:
            return
        temporary = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=self.folder))
            fill(temporary)
            temporary.rename(path)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                return  # another process was first: its entry is as good
            self._writable = False
            warnings.warn(
                f"cache {self.folder}: cannot be written ({error.strerror or error}); going on without it (slower)",
                stacklevel=2,
            )
        finally:
            if temporary is not None and temporary.exists():
                shutil.rmtree(temporary, ignore_errors=True)


def _write_cloud(folder: Path, cloud: Points) -> None:
    arrays = {name: tensor.contiguous().numpy() for name, tensor in {"coord": cloud.coord, **cloud.attrs}.items()}
    for name, array in arrays.items():
        np.save(_array_path(folder, name), array)
    sums = {
        name: {"shape": list(a.shape), "dtype": a.dtype.str, "crc": zlib.crc32(a.data)} for name, a in arrays.items()
    }
    (folder / _MANIFEST).write_text(json.dumps({"arrays": sums, "meta": _plain_meta(cloud.meta[0])}))


def _array_path(folder: Path, name: str) -> Path:
    return folder / f"{quote(name, safe='')}.npy"  # attributes keep the names of their files, whatever they are


def _read_array(path: Path, entry: dict[str, Any]) -> np.ndarray:
    shape = tuple(entry["shape"])
    if 0 in shape:
        return np.zeros(shape, entry["dtype"])  # nothing to map
    array = load_npy(path, "c")
    if array.shape != shape or array.dtype.str != entry["dtype"]:
        raise ValueError(f"{path.name} does not fit its manifest")
    return array


def _check_sums(arrays: dict[str, np.ndarray], entries: dict[str, Any]) -> None:
    for name, array in arrays.items():
        if zlib.crc32(np.ascontiguousarray(array).data) != entries[name]["crc"]:
            raise ValueError(f"{name} is damaged")


def _plain_meta(meta: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in meta.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            continue  # reader-specific objects stay with the file itself
        kept[name] = value
    return kept


def _restore_meta(meta: dict[str, Any]) -> dict[str, Any]:
    return {**meta, "origin": tuple(meta["origin"])} if "origin" in meta else meta
