"""The cache of prepared clouds: round trips, damage, races, full disks."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from pc3d.data.cache import CloudCache
from pc3d.errors import InputError
from pc3d.points import Points


def cloud(count: int = 50) -> Points:
    generator = torch.Generator().manual_seed(count)
    attrs = {
        "color": torch.rand(count, 3, generator=generator) * 255,
        "segment": torch.randint(-1, 5, (count,), generator=generator),
        "flag": torch.rand(count, generator=generator) > 0.5,
        "odd/name é": torch.rand(count, generator=generator, dtype=torch.float64),
        "nothing": torch.zeros(count, 0),
    }
    meta = {"name": "a", "origin": (7e5, 6e6, 0.5), "tensor": torch.ones(2), "note": {"k": [1, 2]}}
    return Points(torch.rand(count, 3, generator=generator), attrs=attrs, meta=[meta])


def never() -> Points:
    raise AssertionError("the cache should have had this cloud")


def files(cache: CloudCache) -> list[Path]:
    return sorted(path for path in cache.folder.rglob("*.npy"))


def test_round_trip(tmp_path: Path) -> None:
    cache, original = CloudCache(tmp_path), cloud()
    assert cache.cloud(("k", 1), lambda: original) is original
    for reader in (cache, CloudCache(tmp_path)):
        copy = reader.cloud(("k", 1), never)
        assert torch.equal(copy.coord, original.coord)
        assert list(copy.attrs) == list(original.attrs)
        for name, value in original.attrs.items():
            assert copy.attrs[name].dtype == value.dtype
            assert torch.equal(copy.attrs[name], value)
        assert copy.meta == [{"name": "a", "origin": (7e5, 6e6, 0.5), "note": {"k": [1, 2]}}]


def test_clouds_without_points_and_with_one(tmp_path: Path) -> None:
    for count in (0, 1):
        cache = CloudCache(tmp_path / str(count))
        cache.cloud(("k",), lambda count=count: cloud(count))
        assert cache.cloud(("k",), never).num_points == count


def test_keys_tell_entries_apart(tmp_path: Path) -> None:
    cache = CloudCache(tmp_path)
    cache.cloud(("a", 1), lambda: cloud(3))
    cache.cloud(("a", 2), lambda: cloud(4))
    assert cache.has("a", 1)
    assert not cache.has("a", 3)
    assert [cache.cloud(("a", i), never).num_points for i in (1, 2)] == [3, 4]


def test_another_version_of_the_package_builds_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CloudCache(tmp_path).cloud(("k",), lambda: cloud(3))
    monkeypatch.setattr("pc3d.__version__", "999")
    assert CloudCache(tmp_path).cloud(("k",), lambda: cloud(5)).num_points == 5


def test_changing_a_cloud_in_place_does_not_reach_the_disk(tmp_path: Path) -> None:
    cache = CloudCache(tmp_path)
    cache.cloud(("k",), cloud)
    first = cache.cloud(("k",), never)
    first.coord += 100
    assert torch.equal(CloudCache(tmp_path).cloud(("k",), never).coord, cloud().coord)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "empty manifest", "no manifest", "garbage", "pickle"])
def test_a_damaged_entry_is_built_again(tmp_path: Path, damage: str) -> None:
    cache = CloudCache(tmp_path)
    cache.cloud(("k",), cloud)
    victim = cache.entry("k") / "color.npy"
    manifest = cache.entry("k") / "manifest.json"
    if damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:-40])
    elif damage == "flip":
        data = bytearray(victim.read_bytes())
        data[-7] ^= 1
        victim.write_bytes(bytes(data))
    elif damage == "remove":
        victim.unlink()
    elif damage == "garbage":
        victim.write_bytes(b"not an array")
    elif damage == "pickle":
        np.save(victim, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text("")
    again = CloudCache(tmp_path)
    assert torch.equal(again.cloud(("k",), cloud).attrs["color"], cloud().attrs["color"])
    assert torch.equal(CloudCache(tmp_path).cloud(("k",), never).attrs["color"], cloud().attrs["color"])


def test_a_writer_that_dies_leaves_no_entry(tmp_path: Path) -> None:
    cache = CloudCache(tmp_path)
    with pytest.raises(InputError):
        cache.cloud(("k",), lambda: (_ for _ in ()).throw(InputError("bad file")))
    assert not cache.has("k")
    assert files(cache) == []


def test_two_writers_at_once(tmp_path: Path) -> None:
    """The second one finds the entry there when it wants to rename its own."""
    first, second = CloudCache(tmp_path), CloudCache(tmp_path)

    def slow() -> Points:
        first.cloud(("k",), cloud)
        return cloud()

    assert second.cloud(("k",), slow).num_points == 50
    assert [path.name for path in tmp_path.iterdir()] == [first.entry("k").name]
    assert second.cloud(("k",), never).num_points == 50


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_full_disk_is_a_warning_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("pc3d.data.cache.np.save", full)
    cache = CloudCache(tmp_path)
    with pytest.warns(
        UserWarning, match=rf"cache {tmp_path}: cannot be written \({os.strerror(code)}\); going on without"
    ):
        assert cache.cloud(("k",), cloud).num_points == 50
    assert list(tmp_path.iterdir()) == []
    assert cache.cloud(("k",), cloud).num_points == 50


def test_a_really_full_disk(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", small], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        with pytest.warns(UserWarning, match=r"cannot be written \(.*(No space|requested and)"):
            assert CloudCache(small).cloud(("k",), lambda: cloud(50_000)).num_points == 50_000
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_values(tmp_path: Path) -> None:
    cache = CloudCache(tmp_path)
    assert cache.value(("v",), lambda: {"a": (1, 2)}) == {"a": [1, 2]}
    assert cache.value(("v",), never) == {"a": [1, 2]}
    (cache.entry("v") / "value.json").write_text("{")
    assert cache.value(("v",), lambda: 7) == 7
    assert json.loads((cache.entry("v") / "value.json").read_text()) == 7


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PC3D_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert CloudCache.default_folder() == tmp_path / "pc3d"
    monkeypatch.setenv("PC3D_CACHE_DIR", str(tmp_path / "mine"))
    assert CloudCache.default_folder() == tmp_path / "mine"
