"""The entry `python -m placement.sweep`."""

import sys

from placement.sweep.run import main

if __name__ == "__main__":
    sys.exit(main())
