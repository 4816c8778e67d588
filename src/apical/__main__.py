"""`python -m apical` is the command `apical`."""

import sys

from apical.cli import main

if __name__ == "__main__":
    sys.exit(main())
