"""Time the kernels beside their peers; ``tools/bench.py --help``."""

import sys
from pathlib import Path

sys.path.pop(0)  # tools/: its profile.py would hide the standard library's
sys.path.append(str(Path(__file__).resolve().parent.parent))  # without an installed pc3d, the one beside

from pc3d.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
