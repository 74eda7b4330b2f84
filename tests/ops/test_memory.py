"""Large blocks that the kernels keep for their next call: bounded, and given back at the end of a thread."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pc3d.ops.backend import cpu_kernels

_PROBE = """
import threading
import time
from pathlib import Path
import torch
from pc3d.ops.neighbours import nearest_rows

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

def work():
    for points in (60_000, 200_000, 400_000, 700_000, 1_100_000):  # none fits into the blocks of another
        nearest_rows(torch.rand(points, 3), torch.tensor([0, points]), 8)

torch.set_num_threads(1)
nearest_rows(torch.rand(1000, 3), torch.tensor([0, 1000]), 8)
before = resident()
work()
print(resident() - before)
before = resident()
for _ in range(3):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
time.sleep(1)  # the thread of the operating system ends after that of Python
print(resident() - before)
"""


@pytest.mark.skipif(cpu_kernels() is None or sys.platform != "linux", reason="needs the C++ kernels, and /proc")
def test_blocks_kept_by_a_thread_are_few_and_go_with_it() -> None:
    words = [sys.executable, "-c", _PROBE]
    found = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    kept, after_threads = map(float, found.stdout.split())
    assert kept < 64 + 16  # MiB; and what torch and malloc keep
    assert after_threads < 64
