"""Last step of ``make setup``: the pinned torch is still the one installed, and the C++ kernels load."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version
from pathlib import Path


def main() -> int:
    pins = (Path(__file__).resolve().parent.parent / "constraints.txt").read_text()
    match = re.search(r"^torch==(\S+)", pins, re.MULTILINE)
    wanted = match.group(1) if match else ""
    found = version("torch").split("+")[0]
    if found != wanted:
        print(f"setup: installing pc3d changed torch to {found}; constraints.txt pins {wanted}", file=sys.stderr)
        return 1
    from pc3d import _C

    print(f"setup: pc3d {version('pc3d')} with torch {version('torch')} and C++ kernels ({Path(_C.__file__).name})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
