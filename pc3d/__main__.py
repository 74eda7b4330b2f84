"""``python -m pc3d``: the command line."""

import sys

from pc3d.cli import main

if __name__ == "__main__":
    sys.exit(main())
