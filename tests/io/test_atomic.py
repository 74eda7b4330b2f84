import os
import signal

import pytest
import torch

from pc3d import InputError, Points
from pc3d.io import atomic_write, write


def test_replaces_the_file_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "new" / "scan.ply"
    for text in ("one", "two"):
        with atomic_write(target) as temporary:
            assert temporary.parent == target.parent
            assert temporary.suffix == ".ply"
            temporary.write_text(text)
        assert target.read_text() == text
    assert os.listdir(target.parent) == ["scan.ply"]


def write_half(target, error):
    with atomic_write(target) as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_failure_keeps_the_old_file_and_its_own_error(tmp_path, error):
    target = tmp_path / "scan.ply"
    target.write_text("old")
    with pytest.raises(type(error)):
        write_half(target, error)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["scan.ply"]


def test_full_disk_is_one_line(tmp_path):
    target = tmp_path / "scan.ply"
    target.write_text("old")
    with (
        pytest.raises(InputError, match=r"scan\.ply: cannot be written: No space left on device$"),
        atomic_write(target),
    ):
        raise OSError(28, "No space left on device")
    assert target.read_text() == "old"


def test_folder_in_place_of_the_file(tmp_path):
    with pytest.raises(InputError, match="it is a folder"), atomic_write(tmp_path):
        pytest.fail("must not start")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), atomic_write(tmp_path / "file" / "x.ply"):
        pytest.fail("must not start")


@pytest.fixture
def small_disk():
    """No file can grow beyond 4 kB: every writer fails half way, as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("suffix", ["ply", "pcd", "laz", "las", "npz", "npy", "bin", "txt"])
def test_a_real_write_error_leaves_the_old_file(tmp_path, small_disk, suffix):
    if suffix in ("las", "laz"):
        pytest.importorskip("lazrs")
        pytest.importorskip("laspy")
    target = tmp_path / f"scan.{suffix}"
    target.write_text("old")
    with pytest.raises(InputError) as caught:
        write(target, Points(torch.rand(20000, 3)))
    assert str(caught.value).startswith(f"{target}: cannot be written: ")
    assert "\n" not in str(caught.value)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == [target.name]
