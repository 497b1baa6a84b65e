"""`python -m retina_seg` is the command `retina-seg`."""

import sys

from retina_seg.cli import main

if __name__ == "__main__":
    sys.exit(main())
